"""Text in, token numbers out: tokenizers, batches, and the trigram that keeps everyone honest.

    python -c "import data; print(*data.load('builtin', users=4), sep='\\n')"

corpora.py says where documents come from, and splits.py who gets which.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

import splits
from corpora import BUILTIN, EVERYTHING, PUBLIC, BadInput, Corpus, excerpts, find, public, shuffled
from files import read_json, whole, write_json
from splits import SPLITS, TEST, TRAIN, VALID, bytes_of

BUILTIN_TRAIN_KB = 40  # private text is scarce, and a run should be short
END = "<|endoftext|>"  # the token that stands before every document, and every further piece of a long one
FORMAT = 1  # of the cached tokens


class Diverged(BadInput):
    """A learning rate was too large."""


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


def type_of(encoding: tiktoken.Encoding) -> np.dtype:
    """What a token number fits into."""
    return np.dtype(np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32)


def encode(document: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """(n,) token numbers: END, then the document's."""
    own = encoding.name == "bytes"
    text = np.frombuffer(document.encode(), np.uint8) if own else encoding.encode_ordinary(document)
    return np.concatenate([[encoding.eot_token], text]).astype(type_of(encoding))


@dataclass
class Text:
    """One user's text. Splits are (n,) token numbers, which may be memory maps of a file."""

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    train_bytes: int
    test_bytes: int


def load(where: str, users: int, train_kb: list[float] | None = None, target: str = "own", encoding: str = "bytes",
         block_size: int = 64, short: str = "refuse", cache: str | Path = "out/cache", **origin: str) -> list[Text]:
    """The text of each user.

    where: a name of BUILTIN or PUBLIC, a folder, or a table. train_kb: of each user; None: BUILTIN_TRAIN_KB, what the
    public corpus says, or all there is. target: `own`, or `mixed` for validation and test text from all users alike.
    short: `refuse` or `leave-out` users with too little text. origin: as in corpora.find. Raises BadInput.
    """
    tokens = tokenizer(encoding)
    usual = BUILTIN_TRAIN_KB if where in BUILTIN else PUBLIC[where].train_kb if where in PUBLIC else None
    wanted = [round(1000 * kb) for kb in train_kb or [usual or EVERYTHING] * users]
    try:
        texts = builtin(where, wanted, target, tokens) if where in BUILTIN else cached(
            where, wanted, target, tokens, block_size, short, Path(cache), origin)
    except OSError as error:
        raise BadInput(f"--data {where}: {error.filename or cache}: {error.strerror}; check the file and its folder, "
                       "or take another --cache") from None
    for text in texts:
        if problem := too_short(text, block_size):
            raise BadInput(f"--block-size {block_size}: {problem}; add text, take a smaller window, or, for --target "
                           "mixed, fewer --users")
    return texts


def load_public(encoding: str = "bytes", block_size: int = 64) -> Text:
    """The text that a base is pretrained on. Raises BadInput as `load`."""
    text = as_tokens("public", splits.divide(excerpts(public()), splits.HELD_OUT, EVERYTHING), tokenizer(encoding))
    if problem := too_short(text, block_size):
        raise BadInput(f"--block-size {block_size}: {problem}; take a smaller one")
    return text


def builtin(where: str, train: list[int], target: str, tokens: tiktoken.Encoding) -> list[Text]:
    named = dict(splits.builtin_users(where, train))
    for (name, documents), wanted in zip(named.items(), train, strict=True):
        if problem := splits.lack(name, {split: bytes_of(documents[split]) for split in SPLITS}, wanted, 0):
            raise BadInput(f"--train-kb {wanted / 1000:g}: {problem}; ask for less, or for fewer --users")
    mixed = splits.mix(named.values()) if target == "mixed" else {}
    return [as_tokens(name, documents | mixed, tokens) for name, documents in named.items()]


def as_tokens(name: str, documents: splits.Documents, tokens: tiktoken.Encoding) -> Text:
    numbers = {split: np.concatenate([encode(document, tokens) for document in documents[split]]) for split in SPLITS}
    return Text(name, **numbers, train_bytes=bytes_of(documents[TRAIN]), test_bytes=bytes_of(documents[TEST]))


def too_short(text: Text, block_size: int) -> str | None:
    """What is wrong where a split doesn't fill one window of block_size tokens and its last target."""
    for split in SPLITS:
        if (n := len(getattr(text, split))) <= block_size:
            return f"the {split} text of user {text.name} has {n} tokens, too few for a window of {block_size}"


# --- tokens of any other text, in a file that is mapped into memory --------------------------------------------------

