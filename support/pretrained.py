"""A pretrained GPT to start from: OpenAI's GPT-2 by name, or a file with tensors under GPT-2's names.

    python -c "from support import pretrained; print(pretrained.load('gpt2').config)"

A file is what torch.save made of such tensors (.bin, .pt; `pack` says what lab/pretrain.py adds to them) or a
.safetensors file. None of them is trusted: only tensors and plain values are read, no code in a file is ever run.
"""

import hashlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from support.errors import BadInput

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
PREFIX = "transformer."  # before every name, where the whole GPT2LMHeadModel was saved
REMEDY = "give a file of tensors under Hugging Face's GPT-2 names"
UNUSED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks, and the head, which is wte again


@dataclass
class Base:
    """Where models start: a pretrained GPT, or, with no tensors, just a shape."""

    name: str  # or path
    sha256: str  # of the file
    tensors: dict[str, nn.Parameter]  # frozen, under the names of model.GPT.plain_name, matrices as nn.Linear has them
    config: dict[str, int | str]  # fields of model.GPTConfig
    tokenizer: str | None  # None: the file doesn't say


def layout(V: int, T: int, L: int, C: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor's name in our plain GPT -> its name in a GPT-2 file, and its shape there, where the matrices inside
    layers are (n_in, n_out)."""
    layer = {"attention_norm": ("ln_1", (C,)), "attention.qkv": ("attn.c_attn", (C, 3 * C)),
             "attention.out": ("attn.c_proj", (C, C)), "moe_norm": ("ln_2", (C,)),
             "moe.up": ("mlp.c_fc", (C, 4 * C)), "moe.down": ("mlp.c_proj", (4 * C, C))}
    parts = {f"blocks.{i}.{ours}": (f"h.{i}.{theirs}", shape) for i in range(L)
             for ours, (theirs, shape) in layer.items()} | {"norm": ("ln_f", (C,))}
    return {"tokens.weight": ("wte.weight", (V, C)), "positions.weight": ("wpe.weight", (T, C)),
            **{f"{ours}.weight": (f"{theirs}.weight", shape) for ours, (theirs, shape) in parts.items()},
            **{f"{ours}.bias": (f"{theirs}.bias", shape[-1:]) for ours, (theirs, shape) in parts.items()}}


def turned(name: str, tensor: Tensor) -> Tensor:
    """From nn.Linear's orientation to a file's, and back; by our name."""
    return tensor.t().contiguous() if name.startswith("blocks.") and tensor.ndim == 2 else tensor


def pack(tensors: dict[str, Tensor], n_head: int, gelu: str, tokenizer: str) -> dict:
    """What to torch.save of a pretrained GPT, its tensors under the names of a plain GPT. `load` reads it."""
    V, C = tensors["tokens.weight"].shape
    L = sum(name.endswith("attention_norm.weight") for name in tensors)
    named = layout(V, len(tensors["positions.weight"]), L, C)
    return {"model": {named[name][0]: turned(name, tensor.detach()).cpu() for name, tensor in tensors.items()},
            "config": {"n_head": n_head, "gelu": gelu}, "tokenizer": tokenizer}


def load(name_or_file: str | Path, block_size: int | None = None, n_head: int | None = None, **wanted) -> Base:
    """Read a pretrained GPT, which is downloaded if it has to be. Positions beyond `block_size` are cut off.

    Where a file doesn't say how many heads there are, there are `n_head`, or they have 64 channels each, as in every
    GPT-2. wanted: fields of model.GPTConfig, of which those that the file decides must agree with it. Raises BadInput.
    """
    path, content = fetch(name_or_file) if name_or_file in NAMES else read(Path(name_or_file))
    ours = isinstance(content, dict) and {"model", "config", "tokenizer"} <= content.keys()
    known = content if ours else {"model": content, "config": {"gelu": "tanh"}, "tokenizer": None}
    try:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in known["model"].items()}
        (V, C), T = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
        L = sum(name.endswith("ln_1.weight") for name in tensors)
        shapes = dict(layout(V, T, L, C).values())
        odd = [name for name in sorted(shapes.keys() | tensors.keys()) if not name.endswith(UNUSED) and (
            name not in tensors or tensors[name].shape != shapes.get(name) or not tensors[name].isfinite().all())]
        if not odd and not torch.equal(tensors.get("lm_head.weight", tensors["wte.weight"]), tensors["wte.weight"]):
            odd = ["lm_head.weight"]
        heads, gelu, tokenizer = known["config"].get("n_head"), known["config"]["gelu"], known["tokenizer"]
        sound = type(heads) in (int, type(None)) and gelu in ("none", "tanh") and tokenizer in (None, "bytes", "gpt2")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"`init_from` {path}: holds no GPT-2; {REMEDY}") from None
    if odd or not sound:
        problem = f"{odd[0]} is missing, not finite or of another shape" if odd else "its config is not a GPT-2's"
        raise BadInput(f"`init_from` {path}: holds no GPT-2: {problem}; {REMEDY}")
    config = dict(vocab_size=V, block_size=block_size or T, n_layer=L, n_head=heads or n_head or C // 64, n_embd=C)
    H = config["n_head"]
    for wrong, problem in (
        (n_head not in (None, H), f"was trained with {H} heads, not {n_head}; leave `n_head` out"),
        (H < 1 or C % max(H, 1), f"{C} channels can't be {f'{H} heads' if H else 'heads of 64'}; give `n_head`"),
        (config["block_size"] > T, f"has {T} positions, not {block_size}; take a smaller `block_size`"),
        *((wanted.get(name, config[name]) != config[name], f"has {name} {config[name]}, not {wanted.get(name)}; leave "
           f"`{name}` out") for name in ("vocab_size", "n_layer", "n_embd")),
    ):
        if wrong:
            raise BadInput(f"`init_from` {path}: {problem}")
    tensors["wpe.weight"] = tensors["wpe.weight"][:config["block_size"]]
    frozen = {name: nn.Parameter(turned(name, tensors.pop(theirs).float()), False)
              for name, (theirs, _) in layout(V, T, L, C).items()}
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Base(str(name_or_file), sha256, frozen, config | {"gelu": gelu}, tokenizer)


def fetch(name: str) -> tuple[Path, object]:
    """One of OpenAI's: where it's kept, and what is in it."""
    file = f"{name}-pytorch_model.bin"  # they are all called pytorch_model.bin there
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        return path, torch.hub.load_state_dict_from_url(URL.format(name), map_location="cpu", file_name=file,
                                                        weights_only=True)
    except (OSError, HTTPException) as error:
        raise BadInput(f"`init_from` {name}: can't be downloaded ({error}); connect to the network once, or give a "
                       "file") from None
    except Exception as error:  # a broken file can fail in any way
        raise BadInput(f"`init_from` {path}: can't be read ({type(error).__name__}); delete it to download it "
                       "again") from None


def read(path: Path) -> tuple[Path, object]:
    """A file: where it is, and what is in it."""
    if not path.is_file():
        raise BadInput(f"`init_from` {path}: no such file; make one with python -m lab.pretrain, or give one of "
                       f"{', '.join(NAMES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return path, load_file(path)
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise BadInput(f"`init_from` {path}: needs a library that isn't here; pip install safetensors, or give a "
                       ".bin") from None
    except Exception as error:  # a foreign file can fail in any way
        raise BadInput(f"`init_from` {path}: can't be read as tensors ({type(error).__name__}); {REMEDY}") from None
