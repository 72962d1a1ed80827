"""A small dense base, trained on public text, so that fine-tuning can be tried without a download.

    python -m lab.pretrain
    python train.py --init-from out/base/base.pt --expert lora --users 4 --specialists 1,2,4,8

The text is that of Python's standard library and numpy, which no user holds (support/text/corpora.py).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
from bilevel import Level, cosine, evaluate
from model import GENERALIST, GPT, GPTConfig
from support.errors import BadInput
from support.files import write
from support.pretrained import gpt2 as pretrained
from support.runs.measuring import DIVERGED
from support.runs.command_line import parsed, run_command
from support.runs.flags import setting
from support.runs.settings import Training
from support.runs.start import blank, check_device
from support.text.trigram import trigram_loss


@dataclass
class Pretraining(Training):
    """Train a small base. Raises BadInput."""

    steps: int = setting(8000, "training steps", int, low=1)
    out: str = setting("out/base", "folder for base.pt")


def pretrain(settings: Pretraining) -> None:
    """Train, write base.pt and print how good it is. Raises BadInput."""
    path = Path(settings.out, "base.pt")
    if path.exists() and not settings.overwrite:
        raise BadInput(f"`out` {settings.out}: holds a base; take another folder, or `overwrite` to replace it")
    check_device(settings.device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"`out` {settings.out}: {error.strerror}; take another folder") from None
    start = blank(settings, "bytes")
    text = data.load_pretraining(settings.block_size, start.encoding)
    config = GPTConfig(**start.config, specialists=0, routed=False)  # one expert: a plain GPT
    model = GPT(config, data.seeded(settings.seed, "base", "weights")).to(settings.device)
    if settings.compile:
        model.compile()
    windows = data.RandomWindows([text.train], [data.seeded(settings.seed, "base", "train")], settings.batch_size,
                                 settings.block_size, settings.device)
    level = Level(model.having(GENERALIST), windows, settings.lr, settings.weight_decay,
                  cosine(settings.steps, min(settings.warmup, settings.steps // 5)))
    with tqdm(range(settings.steps), unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            loss = level.step(model)
            if step % 50 == 0:
                bar.set_description(f"loss {loss:.2f}")
    loss, _ = evaluate(model, data.ordered_windows(text.test, settings.block_size, settings.device))
    if not loss < DIVERGED:
        raise BadInput(f"`lr` {settings.lr}: the loss has grown to {loss:.3g}; take a smaller one")
    tensors = {GPT.plain_name(name): parameter for name, parameter in model.named_parameters()}
    content = pretrained.pack(tensors, config.n_head, config.feed_forward, start.tokenizer)
    write(path, lambda file: torch.save(content, file))
    print(f"{path}: {loss / math.log(2):.3f} bits per byte of held-out text, where a trigram needs "
          f"{trigram_loss(text.train, text.test, config.vocab_size) / math.log(2):.3f}")


def main(arguments: list[str] | None = None) -> int:
    return run_command("lab.pretrain", lambda: pretrain(parsed(arguments, Pretraining)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
