"""A pretrained model to start from: SmolLM2 or OpenAI's GPT-2 by name, a Llama's .gguf
(support/pretrained/llama.py), or a file with tensors under GPT-2's names.

    python -c "from support import pretrained; print(pretrained.load('gpt2').config)"

The last is what torch.save made of such tensors (.bin, .pt; `pack` says what lab/pretrain.py adds to them) or a
.safetensors file. None of them is trusted: only tensors and plain values are read, no code in a file is ever run.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path

import tiktoken
import torch
from torch import Tensor, nn

from support.errors import BadInput, optional
from support.pretrained import llama

NAMES = ("smollm2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
PREFIX = "transformer."  # before every name, where the whole GPT2LMHeadModel was saved
REMEDY = "give a file of tensors under Hugging Face's GPT-2 names"
UNUSED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks, and the head, which is wte again


@dataclass
class Base:
    """Where models start: a pretrained model, or, with no tensors, just a shape."""

    name: str  # or path
    sha256: str  # of the file
    tensors: dict[str, nn.Parameter]  # frozen, under the names of model.GPT.plain_name, matrices as nn.Linear has them
    config: dict  # fields of model.GPTConfig
    tokenizer: str | None  # its name, as data.tokenizer knows it; None: the file doesn't say
    encoding: tiktoken.Encoding | None = None  # the tokenizer itself, once it is there


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


def pack(tensors: dict[str, Tensor], n_head: int, feed_forward: str, tokenizer: str) -> dict:
    """What to torch.save of a pretrained GPT, its tensors under the names of a plain GPT. `load` reads it."""
    V, C = tensors["tokens.weight"].shape
    L = sum(name.endswith("attention_norm.weight") for name in tensors)
    named = layout(V, len(tensors["positions.weight"]), L, C)
    return {"model": {named[name][0]: turned(name, tensor.detach()).cpu() for name, tensor in tensors.items()},
            "config": {"n_head": n_head, "feed_forward": feed_forward}, "tokenizer": tokenizer}


def load(name_or_file: str | Path, block_size: int | None = None, n_head: int | None = None, dtype: str = "float32",
         **wanted) -> Base:
    """Read a pretrained model, which is downloaded if it has to be. Positions beyond `block_size` are cut off.

    Where a file doesn't say how many heads there are, there are `n_head`, or they have 64 channels each, as in every
    GPT-2. wanted: fields of model.GPTConfig, of which those that the file decides must agree with it. Raises BadInput.
    """
    name = str(name_or_file)
    start = (llama_of if llama.is_one(name) else gpt2_of)(name, getattr(torch, dtype))
    T, C, H = (start.config[field] for field in ("block_size", "n_embd", "n_head"))
    config = start.config | {"block_size": block_size or T, "n_head": H or n_head or C // 64}
    H, T_used = config["n_head"], config["block_size"]
    for wrong, problem in (
        (n_head not in (None, H), f"was trained with {H} heads, not {n_head}; leave `n_head` out"),
        (H < 1 or C % max(H, 1), f"{C} channels can't be {f'{H} heads' if H else 'heads of 64'}; give `n_head`"),
        (T_used > T, f"has {T} positions, not {block_size}; take a smaller `block_size`"),
        *((wanted.get(field, config[field]) != config[field], f"has {field} {config[field]}, not {wanted.get(field)}; "
           f"leave `{field}` out") for field in ("vocab_size", "n_layer", "n_embd")),
    ):
        if wrong:
            raise BadInput(f"`init_from` {name}: {problem}")
    if "positions.weight" in start.tensors:
        start.tensors["positions.weight"] = nn.Parameter(start.tensors["positions.weight"][:T_used], False)
    return replace(start, config=config)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def llama_of(name: str, dtype: torch.dtype) -> Base:
    """A file that support/pretrained/llama.py reads. Raises BadInput."""
    file = llama.File(name, "init_from")
    config = file.shape()
    return Base(name, sha256_of(file.path), file.tensors(config, dtype), config, name, file.tokenizer())


def gpt2_of(name: str, dtype: torch.dtype) -> Base:
    """A GPT-2. Raises BadInput."""
    path, content = fetch(name) if name in NAMES else read(Path(name))
    ours = isinstance(content, dict) and {"model", "config", "tokenizer"} <= content.keys()
    known = content if ours else {"model": content, "config": {"feed_forward": "gelu-tanh"},
                                 "tokenizer": "gpt2" if name in NAMES else None}
    try:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in known["model"].items()}
        (V, C), T = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
        L = sum(name.endswith("ln_1.weight") for name in tensors)
        shapes = dict(layout(V, T, L, C).values())
        odd = [name for name in sorted(shapes.keys() | tensors.keys()) if not name.endswith(UNUSED) and (
            name not in tensors or tensors[name].shape != shapes.get(name) or not tensors[name].isfinite().all())]
        if not odd and not torch.equal(tensors.get("lm_head.weight", tensors["wte.weight"]), tensors["wte.weight"]):
            odd = ["lm_head.weight"]
        heads, feed_forward = known["config"].get("n_head"), known["config"]["feed_forward"]
        sound = (type(heads) in (int, type(None)) and feed_forward in ("gelu", "gelu-tanh")
                 and known["tokenizer"] in (None, "bytes", "gpt2"))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"`init_from` {path}: holds no GPT-2; {REMEDY}") from None
    if odd or not sound:
        problem = f"{odd[0]} is missing, not finite or of another shape" if odd else "its config is not a GPT-2's"
        raise BadInput(f"`init_from` {path}: holds no GPT-2: {problem}; {REMEDY}")
    frozen = {name: nn.Parameter(turned(name, tensors.pop(theirs).to(dtype)), False)
              for name, (theirs, _) in layout(V, T, L, C).items()}
    config = dict(vocab_size=V, block_size=T, n_layer=L, n_head=heads, n_embd=C, feed_forward=feed_forward)
    return Base(name, sha256_of(path), frozen, config, known["tokenizer"])


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
    load = partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        load = optional("safetensors.torch", f"`init_from` {path}", "pip install safetensors, or give a .bin").load_file
    try:
        return path, load(path)
    except Exception as error:  # a foreign file can fail in any way
        raise BadInput(f"`init_from` {path}: can't be read as tensors ({type(error).__name__}); {REMEDY}") from None
