"""Text in, token tensors out: corpora, splits, tokenizers, batches, and the trigram that keeps everyone honest.

    python -c "import data; print(*data.load('builtin', users=4), sep='\\n')"

A domain is an iterator of documents (strings) in a fixed order. A user takes its test, then its validation, then
its training documents from its domain's iterator. No document is taken twice, so splits never overlap, and
neither do the shards of users who share a domain. Sizes are in bytes of UTF-8; 1 kB is 1000 bytes.
"""

import hashlib
import importlib.util
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

SPLITS = TRAIN, VALID, TEST = ("train", "valid", "test")
HELD_OUT = {TEST: 32_000, VALID: 16_000}  # bytes of a user's held-out text; of a folder's at most a tenth each
BUILTIN_TRAIN_KB = 40  # private text is scarce, and a run should be short
EXCERPT = 5_000  # characters of a builtin document that are used: many documents, none outweighing the others
EVERYTHING = 1 << 62
END = "<|endoftext|>"  # the token that stands before every document


class BadInput(Exception):
    """What was asked for can't be had. One line: the flag, its value, the remedy."""


class Diverged(BadInput):
    """A learning rate was too large."""


# --- domains: where documents come from ------------------------------------------------------------------------------

def shuffled(key: str) -> bytes:
    """A sort key for an order without rhyme or reason, yet the same on every machine."""
    return hashlib.sha256(key.encode()).digest()


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


BUILTIN = {
    "builtin": {  # four domains that share little
        "cpp": headers, "yaml": operators, "english": manual, "sympy": python("sympy"),
    },
    "builtin-python": {  # four that share much
        name: python(name) for name in ("sympy", "networkx", "torch", "setuptools")
    },
}


# --- splits: name -> split -> documents ------------------------------------------------------------------------------

Documents = dict[str, list[str]]  # of one user, by split


def distinct(documents: Iterable[str]) -> Iterator[str]:
    """The documents that aren't blank, each only once."""
    seen = set()
    for document in documents:
        if document.strip() and document not in seen:
            seen.add(document)
            yield document


def take(documents: Iterator[str], size: int) -> list[str]:
    """The next `size` bytes of documents. The last one is cut to fit, and its rest is nobody's.

    take(iter(["abc", "def", "gh"]), 5) -> ["abc", "de"]
    """
    taken = []
    while size > 0 and (document := next(documents, None)) is not None:
        raw = document.encode()
        taken.append(raw[:size].decode(errors="ignore"))
        size -= len(raw)
    return taken


