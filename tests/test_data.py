"""Who gets which text, as tokens and in batches: nothing stands in two splits or with two users. And the trigram."""

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
from data import SPLITS, TEST, TRAIN, VALID, bytes_of
from support.errors import BadInput
from support.runs.settings import Settings
from support.text.corpora import BUILTIN, EVERYTHING
from support.text.trigram import trigram_loss

BYTES = data.tokenizer("bytes")
RANKS = {bytes([byte]): byte for byte in range(256)} | {b"-" * 2 ** n: 255 + n for n in range(1, 8)}
DASHES = tiktoken.Encoding("dashes", pat_str=r"-+|[^-]", mergeable_ranks=RANKS, special_tokens={data.END: 70_000})
MANY = [words(n, 500) for n in range(40)]
FOUR = [("anna", words(100, 9000)), ("bert", words(101, 6000)),  # running text
        *((name, f"{name} {words(n, 500)}") for n in range(12) for name in ("cleo", "dora"))]


def load(where: object, users: int = 4, tokenizer: tiktoken.Encoding = BYTES, **how: object) -> list[data.Text]:
    return data.load(Settings(data=str(where), users=users, **{"block_size": 16, **how}), tokenizer)


def table(rows: list[tuple[str, str]]) -> Path:
    Path("t.jsonl").write_text("".join(json.dumps({"user": user, "text": text}) + "\n" for user, text in rows))
    return Path("t.jsonl")


def dealt(rows: list[tuple[str, str]]) -> dict[str, data.Splits]:
    n = len({user for user, text in rows if text.strip()})
    return data.anyones(Settings(data=str(table(rows)), users=n, block_size=1), [EVERYTHING] * n, BYTES)


def all_of(user: data.Splits) -> list[str]:
    return [document for split in SPLITS for document in user[split]]


def plain(tokens: np.ndarray) -> bytes:
    """The bytes that tokens stand for, without the ends of documents."""
    return tokens[tokens < 256].astype(np.uint8).tobytes()


