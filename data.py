"""Text in, batches out: each user's documents, their splits, tokens and batches.

    python -c "import data; print(data.tokenizer('bytes').encode('text'))"

A document is in one split of one user. Sizes are in bytes of UTF-8. support/text/sources.py
reads the documents.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
from torch import Tensor

from bilevel import Batch
from support.errors import BadInput
from support.pretrained.gguf_file import SMOLLM2, is_gguf
from support.pretrained.gguf_tokenizer import END, load_tokenizer
from support.text import sources
from support.text.sources import BUILTIN, SPLITS

TRAIN, VALID, TEST = SPLITS
HELD_OUT = {TEST: 32_000, VALID: 16_000}  # bytes; at most a tenth each in folders and tables
DOCUMENT = 1_000_000  # bytes; longer documents are running text, which is cut into splits
BUILTIN_TRAIN_KB = 40  # as private text is scarce, and runs should be short
EVERYTHING = 1 << 62  # bytes


@dataclass(frozen=True)
class DataConfig:
    """Which text users have. Each field is the flag of train.py with its name."""

    data: str = "builtin"  # builtin, builtin-python, a folder or a table
    users: int = 4
    train_kb: tuple[float, ...] | None = None  # one for each user
    valid_kb: tuple[float, ...] | None = None  # one for each user
    target: str = "own"  # own or mixed
    short_users: str = "refuse"  # refuse or leave-out
    user_field: str | None = None
    text_field: str | None = None
    block_size: int = 64

    @property
    def train_bytes(self) -> list[int]:
        """The size of each user's training text."""
        if self.train_kb:
            return [round(1000 * kb) for kb in self.train_kb]
        default = 1000 * BUILTIN_TRAIN_KB if self.data in BUILTIN else EVERYTHING
        return [default] * self.users


# --- documents: users and splits -------------------------------------------------------

Splits = dict[str, list[str]]  # split -> documents of one user


def load_documents(config: DataConfig, tokenizer: tiktoken.Encoding) -> dict[str, Splits]:
    """The documents of each user, by split. Raises BadInput."""
    try:
        if config.data in BUILTIN:
            users = builtin(config.data, config.train_bytes)
        else:
            users = choose_users(config, tokenizer)
    except OSError as error:
        place = error.filename or config.data
        raise BadInput(
            f"`data` {config.data}: {place}: {error.strerror or error}; check the file "
            "and its permissions"
        ) from None
    if config.valid_kb:
        for (name, splits), kb in zip(users.items(), config.valid_kb, strict=True):
            splits[VALID] = shortened(name, splits[VALID], kb)
    if config.target == "mixed":
        mixed = mix(list(users.values()))
        for splits in users.values():
            splits.update(mixed)
    return users


def builtin(name: str, train_bytes: list[int]) -> dict[str, Splits]:
    """Users named after the domains. If there are more users than domains, the next ones are
    `cpp-2`, ..., and get documents that are left. Raises BadInput."""
    domains = BUILTIN[name]
    streams = {domain: sources.builtin_documents(domain) for domain in domains}
    users = {}
    for number, size in enumerate(train_bytes):
        domain = domains[number % len(domains)]
        turn = number // len(domains) + 1
        user = domain if turn == 1 else f"{domain}-{turn}"
        users[user] = fill_splits(streams[domain], HELD_OUT | {TRAIN: size})
    return users


def fill_splits(documents: Iterator[str], sizes: dict[str, int], whole: bool = False) -> Splits:
    """The next documents for each split: `sizes` are in bytes, in the order of filling."""
    splits = {}
    for split, size in sizes.items():
        splits[split] = take(documents, size, whole)
    return splits


def take(documents: Iterator[str], size: int, whole: bool = False) -> list[str]:
    """The next `size` bytes of documents. The last document is cut, and its rest is lost.
    If `whole`, it isn't cut.

    take(iter(["abc", "def", "gh"]), 5) -> ["abc", "de"]
    """
    taken = []
    while size > 0:
        document = next(documents, None)
        if document is None:
            break
        encoded = document.encode()
        taken.append(document if whole else encoded[:size].decode(errors="ignore"))
        size -= len(encoded)
    return taken


