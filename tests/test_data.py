"""Users, splits, tokens and batches: no document is in two splits or held by two users."""

import hashlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data
from conftest import words
from data import EVERYTHING, HELD_OUT, TEST, TRAIN, VALID, DataConfig, bytes_of
from support.errors import BadInput
from support.text.sources import BUILTIN, SPLITS
from support.text.trigram import ngrams, trigram_loss

BYTES = data.tokenizer("bytes")
BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}
DASH_RANKS = {b"-" * 2**n: 255 + n for n in range(1, 8)}
DASHES = tiktoken.Encoding(
    "dashes",
    pat_str=r"-+|[^-]",
    mergeable_ranks=BYTE_RANKS | DASH_RANKS,
    special_tokens={data.END: 70_000},
)
MANY = [words(n, 500) for n in range(40)]
FOUR = [("anna", words(100, 9000)), ("bert", words(101, 6000))]  # running text
FOUR += [(name, f"{name} {words(n, 500)}") for n in range(12) for name in ("cleo", "dora")]


def table(rows: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"user": user, "text": text}) + "\n" for user, text in rows]
    Path("t.jsonl").write_text("".join(lines))
    return "t.jsonl"


def load(
    source: str, users: int = 4, tokenizer: tiktoken.Encoding = BYTES, **config
) -> list[data.Text]:
    return data.load(DataConfig(source, users, **{"block_size": 16} | config), tokenizer)


def documents_of(rows: list[tuple[str, str]], users: int) -> dict[str, data.Splits]:
    return data.load_documents(DataConfig(table(rows), users, block_size=1), BYTES)


def all_of(splits: data.Splits) -> list[str]:
    return [document for split in SPLITS for document in splits[split]]


def plain(tokens: np.ndarray) -> bytes:
    """The bytes of tokens, without the ends of documents."""
    return tokens[tokens < 256].astype(np.uint8).tobytes()


# --- splits


