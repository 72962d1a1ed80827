"""A run's folder: who may work in it, and its checkpoints, from which a run continues bit for bit.

A checkpoint is written under another name, brought to the disk and then renamed, and the one before it is kept until
the next. torch.save writes a zip archive with a checksum for each part, so a damaged one is recognised.
"""

import ast
import hashlib
import itertools
import json
import os
import platform
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy
import tiktoken
import torch
from tqdm import tqdm

from data import SPLITS, Text
from federated import User
from model import GPT
from support.errors import BadInput
from support.files import locked, on_disk, read_json, write, write_json, write_text
from support.pretrained.base import Base
from support.runs.settings import GROUPS, NO_MEMORY, Settings, given_in, plain, refuse, refuse_rest

FORMAT = 5  # of config.json and checkpoints
DECIDING = ("model", "bilevel", "federated", "methods", "data", "support/kernels")  # code whose digest is kept
FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "previous.pt", "result.json", "page.html")


def config_of(settings: Settings, start: Base, texts: list[Text]) -> dict:
    """What a run was made with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                "tiktoken": tiktoken.__version__}
    return {"format": FORMAT, "settings": plain(settings) | {"resume": False}, "base": reference(start),
            "texts": described(texts), "code": code(), "versions": versions, "threads": torch.get_num_threads()}


def code() -> str:
    """A digest of the code that decides figures: of what it does, not of its comments and docstrings."""
    trees = [ast.parse((Path(__file__).parents[2] / f"{name}.py").read_text(encoding="utf-8")) for name in DECIDING]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()[:16]


def doubts(configs: list[dict]) -> list[str]:
    """Why runs that are kept may not belong into one table with each other and with this code."""
    here = code()
    others = sum(config.get("code") != here for config in configs)
    read = {}  # what the settings say of text and base -> what it was
    for config in configs:
        named = [config["settings"][name] for name in (*GROUPS["text"].split(), "users", "init_from", "block_size")]
        read.setdefault(str(named), set()).add(str([config["texts"], config["base"]]))
    return [line for line, wrong in {
        f"{others} of these {len(configs)} runs are the work of other code; --anew makes them again": others,
        "some of these runs read other text, or had another base, than the rest; take another --out":
            any(len(each) > 1 for each in read.values())}.items() if wrong]


def reference(start: Base) -> dict:
    """What a run keeps of its base: which one it was."""
    return {"name": start.name, "sha256": start.sha256, "tokenizer": start.tokenizer}


def described(texts: list[Text]) -> list[list]:
    """What a run keeps of its text: names, and a digest of each user's splits."""
    return [[text.name, hashlib.sha256(b"".join(
        getattr(text, split).tobytes() + b"|" for split in SPLITS)).hexdigest()] for text in texts]


class Folder:
    """The folder of one run, which no other process may work in while this object exists."""

    def __init__(self, settings: Settings, config: dict):
        """Make it, or empty it of an old run if that is wanted, and write config.json; or prepare to continue in it.

        Raises BadInput.
        """
        name = f"{settings.method}-{Path(settings.data).resolve().name}-{settings.users}users-seed{settings.seed}"
        self.path, self.config, self.lines = Path(settings.out or free_name(f"out/{name}")), config, []
        old = [path for path in (self.path / file for file in FILES) if path.exists()]
        if old and not settings.overwrite and not settings.resume:
            raise BadInput(f"`out` {self.path}: holds a run; take another folder, or `overwrite` to start anew in "
                           "it, or `resume` to continue")
        try:
            self.lock = locked(self.path)
            if not settings.resume:
                for path in old:
                    path.unlink()
                write_json(self.path / "config.json", config)
        except BlockingIOError:
            raise BadInput(f"`out` {self.path}: another process works in it; wait, or take another folder") from None
        except OSError as error:
            raise BadInput(f"`out` {self.path}: {error.strerror}; take another folder") from None

    def log(self, lines: list[dict]) -> None:
        """Add to metrics.jsonl."""
        self.lines += lines
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    def save(self, state: dict) -> None:
        """Write a checkpoint; the last one becomes the previous one."""
        def to_disk(path: Path) -> None:
            torch.save({"format": FORMAT, "lines": self.lines, **state}, path)
            on_disk(path)
            if (self.path / "checkpoint.pt").exists():
                os.replace(self.path / "checkpoint.pt", self.path / "previous.pt")
        write(self.path / "checkpoint.pt", to_disk)

    def continued(self) -> dict | None:
        """The state to continue from, None if there is none yet; whatever came later is forgotten. Raises BadInput."""
        if (self.path / "result.json").exists():
            raise BadInput(f"`resume`: the run in {self.path} has ended; `overwrite` starts anew")
        begun = json_of(self.path / "config.json")
        for name, what in (("base", "init_from"), ("texts", "data")):
            if begun[name] != self.config[name]:
                raise BadInput(f"`{what}`: is no longer what the run in {self.path} began with; restore it, or "
                               "start anew with `overwrite`")
        state = newest(self.path, self.config["settings"]["device"], clean=True)
        self.lines = state["lines"] if state else []
        self.log([])  # without what came after the checkpoint
        return state


