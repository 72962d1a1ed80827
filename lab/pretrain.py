"""Pretrain a small dense base on public text, to try fine-tuning without a download.

    python -m lab.pretrain
    python train.py --init-from out/base/base.pt --expert lora --users 4 --specialists 1,2,4,8

The text is the source code of Python's standard library and numpy, which no user has.
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
from support.pretrained.gpt2 import pack
from support.runs.command_line import parsed, run_command
from support.runs.evaluation import DIVERGED
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
    """Train, write base.pt and print its bits per byte. Raises BadInput."""
    path = Path(settings.out, "base.pt")
    if path.exists() and not settings.overwrite:
        raise BadInput(
            f"`out` {settings.out}: holds a base; pass another folder, or `overwrite` to replace it"
        )
    check_device(settings.device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"`out` {settings.out}: {error.strerror}; pass another folder") from None
    start = blank(settings, "bytes")
    text = data.load_pretraining(settings.block_size, start.encoding)

    config = GPTConfig(**start.config, specialists=0, routed=False)  # one expert: a dense GPT
    model = GPT(config, data.seeded(settings.seed, "base", "weights")).to(settings.device)
    if settings.compile:
        model.compile()
    train(model, text, settings)

    loss, _ = evaluate(model, data.ordered_windows(text.test, settings.block_size, settings.device))
    if not loss < DIVERGED:
        raise BadInput(f"`lr` {settings.lr}: the loss grew to {loss:.3g}; pass a smaller value")
    content = pack(model, start.tokenizer)
    write(path, lambda file: torch.save(content, file))
    bits = loss / math.log(2)
    trigram_bits = trigram_loss(text.train, text.test, config.vocab_size) / math.log(2)
    print(
        f"{path}: {bits:.3f} bits per byte of held-out text; "
        f"a trigram model needs {trigram_bits:.3f}"
    )


def train(model: GPT, text: data.Text, settings: Pretraining) -> None:
    """Take all steps on random windows of the training text, with a cosine learning rate."""
    windows = data.RandomWindows(
        [text.train],
        [data.seeded(settings.seed, "base", "train")],
        settings.batch_size,
        settings.block_size,
        settings.device,
    )
    warmup = min(settings.warmup, settings.steps // 5)
    schedule = cosine(settings.steps, warmup)
    level = Level(model.having(GENERALIST), windows, settings.lr, settings.weight_decay, schedule)
    with tqdm(range(settings.steps), unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            loss = level.step(model)
            if step % 50 == 0:
                bar.set_description(f"loss {loss:.2f}")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""

    def work() -> None:
        pretrain(parsed(arguments, Pretraining))

    return run_command("lab.pretrain", work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
