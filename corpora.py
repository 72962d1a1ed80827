"""Where documents come from: packages on this machine, anyone's own text, the paper's public corpora.

    for piece in corpora.find("FOLDER or FILE.csv or FILE.jsonl or wikipedia", cache=Path("out/cache")).pieces(): ...

A corpus is read as often as wanted, always in the same order, one piece of text at a time. What comes from elsewhere is
kept in the cache as JSON lines with a manifest.
"""

import csv
import hashlib
import html
import importlib.util
import json
import re
import sysconfig
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, TextIO
from urllib.parse import urlsplit

from tqdm import tqdm

from files import read_json, whole, write_json

TABLES = (".csv", ".jsonl")
LINE = 16_000_000  # characters of a line in a table; a longer one is a mistake, or no table
PIECE = 2_000_000  # characters of a text that are read at a time
EXCERPT = 5_000  # characters of a builtin document that are used: many documents, none outweighing the others
PUBLIC_EXCERPT = 20_000  # likewise of a public corpus
EVERYTHING = 1 << 62  # bytes


class BadInput(Exception):
    """What was asked for can't be had. One line: the flag, its value, the remedy."""


class Piece(NamedTuple):
    """A document, or the next PIECE of a long one."""

    user: str
    text: str
    split: str = ""  # where it belongs, if its owner says so: train, valid or test


@dataclass(frozen=True)
class Corpus:
    """Users' text."""

    key: str  # the same text has the same key
    pieces: Callable[[], Iterator[Piece]]


def shuffled(key: str) -> bytes:
    """A sort key for an order without rhyme or reason, yet the same on every machine."""
    return hashlib.sha256(key.encode()).digest()


# --- on this machine: domain -> documents ----------------------------------------------------------------------------

def package(name: str) -> Path:
    """The folder of an installed package, which isn't imported."""
    return Path(importlib.util.find_spec(name).origin).parent


def source_files(root: Path, pattern: str, without: tuple[str, ...] = ()) -> Iterator[str]:
    """The files of a folder, but for paths that contain one of `without`."""
    for name in sorted((path.relative_to(root).as_posix() for path in root.glob(pattern)), key=shuffled):
        if not any(part in name for part in without):
            yield (root / name).read_text(encoding="utf-8", errors="replace")


def headers() -> Iterator[str]:
    """PyTorch's C++ headers, without the thousands that were generated from one template."""
    return source_files(package("torch"), "include/**/*.h", without=("ATen/ops/",))


def operators() -> Iterator[str]:
    """PyTorch's operators: an entry of native_functions.yaml is a document."""
    text = next(source_files(package("torchgen"), "packaged/ATen/native/native_functions.yaml"))
    yield from sorted(text.split("\n\n"), key=shuffled)


def manual() -> Iterator[str]:
    """Python's reference manual: a topic is a document."""
    from pydoc_data.topics import topics
    yield from (topics[name] for name in sorted(topics, key=shuffled))


def python(name: str) -> Callable[[], Iterator[str]]:
    return lambda: source_files(package(name), "**/*.py")


def public() -> Iterator[str]:
    """The Python sources of the standard library and numpy, which no user holds, for the pretraining of a base.

    Left out are the manual, which is a user's; what setuptools has copies of, likewise; and tests.
    """
    without = ("site-packages/", "dist-packages/", "pydoc_data/", "distutils/", "importlib/", "test")
    library = source_files(Path(sysconfig.get_paths()["stdlib"]), "**/*.py", without)
    numpy = source_files(package("numpy"), "**/*.py", ("test",))
    yield from sorted((*library, *numpy), key=shuffled)


def excerpts(documents: Iterable[str]) -> Iterator[str]:
    """The beginnings of the documents that aren't blank, each only once."""
    seen = set()
    for excerpt in (document[:EXCERPT] for document in documents):
        if excerpt.strip() and excerpt not in seen:
            seen.add(excerpt)
            yield excerpt


BUILTIN = {
    "builtin": {  # four domains that share little
        "cpp": headers, "yaml": operators, "english": manual, "sympy": python("sympy"),
    },
    "builtin-python": {  # four that share much
        name: python(name) for name in ("sympy", "networkx", "torch", "setuptools")
    },
}


# --- tables: a row is a document -------------------------------------------------------------------------------------

Row = dict[str, object]
CONFIGURATION = "configuration"  # a field that the rows of a data set's configuration get


def news(text: str) -> str:
    """AG News without its scars: a backslash was a line's end, unless before a `$`, and entities lost their &."""
    text = re.sub(r"\\+(?=\$)", "", text)
    text = re.sub(r"[ &]?(#\d+|amp|quot|lt|gt|nbsp|hellip);", lambda found: html.unescape(f"&{found[1]};"), text)
    return re.sub(r"\\+", "\n", text)


