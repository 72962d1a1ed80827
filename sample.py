"""Generate text with the models of a run, or write the report on its experts.

    python sample.py --run out/NAME --user english --prompt "The "
    python sample.py --run out/NAME --user all --prompt "The "
    python sample.py --run out/NAME --html page.html

If a run hasn't ended, its last checkpoint is used.
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
from support.runs.checkpoint import TrainedUser, load_checkpoint, restore_model
from support.runs.command_line import parsed, run_command
from support.runs.flags import check_values, setting
from support.runs.folder import describe_texts, read_config
from support.runs.settings import Settings
from support.runs.start import starting_point
from support.sampling import stream


@dataclass
class Sampling:
    """Show text or the report of a run's models. Raises BadInput."""

    run: str = setting("out", "folder of the run")
    user: str | None = setting(
        None, "the user whose model writes, or all (default: the first user)"
    )
    prompt: str | None = setting(
        None, "the beginning of the text (default: the start of a document)", empty=True
    )
    tokens: int = setting(300, "tokens to generate", int, low=1)
    temperature: float = setting(
        0.8, "0: always the most likely token; 1: the model's probabilities", float, low=0
    )
    top_k: int = setting(40, "sample from this many of the most likely tokens", int, low=1)
    seed: int = setting(0, "the seed of the sampling", int, low=0, high=2**63)
    html: str | None = setting(None, "write the report to this file instead of printing text")

    def __post_init__(self):
        check_values(self)


@dataclass
class OpenedRun:
    """A run's settings, models and texts."""

    folder: Path
    settings: Settings
    users: dict[str, TrainedUser]  # by name; pooled methods have a single one
    tokenizer: tiktoken.Encoding

    @cached_property
    def texts(self) -> dict[str, Text]:
        """Each user's text, by name. Raises BadInput if it has changed since the run."""
        texts = data.load(self.settings.data_config, self.tokenizer)
        if describe_texts(texts) != read_config(self.folder / "config.json")["texts"]:
            raise BadInput(
                f"`run` {self.folder}: the text of {self.settings.data} has changed; restore it"
            )
        return {text.name: text for text in texts}

    @property
    def readers(self) -> list[tuple[TrainedUser, Text]]:
        """Each text with the user that is evaluated on it."""
        texts = list(self.texts.values())
        users = list(self.users.values())
        if len(users) == 1:
            return [(users[0], text) for text in texts]
        return list(zip(users, texts, strict=True))

    def perplexity(self, user: TrainedUser, tokens: np.ndarray) -> float:
        """Perplexity of a user's model on a text (n,), such as run.texts["anna"].test."""
        windows = page.windows(tokens, user.model)
        loss, _ = evaluate(user.model, windows, user.fixed_gates)
        return math.exp(loss)


def open_run(folder: str | Path) -> OpenedRun:
    """Open the last checkpoint of a run. Raises BadInput.

    run = open_run("out/NAME")
    print(run.perplexity(run.users["anna"], run.texts["bert"].test))
    """
    folder = Path(folder)
    state = load_checkpoint(folder)
    if state is None:
        refuse_folder(folder)
    settings = Settings(**state["settings"] | {"resume": False, "overwrite": False})
    dtype = state["users"][0]["config"]["dtype"]  # the one that the run used on its machine
    base = starting_point(replace(settings, dtype=dtype))
    if base.sha256 != state["base"]["sha256"]:
        raise BadInput(
            f"`run` {folder}: {base.name} is no longer the file that the run started "
            "from; restore it"
        )
    users = {}
    for saved in state["users"]:
        model = GPT(GPTConfig(**saved["config"]), torch.Generator(), base.tensors)
        restore_model(model, saved)
        users[saved["name"]] = TrainedUser(saved["name"], model, saved["fixed_gates"])
    return OpenedRun(folder, settings, users, base.encoding)


def refuse_folder(folder: Path) -> None:
    """Raise BadInput with the names of the runs in a folder."""
    runs = sorted(str(path.parent) for path in folder.glob("*/checkpoint.pt"))
    example = f", such as {', '.join(runs)}" if runs else ""
    raise BadInput(f"`run` {folder}: holds no checkpoint.pt; expected the folder of a run{example}")


def generated(user: TrainedUser, sampling: Sampling, tokenizer: tiktoken.Encoding) -> Iterator[str]:
    """Yield the prompt, then the text of each new token."""
    prompt = sampling.prompt or ""
    tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]
    new_tokens = stream(
        user.model,
        torch.tensor([tokens]),
        sampling.tokens,
        temperature=sampling.temperature,
        top_k=min(sampling.top_k, tokenizer.n_vocab),
        vocabulary=tokenizer.n_vocab,
        generator=torch.Generator().manual_seed(sampling.seed),
        fixed_gates=user.fixed_gates,
    )
    yield prompt
    yield from page.decode((token.item() for token in new_tokens), tokenizer, end="\n\n")


def write_report(run: OpenedRun, path: Path) -> None:
    """Write the page. Raises BadInput."""
    if path.is_dir():
        raise BadInput(f"`html` {path}: is a folder; expected a file")
    users = [user for user, _ in run.readers]
    texts = [text for _, text in run.readers]
    try:
        page.of_run(run.folder, path, run.settings.title, texts, users, run.tokenizer)
    except (OSError, ValueError) as error:
        raise BadInput(f"`html` {path}: {error}; pass another file, or check the run") from None
    print(f"report: {path}")


def show(sampling: Sampling) -> None:
    """Print text, or write the report. Raises BadInput."""
    run = open_run(sampling.run)
    if sampling.user not in (None, "all", *run.users):
        names = ", ".join(run.users)
        raise BadInput(f"`user` {sampling.user}: not in this run; expected all, or one of {names}")
    if sampling.html is not None:
        write_report(run, Path(sampling.html))
        return
    if sampling.user == "all":
        for name, user in run.users.items():
            print(f"{name}:")
            write(generated(user, sampling, run.tokenizer))
            print()
        return
    name = sampling.user or next(iter(run.users))
    write(generated(run.users[name], sampling, run.tokenizer))


def write(parts: Iterator[str]) -> None:
    """Print text as it is generated."""
    for part in parts:
        print(part, end="", flush=True)
    print()


def main(arguments: list[str] | None = None) -> int:
    def work() -> None:
        show(parsed(arguments, Sampling))

    return run_command("sample.py", work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
