"""Where the models of a run start: from scratch, or from a pretrained GPT."""

from dataclasses import replace

import data
from support import pretrained
from support.errors import BadInput
from support.pretrained import Base
from support.settings import SCRATCH, Settings, Training


def blank(settings: Training, tokenizer: str) -> Base:
    """Where a model from scratch starts: a shape without tensors. Raises BadInput."""
    shape = {name: getattr(settings, name) or default for name, default in SCRATCH.items()}
    if shape["n_embd"] % shape["n_head"]:
        raise BadInput(f"`n_embd` {shape['n_embd']}: not divisible by `n_head` {shape['n_head']}; change one of them")
    config = {"vocab_size": data.tokenizer(tokenizer).n_vocab, "block_size": settings.block_size, **shape}
    return Base("scratch", "", {}, config, tokenizer)


def starting_point(settings: Settings) -> Base:
    """Where the models start: a pretrained GPT, or from scratch. Raises BadInput."""
    if settings.init_from == "scratch":
        return blank(settings, settings.tokenizer or "bytes")
    start = pretrained.load(settings.init_from, settings.block_size, settings.n_head)
    name = settings.tokenizer or start.tokenizer or "gpt2"
    if name != (start.tokenizer or name) or data.tokenizer(name).n_vocab > start.config["vocab_size"]:
        raise BadInput(f"`tokenizer` {name}: not the one that `init_from` {settings.init_from} was trained with; take "
                       "the other")
    return replace(start, tokenizer=name)
