"""Text in, batches out: who gets which documents, tokens, batches.

    python -c "import data; print(data.tokenizer('bytes').encode('text'))"

A document stands in one split of one user. Sizes are in bytes of UTF-8. Where documents come from is said in
support/text/corpora.py.
"""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
import torch
from torch import Tensor

from support.errors import BadInput
from support.pretrained.gguf_file import SMOLLM2, is_gguf
from support.pretrained.gguf_tokenizer import END, load_tokenizer
from support.text import corpora
from support.text.corpora import BUILTIN, CORPORA, CORPUS_EXCERPT, EVERYTHING

if TYPE_CHECKING:
    from support.runs.settings import Settings

SPLITS = TRAIN, VALID, TEST = corpora.SPLITS
HELD_OUT = {TEST: 32_000, VALID: 16_000}  # bytes of a user's held-out text; of anyone's own text at most a tenth each
DOCUMENT = 1_000_000  # bytes; a longer one is running text, which is cut into splits
BUILTIN_TRAIN_KB = 40  # private text is scarce, and a run should be short

# --- who gets which documents ----------------------------------------------------------------------------------------

Splits = dict[str, list[str]]  # one user's documents, by split


def take(documents: Iterator[str], size: int, whole: bool = False) -> list[str]:
    """The next `size` bytes of documents. The last one is cut to fit, and its rest is nobody's; or it stays whole.

    take(iter(["abc", "def", "gh"]), 5) -> ["abc", "de"]
    """
    taken = []
    while size > 0 and (document := next(documents, None)) is not None:
        raw = document.encode()
        taken.append(document if whole else raw[:size].decode(errors="ignore"))
        size -= len(raw)
    return taken


