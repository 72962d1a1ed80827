"""A run's folder: who may work in it, and its checkpoints, from which a run goes on bit for bit.

A checkpoint is written under another name, brought to the disk and then renamed, and the one before it is kept until
the next. torch.save writes a zip archive with a checksum for each part: so a damaged one is recognised.
"""

import itertools
import json
import os
import platform
import shutil
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy
import tiktoken
import torch

from base import Base
from corpora import BadInput
from data import Text
from federated import Server, User
from files import read_json, write, write_json, write_text
from model import GPT
from settings import Settings

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes apart
    fcntl = None

RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "previous.pt", "result.json", "page.html", "curves.png",
             "curves.svg")


def open_folder(settings: Settings, start: Base, texts: list[Text]) -> tuple[Path, TextIO]:
    """Make the run's folder, or empty it of an old run if that is wanted, and write config.json; or go on in it.

    Returns the folder and its lock, which holds as long as the file is open. Raises BadInput.
    """
    name = f"{settings.method}-{Path(settings.data).resolve().name}-{settings.users}users-seed{settings.seed}"
    folder = Path(settings.out or free_name(f"out/{name}"))
    try:
        old = [path for path in (folder / file for file in RUN_FILES) if path.exists()]
        if old and not settings.overwrite and not settings.resume:
            raise BadInput(f"--out {folder}: holds a run; take another folder, or --overwrite to start anew in it, or "
                           "--resume to go on")
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115, it is to stay open
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"--out {folder}: another process is at work in it; wait, or take another folder") from None
        if not settings.resume:
            for path in old:
                path.unlink()
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            write_json(folder / "config.json", config_of(settings, start, texts))
    except OSError as error:
        raise BadInput(f"--out {folder}: {error.strerror}; take another folder") from None
    return folder, lock


def free_name(name: str) -> str:
    """The name, or with -2, -3, ... behind it, of a folder that isn't there yet."""
    names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
    return next(name for name in names if not os.path.exists(name))


def config_of(settings: Settings, start: Base, texts: list[Text]) -> dict:
    """What a run was made with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                "tiktoken": tiktoken.__version__}
    return {"settings": asdict(settings) | {"resume": False}, "base": reference(start), "texts": lengths(texts),
            "versions": versions, "threads": torch.get_num_threads()}


def reference(start: Base) -> dict:
    """What a run keeps of its base: which one it was."""
    return {"name": start.name, "sha256": start.sha256, "tokenizer": start.tokenizer}


def lengths(texts: list[Text]) -> list[list]:
    """What a run keeps of its text."""
    return [[text.name, len(text.train), len(text.valid), len(text.test)] for text in texts]


# --- checkpoints -----------------------------------------------------------------------------------------------------

def states(users: list[User]) -> list[dict]:
    """All that users' next steps depend on: their models as they are, without what a base brings, and their levels."""
    return [{
        "name": user.name, "config": asdict(user.model.config), "version": user.version, "bytes_up": user.bytes_up,
        "bytes_down": user.bytes_down, "parameters": {name: p.data for name, p in user.model.own().items()},
        "gradients": {name: p.grad for name, p in user.model.own().items() if p.grad is not None},
        "weights": [block.moe.weights for block in user.model.blocks],
        "lower": user.lower.state(), "upper": user.upper and user.upper.state()} for user in users]


def restore_model(saved: dict, model: GPT) -> None:
    """Give a model what a user's state has of it."""
    for name, parameter in model.own().items():
        parameter.data = saved["parameters"][name].data  # whose rank a method may have cut
    for block, weights in zip(model.blocks, saved["weights"], strict=True):
        block.moe.weights = weights


def restore(server_state: dict, user_states: list[dict], server: Server, users: list[User]) -> None:
    """Give server and users the state of a checkpoint."""
    server.load(server_state)
    for user, saved in zip(users, user_states, strict=True):
        user.version, user.bytes_up, user.bytes_down = (saved[name] for name in ("version", "bytes_up", "bytes_down"))
        restore_model(saved, user.model)
        for name, parameter in user.model.own().items():
            parameter.grad = saved["gradients"].get(name)  # what a leak has piled up
        for level, own in ((user.lower, saved["lower"]), (user.upper, saved["upper"])):
            if level:
                level.load(own)


def save(state: dict, folder: Path) -> None:
    """Write a checkpoint; the last one becomes the previous one."""
    def to_disk(path: Path) -> None:
        with open(path, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        if (folder / "checkpoint.pt").exists():
            os.replace(folder / "checkpoint.pt", folder / "previous.pt")
    write(folder / "checkpoint.pt", to_disk)


def newest(folder: Path, device: str = "cpu", clean: bool = False) -> dict | None:
    """The newest checkpoint that is whole; None if there is none yet. Raises BadInput where all are damaged.

    clean: delete a damaged one, so that it never takes the place of one that is whole.
    """
    paths = [path for path in (folder / "checkpoint.pt", folder / "previous.pt") if path.exists()]
    for number, path in enumerate(paths):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is None:
                    state = torch.load(path, map_location=device, weights_only=True)
                    for damaged in paths[:number] if clean else ():
                        damaged.unlink()
                    return state
        except Exception:  # a damaged file can fail in any way
            pass
        print(f"{path} is damaged; trying the one before it", file=sys.stderr)
    if paths:
        raise BadInput(f"--out {folder}: holds no checkpoint that is whole; start anew with --overwrite")
    return None


def forget_later(folder: Path, number: int) -> None:
    """Take from metrics.jsonl what came after a round, or is only half there. Raises OSError, ValueError."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if number >= 0 else []
    write_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["round"] <= number))


def saved_settings(folder: Path) -> dict:
    """The settings of the run in a folder. Raises BadInput."""
    try:
        return read_json(folder / "config.json")["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--resume: --out {folder} holds no run to go on with; give another, or leave it out") from None
