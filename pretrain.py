"""A small dense base, trained on public text, so that the fine-tuning path runs offline from start to end.

    python pretrain.py
    python train.py --init-from out/base/base.pt --expert lora --users 4 --specialists 1,2,4,8

The text is that of Python's standard library and numpy, which no user holds (data.public).
"""

import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import base
import data
from bilevel import Level, cosine, evaluate
from data import BadInput
from files import write
from model import GENERALIST, GPT, GPTConfig, gpt2_name
from settings import Pretraining, parse_settings, status_of
from train import DIVERGED, blank


def pretrain(settings: Pretraining) -> Path:
    """Train, write base.pt and print how good it is. Raises BadInput."""
    path = Path(settings.out, "base.pt")
    if path.exists() and not settings.overwrite:
        raise BadInput(f"--out {settings.out}: holds a base; take another folder, or --overwrite to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {settings.out}: {error.strerror}; take another folder") from None
    start, text = blank(settings, "bytes"), data.load_public("bytes", settings.block_size)
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
    loss, _ = evaluate(model, data.ordered_windows(text.test, 64, settings.block_size, settings.device))
    if not loss < DIVERGED:
        raise BadInput(f"--lr {settings.lr}: the loss has grown to {loss:.3g}; take a smaller one")
    tensors = {gpt2_name(name): parameter for name, parameter in model.named_parameters()}
    write(path, lambda file: torch.save(base.pack(tensors, config.n_head, config.gelu, start.tokenizer), file))
    print(f"{path}: {loss / math.log(2):.3f} bits per byte of held-out text, where a trigram needs "
          f"{data.trigram_loss(text.train, text.test, config.vocab_size) / math.log(2):.3f}")
    return path


def main(arguments: list[str] | None = None) -> int:
    return status_of("pretrain.py", lambda: pretrain(parse_settings(arguments, Pretraining)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
