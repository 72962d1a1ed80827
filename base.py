"""A pretrained GPT to start from: OpenAI's GPT-2 by name, or a file with tensors under GPT-2's names.

    python -c "import base; print(base.load('gpt2').config)"

A file is what torch.save made of such tensors (.bin, .pt; `pack` says what pretrain.py adds to them) or a .safetensors
file. None of them is trusted: only tensors and plain values are read, no code in a file is ever run.
"""

import hashlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
PREFIX = "transformer."  # before every name, where the whole GPT2LMHeadModel was saved
REMEDY = "give a file of tensors under Hugging Face's GPT-2 names"
UNUSED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks, and the head, which is wte again


@dataclass
class Base:
    """A pretrained GPT. Tensors are frozen, and matrices are (n_out, n_in), as nn.Linear has them."""

    name: str  # or path
    sha256: str  # of the file
    tensors: dict[str, nn.Parameter]  # under GPT-2's names
    config: dict[str, int | str]  # fields of model.GPTConfig
    tokenizer: str | None  # None: the file doesn't say


def shapes(V: int, T: int, L: int, C: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GPT-2 file -> its shape. Matrices inside layers are (n_in, n_out) there."""
    layer = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
             "ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    parts = {f"h.{i}.{name}": shape for i in range(L) for name, shape in layer.items()} | {"ln_f": (C,)}
    return {"wte.weight": (V, C), "wpe.weight": (T, C),
            **{f"{name}.weight": shape for name, shape in parts.items()},
            **{f"{name}.bias": shape[-1:] for name, shape in parts.items()}}


def turn(name: str, tensor: Tensor) -> Tensor:
    """From a file's orientation to nn.Linear's, and back."""
    return tensor.t().contiguous() if name.startswith("h.") and tensor.ndim == 2 else tensor


def pack(tensors: dict[str, Tensor], n_head: int, gelu: str, tokenizer: str) -> dict:
    """What to torch.save of a pretrained GPT, its tensors under GPT-2's names. `load` reads it."""
    return {"model": {name: turn(name, tensor.detach()).cpu() for name, tensor in tensors.items()},
            "config": {"n_head": n_head, "gelu": gelu}, "tokenizer": tokenizer}


def load(name_or_file: str | Path, block_size: int | None = None, n_head: int | None = None) -> Base:
    """Read a pretrained GPT, which is downloaded if it has to be. Positions behind `block_size` are cut off.

    Where a file doesn't say how many heads there are, there are `n_head`, or they have 64 channels each, as in every
    GPT-2. Raises ValueError, one line with the remedy, where there is no such model.
    """
    path, content = fetch(name_or_file) if name_or_file in NAMES else read(Path(name_or_file))
    ours = isinstance(content, dict) and {"model", "config", "tokenizer"} <= content.keys()
    known = content if ours else {"model": content, "config": {"gelu": "tanh"}, "tokenizer": None}
    try:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in known["model"].items()}
        (V, C), T = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
        wanted = shapes(V, T, sum(name.endswith("ln_1.weight") for name in tensors), C)
        odd = [name for name in sorted(wanted.keys() | tensors.keys()) if not name.endswith(UNUSED) and (
            name not in tensors or tensors[name].shape != wanted.get(name) or not tensors[name].isfinite().all())]
        if not odd and not torch.equal(tensors.get("lm_head.weight", tensors["wte.weight"]), tensors["wte.weight"]):
            odd = ["lm_head.weight"]
        heads, gelu, tokenizer = known["config"].get("n_head"), known["config"]["gelu"], known["tokenizer"]
        sound = type(heads) in (int, type(None)) and gelu in ("none", "tanh") and tokenizer in (None, "bytes", "gpt2")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: holds no GPT-2; {REMEDY}") from None
    if odd or not sound:
        what = f"{odd[0]} is missing, not finite or of another shape" if odd else "its config is no GPT-2's"
        raise ValueError(f"{path}: holds no GPT-2: {what}; {REMEDY}")
    if heads and n_head not in (None, heads):
        raise ValueError(f"{path}: was trained with {heads} heads, not {n_head}; leave --n-head (n_head) to the file")
    heads = heads or n_head or C // 64
    if heads < 1 or C % heads:
        raise ValueError(f"{path}: {C} channels can't be {heads or 'of 64 each, its'} heads; give --n-head (n_head)")
    if block_size and block_size > T:
        raise ValueError(f"{path}: has {T} positions, not {block_size}; take a smaller --block-size (block_size)")
    T = block_size or T
    tensors["wpe.weight"] = tensors["wpe.weight"][:T]
    frozen = {name: nn.Parameter(turn(name, tensors.pop(name).float()), False) for name in wanted}
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    config = dict(vocab_size=V, block_size=T, n_layer=len(wanted) // 12, n_head=heads, n_embd=C, gelu=gelu)
    return Base(str(name_or_file), sha256, frozen, config, tokenizer)


def fetch(name: str) -> tuple[Path, object]:
    """One of OpenAI's: where it's kept, and what is in it."""
    file = f"{name}-pytorch_model.bin"  # they are all called pytorch_model.bin there
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        return path, torch.hub.load_state_dict_from_url(URL.format(name), map_location="cpu", file_name=file,
                                                        weights_only=True)
    except (OSError, HTTPException) as error:
        raise ValueError(f"{name}: can't be downloaded ({error}); connect once, or give a file") from None
    except Exception as error:  # a broken file can fail in any way
        raise ValueError(f"{path}: can't be read ({type(error).__name__}); delete it to download it again") from None


def read(path: Path) -> tuple[Path, object]:
    """A file: where it is, and what is in it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; make one with pretrain.py, or give one of {', '.join(NAMES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return path, load_file(path)
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path}: needs a library that isn't here; pip install safetensors, or give a .bin") from None
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(f"{path}: can't be read as tensors ({type(error).__name__}); {REMEDY}") from None
