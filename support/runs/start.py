"""The start of a run's models: from scratch, or from a pretrained base."""

from dataclasses import replace

import torch

import data
from support.errors import BadInput
from support.pretrained.base import Base, load
from support.runs.flags import refuse
from support.runs.settings import SCRATCH, Settings, Training


def starting_point(settings: Settings) -> Base:
    """The base of a run, and its tokenizer. Raises BadInput."""
    if settings.init_from == "scratch":
        return blank(settings, settings.tokenizer or "bytes")
    dtype = dtype_of(settings)
    base = load(settings.init_from, settings.block_size, settings.n_head, dtype)
    name = settings.tokenizer or base.tokenizer or "gpt2"
    if base.tokenizer not in (None, name):
        refuse_tokenizer(settings, name)
    encoding = base.encoding or data.tokenizer(name)
    if encoding.n_vocab > base.config["vocab_size"]:
        refuse_tokenizer(settings, name)
    return replace(base, tokenizer=name, encoding=encoding, config=base.config | {"dtype": dtype})


def refuse_tokenizer(settings: Settings, name: str) -> None:
    """Raises BadInput."""
    refuse(
        "tokenizer",
        name,
        f"not the tokenizer that `init_from` {settings.init_from} was trained with",
        "use the other one",
    )


def blank(settings: Training, tokenizer: str) -> Base:
    """A base without weights, for models from scratch: a shape and a tokenizer. Raises BadInput."""
    shape = {}
    for name, default in SCRATCH.items():
        value = getattr(settings, name)
        shape[name] = default if value is None else value
    if shape["n_embd"] % shape["n_head"] != 0:
        C, H = shape["n_embd"], shape["n_head"]
        raise BadInput(f"`n_embd` {C}: not divisible by `n_head` {H}; change one of them")
    encoding = data.tokenizer(tokenizer)
    config = {"vocab_size": encoding.n_vocab, "block_size": settings.block_size, **shape}
    return Base("scratch", "", {}, config, tokenizer, encoding)


def dtype_of(settings: Settings) -> str:
    """The dtype of frozen weights: for `auto`, bfloat16 on a language model if that is faster."""
    if settings.dtype != "auto":
        return settings.dtype
    frozen = settings.expert == "lora" and settings.starts_from_language_model
    return "bfloat16" if frozen and multiplies_bfloat16(settings.device) else "float32"


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device multiplies matrices faster in bfloat16 than in float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def check_device(device: str) -> None:
    """Raises BadInput."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise BadInput(f"`device` {device}: not available on this machine; use cpu") from None
