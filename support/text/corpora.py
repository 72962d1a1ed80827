"""Where documents come from: packages on this machine, a folder, a table, the paper's corpora.

    for user, text, split in corpora.read(Settings(data="FOLDER"), size=100_000): ...

data.py says who gets which.
"""

import csv
import hashlib
import html
import importlib.util
import json
import re
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from tqdm import tqdm

from support.errors import BadInput, optional
from support.files import write, write_text

if TYPE_CHECKING:
    from support.runs.settings import Settings

TABLES = (".csv", ".jsonl")
EXCERPT = 5_000  # characters of a builtin document that are used: many documents, none outweighing the others
CORPUS_EXCERPT = 20_000  # likewise of a streamed corpus
EVERYTHING = 1 << 62  # bytes
SPLITS = ("train", "valid", "test")


class Document(NamedTuple):
    user: str
    text: str
    split: str = ""  # where it belongs, if its owner says so: train, valid or test


# --- on this machine -------------------------------------------------------------------------------------------------

def shuffled(key: str) -> bytes:
    """A sort key for an arbitrary order that is the same on every machine."""
    return hashlib.sha256(key.encode()).digest()


def source_files(module: str, pattern: str, without: tuple[str, ...] = ()) -> Iterator[str]:
    """The files beside a module, which isn't imported, except for paths that contain one of `without`."""
    root = Path(importlib.util.find_spec(module).origin).parent
    for name in sorted((path.relative_to(root).as_posix() for path in root.glob(pattern)), key=shuffled):
        if not any(part in name for part in without):
            yield (root / name).read_text(encoding="utf-8", errors="replace")


def operators() -> Iterator[str]:
    """PyTorch's operators: an entry of native_functions.yaml is a document."""
    text = next(source_files("torchgen", "packaged/ATen/native/native_functions.yaml"))
    yield from sorted(text.split("\n\n"), key=shuffled)


def manual() -> Iterator[str]:
    """Python's reference manual: a topic is a document."""
    from pydoc_data.topics import topics
    yield from (topics[name] for name in sorted(topics, key=shuffled))


def pretraining() -> Iterator[str]:
    """The Python sources of the standard library and numpy, which no user holds, for the pretraining of a base.

    Left out are the manual, which is a user's; what setuptools has copies of, likewise; and tests.
    """
    without = ("site-packages/", "dist-packages/", "pydoc_data/", "distutils/", "importlib/", "test")
    library, numpy = source_files("ast", "**/*.py", without), source_files("numpy", "**/*.py", ("test",))
    yield from sorted((*library, *numpy), key=shuffled)


def excerpts(documents: Iterable[str]) -> Iterator[str]:
    """The beginnings of the documents that aren't blank, each only once."""
    seen = set()
    for excerpt in (document[:EXCERPT] for document in documents):
        if excerpt.strip() and excerpt not in seen:
            seen.add(excerpt)
            yield excerpt


BUILTIN = {  # name -> domain -> documents
    "builtin": {  # four domains that share little; PyTorch's headers without the thousands made from one template
        "cpp": partial(source_files, "torch", "include/**/*.h", ("ATen/ops/",)), "yaml": operators, "english": manual,
        "sympy": partial(source_files, "sympy", "**/*.py"),
    },
    "builtin-python": {  # four that share much
        name: partial(source_files, name, "**/*.py") for name in ("sympy", "networkx", "torch", "setuptools")
    },
}


# --- anyone's own text -----------------------------------------------------------------------------------------------

def read(settings: "Settings", size: int) -> Iterator[Document]:
    """The documents of a folder, a table (.csv with a header, .jsonl), or a corpus by name. Raises BadInput, OSError.

    size: bytes that are wanted of each user, where text is streamed.
    """
    path = Path(settings.data)
    if settings.data in CORPORA:
        return corpus(settings.data, settings.source, Path(settings.cache), size)
    if path.is_dir():
        return folder(path)
    if path.suffix in TABLES and path.is_file():
        recipe = Recipe(user_field=settings.user_field or "user", text_fields=(settings.text_field or "text",))
        return documents(rows(path), recipe)
    raise BadInput(f"`data` {settings.data}: not a folder, nor a .csv or .jsonl file; give one, or one of "
                   f"{', '.join((*BUILTIN, *CORPORA))}")


