"""Text from the models of a run, and a page that shows which expert each token was given to.

    python sample.py --run out/NAME --user english --prompt "The "
    python sample.py --run out/NAME --user all --prompt "The "
    python sample.py --run out/NAME --html page.html

A run that hasn't ended shows its newest checkpoint.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import torch

import data
from bilevel import evaluate
from data import Text
from model import GPT, GPTConfig
from support.errors import BadInput
from support.report import page
from support.runs import folder
from support.runs.folder import Learned
from support.runs.command_line import parsed, run_command
from support.runs.flags import check_values, setting
from support.runs.settings import Settings
from support.runs.start import starting_point
from support.sampling import stream


@dataclass
class Sampling:
    """Show what a run's models learned. Raises BadInput."""

    run: str = setting("out", "folder of the run")
    user: str | None = setting(None, "whose model; all: everyone's, one after the other (default: the first user's)")
    prompt: str | None = setting(None, "how the text begins (default: the start of a document)", empty=True)
    tokens: int = setting(300, "tokens to generate", int, low=1)
    temperature: float = setting(0.8, "0 takes the likeliest token, 1 samples as the model says", float, low=0)
    top_k: int = setting(40, "sample from this many of the likeliest tokens", int, low=1)
    seed: int = setting(0, "the seed of the sampling", int, low=0, high=2 ** 63)
    html: str | None = setting(None, "write the page to this file instead of printing text")

    def __post_init__(self):
        check_values(self)


@dataclass
class Opened:
    """A run as `open_run` finds it."""

    folder: Path
    settings: Settings
    users: dict[str, Learned]  # models by user, or one for everyone
    encoding: tiktoken.Encoding  # the tokenizer

    @cached_property
    def texts(self) -> dict[str, Text]:
        """Each user's text, by name. Raises BadInput where it has changed since the run."""
        texts = data.load(self.settings, self.encoding)
        if folder.described(texts) != folder.json_of(self.folder / "config.json")["texts"]:
            raise BadInput(f"`run` {self.folder}: its text, {self.settings.data}, has changed; restore it")
        return {text.name: text for text in texts}

    @property
    def readers(self) -> list[tuple[Learned, Text]]:
        """Who was tested on which text."""
        users = list(self.users.values())
        return list(zip(users * (len(self.texts) // len(users)), self.texts.values(), strict=True))

    def perplexity(self, user: Learned, tokens: np.ndarray) -> float:
        """Of a user's model on a whole text (n,), such as run.texts["anna"].test."""
        return math.exp(evaluate(user.model, page.windows(tokens, user.model), user.gates)[0])


def open_run(path: str | Path) -> Opened:
    """The users' models of a run's newest checkpoint, its settings and its text. Raises BadInput.

    run = open_run("out/NAME")
    print(run.perplexity(run.users["anna"], run.texts["bert"].test))
    """
    path = Path(path)
    state = folder.newest(path)
    if state is None:
        runs = ", ".join(sorted(str(found.parent) for found in path.glob("*/checkpoint.pt")))
        raise BadInput(f"`run` {path}: holds no checkpoint.pt; give the folder of a run{runs and f', such as {runs}'}")
    settings, users = Settings(**state["settings"] | {"resume": False, "overwrite": False}), {}
    start = starting_point(replace(settings, dtype=state["users"][0]["config"]["dtype"]))
    if start.sha256 != state["base"]["sha256"]:
        raise BadInput(f"`run` {path}: {start.name} is no longer the file that it started from; restore it")
    for saved in state["users"]:
        model = GPT(GPTConfig(**saved["config"]), torch.Generator(), start.tensors)
        folder.restore_model(saved, model)
        users[saved["name"]] = Learned(saved["name"], model, saved["gates"])
    return Opened(path, settings, users, start.encoding)


def continued(user: Learned, sampling: Sampling, tokenizer: tiktoken.Encoding) -> Iterator[str]:
    """The prompt, and then the text of each new token."""
    prompt = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(sampling.prompt or "")]])
    new = stream(user.model, prompt, sampling.tokens, sampling.temperature, min(sampling.top_k, tokenizer.n_vocab),
                 torch.Generator().manual_seed(sampling.seed), vocabulary=tokenizer.n_vocab, gates=user.gates)
    yield sampling.prompt or ""
    yield from page.decode((token.item() for token in new), tokenizer, end="\n\n")


def show_page(run: Opened, path: Path) -> None:
    """Raises BadInput."""
    users, texts = zip(*run.readers, strict=True)
    if path.is_dir():
        raise BadInput(f"`html` {path}: is a folder; give a file")
    try:
        page.of_run(run.folder, path, run.settings.title, texts, users, run.encoding)
    except (OSError, ValueError) as error:
        raise BadInput(f"`html` {path}: {error}; give another file, or check the run") from None
    print(path)


def show(sampling: Sampling) -> None:
    """Raises BadInput."""
    run = open_run(sampling.run)
    if sampling.user not in (None, "all", *run.users):
        raise BadInput(f"`user` {sampling.user}: not in this run; give all, or one of {', '.join(run.users)}")
    if sampling.html:
        show_page(run, Path(sampling.html))
    elif sampling.user == "all":
        print("\n\n".join(f"{name}:\n{''.join(continued(user, sampling, run.encoding))}"
                          for name, user in run.users.items()))
    else:
        for new in continued(run.users[sampling.user or next(iter(run.users))], sampling, run.encoding):
            print(new, end="", flush=True)
        print()


def main(arguments: list[str] | None = None) -> int:
    return run_command("sample.py", lambda: show(parsed(arguments, Sampling)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
