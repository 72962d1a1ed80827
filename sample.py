"""Text from the models of a run, and a page that shows which expert each token was given to.

    python sample.py --run out/NAME --user english --prompt "The "
    python sample.py --run out/NAME --user all --prompt "The "
    python sample.py --run out/NAME --html page.html

A run that is still going, or was cut off, shows its newest checkpoint.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import tiktoken
import torch

import base
import data
import page
import runs
import train
from corpora import BadInput
from model import GPT, GPTConfig
from settings import Settings, check, parse_settings, setting, status_of


@dataclass
class Sampling:
    """What to show of a run. Raises BadInput."""

    run: str | None = setting(None, "folder of the run")
    user: str | None = setting(None, "whose model; all: everyone's, side by side; default: the first user's")
    prompt: str | None = setting(None, "how the text begins; default: as a document does")
    tokens: int = setting(300, "tokens to make", int, low=1)
    temperature: float = setting(0.8, "0 takes the likeliest token, 1 samples as the model says", float, low=0)
    top_k: int = setting(40, "only the likeliest tokens, so many, are sampled from", int, low=1)
    seed: int = setting(0, "of the sampling", int, low=0, high=2 ** 63)
    html: str | None = setting(None, "write the page to this file, and no text")

    def __post_init__(self):
        if self.run is None:
            raise BadInput("--run: missing; give the folder of a run")
        check(self)


def load(run: Path) -> tuple[dict, list[tuple[str, GPT]]]:
    """The checkpoint of a run, and its users' models, as they are used, by name. Raises BadInput."""
    try:
        state = runs.newest(run)
        if state is None:
            raise BadInput(f"--run {run}: holds no checkpoint.pt; give the folder of a run")
        known, models = state["base"], []
        start = None if known["name"] == "scratch" else base.load(
            known["name"], state["users"][0]["config"]["block_size"])
        if start and start.sha256 != known["sha256"]:
            raise ValueError(f"{known['name']}: isn't the file any more that the run started from")
        for user in state["users"]:
            model = GPT(GPTConfig(**user["config"]), torch.Generator(), start and start.tensors)
            runs.restore_model(user, model)
            models.append((user["name"], model))
        return state, models
    except BadInput:
        raise
    except Exception as error:  # a foreign file can fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"--run {run}: its models can't be read ({reason}); check the run and its base") from None


def continued(model: GPT, sampling: Sampling, encoding: tiktoken.Encoding) -> Iterator[str]:
    """The prompt, and then the text of each new token."""
    prompt = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(sampling.prompt or "")]])
    new = model.stream(prompt, sampling.tokens, sampling.temperature, min(sampling.top_k, encoding.n_vocab),
                       torch.Generator().manual_seed(sampling.seed), vocabulary=encoding.n_vocab)
    yield sampling.prompt or ""
    yield from page.decode((token.item() for token in new), encoding, end="\n\n")


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Texts in columns under their names; where there is no room for that, below each other."""
    column = width // len(texts) - 3
    if column < 16:
        return "\n\n".join(f"{name}:\n{text}" for name, text in texts.items())
    columns = [[name, "", *(part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""])]
               for name, text in texts.items()]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" │ ".join(cell[:column].ljust(column) for cell in row).rstrip() for row in rows)


def show_page(run: Path, state: dict, models: list[GPT], encoding: tiktoken.Encoding, path: Path) -> None:
    """Raises BadInput."""
    settings = Settings(**state["settings"] | {"device": "cpu", "plot": False, "tensorboard": False, "resume": False})
    texts = train.load_texts(settings, state["base"]["tokenizer"])
    models = models * (len(texts) // len(models))  # one for all, where text was pooled
    try:
        page.of_run(run, path, settings.title, texts, models, encoding)
    except (OSError, ValueError) as error:
        raise BadInput(f"--html {path}: {error}; give another file, or check the run") from None
    print(path)


def show(sampling: Sampling) -> None:
    """Raises BadInput."""
    run = Path(sampling.run)
    state, models = load(run)
    encoding, named = data.tokenizer(state["base"]["tokenizer"]), dict(models)
    if sampling.user not in (None, "all", *named):
        raise BadInput(f"--user {sampling.user}: not in this run; give all, or one of {', '.join(named)}")
    if sampling.html:
        show_page(run, state, list(named.values()), encoding, Path(sampling.html))
    elif sampling.user == "all":
        texts = {name: "".join(continued(model, sampling, encoding)) for name, model in models}
        print(side_by_side(texts, shutil.get_terminal_size().columns))
    else:
        for new in continued(named[sampling.user or models[0][0]], sampling, encoding):
            print(new, end="", flush=True)
        print()


def main(arguments: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="replace")
    return status_of("sample.py", lambda: show(parse_settings(arguments, Sampling)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
