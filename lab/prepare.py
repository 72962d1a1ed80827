"""Write a public corpus as a table or a folder, for `--data`.

python -m lab.prepare agnews
python train.py --data agnews.jsonl

agnews        four topics of AG News; one .csv file
wikipedia     de, fr, it, nl; streamed from Hugging Face's hub (pip install datasets)
slimpajama    arxiv, book, github, stackexchange; also streamed
commoncorpus  books, patents, tenders, youtube; also streamed
languages     Debian's installation guide in de, fr, it, nl; free under the GPL, version 2.
              Its sections are translations of one another. First, on Debian:

apt-get download installation-guide-amd64  # or from packages.debian.org
dpkg -x installation-guide-amd64_*.deb debian
python -m lab.prepare languages --source debian
"""

import html
import json
import math
import os
import re
import shutil
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from support.errors import BadInput, optional
from support.files import write
from support.runs.command_line import parsed, run_command
from support.runs.flags import check_values, setting
from support.text.sources import PREPARED, TABLES, field_of, rows, text_of


@dataclass
class Preparation:
    """Write a public corpus as a table or a folder. Raises BadInput."""

    source: str | None = setting(
        None,
        "a copy of the corpus to read: a .csv or .jsonl file, or a folder (default: the network)",
    )
    out: str | None = setting(None, "the table or folder to write (default: agnews.jsonl, ...)")
    kb: float | None = setting(
        None,
        "text of each user in kB (default: 2100 of streamed corpora, which is enough "
        "for 2000 of training text; all of others)",
        float,
        above=0,
    )

    def __post_init__(self):
        check_values(self)


# --- tables ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """A table of documents, and the field that names a document's user."""

    address: str  # of a .csv file; or a data set of Hugging Face's hub
    user_field: str
    users: dict[str, str]  # user -> value of user_field
    text_fields: tuple[str, ...] = ("text",)  # "a.b" is field b of field a
    columns: tuple[str, ...] | None = None  # of a .csv file without a header
    excerpt: int | None = 20_000  # characters used of a document
    kb: float | None = 2100


CONFIGURATION = "configuration"  # each user is a configuration of the data set
GITHUB = "https://raw.githubusercontent.com"
CORPORA = {
    "agnews": Corpus(
        f"{GITHUB}/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/train.csv",
        user_field="class",
        users={"business": "3", "science": "4", "sports": "2", "world": "1"},
        text_fields=("title", "description"),
        columns=("class", "title", "description"),
        excerpt=None,
        kb=None,
    ),
    "wikipedia": Corpus(
        "wikimedia/wikipedia",
        user_field=CONFIGURATION,
        users={"de": "20231101.de", "fr": "20231101.fr", "it": "20231101.it", "nl": "20231101.nl"},
    ),
    "slimpajama": Corpus(
        "DKYoon/SlimPajama-6B",
        user_field="meta.redpajama_set_name",
        users={
            "arxiv": "RedPajamaArXiv",
            "book": "RedPajamaBook",
            "github": "RedPajamaGithub",
            "stackexchange": "RedPajamaStackExchange",
        },
    ),
    "commoncorpus": Corpus(
        "PleIAs/common_corpus",
        user_field="collection",
        users={
            "books": "US-PD-Books",
            "patents": "USPTO",
            "tenders": "TEDEUTenders",
            "youtube": "Youtube-Commons-Whisper",
        },
    ),
}
REMEDY = "pass another `source`"
Rows = Iterator[tuple[str, dict]]  # each with its place, for messages


def write_table(name: str, settings: Preparation, out: Path) -> None:
    """Write a corpus as rows of user and text. Raises BadInput, OSError."""
    corpus = CORPORA[name]

    def save(path: Path) -> None:
        found = set()
        with open(path, "w", encoding="utf-8") as file:
            for user, text in tqdm(documents(name, settings), desc=name, unit=" documents"):
                row = {"user": user, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                found.add(user)
        missing = corpus.users.keys() - found
        if missing:
            raise BadInput(f"`source`: has no text of {', '.join(sorted(missing))}; {REMEDY}")

    write(out, save)


def documents(name: str, settings: Preparation) -> Iterator[tuple[str, str]]:
    """The users and documents of a corpus. Raises BadInput, OSError."""
    corpus = CORPORA[name]
    kb = settings.kb or corpus.kb or math.inf
    source = settings.source or corpus.address
    everyone = list(corpus.users)
    if Path(source).suffix in TABLES:
        with local_copy(source) as path:
            table = rows(path, corpus.columns, flag="source")
            yield from documents_in(table, corpus, everyone, 1000 * kb)
    elif corpus.user_field == CONFIGURATION:
        for user in everyone:
            table = stream(source, corpus.users[user])
            yield from documents_in(table, corpus, [user], 1000 * kb)
    else:
        yield from documents_in(stream(source), corpus, everyone, 1000 * kb)


@contextmanager
def local_copy(source: str) -> Iterator[Path]:
    """The path of a file, downloaded first if `source` is an address. Raises BadInput."""
    if "://" not in source:
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(source).name)
        try:
            urllib.request.urlretrieve(source, path)
        except (OSError, HTTPException) as error:
            raise BadInput(
                f"{source}: can't be downloaded ({error}); try again, or pass a copy with `source`"
            ) from None
        yield path