def bytes_of(documents: list[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def deal(documents: Iterator[str], held_out: dict[str, int], train: int, whole: bool = False) -> Splits:
    """The next documents: so many bytes of them for test, for validation and for training."""
    return {split: take(documents, size, whole) for split, size in {**held_out, TRAIN: train}.items()}


def builtin(where: str, train: list[int]) -> dict[str, Splits]:
    """Users named after the domains; in a second turn `cpp-2`, ..., from the documents that are left, and so on."""
    domains = {name: corpora.excerpts(documents()) for name, documents in BUILTIN[where].items()}
    users = {}
    for number, size in enumerate(train):
        turn, i = divmod(number, len(domains))
        name = list(domains)[i]
        users[f"{name}-{turn + 1}" if turn else name] = deal(domains[name], HELD_OUT, size)
    return users


def split(documents: list[str], train: int) -> Splits:
    """One user's documents: at most a tenth for test, a tenth for validation, and `train` bytes of the rest.

    Documents stay whole, so that a split may end one document late; which documents go where depends on their digests.
    Where there are fewer than ten, or one of them is longer than a tenth of all or than DOCUMENT, they are running
    text: joined, and cut. (No two documents are alike.)
    """
    total, longest = bytes_of(documents), max(len(document.encode()) for document in documents)
    held_out = {name: min(size, total // 10) for name, size in HELD_OUT.items()}
    if longest <= min(total // 10, DOCUMENT):
        place = {document: number for number, document in enumerate(documents)}
        dealt = deal(iter(sorted(documents, key=order)), held_out, train, whole=True)
        return {name: sorted(part, key=place.get) for name, part in dealt.items()}
    text, parts = "".join(documents).encode(), {}
    for name, size in {**held_out, TRAIN: train}.items():
        parts[name], text = [text[:size].decode(errors="ignore")], text[size:]
    return parts


def order(document: str) -> int:
    """A document's place in an arbitrary but fixed order: its digest as a number."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "little")


def anyones(settings: "Settings", train: list[int], tokenizer: tiktoken.Encoding) -> dict[str, Splits]:
    """The first users, by name, who have enough text. Of copies only one counts, that of the first user by name.

    Raises BadInput, OSError.
    """
    held = defaultdict(lambda: {"": [], **{name: [] for name in SPLITS}})
    # what is streamed at least, so that what is held out doesn't depend on how much is asked for
    least = 1000 * (CORPORA[settings.data].train_kb or 0) if settings.data in CORPORA else 0
    size = max(*train, least) + 10 * max(HELD_OUT.values()) + len(SPLITS) * 4 * CORPUS_EXCERPT  # enough for every split
    for user, text, meant in corpora.read(settings, min(size, EVERYTHING)):
        if text.strip():
            held[user][meant].append(text)
    users, seen, left_out = {}, set(), 0
    for name in sorted(held):
        if len(users) == len(train):
            break
        own, wanted = held[name], train[len(users)]
        documents = list(dict.fromkeys(text for text in own.pop("") if text not in seen))
        if documents:
            own = split(documents, wanted)
        elif wanted < EVERYTHING:
            own[TRAIN] = take(iter(own[TRAIN]), wanted)
        leaving_out = settings.short_users == "leave-out"  # else `load` refuses, once it has the tokens
        if leaving_out and (problem := lack(as_tokens(name, own, tokenizer), wanted, settings.block_size)):
            print(f"left out: {problem.replace('`', '')}", file=sys.stderr)
            left_out += 1
        else:
            users[name] = own
            seen.update(documents)
    if len(users) < len(train):
        others = f", and {left_out} with too little text" if left_out else ""
        raise BadInput(f"`users` {len(train)}: `data` {settings.data} has text of {len(users)}{others}; "
                       + (f"take `users` {len(users)}, or add text" if users else "add text"))
    if (more := len(held) - left_out) > len(users):
        print(f"{settings.data} has text of {more} users; the first {len(users)} by name take part", file=sys.stderr)
    return users


def mix(users: Iterable[Splits]) -> Splits:
    """Validation and test text of the mixed target: the same share of every user's, one after the other."""
    users, mixed = list(users), {}
    for name in (VALID, TEST):
        share = min(bytes_of(user[name]) for user in users) // len(users)
        mixed[name] = [document for user in users for document in take(iter(user[name]), share)]
    return mixed


# --- tokens ----------------------------------------------------------------------------------------------------------

def tokenizer(name: str) -> tiktoken.Encoding:
    """`bytes`: tokens 0 to 255 are the bytes of UTF-8 and 256 is END. `smollm2` or a .gguf: the file's own. Else one of
    tiktoken's, such as `gpt2`. All have a token called END. Raises BadInput."""
    if name == "bytes":
        bytewise = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=bytewise, special_tokens={END: 256})
    if is_gguf(name):
        return load_tokenizer(name, "tokenizer")
    if name not in tiktoken.list_encoding_names():
        raise BadInput(f"`tokenizer` {name}: not known; take bytes, gpt2, {SMOLLM2} or a .gguf")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # a failed download: the errors of `requests` are OSErrors
        raise BadInput(f"`tokenizer` {name}: its table can't be loaded ({type(error).__name__}); connect to the "
                       "network once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or take bytes") from None


def encode(document: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """(n,) token numbers: END, then the document's."""
    own = tokenizer.name == "bytes"
    text = np.frombuffer(document.encode(), np.uint8) if own else tokenizer.encode_ordinary(document)
    kind = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    return np.concatenate([np.array([tokenizer.eot_token], kind), np.asarray(text, kind)])


@dataclass
class Text:
    """One user's text. Splits are (n,) token numbers."""

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    train_bytes: int
    test_bytes: int


def as_tokens(name: str, documents: Splits, tokenizer: tiktoken.Encoding) -> Text:
    encoded = {split: [encode(document, tokenizer) for document in documents[split]] for split in SPLITS}
    numbers = {split: np.concatenate([np.empty(0, np.uint8), *parts]) for split, parts in encoded.items()}
    return Text(name, **numbers, train_bytes=bytes_of(documents[TRAIN]), test_bytes=bytes_of(documents[TEST]))


def lack(text: Text, wanted: int, block_size: int) -> str | None:
    """What a user hasn't enough text for: `wanted` bytes for training, a window and its last target in each split."""
    if wanted < EVERYTHING and text.train_bytes < wanted - 3:  # a character that would be cut is up to 3 bytes
        return (f"user {text.name} has {text.train_bytes / 1000:g} kB of training text, not `train_kb` "
                f"{wanted / 1000:g}")
    for name in SPLITS:
        if (n := len(getattr(text, name))) <= block_size:
            return f"the {name} text of user {text.name} has {n} tokens, too few for `block_size` {block_size}"


def training_bytes(settings: "Settings") -> list[int]:
    """How much training text each user is to have."""
    where = settings.data
    usual = BUILTIN_TRAIN_KB if where in BUILTIN else CORPORA[where].train_kb if where in CORPORA else None
    return [round(1000 * kb) if kb else EVERYTHING for kb in settings.train_kb or [usual] * settings.users]


def dealt(settings: "Settings", tokenizer: tiktoken.Encoding) -> dict[str, Splits]:
    """The documents of each user. Raises BadInput."""
    where, train = settings.data, training_bytes(settings)
    try:
        users = builtin(where, train) if where in BUILTIN else anyones(settings, train, tokenizer)
    except OSError as error:
        raise BadInput(f"`data` {where}: {error.filename or where}: {error.strerror or error}; check the file and its "
                       "folder, or take another `cache`") from None
    for (name, documents), kb in zip(users.items(), settings.valid_kb or (), strict=False):
        if (held := bytes_of(documents[VALID])) < 1000 * kb:
            raise BadInput(f"`valid_kb` {kb:g}: user {name} has {held / 1000:g} kB held out; ask for less")
        documents[VALID] = take(iter(documents[VALID]), round(1000 * kb))
    mixed = mix(users.values()) if settings.target == "mixed" else {}
    return {name: documents | mixed for name, documents in users.items()}


def load(settings: "Settings", tokenizer: tiktoken.Encoding, users: dict[str, Splits] | None = None) -> list[Text]:
    """The text of each user, from documents that are dealt now, or were. Raises BadInput."""
    texts = [as_tokens(name, documents, tokenizer) for name, documents in (users or dealt(settings, tokenizer)).items()]
    for text, wanted in zip(texts, training_bytes(settings), strict=True):
        if problem := lack(text, wanted, settings.block_size):
            raise BadInput(f"`data` {settings.data}: {problem}; add text, ask for less or for fewer `users`, or leave "
                           "such users out with `short_users` leave-out")
    return texts


def load_pretraining(block_size: int, tokenizer: tiktoken.Encoding) -> Text:
    """The text that a base is pretrained on. Raises BadInput."""
    documents = corpora.excerpts(corpora.pretraining())
    text = as_tokens("pretraining", deal(documents, HELD_OUT, EVERYTHING), tokenizer)
    if problem := lack(text, EVERYTHING, block_size):
        raise BadInput(f"`block_size` {block_size}: {problem}; take a smaller one")
    return text


# --- batches ---------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]  # inputs and, one token further on, targets: (B, T) each


def seeded(*key: object) -> torch.Generator:
    """A generator of its own for each key, such as (seed, user, purpose)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def joined(text: Text, splits: tuple[str, ...]) -> np.ndarray:
    """These splits of a text, end to end."""
    return np.concatenate([getattr(text, name) for name in splits])


def windows_at(starts: Tensor, text: np.ndarray, T: int) -> Tensor:
    """The windows of T tokens, and the last one's target, that begin at these places: (n,) -> (n, T + 1)."""
    return torch.from_numpy(text[starts[:, None] + torch.arange(T + 1)].astype(np.int64))


class RandomWindows:
    """An endless stream of batches: B random windows of T tokens from each of the texts.

    Each text's windows are drawn with a generator of its own, so they don't depend on what the other texts are.
    """

    def __init__(self, texts: list[np.ndarray], generators: list[torch.Generator], B: int, T: int, device: str = "cpu"):
        self.texts, self.generators, self.B, self.T, self.device = texts, generators, B, T, device
        self.tokens_per_batch = len(texts) * B * T

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        windows = torch.cat([self.draw(*pair) for pair in zip(self.texts, self.generators, strict=True)])
        windows = windows.to(self.device)  # (texts·B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def draw(self, text: np.ndarray, generator: torch.Generator) -> Tensor:
        return windows_at(torch.randint(len(text) - self.T, (self.B,), generator=generator), text, self.T)

    def state(self) -> list[Tensor]:
        """Everything that the next batches depend on, besides the texts."""
        return [generator.get_state() for generator in self.generators]

    def load(self, state: list[Tensor]) -> None:
        for generator, own in zip(self.generators, state, strict=True):
            generator.set_state(own.cpu())


def spread_windows(text: np.ndarray, n: int, T: int, device: str = "cpu") -> Iterator[Batch]:
    """One batch of n windows that are spread evenly over a text."""
    windows = windows_at(torch.linspace(0, len(text) - T - 1, n, dtype=torch.float64).long(), text, T).to(device)
    yield windows[:, :-1], windows[:, 1:]


def ordered_windows(text: np.ndarray, T: int, device: str = "cpu", B: int | None = None) -> Iterator[Batch]:
    """A whole text once, in order, in windows that don't overlap; the last one may be shorter.

    Every token but the first is a target exactly once. B: windows in a batch (default: some 1024 tokens).
    """
    B = B or max(1, 1024 // T)
    text = torch.from_numpy(text.astype(np.int64)).to(device)
    full = (len(text) - 1) // T * T  # targets in full windows
    yield from zip(text[:full].view(-1, T).split(B), text[1:full + 1].view(-1, T).split(B), strict=True)
    if full < len(text) - 1:
        yield text[None, full:-1], text[None, full + 1:]