def bytes_of(documents: list[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def choose_users(config: DataConfig, tokenizer: tiktoken.Encoding) -> dict[str, Splits]:
    """The first users of a folder or table, in order of names, who have enough text.

    A document that several users have counts for the first of them only. Raises BadInput, OSError.
    """
    found = read_users(config)
    users = {}
    seen = set()  # documents of the users so far
    left_out = 0
    for name in sorted(found):
        if len(users) == config.users:
            break
        size = config.train_bytes[len(users)]
        given = found[name]
        new = [document for document in dict.fromkeys(given[""]) if document not in seen]
        splits = split_documents(new, size) if new else cut_training(given, size)
        if config.short_users == "leave-out":
            problem = shortage(encode_user(name, splits, tokenizer), size, config.block_size)
            if problem:
                print(f"left out: {problem.replace('`', '')}", file=sys.stderr)
                left_out += 1
                continue
        users[name] = splits
        seen.update(new)
    check_number(config, len(users), left_out)
    if len(found) - left_out > len(users):
        print(
            f"{config.data} has text of {len(found) - left_out} users; the first {len(users)} by "
            "name take part",
            file=sys.stderr,
        )
    return users


def read_users(config: DataConfig) -> dict[str, Splits]:
    """The documents of each user of a folder or table, by split. Documents whose split the
    source doesn't decide are under "". Blank documents are left out."""
    user_field = config.user_field or "user"
    text_field = config.text_field or "text"
    users = {}
    for user, text, split in sources.read(config.data, user_field, text_field):
        if text.strip():
            splits = users.setdefault(user, {name: [] for name in ("", *SPLITS)})
            splits[split].append(text)
    return users


def split_documents(documents: list[str], train_bytes: int) -> Splits:
    """One user's documents, all different: at most a tenth for test, a tenth for validation,
    and `train_bytes` of the others.

    Documents stay whole, so a split may end one document late; digests decide which documents
    are in which split. Few or long documents are running text: joined, and cut.
    """
    total = bytes_of(documents)
    longest = max(len(document.encode()) for document in documents)
    sizes = {split: min(size, total // 10) for split, size in HELD_OUT.items()}
    sizes[TRAIN] = train_bytes
    if longest > total // 10 or longest > DOCUMENT:
        return cut("".join(documents), sizes)
    splits = fill_splits(iter(sorted(documents, key=digest)), sizes, whole=True)
    place = {document: number for number, document in enumerate(documents)}
    for part in splits.values():
        part.sort(key=place.get)
    return splits


def digest(document: str) -> int:
    """A sort key: an arbitrary order that doesn't depend on other documents."""
    raw = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little")


def cut(text: str, sizes: dict[str, int]) -> Splits:
    """Running text, cut into splits of these sizes in bytes."""
    rest = text.encode()
    splits = {}
    for split, size in sizes.items():
        start = rest[:size].decode(errors="ignore")  # without a character that was cut in half
        splits[split] = [start]
        rest = rest[size:]
    return splits


def cut_training(given: Splits, train_bytes: int) -> Splits:
    """Splits that the source decides; only their training text is cut."""
    splits = {split: given[split] for split in SPLITS}
    splits[TRAIN] = take(iter(given[TRAIN]), train_bytes)
    return splits


def check_number(config: DataConfig, found: int, left_out: int) -> None:
    """Raises BadInput if there are fewer users than wanted."""
    if found == config.users:
        return
    others = f", and {left_out} with too little text" if left_out else ""
    remedy = f"pass `users` {found}, or add text" if found else "add text"
    raise BadInput(
        f"`users` {config.users}: `data` {config.data} has text of {found}{others}; {remedy}"
    )


def shortened(user: str, held_out: list[str], kb: float) -> list[str]:
    """The first `kb` of a user's validation text. Raises BadInput."""
    available = bytes_of(held_out)
    if available < 1000 * kb:
        raise BadInput(
            f"`valid_kb` {kb:g}: user {user} has {available / 1000:g} kB held out; "
            "pass a smaller number"
        )
    return take(iter(held_out), round(1000 * kb))


def mix(users: list[Splits]) -> Splits:
    """Validation and test text of the mixed target: an equal share of each user's."""
    mixed = {}
    for split in (VALID, TEST):
        share = min(bytes_of(splits[split]) for splits in users) // len(users)
        mixed[split] = []
        for splits in users:
            mixed[split] += take(iter(splits[split]), share)
    return mixed


# --- tokens ----------------------------------------------------------------------------


def tokenizer(name: str) -> tiktoken.Encoding:
    """A tokenizer, whose vocabulary includes END. Raises BadInput.

    bytes: tokens 0 to 255 are the bytes of UTF-8, and 256 is END; smollm2 or a .gguf: the
    file's; any other: tiktoken's of that name, such as gpt2.
    """
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(
            name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={END: 256}
        )
    if is_gguf(name):
        return load_tokenizer(name, "tokenizer")
    if name not in tiktoken.list_encoding_names():
        raise BadInput(f"`tokenizer` {name}: unknown; expected bytes, gpt2, {SMOLLM2} or a .gguf")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # failed downloads raise subclasses of OSError
        raise BadInput(
            f"`tokenizer` {name}: its vocabulary can't be loaded ({type(error).__name__}); connect "
            "to the network once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or pass bytes"
        ) from None


def encode(document: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """The tokens of a document, after END: (n,)."""
    if tokenizer.name == "bytes":
        tokens = np.frombuffer(document.encode(), np.uint8)
    else:
        tokens = tokenizer.encode_ordinary(document)
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    end = np.array([tokenizer.eot_token], dtype)
    return np.concatenate([end, np.asarray(tokens, dtype)])


@dataclass
class Text:
    """One user's text. Each split is an array of tokens, (n,)."""

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    train_bytes: int
    test_bytes: int


def load(config: DataConfig, tokenizer: tiktoken.Encoding) -> list[Text]:
    """The text of each user. Raises BadInput."""
    return encode_users(config, load_documents(config, tokenizer), tokenizer)


def encode_users(
    config: DataConfig, users: dict[str, Splits], tokenizer: tiktoken.Encoding
) -> list[Text]:
    """The text of each user, from its documents. Raises BadInput."""
    texts = []
    for (name, splits), size in zip(users.items(), config.train_bytes, strict=True):
        text = encode_user(name, splits, tokenizer)
        problem = shortage(text, size, config.block_size)
        if problem:
            raise BadInput(
                f"`data` {config.data}: {problem}; add text, pass a smaller number or "
                "fewer `users`, or leave such users out with `short_users` leave-out"
            )
        texts.append(text)
    return texts


def encode_user(name: str, splits: Splits, tokenizer: tiktoken.Encoding) -> Text:
    tokens = {}
    for split in SPLITS:
        encoded = [encode(document, tokenizer) for document in splits[split]]
        tokens[split] = np.concatenate(encoded) if encoded else np.empty(0, np.uint8)
    return Text(
        name,
        tokens[TRAIN],
        tokens[VALID],
        tokens[TEST],
        train_bytes=bytes_of(splits[TRAIN]),
        test_bytes=bytes_of(splits[TEST]),
    )


def shortage(text: Text, train_bytes: int, block_size: int) -> str | None:
    """A sentence if a user has too little text: less than `train_bytes` of training text, or a
    split without one window and its last target. None if there is enough."""
    enough = train_bytes - 3  # a cut loses at most 3 bytes of a character
    if train_bytes < EVERYTHING and text.train_bytes < enough:
        return (
            f"user {text.name} has {text.train_bytes / 1000:g} kB of training text, not "
            f"`train_kb` {train_bytes / 1000:g}"
        )
    for split in SPLITS:
        n = len(getattr(text, split))
        if n <= block_size:
            return (
                f"the {split} text of user {text.name} has {n} tokens, too few for "
                f"`block_size` {block_size}"
            )
    return None


def load_pretraining(block_size: int, tokenizer: tiktoken.Encoding) -> Text:
    """The text that a base is pretrained on. Raises BadInput."""
    splits = fill_splits(sources.pretraining_documents(), HELD_OUT | {TRAIN: EVERYTHING})
    text = encode_user("pretraining", splits, tokenizer)
    problem = shortage(text, EVERYTHING, block_size)
    if problem:
        raise BadInput(f"`block_size` {block_size}: {problem}; pass a smaller number")
    return text


# --- batches ---------------------------------------------------------------------------


def seeded(*key: object) -> torch.Generator:
    """A random generator for each key, such as (seed, user, purpose)."""
    raw = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(raw[:8], "little"))


def joined(text: Text, splits: tuple[str, ...]) -> np.ndarray:
    """Concatenate these splits of a text."""
    return np.concatenate([getattr(text, split) for split in splits])


def windows_at(starts: Tensor, tokens: np.ndarray, block_size: int) -> Tensor:
    """Windows of a text, each with the target of its last token: (n,) -> (n, block_size + 1)."""
    places = starts[:, None] + torch.arange(block_size + 1)
    return torch.from_numpy(tokens[places].astype(np.int64))


class RandomWindows:
    """Endless batches: `batch_size` random windows from each of several texts.

    Each text has a generator of its own, so its windows don't depend on the other texts.
    """

    def __init__(
        self,
        texts: list[np.ndarray],
        generators: list[torch.Generator],
        batch_size: int,
        block_size: int,
        device: str = "cpu",
    ):
        self.texts = texts
        self.generators = generators
        self.batch_size = batch_size
        self.block_size = block_size
        self.device = device
        self.tokens_per_batch = len(texts) * batch_size * block_size

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        drawn = []
        for tokens, generator in zip(self.texts, self.generators, strict=True):
            number = len(tokens) - self.block_size
            starts = torch.randint(number, (self.batch_size,), generator=generator)
            drawn.append(windows_at(starts, tokens, self.block_size))
        windows = torch.cat(drawn).to(self.device)  # (texts * batch_size, block_size + 1)
        return windows[:, :-1], windows[:, 1:]

    def state(self) -> list[Tensor]:
        """The state of the batches, without the texts."""
        return [generator.get_state() for generator in self.generators]

    def load(self, state: list[Tensor]) -> None:
        for generator, saved in zip(self.generators, state, strict=True):
            generator.set_state(saved.cpu())


def spread_windows(
    tokens: np.ndarray, n: int, block_size: int, device: str = "cpu"
) -> Iterator[Batch]:
    """One batch of n windows, spread evenly over a text."""
    last = len(tokens) - block_size - 1
    starts = torch.linspace(0, last, n, dtype=torch.float64).long()
    windows = windows_at(starts, tokens, block_size).to(device)
    yield windows[:, :-1], windows[:, 1:]


def ordered_windows(
    tokens: np.ndarray, block_size: int, device: str = "cpu", batch_size: int | None = None
) -> Iterator[Batch]:
    """A whole text once, in order. Windows do not overlap, and the last one may be shorter.

    Every token but the first is a target exactly once. By default a batch has about 1024 tokens.
    """
    batch_size = batch_size or max(1, 1024 // block_size)
    stream = torch.from_numpy(tokens.astype(np.int64)).to(device)
    full = (len(stream) - 1) // block_size * block_size  # targets in full windows
    inputs = stream[:full].view(-1, block_size)  # (windows, block_size)
    targets = stream[1 : full + 1].view(-1, block_size)
    for start in range(0, len(inputs), batch_size):
        batch = slice(start, start + batch_size)
        yield inputs[batch], targets[batch]
    if full < len(stream) - 1:
        yield stream[None, full:-1], stream[None, full + 1 :]