@dataclass(frozen=True)
class Recipe:
    """What makes users and documents of the rows of a table."""

    source: str  # a file, an address of one, or a data set of Hugging Face's hub
    user_field: str  # CONFIGURATION: each user is a configuration of the data set
    users: dict[str, str] | None  # name -> value of user_field; None: every value is a user, of that name
    text_fields: tuple[str, ...] = ("text",)  # `a.b` is field b of field a
    columns: tuple[str, ...] | None = None  # of a CSV file without a header
    clean: Callable[[str], str] = str
    excerpt: int | None = None  # characters of a document that are used
    md5: str | None = None  # of the file
    train_kb: float | None = None  # that a user has by default; None: all there is
    licence: str = ""


PUBLIC = {
    "agnews": Recipe(
        "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/train.csv", "class",
        {"business": "3", "science": "4", "sports": "2", "world": "1"}, ("title", "description"),
        ("class", "title", "description"), news, md5="b1a00f826fdfbd249f79597b59e1dc12",
        licence="for research, not for commerce"),
    "wikipedia": Recipe(
        "wikimedia/wikipedia", CONFIGURATION, {name: f"20231101.{name}" for name in ("de", "fr", "it", "nl")},
        excerpt=PUBLIC_EXCERPT, train_kb=2000, licence="CC BY-SA 3.0, GFDL"),
    "slimpajama": Recipe(
        "DKYoon/SlimPajama-6B", "meta.redpajama_set_name",
        {"arxiv": "RedPajamaArXiv", "book": "RedPajamaBook", "github": "RedPajamaGithub",
         "stackexchange": "RedPajamaStackExchange"}, excerpt=PUBLIC_EXCERPT, train_kb=2000, licence="each part's own"),
    "commoncorpus": Recipe(
        "PleIAs/common_corpus", "collection",
        {"books": "US-PD-Books", "patents": "USPTO", "tenders": "TEDEUTenders", "youtube": "Youtube-Commons-Whisper"},
        excerpt=PUBLIC_EXCERPT, train_kb=2000, licence="public domain or open, in each row"),
}


def rows(path: Path, called: str, columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, Row]]:
    """Each row of a table, behind a word on where it stands. Raises BadInput."""
    number, table = 0, path.suffix == ".csv"
    try:
        with open(path, encoding="utf-8-sig", newline="" if table else None) as file:
            for number, row in enumerate(csv_rows(file, columns) if table else json_rows(file), 1):
                yield f"{called}, row {number}", row
    except UnicodeDecodeError:
        raise BadInput(f"{called}: is not UTF-8 behind row {number}; convert it") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise BadInput(f"{called}: row {number + 1} is no {path.suffix[1:]} ({error}); mend it") from None


def csv_rows(file: TextIO, columns: tuple[str, ...] | None) -> Iterator[Row]:
    """Raises csv.Error, ValueError."""
    csv.field_size_limit(LINE)
    for row in csv.DictReader(file, columns, strict=True):
        if None in row:
            raise ValueError("more fields than the first row; is a comma without quotes?")
        yield row


def json_rows(file: TextIO) -> Iterator[Row]:
    """Raises ValueError."""
    while line := file.readline(LINE + 1):
        if len(line) > LINE:
            raise ValueError(f"longer than {LINE / 1e6:.0f} MB")
        if line.strip():
            yield json.loads(line)


def field(row: Row, name: str) -> object:
    """A field of a row; `a.b` is also field b of field a. Raises KeyError."""
    if not isinstance(row, dict):
        raise KeyError(name)
    first, _, rest = name.partition(".")
    return row[name] if name in row or not rest else field(row[first], rest)


def is_name(value: object) -> bool:
    """Whether this may be a user's name, which is shown and may become part of a path."""
    name = str(value)
    return (isinstance(value, str | int) and 0 < len(name) <= 100 and name.isprintable() and name.strip() == name
            and not name.startswith(".") and "/" not in name and "\\" not in name)


def check_name(name: object, where: str) -> None:
    """Raises BadInput."""
    if not is_name(name):
        raise BadInput(f"{where}: {str(name)[:40]!r} can't be a user's name; rename it to at most 100 characters, no "
                       "slash among them, no dot in front")


def documents(table: Iterable[tuple[str, Row]], recipe: Recipe) -> Iterator[Piece]:
    """The rows that are some user's. Raises BadInput."""
    named = recipe.users and {value: name for name, value in recipe.users.items()}
    for where, row in table:
        try:
            owner = field(row, recipe.user_field)
            if named is not None and str(owner) not in named:
                continue
            texts = [field(row, name) or "" for name in recipe.text_fields]
        except KeyError as error:
            there = ", ".join(map(str, row)) if isinstance(row, dict) else "no fields"
            raise BadInput(f"{where}: has no field {error.args[0]} but {there}; "
                           f"{'give another --source' if named else 'name one: --user-field, --text-field'}") from None
        if not all(isinstance(text, str) for text in texts):
            raise BadInput(f"{where}: its {' or '.join(recipe.text_fields)} is no text; mend the row or take it away")
        if named is None:
            check_name(owner, where)
        text = recipe.clean("\n".join(texts)).replace("\r\n", "\n")[:recipe.excerpt].encode(errors="replace").decode()
        yield Piece(named[str(owner)] if named else str(owner), text)