def folder(root: Path) -> Iterator[Document]:
    """The files of a folder, by user: NAME.txt, NAME/ with a file per document, or NAME/{train,valid,test}.txt."""
    paths = [path for path in visible(root, "*") if path.is_dir() or path.suffix == ".txt"]
    names = [path.name if path.is_dir() else path.stem for path in paths]
    if len(set(names)) < len(names):
        raise BadInput(f"`data` {root}: holds a NAME.txt and a NAME/ for the same user; rename one of them")
    for name, path in zip(names, paths, strict=True):
        check_name(name, str(root))
        given = {path / f"{split}.txt": split for split in SPLITS}
        there = [file for file in given if file.is_file()]
        if there and len(there) < len(given):
            raise BadInput(f"`data` {path}: holds {there[0].name} but not all of train.txt, valid.txt and test.txt; "
                           "give all three or none")
        for file in there or ([path] if path.is_file() else visible(path, "**/*")):
            if file.is_file():
                try:
                    yield Document(name, file.read_text(encoding="utf-8-sig"), given.get(file, ""))
                except UnicodeDecodeError:
                    raise BadInput(f"`data` {file}: is not UTF-8; convert or remove the file") from None


def visible(folder: Path, pattern: str) -> list[Path]:
    """What a folder holds, in order, without what is hidden."""
    return sorted(path for path in folder.glob(pattern)
                  if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def check_name(name: object, where: str) -> None:
    """Refuse what can't be a user's name, which is shown and may become part of a path. Raises BadInput."""
    shape = r"(?! )[^./\\][^/\\]{0,99}(?<! )"
    if not isinstance(name, str | int) or not str(name).isprintable() or not re.fullmatch(shape, str(name)):
        raise BadInput(f"`data` {where}: {str(name)[:40]!r} can't be a user's name; rename it: at most 100 "
                       "characters, no slashes, no leading dot")


# --- tables: a row is a document -------------------------------------------------------------------------------------

Row = dict[str, object]
CONFIGURATION = "configuration"  # a field that the rows of a data set's configuration get


@dataclass(frozen=True)
class Recipe:
    """What makes users and documents of the rows of a table."""

    source: str = ""  # an address of a file, or a data set of Hugging Face's hub
    user_field: str = "user"  # CONFIGURATION: each user is a configuration of the data set
    users: dict[str, str] | None = None  # name -> value of user_field; None: every value is a user of that name
    text_fields: tuple[str, ...] = ("text",)  # `a.b` is field b of field a
    columns: tuple[str, ...] | None = None  # of a CSV file without a header
    clean: Callable[[str], str] = str
    excerpt: int | None = None  # characters of a document that are used
    train_kb: float | None = None  # that a user has by default; None: all there is


def news(text: str) -> str:
    """AG News without its scars: a backslash was a line's end, unless before a `$`, and entities lost their &."""
    text = re.sub(r"\\+(?=\$)", "", text)
    text = re.sub(r"[ &]?(#\d+|amp|quot|lt|gt|nbsp|hellip);", lambda found: html.unescape(f"&{found[1]};"), text)
    return re.sub(r"\\+", "\n", text)


CORPORA = {
    "agnews": Recipe(
        "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/train.csv", "class",
        {"business": "3", "science": "4", "sports": "2", "world": "1"}, ("title", "description"),
        ("class", "title", "description"), news),
    "wikipedia": Recipe(
        "wikimedia/wikipedia", CONFIGURATION, {name: f"20231101.{name}" for name in ("de", "fr", "it", "nl")},
        excerpt=CORPUS_EXCERPT, train_kb=2000),
    "slimpajama": Recipe(
        "DKYoon/SlimPajama-6B", "meta.redpajama_set_name",
        {"arxiv": "RedPajamaArXiv", "book": "RedPajamaBook", "github": "RedPajamaGithub",
         "stackexchange": "RedPajamaStackExchange"}, excerpt=CORPUS_EXCERPT, train_kb=2000),
    "commoncorpus": Recipe(
        "PleIAs/common_corpus", "collection",
        {"books": "US-PD-Books", "patents": "USPTO", "tenders": "TEDEUTenders", "youtube": "Youtube-Commons-Whisper"},
        excerpt=CORPUS_EXCERPT, train_kb=2000),
}


def rows(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, Row]]:
    """Each row of a table, after a word on where it stands. Raises BadInput."""
    number, table = 0, path.suffix == ".csv"
    try:
        with open(path, encoding="utf-8-sig", newline="" if table else None) as file:
            records = csv_rows(file, columns) if table else map(json.loads, filter(str.strip, file))
            for number, row in enumerate(records, 1):
                yield f"{path}, row {number}", row
    except UnicodeDecodeError:
        raise BadInput(f"`data` {path}: is not UTF-8 after row {number}; convert it") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise BadInput(f"`data` {path}: row {number + 1} isn't valid {path.suffix} ({error}); correct it") from None


