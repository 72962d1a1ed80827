"""Files that are written completely or not at all, even if the process or the machine stops."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file: `save` writes it under a temporary name, and then it is renamed.

    Makes the folder if necessary.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # on the disk before the rename, in case of a power failure
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_lines(path: Path, entries: Iterable[dict]) -> None:
    """Write a .jsonl file: one line of JSON per entry."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def read_json(path: Path) -> dict:
    """Raises OSError, ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """The entries of a .jsonl file; [] if there is no file. Raises OSError, ValueError."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def locked(folder: Path) -> IO:
    """Make a folder and lock it against other processes while the returned file is open.

    Raises OSError; BlockingIOError if another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")  # noqa: SIM115, it stays open
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file