def stream(source: str, configuration: str | None = None) -> Rows:
    """The rows of a data set of the hub, or of a local copy. Raises BadInput."""
    remedy = "pip install datasets, or pass a .csv or .jsonl file with `source`"
    datasets = optional("datasets", source, remedy)
    try:
        table = datasets.load_dataset(source, configuration, split="train", streaming=True)
        for row in table:
            yield f"`source` {source}", {**row, CONFIGURATION: configuration}
    except Exception as error:  # its back ends raise many kinds of errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(
            f"`source` {source}: can't be read ({reason[:200]}); try again, or pass a copy"
        ) from None


def documents_in(
    table: Rows, corpus: Corpus, users: list[str], limit: float
) -> Iterator[tuple[str, str]]:
    """Users and documents, until each of these users has `limit` bytes. Copies are left out.
    Raises BadInput."""
    user_of = {value: user for user, value in corpus.users.items()}
    sizes = Counter()
    seen = set()
    for place, row in table:
        value = field_of(row, corpus.user_field, place, REMEDY)
        user = user_of.get(str(value))
        if user is None or sizes[user] >= limit:
            continue
        texts = [text_of(row, field, place, REMEDY) for field in corpus.text_fields]
        text = "\n".join(texts)[: corpus.excerpt]
        if corpus.columns:
            text = clean_news(text)
        if (user, text) not in seen:
            seen.add((user, text))
            sizes[user] += len(text.encode())
            yield user, text
        if all(sizes[each] >= limit for each in users):
            return


def clean_news(text: str) -> str:
    """Repair a text of AG News: a backslash was a line end, except before "$", and entities
    lost their "&"."""
    text = re.sub(r"\\+(?=\$)", "", text)
    text = re.sub(
        r"[ &]?(#\d+|amp|quot|lt|gt|nbsp|hellip);",
        lambda entity: html.unescape(f"&{entity[1]};"),
        text,
    )
    return re.sub(r"\\+", "\n", text)


# --- Debian's installation guide -------------------------------------------------------

LANGUAGES = ("de", "fr", "it", "nl")
GUIDE = "usr/share/doc/installation-guide-amd64"
LEFT_OUT = ("index", "apd", "ape", "apf")  # contents, and the licence, always in English
SHORTEST = 400  # characters of a section
NO_TEXT_TAGS = ("script", "style", "head")
NO_TEXT_CLASSES = ("navheader", "navfooter", "toc")
LINES = ("li", "tr", "pre", "dt", "dd", "br")  # tags that begin a line
PARAGRAPHS = ("p", "h1", "h2", "h3", "h4")


class Section(HTMLParser):
    """The text of a page, without navigation. Blanks are kept in <pre> only."""

    def __init__(self, page: str):
        super().__init__()
        self.parts = []
        self.skipped = []  # open tags whose content is not text
        self.preformatted = 0  # how many <pre> are open
        self.feed(page)
        text = re.sub(r"[ \t]+\n", "\n", "".join(self.parts))
        text = re.sub(r"\n{3,}", "\n\n", text)
        self.text = text.strip() + "\n"

    def handle_starttag(self, tag: str, attributes: list) -> None:
        nested = self.skipped and tag == "div"
        if nested or tag in NO_TEXT_TAGS or dict(attributes).get("class") in NO_TEXT_CLASSES:
            self.skipped.append(tag)
        if tag == "pre":
            self.preformatted += 1
        if tag in LINES:
            self.parts.append("\n")
        if tag in PARAGRAPHS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self.skipped and tag == self.skipped[-1]:
            self.skipped.pop()
        if tag == "pre":
            self.preformatted -= 1

    def handle_data(self, text: str) -> None:
        if self.skipped:
            return
        self.parts.append(text if self.preformatted else re.sub(r"\s+", " ", text))


def write_languages(package: str | None, out: Path) -> None:
    """Write a folder for each language, with a file for each section. Raises BadInput, OSError.

    package: the folder in which the Debian package was unpacked.
    """
    if package is None:
        raise BadInput(
            "`source`: needed for languages; apt-get download installation-guide-amd64, "
            "dpkg -x installation-guide-amd64_*.deb debian, and pass `source` debian"
        )
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        for language in LANGUAGES:
            pages = sorted(Path(package, GUIDE, language).glob("*.html"))
            if not pages:
                raise BadInput(
                    f"`source` {package}: holds no {GUIDE}/{language}; unpack the "
                    "Debian package there"
                )
            (temporary / language).mkdir(parents=True)
            for page in tqdm(pages, desc=language, unit=" pages"):
                text = Section(page.read_text(encoding="utf-8", errors="replace")).text
                if not page.name.startswith(LEFT_OUT) and len(text) > SHORTEST:
                    file = temporary / language / f"{page.stem}.txt"
                    file.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- the command -----------------------------------------------------------------------


def prepare(name: str, settings: Preparation) -> None:
    """Write a corpus. Raises BadInput, OSError."""
    out = Path(settings.out or PREPARED[name])
    if out.exists():
        raise BadInput(f"`out` {out}: exists; remove it, or pass another `out`")
    if name == "languages":
        write_languages(settings.source, out)
    else:
        write_table(name, settings, out)
    print(f"{out}: python train.py --data {out}")


def from_command_line(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        parsed(["--help"], Preparation)
    name, *flags = arguments
    if name not in PREPARED:
        raise BadInput(f"{name}: not a corpus; expected one of {', '.join(PREPARED)}")
    prepare(name, parsed(flags, Preparation))


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("lab.prepare", lambda: from_command_line(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
