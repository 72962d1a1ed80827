"""Where documents come from: packages on this machine, a folder, or a table.

    for user, text, split in sources.read("FOLDER"): ...

data.py assigns them to users and splits.
"""

import csv
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from support.errors import BadInput

SPLITS = ("train", "valid", "test")
TABLES = (".csv", ".jsonl")
PREPARED = {  # what `python -m lab.prepare NAME` writes
    "agnews": "agnews.jsonl",
    "wikipedia": "wikipedia.jsonl",
    "slimpajama": "slimpajama.jsonl",
    "commoncorpus": "commoncorpus.jsonl",
    "languages": "languages",
}


class Document(NamedTuple):
    user: str
    text: str
    split: str = ""  # train, valid or test, if the source decides that


# --- builtin: text that comes with Python and PyTorch ---------------------------------

BUILTIN = {  # name -> its domains, each of which is a user
    "builtin": ("cpp", "yaml", "english", "sympy"),  # these share little
    "builtin-python": ("sympy", "networkx", "torch", "setuptools"),  # these share much
}
EXCERPT = 5_000  # characters used of a document, so that no document outweighs the others


def builtin_documents(domain: str) -> Iterator[str]:
    """The documents of one domain, in an arbitrary but fixed order. Raises BadInput."""
    if domain == "cpp":  # leaves out thousands of generated headers
        documents = package_files("torch", "include/**/*.h", without=("ATen/ops/",))
    elif domain == "yaml":
        documents = operators()
    elif domain == "english":
        documents = manual()
    else:
        documents = package_files(domain, "**/*.py")
    return excerpts(documents)


def pretraining_documents() -> Iterator[str]:
    """Python sources of the standard library and numpy, to pretrain a base on.

    No user has them: the manual, copies of setuptools' modules, and tests are left out.
    """
    without = (
        "site-packages/",
        "dist-packages/",
        "pydoc_data/",
        "distutils/",
        "importlib/",
        "test",
    )
    library = package_files("ast", "**/*.py", without)  # the folder of the standard library
    numpy = package_files("numpy", "**/*.py", without=("test",))
    return excerpts(sorted([*library, *numpy], key=fixed_order))


def fixed_order(key: str) -> bytes:
    """A sort key: an arbitrary order that is the same on every machine."""
    return hashlib.sha256(key.encode()).digest()


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported. Raises BadInput."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        remedies = {
            "torchgen": "pip install torch",
            "pydoc_data": "install the whole standard library of Python",
        }
        remedy = remedies.get(package, f"pip install {package}")
        raise BadInput(f"`data` builtin: the package {package} is missing; {remedy}")
    return Path(spec.origin).parent


def package_files(package: str, pattern: str, without: tuple[str, ...] = ()) -> Iterator[str]:
    """The files of a package whose paths contain no part of `without`. Raises BadInput."""
    folder = package_folder(package)
    names = [path.relative_to(folder).as_posix() for path in folder.glob(pattern)]
    for name in sorted(names, key=fixed_order):
        if not any(part in name for part in without):
            yield (folder / name).read_text(encoding="utf-8", errors="replace")


def operators() -> Iterator[str]:
    """PyTorch's operators: each entry of native_functions.yaml is a document."""
    path = package_folder("torchgen") / "packaged/ATen/native/native_functions.yaml"
    entries = path.read_text(encoding="utf-8").split("\n\n")
    yield from sorted(entries, key=fixed_order)


def manual() -> Iterator[str]:
    """Python's reference manual: each topic is a document."""
    package_folder("pydoc_data")  # refuses if it is missing
    from pydoc_data.topics import topics

    for name in sorted(topics, key=fixed_order):
        yield topics[name]


def excerpts(documents: Iterable[str]) -> Iterator[str]:
    """The beginning of each document. Blank ones and copies are left out."""
    seen = set()
    for document in documents:
        excerpt = document[:EXCERPT]
        if excerpt.strip() and excerpt not in seen:
            seen.add(excerpt)
            yield excerpt


# --- folders and tables ----------------------------------------------------------------


def read(source: str, user_field: str = "user", text_field: str = "text") -> Iterator[Document]:
    """The documents of a folder or a table. Raises BadInput, OSError."""
    path = Path(source)
    if path.is_dir():
        return read_folder(path)
    if path.suffix in TABLES and path.is_file():
        return read_table(path, user_field, text_field)
    if path.stem in PREPARED:
        raise BadInput(
            f"`data` {source}: no such folder or table; python -m lab.prepare "
            f"{path.stem} makes {PREPARED[path.stem]}"
        )
    raise BadInput(
        f"`data` {source}: not a folder, .csv or .jsonl file; expected one, or one of "
        f"{', '.join(BUILTIN)}"
    )


