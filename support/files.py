"""Files that are there whole or not at all, however the process that writes them, or its machine, ends."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes apart
    fcntl = None


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file under another name, which `save` is given, and then rename it. Its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        on_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def on_disk(path: Path) -> None:
    """Wait until a file is on the disk, so that its machine may lose power."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def locked(folder: Path) -> IO:
    """Make a folder, and keep other processes out of it as long as this file is open. Raises OSError, and of these
    BlockingIOError where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")  # noqa: SIM115, it is to stay open
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Raises OSError, ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; none where there is no file. Raises OSError, ValueError."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def kept(folder: Path, key: object, compute: Callable[[], object]) -> object:
    """What was computed earlier under this key, out of a file in that folder; else it is computed now, and kept."""
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        write_json(path, compute())
    return read_json(path)