@pytest.mark.parametrize("documents", [MANY, [words(n, 4000) for n in range(200)]])
def test_documents_stay_whole_in_one_split_and_in_their_order(documents):
    splits = data.split_documents(documents, EVERYTHING)
    assert sorted(all_of(splits)) == sorted(documents)
    for split in SPLITS:
        assert splits[split] == [document for document in documents if document in splits[split]]
    for split, most in HELD_OUT.items():
        size = min(most, bytes_of(documents) // 10)
        assert size <= bytes_of(splits[split]) < size + len(documents[0])


def test_a_documents_split_is_decided_by_its_digest_and_not_by_its_place():
    def key(text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=8).digest()[::-1]

    for documents in (MANY, MANY[::-1]):
        splits = data.split_documents(documents, EVERYTHING)
        in_order = [
            text for split in (TEST, VALID, TRAIN) for text in sorted(splits[split], key=key)
        ]
        assert in_order == sorted(MANY, key=key)


@pytest.mark.parametrize(
    "documents",
    [
        [words(0, 6000)],  # one text
        [words(0, 3000), words(1, 3000), words(2, 3000)],  # a few
        [words(n, 300) for n in range(10)] + [words(99, 30_000)],  # one outweighs the others
        [words(n, 32_000) for n in range(12)],  # long ones
    ],
)
def test_running_text_is_cut_into_three_parts(documents, monkeypatch):
    monkeypatch.setattr(data, "DOCUMENT", 31_000)
    splits = data.split_documents(documents, EVERYTHING)
    assert "".join(text for split in (TEST, VALID, TRAIN) for text in splits[split]) == "".join(
        documents
    )
    for split, most in HELD_OUT.items():
        assert bytes_of(splits[split]) == min(most, bytes_of(documents) // 10)


def test_a_cut_leaves_no_half_character():
    splits = data.split_documents(["é" * 505], 301)
    assert splits == {TEST: ["é" * 50], VALID: ["é" * 50], TRAIN: ["é" * 150]}
    documents = iter(["abc", "dé", "gh"])
    assert data.take(documents, 5) == ["abc", "d"]
    assert data.take(documents, 5) == ["gh"]
    assert data.take(documents, 5) == []


def test_held_out_text_does_not_depend_on_train_kb():
    full = load(table(FOUR))
    short = load(table(FOUR), train_kb=(1, 2, 1, 1))
    for a, b in zip(short, full, strict=True):
        assert np.array_equal(a.test, b.test)
        assert np.array_equal(a.valid, b.valid)
        assert len(a.train) < len(b.train)
    assert [text.train_bytes for text in short[:2]] == [1000, 2000]
    assert 1000 <= short[2].train_bytes < 1500  # documents stay whole


def test_valid_kb_uses_the_beginning_of_the_validation_text():
    full = load(table(FOUR))
    sizes = (0.1, 0.2, 0.1, 0.1)
    for text, whole, kb in zip(load(table(FOUR), valid_kb=sizes), full, sizes, strict=True):
        assert plain(text.valid) == plain(whole.valid)[: round(1000 * kb)]
        assert np.array_equal(text.test, whole.test)
        assert np.array_equal(text.train, whole.train)
    mixed = load(table(FOUR), valid_kb=(0.1,) * 4, target="mixed")[0].valid
    assert plain(mixed) == b"".join(plain(text.valid)[:25] for text in full)


def test_splits_that_the_source_decides_stay_and_training_text_is_cut():
    for split in SPLITS:
        Path("t/a").mkdir(parents=True, exist_ok=True)
        Path(f"t/a/{split}.txt").write_text(f"{split} text")
    (text,) = load("t", 1, train_kb=(0.005,), block_size=4)
    assert [plain(getattr(text, split)) for split in SPLITS] == [
        b"train",
        b"valid text",
        b"test text",
    ]
    assert plain(load("t", 1, block_size=4)[0].train) == b"train text"


# --- users


def test_a_users_splits_do_not_depend_on_other_users():
    rows = []
    for n, text in enumerate(MANY):
        rows += [("ac"[n % 2], words(100 + n, 300)), ("b", text)]
    assert documents_of(rows, 3)["b"] == documents_of([("b", text) for text in MANY], 1)["b"]


def test_copies_count_once_for_the_first_user_by_name_and_blank_documents_for_no_user():
    common = [words(n, 300) for n in range(20)]
    private = {name: [words(1000 * ord(name) + n, 300) for n in range(20)] for name in "ab"}
    rows = [("0", "\t")]
    for name in "ba":
        rows += [(name, text) for text in [*common, *private[name], *common[::-1], "", " \n"]]
    users = documents_of(rows, 2)
    assert list(users) == ["a", "b"]
    assert Counter(all_of(users["a"])) == Counter(common + private["a"])
    assert Counter(all_of(users["b"])) == Counter(private["b"])


def test_users_with_too_little_text_are_refused_or_left_out(capsys):
    source = table(
        [(name, words(n, 100 if name == "b" else 5000)) for n, name in enumerate("abcd")]
    )
    with pytest.raises(
        BadInput, match="valid text of user b has 10 tokens.*`block_size` 16;.*`short_users` leave"
    ):
        load(source, 3)
    left = load(source, 3, short_users="leave-out", train_kb=(1, 2, 3))
    assert [(text.name, text.train_bytes) for text in left] == [
        ("a", 1000),
        ("c", 2000),
        ("d", 3000),
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "t.jsonl has text of 4 users; the first 3 by name take part"
    assert lines[1].startswith("left out: user b has 0.0")
    with pytest.raises(BadInput, match="`users` 4: .* has text of 3, and 1 with too little text;"):
        load(source, 4, short_users="leave-out")
    with pytest.raises(
        BadInput, match="user cpp has [0-9.]* kB of training text, not `train_kb` 90000; add"
    ):
        load("builtin", 1, train_kb=(90_000,))
    with pytest.raises(
        BadInput, match="`valid_kb` 5: user a has 0.49[0-9]* kB held out; pass a smaller"
    ):
        load(source, 1, valid_kb=(5,))


def test_users_are_left_out_by_tokens_and_not_by_bytes():
    source = table([("a", words(0, 6000)), ("b", "-" * 20_000), ("c", words(1, 6000))])
    texts = load(source, 2, DASHES, short_users="leave-out", block_size=64)
    assert [text.name for text in texts] == ["a", "c"]


@pytest.mark.parametrize("source", ["t.jsonl", "builtin"])
def test_a_mixed_target_is_the_same_for_all_users_and_an_equal_share_of_each(source):
    table(FOUR)
    private = load(source)
    mixed = load(source, target="mixed")
    for split in (VALID, TEST):
        texts = [plain(getattr(text, split)) for text in private]
        share = min(map(len, texts)) // 4
        assert share > 100
        expected = b"".join(text[:share].decode(errors="ignore").encode() for text in texts)
        assert [plain(getattr(text, split)) for text in mixed] == [expected] * 4
    for text, alone in zip(mixed, private, strict=True):
        assert np.array_equal(text.train, alone.train)
        assert text.test_bytes == len(expected)


def test_a_mixed_target_of_too_many_users_is_one_line():
    source = table([(f"u{n}", words(n, 1000)) for n in range(200)])
    with pytest.raises(BadInput, match="the valid text of user u0 has 0 tokens, .* fewer `users`"):
        load(source, 200, target="mixed")


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_splits_and_users_share_no_document_and_have_their_sizes(name):
    users = data.builtin(name, [5000] * 8)
    assert list(users)[4:] == [f"{domain}-2" for domain in BUILTIN[name]]
    whole = [
        document for splits in users.values() for split in SPLITS for document in splits[split][:-1]
    ]
    assert max(Counter(whole).values()) == 1  # the last document of a split is cut
    for splits in users.values():
        sizes = {split: bytes_of(splits[split]) for split in SPLITS}
        assert sizes == pytest.approx({TRAIN: 5000, VALID: 16_000, TEST: 32_000}, abs=3)


def test_the_pretraining_text_holds_no_users_test_text():
    """Except for lines that many files have, such as imports: fewer than one in twenty."""
    text = data.load_pretraining(64, BYTES)
    assert (len(plain(text.valid)), text.test_bytes) == pytest.approx((16_000, 32_000), abs=3)
    lines = plain(data.joined(text, SPLITS)).decode().splitlines()
    seen = {line.strip() for line in lines}
    assert len(seen) > 50_000
    for name in BUILTIN:
        for user, splits in data.builtin(name, [1000] * 4).items():
            lines = [line.strip() for document in splits[TEST] for line in document.splitlines()]
            long = [line for line in lines if len(line) > 30]
            assert sum(line in seen for line in long) < 0.05 * len(long), user


# --- tokens


def test_the_byte_tokenizer_returns_any_text():
    text = "naïve <|endoftext|> \0 \r\n 漢字"
    assert BYTES.decode(BYTES.encode_ordinary(text)) == text
    assert BYTES.decode(data.encode(text, BYTES)[1:].tolist()) == text
    assert (BYTES.n_vocab, BYTES.eot_token) == (257, 256)


def test_each_document_begins_with_an_end_and_bytes_are_counted_without():
    for text in load(table(FOUR))[2:]:
        found = {}
        for split in SPLITS:
            found[split] = BYTES.decode(getattr(text, split).tolist()).split(data.END)[1:]
        assert sorted(all_of(found)) == sorted(
            document for user, document in FOUR if user == text.name
        )
        assert (text.train_bytes, text.test_bytes) == (
            bytes_of(found[TRAIN]),
            bytes_of(found[TEST]),
        )


def test_tokens_above_65535_are_kept():
    assert data.encode("ab", DASHES).tolist() == [70_000, 97, 98]
    assert data.encode("ab", BYTES).dtype == np.uint16


def test_a_vocabulary_that_cannot_be_loaded_is_one_line(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Path("nowhere\n").read_bytes())
    with pytest.raises(BadInput, match="^`tokenizer` gpt2: .*; .*TIKTOKEN_CACHE_DIR.*bytes$"):
        data.tokenizer("gpt2")
    with pytest.raises(BadInput, match="^`tokenizer` nope: unknown; expected bytes"):
        data.tokenizer("nope")


# --- batches


@pytest.mark.parametrize("length", [9, 10, 17, 41, 50])
def test_ordered_windows_read_every_token_once_in_order(length):
    tokens = torch.arange(length)
    inputs, targets = zip(*data.ordered_windows(tokens.numpy(), 8, batch_size=2), strict=True)
    assert torch.equal(torch.cat([part.flatten() for part in inputs]), tokens[:-1])
    assert torch.equal(torch.cat([part.flatten() for part in targets]), tokens[1:])
    assert all(0 < part.shape[0] <= 2 and 0 < part.shape[1] <= 8 for part in inputs)


def test_random_windows_are_windows_and_reach_both_ends():
    stream = data.RandomWindows([np.arange(20)], [data.seeded("test")], 4, 8)
    inputs, targets = map(torch.cat, zip(*itertools.islice(stream, 50), strict=True))
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
    assert set(torch.cat([inputs, targets]).flatten().tolist()) == set(range(20))


def test_a_users_batches_do_not_depend_on_other_users():
    texts = [np.arange(100), np.arange(1000, 1200)]
    alone = data.RandomWindows(texts[1:], [data.seeded(0, "b")], 3, 8)
    pooled = data.RandomWindows(texts, [data.seeded(0, "a"), data.seeded(0, "b")], 3, 8)
    for _ in range(3):
        assert torch.equal(next(alone)[0], next(pooled)[0][3:])
    seeds = {data.seeded(*key).initial_seed() for key in [(0, "a"), (0, "b"), (1, "b")]}
    assert len(seeds) == 3


def test_spread_windows_are_spread_from_one_end_to_the_other():
    ((inputs, targets),) = data.spread_windows(np.arange(100), 4, 8)
    assert inputs[:, 0].tolist() == [0, 30, 60, 91]
    assert targets[:, -1].tolist() == [8, 38, 68, 99]


# --- the trigram


def test_trigram_worked_by_hand():
    """Train a b a b a c, V = 3. After the first token follow b a b a c: a 2, b 2, c 1, 3 types.

    Test a b a: p1(b) = (2 + 3/3) / (5 + 3) = 3/8 and p1(a) = 3/8. After a: b 2, c 1 (2 types);
    after b: a 2 (1 type). p2(b|a) = (2 + 2 · 3/8) / (3 + 2) = 11/20;
    p2(a|b) = (2 + 3/8) / (2 + 1) = 19/24. The start counts as (a, a): b 1 (1 type), so
    p3(b|a a) = (1 + 11/20) / 2 = 31/40; after (a, b): a 2 (1 type), so
    p3(a|a b) = (2 + 19/24) / 3 = 67/72.
    """
    a, b, c = range(3)
    loss = trigram_loss(np.array([a, b, a, b, a, c]), np.array([a, b, a]), 3)
    assert loss == pytest.approx(-(math.log(31 / 40) + math.log(67 / 72)) / 2)
    assert ngrams(np.array([3, 1, 4]), 2, 10).tolist() == [31, 14]


def test_trigram_probabilities_sum_to_one_also_after_unseen_histories():
    train = np.random.default_rng(0).integers(0, 5, 40)
    for history in itertools.product(range(6), repeat=2):
        first = trigram_loss(train, np.array(history), 6)
        total = 0.0
        for token in range(6):  # token 5 is not in train
            both = trigram_loss(train, np.array([*history, token]), 6)
            total += math.exp(first - 2 * both)  # losses are means over 2 targets and 1
        assert total == pytest.approx(1)
