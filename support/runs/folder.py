"""The folder of a run: its files, its lock, and how to resume a run in it."""

import hashlib
import itertools
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import tiktoken
import torch
from tqdm import tqdm

from data import SPLITS, Text
from support.errors import BadInput
from support.files import locked, read_json, write_json, write_lines
from support.pretrained.base import Base
from support.runs.checkpoint import damaged, load_checkpoint, save_checkpoint
from support.runs.code import code_digest
from support.runs.command_line import parse_all
from support.runs.flags import flags, refuse
from support.runs.settings import Settings, one_per_user, plain

FORMAT = 6  # of config.json
FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "page.html")


# --- config.json ---


def config_of(settings: Settings, base: Base, texts: list[Text]) -> dict:
    """The settings, text and code of a run."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tiktoken": tiktoken.__version__,
    }
    return {
        "format": FORMAT,
        "settings": plain(settings) | {"resume": False},
        "hyper": settings.hyper,
        "base": describe_base(base),
        "texts": describe_texts(texts),
        "code": code_digest(settings.method),
        "versions": versions,
        "threads": torch.get_num_threads(),
    }


def describe_base(base: Base) -> dict:
    return {"name": base.name, "sha256": base.sha256, "tokenizer": base.tokenizer}


def describe_texts(texts: list[Text]) -> list[list[str]]:
    """Each user's name, and a digest of its splits."""
    described = []
    for text in texts:
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(getattr(text, split).tobytes() + b"|")
        described.append([text.name, digest.hexdigest()])
    return described


def read_config(path: Path) -> dict:
    """A config.json. Raises BadInput."""
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise damaged(path, f"not format {FORMAT}")
    return config


def runs_of_other_code(configs: list[dict]) -> int:
    """The number of runs that were made by different code."""
    return sum(
        config.get("code") != code_digest(config["settings"]["method"]) for config in configs
    )


INPUTS = (
    "data",
    "user_field",
    "text_field",
    "short_users",
    "target",
    "train_kb",
    "valid_kb",
    "tokenizer",
    "users",
    "init_from",
    "block_size",
)  # the settings that name text and base


def inputs_differ(configs: list[dict]) -> bool:
    """Whether runs with the same settings had different text or a different base."""
    contents = {}
    for config in configs:
        names = str([config["settings"].get(name) for name in INPUTS])
        content = [config["texts"], config["base"]]
        if contents.setdefault(names, content) != content:
            return True
    return False


# --- the folder ---


class Folder:
    """The folder of one run. While this object exists, no other process can work in it."""

    def __init__(self, settings: Settings, config: dict):
        """Make the folder, or empty it with `overwrite`, and write config.json; or resume in it.

        Raises BadInput.
        """
        self.config = config
        self.metrics = []  # the lines of metrics.jsonl
        self.path = Path(settings.out or new_folder(settings))
        old_files = [self.path / name for name in FILES if (self.path / name).exists()]
        if old_files and not settings.overwrite and not settings.resume:
            refuse(
                "out",
                str(self.path),
                "holds a run",
                "use another folder, `overwrite` to delete it, or `resume` to continue it",
            )
        try:
            self.lock = locked(self.path)
            if not settings.resume:
                for file in old_files:
                    file.unlink()
                write_json(self.path / "config.json", config)
        except BlockingIOError:
            refuse(
                "out", str(self.path), "another process works in it", "wait, or use another folder"
            )
        except OSError as error:
            refuse("out", str(self.path), error.strerror, "use another folder")

    def log(self, lines: list[dict]) -> None:
        """Add lines to metrics.jsonl."""
        self.metrics += lines
        write_lines(self.path / "metrics.jsonl", self.metrics)

    def save(self, state: dict) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.path, state | {"metrics": self.metrics})

    def load(self) -> dict | None:
        """The state to continue from; None if there is no checkpoint yet.

        Lines of metrics that are newer than the checkpoint are dropped. Raises BadInput.
        """
        if (self.path / "result.json").exists():
            raise BadInput(
                f"`resume`: the run in {self.path} has ended; `overwrite` starts a new one"
            )
        begun = read_config(self.path / "config.json")
        for key, setting in (("base", "init_from"), ("texts", "data"), ("hyper", "method")):
            if begun[key] != self.config[key]:
                raise BadInput(
                    f"`{setting}`: has changed since the run in {self.path} began; restore it, or "
                    "start again with `overwrite`"
                )
        state = load_checkpoint(self.path, begun["settings"]["device"])
        self.metrics = [] if state is None else state["metrics"]
        self.log([])
        return state

    def finish(self, result: dict) -> None:
        """Write result.json."""
        write_json(self.path / "result.json", result)


def new_folder(settings: Settings) -> str:
    """A new folder under out/, named after the run; if the name is taken, -2, -3, ... is added."""
    text = Path(settings.data).resolve().name
    name = f"out/{settings.method}-{text}-{settings.users}users-seed{settings.seed}"
    if not os.path.exists(name):
        return name
    for number in itertools.count(2):
        if not os.path.exists(f"{name}-{number}"):
            return f"{name}-{number}"


# --- continuing a run ---


def settings_of(arguments: list[str] | None) -> Settings:
    """The settings of a command line. With --resume, those of the run in --out. Raises BadInput."""
    given = parse_all(arguments, Settings)
    if not given.get("resume"):
        return Settings(**given)
    if "out" not in given:
        raise BadInput("`resume`: needs the folder of the run; add `out`")
    path = Path(given["out"], "config.json")
    if not path.exists():
        remedy = "use another folder, or leave `resume` out"
        raise BadInput(f"`out` {given['out']}: holds no run to continue; {remedy}")
    saved = read_config(path)["settings"]
    refuse_changes(given, saved)
    return Settings(**saved | {"overwrite": False} | given)


def refuse_changes(given: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise BadInput if a flag differs from that of the run to continue."""
    for name, value in given.items():
        if name in ("resume", "out", "overwrite"):
            continue
        if flags(Settings)[name].many:
            value = list(one_per_user(name, value, saved["users"]))
        if value != saved[name]:
            refuse(
                name,
                given[name],
                f"the run in {given['out']} has {saved[name]}",
                "leave it out, or start again with `overwrite`",
            )


@contextmanager
def stop_after_round(path: Path) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request to stop after the round; a second one stops at once.

    Yields a function that reports whether to stop.
    """
    requests = []

    def request(*_) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(True)
        message = "stopping at the end of this round; press Ctrl-C again to stop at once"
        tqdm.write(message, file=sys.stderr)

    old_handler = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: bool(requests)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: python train.py --resume --out {path}") from None
    finally:
        signal.signal(signal.SIGINT, old_handler)