def bytes_of(documents: list[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def divide(documents: Iterator[str], held_out: dict[str, int], train: int) -> Documents:
    """The next documents: so many bytes of them for test, for validation and for training."""
    return {name: take(documents, size) for name, size in {**held_out, TRAIN: train}.items()}


def excerpts(documents: Iterable[str]) -> Iterator[str]:
    return distinct(document[:EXCERPT] for document in documents)


def builtin_users(where: str, train: list[int]) -> Iterator[tuple[str, Documents]]:
    """Users named after the domains; in a second turn `cpp-2`, ..., from the documents that are left, and so on."""
    domains = {name: excerpts(documents()) for name, documents in BUILTIN[where].items()}
    for user, size in enumerate(train):
        turn, number = divmod(user, len(domains))
        name = list(domains)[number]
        yield f"{name}-{turn + 1}" if turn else name, divide(domains[name], HELD_OUT, size)


def folder_users(where: str, train: list[int]) -> Iterator[tuple[str, Documents]]:
    """A folder's users, by name: NAME.txt, NAME/ with a file per document, or NAME/{train,valid,test}.txt."""
    root = Path(where)
    if not root.is_dir():
        raise BadInput(f"--data {where}: not a folder; give one, or one of {', '.join(BUILTIN)}")
    paths = [path for path in visible(root.iterdir()) if path.is_dir() or path.suffix == ".txt"]
    names = [path.name if path.is_dir() else path.stem for path in paths]
    if len(set(names)) < len(names):
        raise BadInput(f"--data {where}: holds a NAME.txt and a NAME/ for the same user; rename one of them")
    if len(paths) < len(train):
        raise BadInput(f"--users {len(train)}: --data {where} holds {len(paths)} users, a NAME.txt or a sub-folder "
                       "each; add text or ask for fewer")
    for name, path, size in zip(names, paths, train, strict=False):
        if path.is_file():
            yield name, split_files([read(path)], size)
            continue
        given = {split: path / f"{split}.txt" for split in SPLITS}
        there = [split for split, file in given.items() if file.exists()]
        if not there:
            yield name, split_files([read(file) for file in visible(path.rglob("*")) if file.is_file()], size)
        elif len(there) == len(SPLITS):
            documents = {split: [read(file)] for split, file in given.items()}
            yield name, {**documents, TRAIN: take(iter(documents[TRAIN]), size)}
        else:
            raise BadInput(f"--data {path}: holds {there[0]}.txt but not all of train.txt, valid.txt and test.txt; "
                           "give all three or none")


def visible(paths: Iterable[Path]) -> list[Path]:
    """The paths in order, without hidden ones."""
    return sorted(path for path in paths if not path.name.startswith("."))


def split_files(files: list[str], train: int) -> Documents:
    """A folder's user. Ten files or more, none of them large, are documents; others are laid end to end and cut."""
    documents = list(distinct(files))
    total = bytes_of(documents)
    held_out = {split: min(size, total // 10) for split, size in HELD_OUT.items()}
    if len(documents) >= 10 and max(bytes_of([document]) for document in documents) <= total // 10:
        return divide(iter(sorted(documents, key=shuffled)), held_out, train)
    text = "\n".join(documents)
    pieces = (text[i:i + 100] for i in range(0, len(text), 100))
    return {name: ["".join(part)] for name, part in divide(pieces, held_out, train).items()}


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"--data {path}: byte {error.start} is not UTF-8; convert the file or take it away") from None


def mix(users: list[Documents]) -> Documents:
    """Validation and test text of the mixed target: the same share of every user's, one after the other."""
    mixed = {}
    for name in (VALID, TEST):
        share = min(bytes_of(user[name]) for user in users) // len(users)
        mixed[name] = [document for user in users for document in take(iter(user[name]), share)]
    return mixed


# --- tokens ----------------------------------------------------------------------------------------------------------

def tokenizer(name: str) -> tiktoken.Encoding:
    """`bytes`: tokens 0 to 255 are the bytes of UTF-8 and 256 is END. Else one of tiktoken's, such as `gpt2`."""
    if name == "bytes":
        bytewise = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=bytewise, special_tokens={END: 256})
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # a failed download: the errors of `requests` are OSErrors
        raise BadInput(f"--tokenizer {name}: its table can't be downloaded ({type(error).__name__}); connect once, "
                        "set TIKTOKEN_CACHE_DIR to a folder that holds it, or take bytes") from None


def encode(documents: list[str], encoding: tiktoken.Encoding) -> Tensor:
    """(n,) token numbers, END before every document."""
    tokens = [[encoding.eot_token, *encoding.encode_ordinary(document)] for document in documents]
    return torch.tensor([token for document in tokens for token in document])


@dataclass
class Text:
    """One user's text. Splits are (n,) token numbers."""

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    train_bytes: int
    test_bytes: int


def load(where: str, users: int, train_kb: list[float] | None = None, target: str = "own", encoding: str = "bytes",
         block_size: int = 64) -> list[Text]:
    """The text of each user.

    where: `builtin`, `builtin-python` or a folder. train_kb: of each user; None takes all there is of a folder, and
    BUILTIN_TRAIN_KB of a builtin. target: `own`, or `mixed` for validation and test text from all users alike.
    Raises BadInput.
    """
    tokens = tokenizer(encoding)
    if train_kb is None and where not in BUILTIN:
        wanted = [EVERYTHING] * users
    else:
        wanted = [round(1000 * kb) for kb in train_kb or [BUILTIN_TRAIN_KB] * users]
    try:
        named = list((builtin_users if where in BUILTIN else folder_users)(where, wanted))
    except OSError as error:
        raise BadInput(f"--data {where}: {error.filename}: {error.strerror}; check the folder") from None
    for (name, documents), size in zip(named, wanted, strict=True):
        got = bytes_of(documents[TRAIN])
        if got < size - 3 and size != EVERYTHING:  # a character that would be cut is up to 3 bytes
            raise BadInput(f"--train-kb {size / 1000:g}: user {name} has only {got / 1000:.0f} kB of training text; "
                           "give less, or fewer --users")
    mixed = mix([documents for _, documents in named]) if target == "mixed" else {}
    return [as_tokens(name, own | mixed, tokens, block_size) for name, own in named]


def load_public(encoding: str = "bytes", block_size: int = 64) -> Text:
    """The text that a base is pretrained on. Raises BadInput as `load`."""
    return as_tokens("public", divide(excerpts(public()), HELD_OUT, EVERYTHING), tokenizer(encoding), block_size)


def as_tokens(name: str, documents: Documents, tokens: tiktoken.Encoding, block_size: int) -> Text:
    """Raises BadInput where a split doesn't fill one window of block_size + 1 tokens."""
    splits = {split: encode(documents[split], tokens) for split in SPLITS}
    for split, tensor in splits.items():
        if len(tensor) <= block_size:
            raise BadInput(f"--block-size {block_size}: the {split} text of user {name} has {len(tensor)} tokens, too "
                           "few for one window and its last target; add text or take a smaller window")
    return Text(name, **splits, train_bytes=bytes_of(documents[TRAIN]), test_bytes=bytes_of(documents[TEST]))


# --- batches ---------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]  # inputs and, one token further on, targets: (B, T) each


def seeded(*key: object) -> torch.Generator:
    """A generator of its own for each key, such as (seed, user, purpose)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def windows_at(starts: Tensor, tokens: Tensor, T: int) -> Tensor:
    """The windows of T tokens, and the last one's target, that begin at these places: (n,) -> (n, T + 1)."""
    return tokens[starts[:, None] + torch.arange(T + 1)]


class RandomWindows:
    """An endless stream of batches: B random windows of T tokens from each of the texts.

    Each text's windows are drawn with a generator of its own, so they don't depend on what the other texts are.
    """

    def __init__(self, texts: list[Tensor], generators: list[torch.Generator], B: int, T: int, device: str = "cpu"):
        self.texts, self.generators, self.B, self.T, self.device = texts, generators, B, T, device
        self.tokens_per_batch = len(texts) * B * T

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        windows = torch.cat([self.draw(*pair) for pair in zip(self.texts, self.generators, strict=True)])
        windows = windows.to(self.device)  # (texts·B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def draw(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        return windows_at(torch.randint(len(tokens) - self.T, (self.B,), generator=generator), tokens, self.T)

    def state(self) -> list[Tensor]:
        """All that the next batches depend on, besides the texts."""
        return [generator.get_state() for generator in self.generators]


def spread_windows(tokens: Tensor, n: int, block_size: int, device: str = "cpu") -> Iterator[Batch]:
    """One batch of n windows that are spread evenly over a text."""
    windows = windows_at(torch.linspace(0, len(tokens) - block_size - 1, n).long(), tokens, block_size).to(device)
    yield windows[:, :-1], windows[:, 1:]


def ordered_windows(tokens: Tensor, batch_size: int, block_size: int, device: str = "cpu") -> Iterator[Batch]:
    """A whole text once, in order, in windows that don't overlap; the last one may be shorter.

    Every token but the first is a target exactly once.
    """
    tokens, T = tokens.to(device), block_size
    full = (len(tokens) - 1) // T * T  # targets in full windows
    yield from zip(tokens[:full].view(-1, T).split(batch_size), tokens[1:full + 1].view(-1, T).split(batch_size),
                   strict=True)
    if full < len(tokens) - 1:
        yield tokens[None, full:-1], tokens[None, full + 1:]


# --- the yardstick ---------------------------------------------------------------------------------------------------

def trigram_loss(train: Tensor, test: Tensor, vocab_size: int) -> float:
    """Mean cross-entropy in nats of test[1:] under a trigram fitted to train, with Witten-Bell interpolation:

        p(w | h) = (count(h w) + types(h) · p(w | h')) / (count(h) + types(h)),    h' = h without its first token,

    down to p(w) = 1/V; types(h) is the number of different tokens seen after h (Chen and Goodman 1999, section 2.5).
    """
    train, test = train.numpy().astype(np.int64), test.numpy().astype(np.int64)
    targets = len(test) - 1
    p = np.full(targets, 1 / vocab_size)
    for n in (1, 2, 3):
        seen, count = np.unique(ngrams(train, n, vocab_size), return_counts=True)
        histories, which = np.unique(seen // vocab_size, return_inverse=True)
        query = ngrams(test, n, vocab_size)
        count_hw = lookup(query, seen, count)
        count_h = lookup(query // vocab_size, histories, np.bincount(which, count))
        types_h = lookup(query // vocab_size, histories, np.bincount(which))
        p = np.where(count_h > 0, (count_hw + types_h * p) / np.maximum(count_h + types_h, 1), p)
    return float(-np.log(p).mean())


def ngrams(tokens: np.ndarray, n: int, V: int) -> np.ndarray:
    """The n-gram that ends at each token but the first, read as a number with digits of base V: (len(tokens) - 1,)."""
    padded = np.concatenate([tokens[:1], tokens])  # a token before the first, for its successor's trigram
    last = len(padded) - n + 1
    return sum(padded[3 - n + i:last + i] * V ** (n - 1 - i) for i in range(n))


def lookup(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each query, 0 where it isn't among the sorted keys."""
    place = np.searchsorted(keys, query).clip(max=len(keys) - 1)
    return np.where(keys[place] == query, values[place], 0)