# --- anyone's own text -----------------------------------------------------------------------------------------------

def find(where: str, cache: Path, user_field: str | None = None, text_field: str | None = None,
         source: str | None = None, size: int = EVERYTHING) -> Corpus:
    """The corpus of a name of PUBLIC, a folder, or a table (.csv with a header, .jsonl). Raises BadInput, OSError.

    source: in the place of PUBLIC's, a file, an address or a data set. size: bytes that are wanted of each user.
    """
    path = fetch(where, source or PUBLIC[where].source, cache, size) if where in PUBLIC else Path(where)
    if path.is_dir():
        files = list(folder(path))
        names = [(user, split) for user, split, _ in files]
        key = repr((names, digests([file for *_, file in files], cache)))
        return Corpus(shuffled(key).hex(), lambda: texts(files))
    if path.suffix not in TABLES or not path.is_file():
        raise BadInput(f"--data {where}: not a folder, nor a .csv or .jsonl file; give one, or one of "
                       f"{', '.join((*BUILTIN, *PUBLIC))}")
    recipe = Recipe(str(path), user_field or "user", None, (text_field or "text",))
    key = repr((recipe.user_field, recipe.text_fields, path.suffix, digests([path], cache)))
    return Corpus(shuffled(key).hex(), lambda: documents(rows(path, f"--data {path}"), recipe))


def folder(root: Path) -> Iterator[tuple[str, str, Path]]:
    """The files of a folder, by user: NAME.txt, NAME/ with a file per document, or NAME/{train,valid,test}.txt."""
    paths = [path for path in visible(root, "*") if path.is_dir() or path.suffix == ".txt"]
    names = [path.name if path.is_dir() else path.stem for path in paths]
    if len(set(names)) < len(names):
        raise BadInput(f"--data {root}: holds a NAME.txt and a NAME/ for the same user; rename one of them")
    for name, path in zip(names, paths, strict=True):
        check_name(name, f"--data {root}")
        given = {path / f"{split}.txt": split for split in ("train", "valid", "test")}
        there = [file for file in given if file.is_file()]
        if there and len(there) < len(given):
            raise BadInput(f"--data {path}: holds {there[0].name} but not all of train.txt, valid.txt and test.txt; "
                           "give all three or none")
        for file in there or ([path] if path.is_file() else visible(path, "**/*")):
            if file.is_file():
                yield name, given.get(file, ""), file


