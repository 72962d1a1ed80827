"""Files and folders that are there whole or not at all, however the process that writes them ends."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file under another name, which `save` is given, and then rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Raises OSError, ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A new folder to fill. It gets its name when it is full."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=target.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        yield new
        try:
            new.rename(target)
        except OSError:
            if not target.exists():  # else another process was quicker, with the same
                raise