def cached(where: str, train: list[int], target: str, tokens: tiktoken.Encoding, block_size: int, short: str,
           cache: Path, origin: dict[str, str]) -> list[Text]:
    """The users' text from the cache, where it is put if it isn't there. Raises BadInput, OSError."""
    size = splits.room(max(train))
    corpus = find(where, cache, size=size, **origin)
    leaving = block_size if short == "leave-out" else None
    key = shuffled(repr((FORMAT, corpus.key, train, target, tokens.name, tokens.n_vocab, leaving))).hex()[:16]
    kept = cache / f"tokens-{key}"
    if not kept.exists():
        with whole(kept) as new:
            deal_out(corpus, where, train, target, tokens, block_size, short, new)
            if find(where, cache, size=size, **origin).key != corpus.key:
                raise BadInput(f"--data {where}: changed while it was read; start again")
    texts, left_out = read_tokens(kept, cache)
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)
    return texts


def deal_out(corpus: Corpus, where: str, train: list[int], target: str, tokens: tiktoken.Encoding, block_size: int,
             short: str, folder: Path) -> None:
    """Choose users and write their tokens, until none of them is to be left out: how many tokens a text has, only its
    tokens say. Raises BadInput."""
    holdings, left_out = splits.survey(corpus), {}
    while True:
        chosen, left_out = splits.choose(holdings, where, train, block_size, short, left_out)
        users = write_tokens(corpus, chosen, target, tokens, folder / "tokens.bin")
        write_json(folder / "manifest.json", {
            "dtype": type_of(tokens).name, "users": users, "left_out": left_out})
        texts, _ = read_tokens(folder, folder)
        more = {text.name: reason for text in texts if (reason := too_short(text, block_size))}
        if short == "refuse" or target == "mixed" or not more:
            return
        left_out |= more


def read_tokens(folder: Path, cache: Path) -> tuple[list[Text], dict[str, str]]:
    """The users' text, mapped into memory, and why others are left out. Raises BadInput."""
    try:
        manifest = read_json(folder / "manifest.json")
        end = max(user[TEST][1] for user in manifest["users"])
        numbers = np.memmap(folder / "tokens.bin", manifest["dtype"], "r", shape=end).view(np.ndarray)
        return [Text(**user | {split: numbers[slice(*user[split])] for split in SPLITS})
                for user in manifest["users"]], manifest["left_out"]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"--cache {cache}: {folder} is damaged; delete it") from None


def write_tokens(corpus: Corpus, users: dict[str, splits.Plans], target: str, tokens: tiktoken.Encoding,
                 path: Path) -> list[dict]:
    """Write all users' splits into one file, in one go through the corpus. Returns where each begins and ends."""
    begin, end = {}, {}
    free = 0
    for name, plans in users.items():  # room for the training text: no token is shorter than a byte, and every END
        begin[name] = end[name] = free
        free += splits.sizes(plans)[TRAIN] + sum(len(each.starts) for each in plans.values())
    held, seen, train_bytes = {name: {VALID: [], TEST: []} for name in users}, Counter(), Counter()
    with open(path, "wb") as file:
        def put(document: str, place: int) -> int:
            numbers = encode(document, tokens)
            if file.tell() != place * numbers.itemsize:
                file.seek(place * numbers.itemsize)
            file.write(numbers.tobytes())
            return place + len(numbers)

        for name, text, meant in splits.filled(corpus):
            if name not in users:
                continue
            for split, part in users[name][meant].cut(seen[name, meant], text):
                if split == TRAIN:
                    end[name] = put(part, end[name])
                    train_bytes[name] += len(part.encode())
                else:
                    held[name][split].append(part)
            seen[name, meant] += 1
        mixed, result = splits.mix(held.values()) if target == "mixed" else {}, []
        for name, own in held.items():
            documents, places = own | mixed, {TRAIN: (begin[name], end[name])}
            for split in (VALID, TEST):
                start = free
                for document in documents[split]:
                    free = put(document, free)
                places[split] = start, free
            result.append({"name": name, **places, "train_bytes": train_bytes[name],
                           "test_bytes": bytes_of(documents[TEST])})
        file.truncate(free * type_of(tokens).itemsize)
    return result


# --- batches ---------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]  # inputs and, one token further on, targets: (B, T) each


def seeded(*key: object) -> torch.Generator:
    """A generator of its own for each key, such as (seed, user, purpose)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def joined(texts: list[np.ndarray]) -> np.ndarray:
    """The texts end to end; a single one isn't copied."""
    return texts[0] if len(texts) == 1 else np.concatenate(texts)