def read_folder(root: Path) -> Iterator[Document]:
    """The files of each user in a folder: NAME.txt, NAME/ with one file per document, or NAME/
    with train.txt, valid.txt and test.txt."""
    users = {}  # name -> file or folder
    for path in visible(root, "*"):
        if not path.is_dir() and path.suffix != ".txt":
            continue
        name = path.name if path.is_dir() else path.stem
        if name in users:
            raise BadInput(f"`data` {root}: holds {name}.txt and {name}/; rename one of them")
        users[name] = path
    for name, path in users.items():
        check_name(name, f"`data` {root}")
        if not path.is_dir():
            yield Document(name, read_text(path))
        elif has_splits(path):
            for split in SPLITS:
                yield Document(name, read_text(path / f"{split}.txt"), split)
        else:
            for file in visible(path, "**/*"):
                if file.is_file():
                    yield Document(name, read_text(file))


def visible(folder: Path, pattern: str) -> list[Path]:
    """The sorted contents of a folder, without hidden files and folders."""
    paths = []
    for path in folder.glob(pattern):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") for part in parts):
            paths.append(path)
    return sorted(paths)


def has_splits(folder: Path) -> bool:
    """Whether a user's folder holds train.txt, valid.txt and test.txt. Raises BadInput if it
    holds only some of them."""
    found = [split for split in SPLITS if (folder / f"{split}.txt").is_file()]
    if found and len(found) < len(SPLITS):
        raise BadInput(
            f"`data` {folder}: holds {found[0]}.txt, but not all of train.txt, "
            "valid.txt and test.txt; expected all three or none"
        )
    return bool(found)


def read_text(file: Path) -> str:
    """Raises BadInput, OSError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"`data` {file}: not UTF-8; convert or remove the file") from None


def check_name(name: object, place: str) -> None:
    """Refuse a user's name that can't be shown or become part of a path. Raises BadInput."""
    shape = r"(?! )[^./\\][^/\\]{0,99}(?<! )"
    valid = isinstance(name, str | int) and str(name).isprintable()
    if not valid or not re.fullmatch(shape, str(name)):
        raise BadInput(
            f"{place}: {str(name)[:40]!r} can't be a user's name; expected at most 100 "
            "characters, without slashes and without a leading dot"
        )


def read_table(path: Path, user_field: str, text_field: str) -> Iterator[Document]:
    """The rows of a table, each of which is a document. Raises BadInput, OSError."""
    remedy = "pass `user_field` and `text_field` (the first row of a .csv is a header)"
    for place, row in rows(path):
        user = field_of(row, user_field, place, remedy)
        text = text_of(row, text_field, place, remedy)
        check_name(user, place)
        split = str(row.get("split", ""))
        yield Document(str(user), text, split if split in SPLITS else "")


def rows(
    path: Path, columns: tuple[str, ...] | None = None, flag: str = "data"
) -> Iterator[tuple[str, dict]]:
    """The rows of a table, each with its place, for messages. Raises BadInput, OSError.

    columns: names of the columns of a .csv file without a header
    flag: the setting that named the path
    """
    number = 0
    try:
        table = csv_rows(path, columns) if path.suffix == ".csv" else json_rows(path)
        for row in table:
            number += 1
            yield f"`{flag}` {path}, row {number}", row
    except UnicodeDecodeError:
        raise BadInput(f"`{flag}` {path}: not UTF-8 after row {number}; convert it") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise BadInput(
            f"`{flag}` {path}: row {number + 1} isn't valid {path.suffix} ({error}); correct it"
        ) from None


def csv_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[dict]:
    """Raises csv.Error, ValueError, OSError."""
    csv.field_size_limit(16_000_000)
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, columns, strict=True):
            if None in row:
                raise ValueError("more fields than the first row; is a comma not in quotes?")
            yield row


def json_rows(path: Path) -> Iterator[dict]:
    """Raises ValueError, RecursionError, OSError."""
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def field_of(row: dict, name: str, place: str, remedy: str) -> object:
    """The value of a field. Raises BadInput."""
    try:
        return nested(row, name)
    except KeyError as error:
        fields = ", ".join(map(str, row)) if isinstance(row, dict) else "no fields"
        fields = " ".join(fields.split())  # on one line
        raise BadInput(
            f"{place}: has no field {error.args[0]} but {fields[:200]}; {remedy}"
        ) from None


def nested(row: dict, name: str) -> object:
    """nested({"a": {"b": 1}}, "a.b") -> 1. Raises KeyError."""
    if not isinstance(row, dict):
        raise KeyError(name)
    first, dot, rest = name.partition(".")
    if name in row or not dot:
        return row[name]
    return nested(row[first], rest)


def text_of(row: dict, name: str, place: str, remedy: str) -> str:
    """The text of a field; "" if it is null. Raises BadInput."""
    text = field_of(row, name, place, remedy) or ""
    if not isinstance(text, str):
        raise BadInput(f"{place}: its {name} isn't text; correct or remove the row")
    text = text.replace("\r\n", "\n")
    return text.encode(errors="replace").decode()  # a lone surrogate becomes "?"
