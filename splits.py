"""Who gets which text: users, and their training, validation and test text.

A document stands in one split of one user. Of a builtin domain a user takes its test, then its validation, then its
training documents, and the next user of the same domain goes on from there. Of other text, a user's documents are
put in an order without rhyme or reason and dealt out likewise. Of copies only one counts, that of the first user by
name. Sizes are in bytes of UTF-8.
"""

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from corpora import BUILTIN, EVERYTHING, PUBLIC_EXCERPT, BadInput, Corpus, Piece, excerpts

SPLITS = TRAIN, VALID, TEST = ("train", "valid", "test")
HELD_OUT = {TEST: 32_000, VALID: 16_000}  # bytes of a user's held-out text; of anyone's own at most a tenth each
DOCUMENT = 1_000_000  # bytes; a longer one is running text, which is cut into splits end to end

# --- builtin text ----------------------------------------------------------------------------------------------------

Documents = dict[str, list[str]]  # of one user, by split


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


def builtin_users(where: str, train: list[int]) -> Iterator[tuple[str, Documents]]:
    """Users named after the domains; in a second turn `cpp-2`, ..., from the documents that are left, and so on."""
    domains = {name: excerpts(documents()) for name, documents in BUILTIN[where].items()}
    for user, size in enumerate(train):
        turn, number = divmod(user, len(domains))
        name = list(domains)[number]
        yield f"{name}-{turn + 1}" if turn else name, divide(domains[name], HELD_OUT, size)


def mix(users: Iterable[Documents]) -> Documents:
    """Validation and test text of the mixed target: the same share of every user's, one after the other."""
    users, mixed = list(users), {}
    for name in (VALID, TEST):
        share = min(bytes_of(user[name]) for user in users) // len(users)
        mixed[name] = [document for user in users for document in take(iter(user[name]), share)]
    return mixed


# --- any other text: read twice, once to see what there is and once to deal it out -----------------------------------

@dataclass
class Holding:
    """What there is of one user: of each piece of its text, in the order they come in, a hash and the bytes."""

    keys: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("Q"))
    originals: np.ndarray | None = None  # which of the pieces are no copies of earlier ones

    def add(self, raw: bytes) -> None:
        self.keys.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"))
        self.sizes.append(len(raw))


@dataclass
class Plan:
    """The bytes of one user in an order, of which each split is a range."""

    starts: np.ndarray  # (pieces,) where each begins in that order; -1: a copy of another
    ranges: dict[str, tuple[int, int]]

    def cut(self, number: int, text: str) -> Iterator[tuple[str, str]]:
        """The splits that a piece of text belongs to, each with its part of it."""
        start, raw = int(self.starts[number]) if number < len(self.starts) else -1, text.encode()
        for split, (first, end) in self.ranges.items():
            if 0 <= start < end and first < start + len(raw):
                yield split, raw[max(first - start, 0):end - start].decode(errors="ignore")


def filled(corpus: Corpus) -> Iterator[Piece]:
    """The pieces that aren't blank."""
    pieces = tqdm(corpus.pieces(), "reading", unit=" texts", unit_scale=True, delay=1)
    return (piece for piece in pieces if piece.text.strip())


def survey(corpus: Corpus) -> dict[str, dict[str, Holding]]:
    """User, in order of names -> the split that its text is meant for, or "" -> what there is."""
    users = defaultdict(lambda: defaultdict(Holding))
    for user, text, split in filled(corpus):
        users[user][split].add(text.encode())
    holdings = [users[name][split] for name in sorted(users) for split in sorted(users[name])]
    find_copies(holdings)
    return dict(sorted(users.items()))


def find_copies(holdings: list[Holding]) -> None:
    """Of texts that several have, or one several times, the first is the original."""
    keys = np.concatenate([np.empty(0, np.uint64), *(np.array(holding.keys) for holding in holdings)])
    original = np.zeros(len(keys), bool)
    original[np.unique(keys, return_index=True)[1]] = True
    end = 0
    for holding in holdings:
        start, end = end, end + len(holding.keys)
        holding.originals = original[start:end]


