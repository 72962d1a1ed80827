"""Where the models of a run start: from scratch, or from a pretrained model."""

from dataclasses import replace

import torch

import data
from support.errors import BadInput
from support.pretrained.base import Base, load
from support.runs.settings import SCRATCH, Settings, Training


def blank(settings: Training, tokenizer: str) -> Base:
    """Where a model from scratch starts: a shape without tensors. Raises BadInput."""
    shape = {name: getattr(settings, name) or default for name, default in SCRATCH.items()}
    if shape["n_embd"] % shape["n_head"]:
        raise BadInput(f"`n_embd` {shape['n_embd']}: not divisible by `n_head` {shape['n_head']}; change one of them")
    encoding = data.tokenizer(tokenizer)
    config = {"vocab_size": encoding.n_vocab, "block_size": settings.block_size, **shape}
    return Base("scratch", "", {}, config, tokenizer, encoding)


def multiplies_bfloat16(device: str) -> bool:
    """Whether it does so faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return device == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def dtype_of(settings: Settings) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    frozen = settings.expert == "lora" and settings.by_others
    return "bfloat16" if frozen and multiplies_bfloat16(settings.device) else "float32"


def starting_point(settings: Settings) -> Base:
    """Where the models start: a pretrained model, or from scratch. Raises BadInput."""
    if settings.init_from == "scratch":
        return blank(settings, settings.tokenizer or "bytes")
    dtype = dtype_of(settings)
    start = load(settings.init_from, settings.block_size, settings.n_head, dtype)
    name = settings.tokenizer or start.tokenizer or "gpt2"
    if start.tokenizer in (None, name):
        encoding = start.encoding or data.tokenizer(name)
        if encoding.n_vocab <= start.config["vocab_size"]:
            return replace(start, tokenizer=name, encoding=encoding, config=start.config | {"dtype": dtype})
    raise BadInput(f"`tokenizer` {name}: not the one that `init_from` {settings.init_from} was trained with; take the "
                   "other")