def visible(folder: Path, pattern: str) -> list[Path]:
    """What a folder holds, in order, without what is hidden."""
    return sorted(path for path in folder.glob(pattern)
                  if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def texts(files: list[tuple[str, str, Path]]) -> Iterator[Piece]:
    for user, split, path in files:
        try:
            with open(path, encoding="utf-8-sig") as file:
                while text := file.read(PIECE):
                    yield Piece(user, text, split)
        except UnicodeDecodeError:
            raise BadInput(f"--data {path}: is not UTF-8; convert the file or take it away") from None


# --- the cache -------------------------------------------------------------------------------------------------------

def digest_of(path: Path, kind: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def digests(paths: list[Path], cache: Path) -> list[str]:
    """The files' SHA-256. A file whose size and times are as at the last time isn't read again."""
    memory, fresh, result = cache / "digests.json", {}, []
    try:
        known = dict(read_json(memory))
    except (OSError, TypeError, ValueError):  # there is none, or it was damaged
        known = {}
    for path in paths:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        match known.get(str(path.resolve())):
            case [size, changed, touched, str(digest)] if [size, changed, touched] == mark:
                pass
            case _:
                digest = digest_of(path)
                if time.time_ns() - max(mark[1:]) > 2e9:  # else it might still change within one tick of its clock
                    fresh[str(path.resolve())] = [*mark, digest]
        result.append(digest)
    if fresh:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(memory, known | fresh)
    return result


# --- public corpora --------------------------------------------------------------------------------------------------

Streams = list[tuple[set[str], Iterator[Piece]]]  # users, and text of theirs


def fetch(name: str, source: str, cache: Path, size: int) -> Path:
    """A public corpus as JSON lines of user and text, in the cache; if it isn't there, it is read from the source.

    Raises BadInput, OSError.
    """
    recipe, place, own = PUBLIC[name], Path(source), ""
    if kind_of(source) in TABLES:  # it comes whole, or not at all
        size = EVERYTHING
    if source != recipe.source:  # known by what it holds, if it is here
        files = [place] if place.is_file() else visible(place, "**/*") if place.is_dir() else []
        own = "-" + shuffled(repr(digests([file for file in files if file.is_file()], cache) or source)).hex()[:8]
    kept = cache / f"{name}{own}-{'all' if size == EVERYTHING else size}"
    if not kept.exists():
        with whole(kept) as new:
            streams, revision = read_public(name, recipe, source, new)
            counts = collect(name, streams, size, new / "documents.jsonl")
            for download in new.glob("download.*"):
                download.unlink()
            missing = ", ".join(recipe.users.keys() - counts["bytes"].keys())
            if missing:
                raise BadInput(f"--data {name}: {source} holds nothing of {missing}; give another --source")
            write_json(new / "manifest.json", {"source": source, "revision": revision, "licence": recipe.licence,
                                               **counts, "sha256": digest_of(new / "documents.jsonl")})
    path = kept / "documents.jsonl"
    try:
        intact = digests([path], cache) == [read_json(kept / "manifest.json")["sha256"]]
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise BadInput(f"--data {name}: {path} isn't what its manifest says; delete {kept} to fetch it again")
    return path


def kind_of(source: str) -> str:
    """The suffix of a file or of an address, whatever stands behind a question mark."""
    return Path(urlsplit(source).path if "://" in source else source).suffix


def collect(name: str, streams: Streams, size: int, path: Path) -> dict:
    """Write so many bytes of each user's documents, without blank ones and copies. Returns the manifest's counts."""
    bytes_of, documents_of, seen = Counter(), Counter(), set()
    total = size * sum(len(users) for users, _ in streams) if size < EVERYTHING else None
    with open(path, "w", encoding="utf-8") as file, tqdm(total=total, unit="B", unit_scale=True, desc=name) as bar:
        for users, pieces in streams:
            for user, text, _ in pieces:
                if text.strip() and bytes_of[user] < size and (digest := shuffled(text)) not in seen:
                    seen.add(digest)
                    file.write(json.dumps({"user": user, "text": text}, ensure_ascii=False) + "\n")
                    length = len(text.encode())
                    bytes_of[user] += length
                    documents_of[user] += 1
                    bar.update(length)
                if all(bytes_of[user] >= size for user in users):
                    break
    return {"documents": documents_of, "bytes": bytes_of}


def read_public(name: str, recipe: Recipe, source: str, folder: Path) -> tuple[Streams, str]:
    """The documents of a public corpus, and which revision they are of. Raises BadInput."""
    table, kind = Path(source), kind_of(source)
    if kind not in TABLES and ("://" in source or table.is_file()):
        raise BadInput(f"--source {source}: not a .csv or .jsonl file; give one, or a data set")
    if kind not in TABLES:
        return hub(name, recipe, source)
    if "://" in source:
        table = folder / f"download{kind}"
        try:
            urllib.request.urlretrieve(source, table)
        except (OSError, ValueError, HTTPException) as error:
            raise BadInput(f"--data {name}: {source} can't be downloaded ({error}); try again, or give a file of it "
                           "with --source") from None
    md5 = digest_of(table, "md5")
    if source == recipe.source and md5 != recipe.md5:
        raise BadInput(f"--data {name}: what came from {source} has MD5 {md5}, not {recipe.md5}; try again, or give a "
                       "file of it with --source")
    return [(set(recipe.users), documents(rows(table, f"--source {source}", recipe.columns), recipe))], f"MD5 {md5}"


def hub(name: str, recipe: Recipe, source: str) -> tuple[Streams, str]:
    """The documents of a data set of Hugging Face's hub, or of a local folder like one, and its revision."""
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError:
        raise BadInput(f"--data {name}: needs a library that isn't here; pip install datasets, or give a file of it, "
                       ".csv or .jsonl, with --source") from None

    def stream(configuration: str | None) -> Iterator[tuple[str, Row]]:
        try:
            for row in datasets.load_dataset(source, configuration, split="train", streaming=True, revision=revision):
                yield f"--data {name}, {source}", {CONFIGURATION: configuration, **row}
        except Exception as error:  # its many back ends raise all kinds
            raise unreadable(error) from None

    def unreadable(error: Exception) -> BadInput:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return BadInput(f"--data {name}: {source} can't be read ({reason}); try again, or give a copy with --source")

    try:
        revision = None if Path(source).exists() else HfApi().dataset_info(source).sha
    except Exception as error:
        raise unreadable(error) from None
    each = recipe.user_field == CONFIGURATION
    streams = [({user}, value) for user, value in recipe.users.items()] if each else [(set(recipe.users), None)]
    return [(users, documents(stream(value), recipe)) for users, value in streams], revision or "a folder"