def plan(holding: Holding, split: str, train: int) -> Plan:
    """Where a user's text goes: to the split that it is meant for, or to three.

    Documents stay whole, so that a split may end one document later than it should. Where there are fewer than ten, or
    one of them is longer than a tenth of all or than DOCUMENT, they are laid end to end, as they come, and then cut.
    """
    keys, sizes = np.array(holding.keys), np.array(holding.sizes).astype(np.int64)
    order = np.arange(len(keys)) if split else np.flatnonzero(holding.originals)
    total = int(sizes[order].sum())
    wanted = {split: train if split == TRAIN else total} if split else {
        **{held: min(size, total // 10) for held, size in HELD_OUT.items()}, TRAIN: train}
    documents = not split and len(order) >= 10 and sizes[order].max() <= min(total // 10, DOCUMENT)
    if documents:
        order = order[np.argsort(keys[order], kind="stable")]  # by hashes: an order without rhyme or reason
    ends = sizes[order].cumsum()
    starts = np.full(len(keys), -1)
    starts[order] = ends - sizes[order]
    ranges, start = {}, 0
    for name, size in wanted.items():
        end = min(start + size, total)
        if documents and end > start:
            end = int(ends[np.searchsorted(ends, end)])
        ranges[name], start = (start, end), end
    return Plan(starts, ranges)


Plans = dict[str, Plan]  # of one user, by the split that the text is meant for, or ""


def sizes(plans: Plans) -> dict[str, int]:
    """The bytes of each split."""
    ranges = [item for each in plans.values() for item in each.ranges.items()]
    return dict.fromkeys(SPLITS, 0) | {name: end - start for name, (start, end) in ranges}


def room(train: int) -> int:
    """How much text it takes for so much training text: what is held out is at most a tenth of all, and each split may
    end one document late."""
    longest = 4 * PUBLIC_EXCERPT  # bytes
    return min(max(10 * max(HELD_OUT.values()), train + sum(HELD_OUT.values()) + len(SPLITS) * longest), EVERYTHING)


def lack(name: str, size: dict[str, int], train: int, least: int) -> str | None:
    """What a user hasn't enough text for; least: bytes of a split."""
    if train < EVERYTHING and size[TRAIN] < train - 3:  # a character that would be cut is up to 3 bytes
        return f"user {name} has {size[TRAIN] / 1000:g} kB of training text, not --train-kb {train / 1000:g}"
    for split in SPLITS:
        if size[split] < least:
            return f"the {split} text of user {name} has {size[split]} bytes, too few for --block-size {least}"


def choose(users: dict[str, dict[str, Holding]], where: str, train: list[int], least: int, short: str,
           left_out: dict[str, str]) -> tuple[dict[str, Plans], dict[str, str]]:
    """The first users who have enough text, and why the others before them are left out. Raises BadInput."""
    chosen, left_out = {}, dict(left_out)
    for name, holdings in users.items():
        if len(chosen) == len(train):
            break
        if name in left_out:
            continue
        wanted = train[len(chosen)]
        plans = {split: plan(holding, split, wanted) for split, holding in holdings.items()}
        problem = lack(name, sizes(plans), wanted, least)
        if problem and short == "refuse":
            raise BadInput(f"--data {where}: {problem}; add text, ask for less, or leave such users out with "
                           "--short-users leave-out")
        if problem:
            left_out[name] = problem
        else:
            chosen[name] = plans
    if len(chosen) < len(train):
        others = f", and {len(left_out)} with too little text" if left_out else ""
        raise BadInput(f"--users {len(train)}: --data {where} holds {len(chosen)} users{others}; add text or ask for "
                       "fewer")
    return chosen, left_out