def csv_rows(file: TextIO, columns: tuple[str, ...] | None) -> Iterator[Row]:
    """Raises csv.Error, ValueError."""
    csv.field_size_limit(16_000_000)
    for row in csv.DictReader(file, columns, strict=True):
        if None in row:
            raise ValueError("more fields than the first row; is a comma without quotes?")
        yield row


def field(row: Row, name: str) -> object:
    """A field of a row; `a.b` is also field b of field a. Raises KeyError."""
    if not isinstance(row, dict):
        raise KeyError(name)
    first, _, rest = name.partition(".")
    return row[name] if name in row or not rest else field(row[first], rest)


def documents(table: Iterable[tuple[str, Row]], recipe: Recipe) -> Iterator[Document]:
    """The rows that are some user's. Raises BadInput."""
    named = recipe.users and {value: name for name, value in recipe.users.items()}
    remedy = ("give another `source`" if named else
              "name one: `user_field`, `text_field` (in a .csv the first row is a header)")
    for where, row in table:
        try:
            owner = field(row, recipe.user_field)
            if named is not None and str(owner) not in named:
                continue
            texts = [field(row, name) or "" for name in recipe.text_fields]
        except KeyError as error:
            there = " ".join(", ".join(map(str, row)).split())[:200] if isinstance(row, dict) else "no fields"
            raise BadInput(f"`data` {where}: has no field {error.args[0]} but {there}; {remedy}") from None
        if not all(isinstance(text, str) for text in texts):
            raise BadInput(f"`data` {where}: its {' or '.join(recipe.text_fields)} isn't text; correct or "
                           "remove the row")
        if named is None:
            check_name(owner, where)
        text = recipe.clean("\n".join(texts)).replace("\r\n", "\n")[:recipe.excerpt].encode(errors="replace").decode()
        meant = str(row.get("split", "")) if named is None else ""
        yield Document(named[str(owner)] if named else str(owner), text, meant if meant in SPLITS else "")


# --- the paper's corpora ---------------------------------------------------------------------------------------------

def corpus(name: str, source: str | None, cache: Path, size: int) -> Iterator[Document]:
    """The documents of one of CORPORA. source: instead of its own, a file or its address, a data set or a folder like
    one. What comes over the network is kept in the cache: a file as it is, a data set as JSON lines of user and text.

    Raises BadInput, OSError.
    """
    recipe, source = CORPORA[name], source or CORPORA[name].source
    path = download(source, cache) if "://" in source else Path(source)
    if path.suffix in TABLES and path.is_file():
        return documents(rows(path, recipe.columns), recipe)
    if path.is_dir():
        return streamed(name, source, size)
    if path.exists() or path.suffix in TABLES:
        raise BadInput(f"`source` {source}: not a .csv or .jsonl file; give one, or a data set")
    kept = cache / f"{name}-{shuffled(source).hex()[:8]}-{size}.jsonl"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, "".join(json.dumps({"user": user, "text": text}, ensure_ascii=False) + "\n"
                                 for user, text, _ in streamed(name, source, size)))
    return documents(rows(kept), Recipe())


def download(address: str, cache: Path) -> Path:
    """The file of an address, in the cache. Raises BadInput, OSError."""
    path = cache / (shuffled(address).hex()[:16] + Path(address.partition("?")[0]).suffix)
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            write(path, lambda file: urllib.request.urlretrieve(address, file))
        except (OSError, HTTPException) as error:
            raise BadInput(f"`source` {address}: can't be downloaded ({error}); try again, or give a file") from None
    return path


def streamed(name: str, source: str, size: int) -> Iterator[Document]:
    """The documents of a data set, until every user has `size` bytes. Raises BadInput."""
    recipe = CORPORA[name]

    def stream(configuration: str | None) -> Iterator[tuple[str, Row]]:
        datasets = optional("datasets", f"`data` {name}", "pip install datasets, or give a file of it, .csv or .jsonl, "
                                                          "with `source`")
        try:
            for row in datasets.load_dataset(source, configuration, split="train", streaming=True):
                yield source, {**row, CONFIGURATION: configuration}
        except Exception as error:  # its many back ends raise all kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise BadInput(f"`data` {name}: {source} can't be read ({reason}); try again, or give a copy with "
                           "`source`") from None

    each = recipe.user_field == CONFIGURATION
    with tqdm(desc=name, unit="B", unit_scale=True) as bar:
        for users in [[user] for user in recipe.users] if each else [list(recipe.users)]:
            held, seen = dict.fromkeys(users, 0), set()
            for document in documents(stream(recipe.users[users[0]] if each else None), recipe):
                if document.text.strip() and document.text not in seen and held[document.user] < size:
                    seen.add(document.text)
                    held[document.user] += len(document.text.encode())
                    bar.update(len(document.text.encode()))
                    yield document
                if min(held.values()) >= size:
                    break