def windows_at(starts: Tensor, tokens: np.ndarray, T: int) -> Tensor:
    """The windows of T tokens, and the last one's target, that begin at these places: (n,) -> (n, T + 1)."""
    return torch.from_numpy(tokens[starts[:, None] + torch.arange(T + 1)].astype(np.int64))


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

    def draw(self, tokens: np.ndarray, generator: torch.Generator) -> Tensor:
        return windows_at(torch.randint(len(tokens) - self.T, (self.B,), generator=generator), tokens, self.T)

    def state(self) -> list[Tensor]:
        """All that the next batches depend on, besides the texts."""
        return [generator.get_state() for generator in self.generators]

    def load(self, state: list[Tensor]) -> None:
        for generator, own in zip(self.generators, state, strict=True):
            generator.set_state(own.cpu())


def spread_windows(tokens: np.ndarray, n: int, block_size: int, device: str = "cpu") -> Iterator[Batch]:
    """One batch of n windows that are spread evenly over a text."""
    windows = windows_at(torch.linspace(0, len(tokens) - block_size - 1, n).long(), tokens, block_size).to(device)
    yield windows[:, :-1], windows[:, 1:]


def ordered_windows(tokens: np.ndarray, batch_size: int, block_size: int, device: str = "cpu") -> Iterator[Batch]:
    """A whole text once, in order, in windows that don't overlap; the last one may be shorter.

    Every token but the first is a target exactly once.
    """
    tokens, T = torch.from_numpy(tokens.astype(np.int64)).to(device), block_size
    full = (len(tokens) - 1) // T * T  # targets in full windows
    yield from zip(tokens[:full].view(-1, T).split(batch_size), tokens[1:full + 1].view(-1, T).split(batch_size),
                   strict=True)
    if full < len(tokens) - 1:
        yield tokens[None, full:-1], tokens[None, full + 1:]


# --- the yardstick ---------------------------------------------------------------------------------------------------

def trigram_loss(train: np.ndarray, test: np.ndarray, vocab_size: int) -> float:
    """Mean cross-entropy in nats of test[1:] under a trigram fitted to train, with Witten-Bell interpolation:

        p(w | h) = (count(h w) + types(h) · p(w | h')) / (count(h) + types(h)),    h' = h without its first token,

    down to p(w) = 1/V; types(h) is the number of different tokens seen after h (Chen and Goodman 1999, section 2.5).
    """
    p = np.full(len(test) - 1, 1 / vocab_size)
    for n in (1, 2, 3):
        query = ngrams(test, n, vocab_size, 1, len(test))
        seen, count = counted(train, n, vocab_size, np.unique(query // vocab_size))
        histories, which = np.unique(seen // vocab_size, return_inverse=True)
        count_hw = lookup(query, seen, count)
        count_h = lookup(query // vocab_size, histories, np.bincount(which, count))
        types_h = lookup(query // vocab_size, histories, np.bincount(which))
        p = np.where(count_h > 0, (count_hw + types_h * p) / np.maximum(count_h + types_h, 1), p)
    return float(-np.log(p).mean())


def counted(tokens: np.ndarray, n: int, V: int, histories: np.ndarray,
            chunk: int = 1 << 20) -> tuple[np.ndarray, np.ndarray]:
    """The different n-grams of a text that continue one of the histories, in order, and how often each comes."""
    seen, count = np.empty(0, np.int64), np.empty(0)
    for start in range(1, len(tokens), chunk):
        found = ngrams(tokens, n, V, start, min(start + chunk, len(tokens)))
        new, often = np.unique(found[np.isin(found // V, histories)], return_counts=True)
        seen, which = np.unique(np.concatenate([seen, new]), return_inverse=True)
        count = np.bincount(which, np.concatenate([count, often]), len(seen))
    return seen, count


def ngrams(tokens: np.ndarray, n: int, V: int, start: int, end: int) -> np.ndarray:
    """The n-gram that ends at each token of a range from 1 on, as a number to base V: (end - start,)."""
    part = tokens[max(start - 2, 0):end].astype(np.int64)
    if start == 1:
        part = np.concatenate([part[:1], part])  # a token before the first, for its successor's trigram
    return sum(part[2 - k:len(part) - k] * V ** k for k in range(n))


def lookup(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each query, 0 where it isn't among the sorted keys."""
    if not len(keys):
        return np.zeros(len(query))
    place = np.searchsorted(keys, query).clip(max=len(keys) - 1)
    return np.where(keys[place] == query, values[place], 0)
