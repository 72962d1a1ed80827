"""A pretrained model to start from: SmolLM2 or GPT-2 by name, or a file.

    python -c "from support.pretrained.base import load; print(load('smollm2').config)"

A file is a Llama's .gguf (llama.py) or a .bin, .pt or .safetensors with GPT-2's tensors (gpt2.py).
No file is trusted: only tensors and plain values are read, no code in a file is run, and every
tensor's name, shape and numbers are checked.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import nn

from support.errors import BadInput
from support.pretrained import gpt2
from support.pretrained.gguf_file import SMOLLM2, is_gguf
from support.pretrained.gpt2 import GPT2File
from support.pretrained.llama import LlamaFile

NAMES = (SMOLLM2, *gpt2.NAMES)


@dataclass
class Base:
    """The start of a run's models: a pretrained model, or only a shape, without tensors."""

    name: str  # or path
    sha256: str  # of the file
    tensors: dict[str, nn.Parameter]  # frozen, by the names of model.GPT.plain_name
    config: dict  # fields of model.GPTConfig
    tokenizer: str | None  # its name for data.tokenizer; None: not in the file
    encoding: tiktoken.Encoding | None = None  # the tokenizer itself, once it is loaded


def load(
    name_or_file: str | Path,
    block_size: int | None = None,
    n_head: int | None = None,
    dtype: str = "float32",
    **fields,
) -> Base:
    """Read a pretrained model. GPT-2 is downloaded when it is first used.

    block_size: positions to use, at most the file's (default: all).
    n_head: attention heads, if they aren't in the file (default: of 64 channels, as in GPT-2).
    dtype: of the tensors.
    fields: other fields of model.GPTConfig. Those that are in the file must agree with it.
    Raises BadInput.
    """
    name = str(name_or_file)
    file = LlamaFile(name) if is_gguf(name) else GPT2File(name)
    config = file.config
    channels = config["n_embd"]
    if config["n_head"] is None:
        config["n_head"] = n_head or channels // 64
    elif n_head is not None:
        fields["n_head"] = n_head
    heads = config["n_head"]
    if heads < 1 or channels % heads != 0:
        raise BadInput(
            f"`init_from` {name}: {channels} channels can't be split into {heads} heads"
            "; pass another `n_head`"
        )
    for field, value in fields.items():
        if field in config and value != config[field]:
            raise BadInput(
                f"`init_from` {name}: has {field} {config[field]}, not {value}; leave `{field}` out"
            )
    n_positions = config["block_size"]
    if block_size is None:
        block_size = n_positions
    if block_size > n_positions:
        raise BadInput(
            f"`init_from` {name}: has {n_positions} positions, not {block_size}; "
            "pass a smaller `block_size`"
        )
    config["block_size"] = block_size

    tensors = read_parameters(file, getattr(torch, dtype))
    if "position_embedding.weight" in tensors:
        positions = tensors["position_embedding.weight"][:block_size]
        tensors["position_embedding.weight"] = nn.Parameter(positions, requires_grad=False)
    return Base(name, sha256_of(file.path), tensors, config, file.tokenizer, file.encoding)


def read_parameters(file: GPT2File | LlamaFile, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Read, check and convert a file's tensors: our names -> frozen parameters. Raises BadInput."""
    parameters = {}
    unexpected = set(file.tensors)
    for ours, shapes in file.sources.items():
        parts = []
        for name, shape in shapes.items():
            if name not in file.tensors:
                raise file.bad(f"{name} is missing")
            unexpected.remove(name)
            tensor = file.read(name)
            if tensor.shape != shape:
                raise file.bad(f"{name} has the shape {list(tensor.shape)}, not {list(shape)}")
            if not tensor.isfinite().all():
                raise file.bad(f"{name} holds numbers that are not finite")
            parts.append(tensor.to(dtype))
        parameters[ours] = nn.Parameter(torch.cat(parts), requires_grad=False)
    if unexpected:
        raise file.bad(f"{min(unexpected)!r} is unexpected")
    return parameters


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