def free_name(name: str) -> str:
    """The name, or with -2, -3, ... after it, of a folder that isn't there yet."""
    names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
    return next(name for name in names if not os.path.exists(name))


def damaged(path: Path, error: Exception) -> BadInput:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return BadInput(f"the run in {path.parent}: {path.name} is missing, damaged or of another version ({reason}); "
                    "train it anew with `overwrite`")


def json_of(path: Path) -> dict:
    """A config.json. Raises BadInput."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged(path, ValueError(f"not format {FORMAT}"))
    return content


def settings_of(arguments: list[str] | None) -> Settings:
    """The settings of a command line; of a run that is continued, its own. Raises BadInput."""
    given, rest = given_in(arguments, Settings)
    refuse_rest(rest)
    if not given.get("resume"):
        return Settings(**given)
    if "out" not in given:
        raise BadInput("`resume`: needs the run's folder; give `out`")
    if not (Path(given["out"]) / "config.json").exists():
        raise BadInput(f"`resume`: `out` {given['out']} holds no run to continue; give another, or leave `resume` out")
    saved = json_of(Path(given["out"]) / "config.json")["settings"]
    for name, value in sorted(given.items(), key=lambda item: isinstance(item[1], tuple)):  # one for each user: last
        wanted = plain(Settings(**saved | {name: value}))[name] if isinstance(value, tuple) else value
        if name == "rounds" and (Path(given["out"]) / "result.json").exists():
            refuse(name, value, f"the run in {given['out']} ended after {saved[name]}, and the cosine of its learning "
                                "rates with it", "start anew with `overwrite`")
        if name not in ("resume", "out", "overwrite") and wanted != saved[name]:
            refuse(name, value, f"the run in {given['out']} has {saved[name]}",
                   "leave it out, or start anew with `overwrite`")
    return Settings(**saved | {"overwrite": False} | given)


@contextmanager
def stopped_gently(path: Path | str) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end the run in that folder after its round, with a checkpoint, and the second one at once.
    Gives a function that says whether the run is to end."""
    asked = []

    def ask(*_) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        tqdm.write("stopping at the end of this round; press Ctrl-C again to stop at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: python train.py --resume --out {path}") from None
    finally:
        signal.signal(signal.SIGINT, before)


# --- checkpoints -----------------------------------------------------------------------------------------------------

class Learned(NamedTuple):
    """What a user has at the end: its model, and the gates that stand in for its routers', if there are any."""

    name: str
    model: GPT
    gates: torch.Tensor | None


KEPT = ("gates", "memory", "bytes_up", "bytes_down")  # of a user, besides its model and levels


def states(users: list[User]) -> list[dict]:
    """Everything that users' next steps depend on: their models, without what a base brings, and their levels."""
    return [{
        "name": user.name, "config": asdict(user.model.config), **{name: getattr(user, name) for name in KEPT},
        "parameters": {name: p.data for name, p in user.model.own().items()},
        "gradients": {name: p.grad for name, p in user.model.own().items() if p.grad is not None},
        "lower": user.lower.state(), "upper": user.upper and user.upper.state()} for user in users]


def restore_model(saved: dict, model: GPT) -> None:
    """Give a model what a user's state has of it."""
    for name, parameter in model.own().items():
        parameter.data = saved["parameters"][name].data  # whose rank a method may have cut


def restore_user(user: User, saved: dict) -> None:
    """Give a user its state."""
    for name in KEPT:
        setattr(user, name, saved[name])
    restore_model(saved, user.model)
    for name, parameter in user.model.own().items():
        parameter.grad = saved["gradients"].get(name)  # what a leak has piled up
    for level, own in ((user.lower, saved["lower"]), (user.upper, saved["upper"])):
        if level:
            level.load(own)


def newest(folder: Path, device: str = "cpu", clean: bool = False) -> dict | None:
    """The newest whole checkpoint; None if there is none yet. Raises BadInput where all are damaged.

    clean: delete a damaged one, so that it never takes the place of a whole one.
    """
    paths, bad = [path for path in (folder / "checkpoint.pt", folder / "previous.pt") if path.exists()], []
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                whole = archive.testzip() is None
            state = torch.load(path, map_location=device, weights_only=True) if whole else None
        except Exception as error:  # a damaged file can fail in any way
            if isinstance(error, MemoryError | OSError) or NO_MEMORY.search(str(error)):
                raise
            state = None
        if state is None:
            print(f"{path} is damaged; trying the one before it", file=sys.stderr)
            bad.append(path)
        elif not isinstance(state, dict) or state.get("format") != FORMAT:
            raise damaged(path, ValueError(f"not format {FORMAT}"))
        else:
            for path in bad if clean else ():
                path.unlink()
            return state
    if bad:
        raise BadInput(f"the run in {folder} holds no whole checkpoint; train it anew with `overwrite`")
    return None