@pytest.mark.parametrize("documents", [MANY, [words(n, 4000) for n in range(200)]])
def test_documents_stay_whole_in_one_split_and_in_their_order(documents):
    parts = data.split(documents, EVERYTHING)
    assert sorted(all_of(parts)) == sorted(documents)
    for split in SPLITS:
        assert parts[split] == [document for document in documents if document in parts[split]]
    for split, most in data.HELD_OUT.items():  # so much, and what is left of the document that fills it
        size = min(most, bytes_of(documents) // 10)
        assert size <= bytes_of(parts[split]) < size + len(documents[0])


def test_a_documents_split_is_decided_by_its_hash_and_not_by_its_place():
    hashes = {text: hashlib.blake2b(text.encode(), digest_size=8).digest()[::-1] for text in MANY}
    for documents in (MANY, MANY[::-1]):
        parts = data.split(documents, EVERYTHING)
        assert [text for split in (TEST, VALID, TRAIN) for text in sorted(parts[split], key=hashes.get)] == sorted(
            MANY, key=hashes.get)


@pytest.mark.parametrize("documents", [
    [words(0, 6000)],  # one text
    [words(0, 3000), words(1, 3000), words(2, 3000)],  # a few
    [words(n, 300) for n in range(10)] + [words(99, 30_000)],  # one outweighs the others
    [words(n, 32_000) for n in range(12)],  # long ones
])
def test_running_text_is_cut_end_to_end_into_three_parts_that_dont_overlap(documents, monkeypatch):
    monkeypatch.setattr(data, "DOCUMENT", 31_000)
    parts = data.split(documents, EVERYTHING)
    assert "".join(document for split in (TEST, VALID, TRAIN) for document in parts[split]) == "".join(documents)
    for split, most in data.HELD_OUT.items():
        assert bytes_of(parts[split]) == min(most, bytes_of(documents) // 10)


def test_a_cut_leaves_no_half_character_and_the_next_starts_behind_it():
    parts = data.split(["é" * 505], 301)
    assert [parts[split] for split in (TEST, VALID, TRAIN)] == [["é" * 50], ["é" * 50], ["é" * 150]]
    documents = iter(["abc", "dé", "gh"])
    assert [data.take(documents, 5), data.take(documents, 5), data.take(documents, 5)] == [["abc", "d"], ["gh"], []]


def test_held_out_text_depends_neither_on_the_seed_nor_on_train_kb():
    full, short = load(table(FOUR)), load(table(FOUR), train_kb=(1, 2, 1, 1), seed=5)
    for a, b in zip(short, full, strict=True):
        assert np.array_equal(a.test, b.test)
        assert np.array_equal(a.valid, b.valid)
        assert len(a.train) < len(b.train)
    assert [text.train_bytes for text in short[:2]] == [1000, 2000]
    assert 1000 <= short[2].train_bytes < 1500  # documents stay whole


def test_less_validation_text_is_its_beginning_and_of_a_mixed_target_everyones():
    full, short = load(table(FOUR)), load(table(FOUR), valid_kb=(0.1, 0.2, 0.1, 0.1))
    for text, whole, size in zip(short, full, (100, 200, 100, 100), strict=True):
        assert plain(text.valid) == plain(whole.valid)[:size]
        assert np.array_equal(text.test, whole.test)
        assert np.array_equal(text.train, whole.train)
    mixed = load(table(FOUR), valid_kb=(0.1,), target="mixed")[0].valid
    assert plain(mixed) == b"".join(plain(text.valid)[:25] for text in full)


def test_a_users_split_doesnt_depend_on_who_else_is_there():
    mine, others = [("b", text) for text in MANY], [(name, words(100 + n, 300)) for n in range(20) for name in "ac"]
    assert dealt([row for pair in zip(others, mine, strict=True) for row in pair])["b"] == dealt(mine)["b"]


def test_copies_count_once_for_the_first_user_by_name_and_blank_text_for_nobody():
    common = [words(n, 300) for n in range(20)]
    own = {name: [words(1000 * ord(name) + n, 300) for n in range(20)] for name in "ab"}
    users = dealt([*((name, text) for name in "ba" for text in common + own[name] + common[::-1] + ["", " \n"]),
                   ("0", "\t")])
    assert list(users) == ["a", "b"]
    assert Counter(all_of(users["a"])) == Counter(common + own["a"])
    assert Counter(all_of(users["b"])) == Counter(own["b"])


def test_given_splits_are_taken_as_they_are_but_for_the_length_of_training():
    for split in SPLITS:
        Path("t/a").mkdir(parents=True, exist_ok=True)
        Path(f"t/a/{split}.txt").write_text(f"{split} text")
    text, = load("t", 1, train_kb=(0.005,), block_size=4)
    assert [plain(getattr(text, split)) for split in SPLITS] == [b"train", b"valid text", b"test text"]
    assert plain(load("t", 1, block_size=4)[0].train) == b"train text"


def test_users_with_too_little_text_are_refused_or_left_out(capsys):
    where = table([(name, words(n, 100 if name == "b" else 5000)) for n, name in enumerate("abcd")])
    with pytest.raises(BadInput, match="the valid text of user b has 10 tokens.*`block_size` 16;.*`short_users` leave"):
        load(where, 3)
    left = load(where, 3, short_users="leave-out", train_kb=(1, 2, 3))
    assert [(text.name, text.train_bytes) for text in left] == [("a", 1000), ("c", 2000), ("d", 3000)]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "t.jsonl has text of 4 users; the first 3 by name take part"
    assert told[1].startswith("left out: user b has 0.0")
    with pytest.raises(BadInput, match="`users` 4: .* has text of 3, and 1 with too little text;"):
        load(where, 4, short_users="leave-out")
    with pytest.raises(BadInput, match="user yaml has [0-9.]* kB of training text, not `train_kb` 900; add"):
        load("builtin", train_kb=(900,))


def test_leaving_out_goes_by_tokens_and_not_by_bytes():
    where = table([("a", words(0, 6000)), ("b", "-" * 20_000), ("c", words(1, 6000))])
    assert [text.name for text in load(where, 2, DASHES, short_users="leave-out", block_size=64)] == ["a", "c"]


@pytest.mark.parametrize("where", ["t.jsonl", "builtin"])
def test_a_mixed_target_is_the_same_for_all_and_an_even_share_of_each(where):
    table(FOUR)
    own, mixed = load(where), load(where, target="mixed")
    for split in (VALID, TEST):
        texts = [plain(getattr(text, split)) for text in own]
        share = min(map(len, texts)) // 4
        assert share > 100
        expected = b"".join(text[:share].decode(errors="ignore").encode() for text in texts)
        assert [plain(getattr(text, split)) for text in mixed] == [expected] * 4
    for text, alone in zip(mixed, own, strict=True):
        assert np.array_equal(text.train, alone.train)
        assert text.test_bytes == len(expected)


def test_a_mixed_target_of_too_many_users_is_one_line():
    with pytest.raises(BadInput, match="the valid text of user u0 has 0 tokens, .* fewer `users`"):
        load(table([(f"u{n}", words(n, 1000)) for n in range(200)]), 200, target="mixed")


@pytest.mark.parametrize("where", list(BUILTIN))
def test_builtin_splits_and_shards_share_no_document_and_have_their_sizes(where):
    users = data.builtin(where, [5000] * 8)
    assert list(users)[4:] == [f"{name}-2" for name in list(users)[:4]]
    whole = [document for user in users.values() for split in SPLITS for document in user[split][:-1]]  # one is cut
    assert max(Counter(whole).values()) == 1
    for user in users.values():
        assert {split: bytes_of(user[split]) for split in SPLITS} == pytest.approx(
            {TRAIN: 5000, VALID: 16_000, TEST: 32_000}, abs=3)


def test_no_users_test_text_stands_in_the_pretraining_text():
    """Except for lines that everyone writes, such as imports: fewer than one in twenty."""
    text = data.load_pretraining(64, BYTES)
    assert (len(plain(text.valid)), text.test_bytes) == pytest.approx((16_000, 32_000), abs=3)
    seen = {line.strip() for line in plain(data.joined(text, SPLITS)).decode().splitlines()}
    assert len(seen) > 50_000
    for where in BUILTIN:
        for name, documents in data.builtin(where, [1000] * 4).items():
            lines = [line.strip() for document in documents[TEST] for line in document.splitlines()]
            long = [line for line in lines if len(line) > 30]
            assert sum(line in seen for line in long) < 0.05 * len(long), name


def test_byte_tokenizer_returns_any_text():
    text = "naïve <|endoftext|> \0 \r\n 漢字"
    assert BYTES.decode(BYTES.encode_ordinary(text)) == text
    assert BYTES.decode(data.encode(text, BYTES)[1:].tolist()) == text
    assert (BYTES.n_vocab, BYTES.eot_token) == (257, 256)


def test_an_end_stands_before_every_document_and_bytes_are_those_of_the_text():
    for text in load(table(FOUR))[2:]:
        found = {split: BYTES.decode(getattr(text, split).tolist()).split(data.END)[1:] for split in SPLITS}
        assert sorted(all_of(found)) == sorted(document for user, document in FOUR if user == text.name)
        assert (text.train_bytes, text.test_bytes) == (bytes_of(found[TRAIN]), bytes_of(found[TEST]))


def test_token_numbers_above_65535_stay_what_they_are():
    assert data.encode("ab", DASHES).tolist() == [70_000, 97, 98]
    assert data.encode("ab", BYTES).dtype == np.uint16


def test_a_gpt2_table_that_cant_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Path("nowhere\n").read_bytes())
    with pytest.raises(BadInput, match="^`tokenizer` gpt2: .*; .*TIKTOKEN_CACHE_DIR.*bytes$"):
        data.tokenizer("gpt2")


@pytest.mark.parametrize("length", [9, 10, 17, 41, 50])
def test_ordered_windows_read_every_token_once_in_order(length):
    tokens = np.arange(length)
    inputs, targets = zip(*data.ordered_windows(tokens, 8, B=2), strict=True)
    assert torch.equal(torch.cat([part.flatten() for part in inputs]), torch.from_numpy(tokens[:-1]))
    assert torch.equal(torch.cat([part.flatten() for part in targets]), torch.from_numpy(tokens[1:]))
    assert all(0 < part.shape[0] <= 2 and 0 < part.shape[1] <= 8 for part in inputs)


def test_random_windows_are_windows_and_reach_both_ends():
    stream = data.RandomWindows([np.arange(20)], [data.seeded("test")], 4, 8)
    inputs, targets = map(torch.cat, zip(*itertools.islice(stream, 50), strict=True))
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
    assert set(torch.cat([inputs, targets]).flatten().tolist()) == set(range(20))


def test_a_users_batches_dont_depend_on_who_else_is_there():
    texts = [np.arange(100), np.arange(1000, 1200)]
    alone = data.RandomWindows(texts[1:], [data.seeded(0, "b")], 3, 8)
    pooled = data.RandomWindows(texts, [data.seeded(0, "a"), data.seeded(0, "b")], 3, 8)
    for _ in range(3):
        assert torch.equal(next(alone)[0], next(pooled)[0][3:])
    assert len({data.seeded(*key).initial_seed() for key in [(0, "a"), (0, "b"), (1, "b")]}) == 3


def test_spread_windows_are_spread_from_one_end_to_the_other():
    (inputs, targets), = data.spread_windows(np.arange(100), 4, 8)
    assert inputs[:, 0].tolist() == [0, 30, 60, 91]
    assert targets[:, -1].tolist() == [8, 38, 68, 99]


def test_trigram_worked_by_hand():
    """Train a b a b a c, V = 3, Witten-Bell. After the first token come b a b a c: unigrams a 2, b 2, c 1, 3 types.

    Test a b a: p1(b) = (2 + 3/3) / (5 + 3) = 3/8 and p1(a) = 3/8. Bigrams after a: b 2, c 1 (2 types); after b: a 2
    (1 type). p2(b|a) = (2 + 2 · 3/8) / (3 + 2) = 11/20; p2(a|b) = (2 + 3/8) / (2 + 1) = 19/24. Trigrams: the start
    counts as (a, a): b 1 (1 type), so p3(b|a a) = (1 + 11/20) / 2 = 31/40; after (a, b): a 2 (1 type), so
    p3(a|a b) = (2 + 19/24) / 3 = 67/72.
    """
    a, b, c = range(3)
    loss = trigram_loss(np.array([a, b, a, b, a, c]), np.array([a, b, a]), 3)
    assert loss == pytest.approx(-(math.log(31 / 40) + math.log(67 / 72)) / 2)


def test_trigram_probabilities_sum_to_one_also_after_unseen_histories():
    train = np.random.default_rng(0).integers(0, 5, 40)
    for history in itertools.product(range(6), repeat=2):
        p = []
        for token in range(6):  # token 5 is never seen
            both, first = (trigram_loss(train, np.array(x), 6) for x in ([*history, token], [*history]))
            p.append(math.exp(first - 2 * both))  # losses are means over 2 targets and 1
        assert sum(p) == pytest.approx(1)
