"""Tokens: every one is read once, they come back from the cache as they were, and the trigram is what it says."""

import itertools
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import corpora
import data
from data import BadInput
from splits import SPLITS, TEST, TRAIN
from texts import words


@pytest.fixture
def corpus(tmp_path):
    """Two users with a file each, two with a folder of twelve."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i, name in enumerate(("anna", "bert")):
        (folder / f"{name}.txt").write_text(words(i, 6000))
    for i, name in enumerate(("cleo", "dora")):
        (folder / name).mkdir()
        for j in range(12):
            (folder / name / f"{j}.md").write_text(words(100 * (i + 1) + j, 500))
    return folder


def test_mixed_target_is_the_same_for_all_and_an_even_share_of_each(corpus):
    texts = data.load(str(corpus), 4, target="mixed", block_size=16)
    own = data.load(str(corpus), 4, block_size=16)
    shortest = min(text.test_bytes for text in own)
    for text, alone in zip(texts, own, strict=True):
        assert np.array_equal(text.test, texts[0].test)
        assert np.array_equal(text.train, alone.train)
        shared = data.tokenizer("bytes").decode_bytes(texts[0].test.tolist())
        start = data.tokenizer("bytes").decode_bytes(alone.test[:shortest // 4 - 100].tolist())
        assert start in shared
    assert texts[0].test_bytes == pytest.approx(shortest, abs=4)


def test_train_kb_cuts_only_the_training_text(corpus):
    short, full = data.load(str(corpus), 4, [1, 2, 1, 2], block_size=16), data.load(str(corpus), 4, block_size=16)
    assert [text.train_bytes for text in short[:2]] == [1000, 2000]
    for text, size in zip(short[2:], (1000, 2000), strict=True):  # documents stay whole
        assert size <= text.train_bytes < size + 500
    for a, b in zip(short, full, strict=True):
        assert np.array_equal(a.test, b.test)
        assert np.array_equal(a.valid, b.valid)
        assert len(a.train) < len(b.train)


def same(one: list[data.Text], two: list[data.Text]) -> bool:
    return all(a.name == b.name and (a.train_bytes, a.test_bytes) == (b.train_bytes, b.test_bytes)
               and all(np.array_equal(getattr(a, split), getattr(b, split)) for split in SPLITS)
               for a, b in zip(one, two, strict=True))


def test_loading_twice_gives_the_same_tokens(corpus):
    assert same(data.load("builtin", 4), data.load("builtin", 4))
    assert same(data.load(str(corpus), 4), data.load(str(corpus), 4))


def test_the_cache_holds_every_users_documents_each_behind_an_end(corpus):
    """Decoded, the splits of a folder's user are its files again, and the counts of bytes are theirs."""
    encoding = data.tokenizer("bytes")
    for text in data.load(str(corpus), 4)[2:]:
        files = {path.read_text() for path in (corpus / text.name).iterdir()}
        found = {split: encoding.decode(getattr(text, split).tolist()).split(data.END)[1:] for split in SPLITS}
        assert sorted(document for split in SPLITS for document in found[split]) == sorted(files)
        assert text.train_bytes == sum(len(document) for document in found[TRAIN])
        assert text.test_bytes == sum(len(document) for document in found[TEST])


def test_a_second_start_reads_no_text(corpus, monkeypatch):
    first = data.load(str(corpus), 4)
    monkeypatch.setattr(corpora, "texts", None)
    assert same(first, data.load(str(corpus), 4))
    assert isinstance(first[0].train.base.base, np.memmap)


def test_the_cache_knows_text_by_what_it_is(corpus, tmp_path):
    """A change of a file that keeps its size and time is seen; text that has moved needn't be read again."""
    before, file = data.load(str(corpus), 4), corpus / "anna.txt"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_text(words(77, 6000))
    os.utime(file, ns=times)
    assert not same(before, data.load(str(corpus), 4))
    corpus.rename(tmp_path / "elsewhere")
    kept = set(Path("out/cache").iterdir())
    data.load(str(tmp_path / "elsewhere"), 4)
    assert set(Path("out/cache").iterdir()) == kept
    data.load(str(tmp_path / "elsewhere"), 3)
    assert len(set(Path("out/cache").iterdir()) - kept) == 1


@pytest.mark.parametrize("moment", ["write_json", "sizes"])
def test_what_fails_on_the_way_leaves_nothing_behind(corpus, monkeypatch, moment):
    """Before anything is written, or after all of it is but the manifest."""
    def fail(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as context:
        context.setattr(*((data, "write_json") if moment == "write_json" else (data.splits, "sizes")), fail)
        with pytest.raises(KeyboardInterrupt):
            data.load(str(corpus), 4)
    assert [path for path in Path("out/cache").glob("*") if path.is_dir()] == []
    assert len(data.load(str(corpus), 4)) == 4


def test_a_killed_start_does_no_harm(corpus, tmp_path):
    """kill -9 after all tokens are written and before the folder has its name: the next start begins anew."""
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path}
import data
data.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
data.load({str(corpus)!r}, 4)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    left = list(Path("out/cache").iterdir())
    assert [path.name[:11] for path in left] == ["unfinished-"]
    assert [text.name for text in data.load(str(corpus), 4)] == ["anna", "bert", "cleo", "dora"]


def test_two_starts_at_once_end_with_one_cache(corpus, monkeypatch):
    """The slower one takes what the quicker one has put there."""
    write = data.write_tokens

    def slow(*arguments):
        monkeypatch.setattr(data, "write_tokens", write)
        data.load(str(corpus), 4)
        return write(*arguments)
    monkeypatch.setattr(data, "write_tokens", slow)
    assert len(data.load(str(corpus), 4)) == 4
    assert len(list(Path("out/cache").glob("tokens-*"))) == 1


def test_text_that_changes_while_it_is_read_is_one_line_and_not_kept(corpus, monkeypatch):
    write = data.write_tokens

    def changing(*arguments):
        (corpus / "anna.txt").write_text(words(5, 9000))
        (corpus / "dora" / "new.md").write_text(words(6, 900))
        return write(*arguments)
    with monkeypatch.context() as context:
        context.setattr(data, "write_tokens", changing)
        with pytest.raises(BadInput, match="changed while it was read; start again"):
            data.load(str(corpus), 4)
    assert not list(Path("out/cache").glob("tokens-*"))
    assert len(data.load(str(corpus), 4)) == 4


def test_a_memory_of_digests_that_is_damaged_is_made_anew(corpus):
    first = data.load(str(corpus), 4)
    for damage in ("[]", "{", '{"a": 5}', '[1, 2]'):
        Path("out/cache/digests.json").write_text(damage)
        assert same(first, data.load(str(corpus), 4))


def test_leaving_out_goes_by_tokens(corpus, monkeypatch, capsys):
    """A user whose text makes few tokens is left out although it has many bytes."""
    (corpus / "bert.txt").write_text("-" * 20_000)
    table = {bytes([byte]): byte for byte in range(256)} | {b"-" * 2 ** n: 255 + n for n in range(1, 8)}
    dashes = data.tiktoken.Encoding("dashes", pat_str=r"-+|[^-]", mergeable_ranks=table, special_tokens={data.END: 263})
    monkeypatch.setattr(data, "tokenizer", lambda name: dashes)
    with pytest.raises(BadInput, match="--block-size 64: the valid text of user bert has 18 tokens"):
        data.load(str(corpus), 3)
    assert [text.name for text in data.load(str(corpus), 3, short="leave-out")] == ["anna", "cleo", "dora"]
    assert "left out: the valid text of user bert has 18 tokens" in capsys.readouterr().err


def test_a_mixed_target_of_too_many_users_is_one_line(tmp_path):
    rows = "".join(f"u{n:03},{words(n, 90)} {m}\n" for n in range(200) for m in range(12))
    (tmp_path / "t.csv").write_text("user,text\n" + rows)
    for _ in range(2):
        with pytest.raises(BadInput, match="the valid text of user u000 has 0 tokens, .* fewer --users"):
            data.load(str(tmp_path / "t.csv"), 200, target="mixed", block_size=16)


@pytest.mark.parametrize("damage", ["tokens.bin", "manifest.json"])
def test_a_damaged_cache_is_one_line(corpus, damage):
    data.load(str(corpus), 4)
    file, = Path("out/cache").glob(f"tokens-*/{damage}")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadInput, match="--cache out/cache: .* is damaged; delete it"):
        data.load(str(corpus), 4)


def test_a_cache_that_cant_be_written_is_one_line(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file.*; .*take another --cache"):
        data.load(str(corpus), 4, cache=tmp_path / "file" / "cache")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of memory")
def test_memory_doesnt_grow_with_the_corpus(tmp_path):
    """The peak of the second start with 24 MB of text is that of one with 1 MB, within 8 MB."""
    code = f"""
import sys
sys.path[:0] = {sys.path}
import data
data.load(sys.argv[1], 1)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])"""
    peaks = []
    for name, size in (("small", 1), ("large", 24)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(words(0, 1_000_000) * size)
        for _ in range(2):
            run = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, check=True)
        peaks.append(int(run.stdout) / 1000)
    assert peaks[1] < peaks[0] + 8


def test_byte_tokenizer_returns_any_text():
    encoding = data.tokenizer("bytes")
    text = "naïve <|endoftext|> \0 \r\n 漢字"
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.encode_ordinary("é") == [0xC3, 0xA9]
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert data.encode("ab", encoding).tolist() == [256, 97, 98]
    assert data.encode(text, encoding)[1:].tolist() == encoding.encode_ordinary(text)


def test_a_gpt2_table_that_cannot_be_had_is_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    with pytest.raises(BadInput, match="--tokenizer gpt2: .*TIKTOKEN_CACHE_DIR") as error:
        data.tokenizer("gpt2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 41, 50])
def test_ordered_windows_read_every_token_once_in_order(length):
    tokens = np.arange(length)
    inputs, targets = zip(*data.ordered_windows(tokens, 2, 8), strict=True)
    assert torch.equal(torch.cat([part.flatten() for part in inputs]), torch.from_numpy(tokens[:-1]))
    assert torch.equal(torch.cat([part.flatten() for part in targets]), torch.from_numpy(tokens[1:]))
    assert all(part.shape[0] <= 2 and part.shape[1] <= 8 for part in inputs)


def test_random_windows_are_windows_and_reach_both_ends():
    tokens = np.arange(20)
    stream = data.RandomWindows([tokens], [data.seeded("test")], 4, 8)
    seen = set()
    for inputs, targets in itertools.islice(stream, 50):
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
        seen |= set(inputs.flatten().tolist()) | set(targets.flatten().tolist())
    assert seen == set(range(20))


def test_a_users_batches_dont_depend_on_who_else_is_there():
    texts = [np.arange(100), np.arange(1000, 1200)]
    alone = data.RandomWindows(texts[1:], [data.seeded(0, "b")], 3, 8)
    pooled = data.RandomWindows(texts, [data.seeded(0, "a"), data.seeded(0, "b")], 3, 8)
    for _ in range(3):
        assert torch.equal(next(alone)[0], next(pooled)[0][3:])
    keys = [(0, "a"), (0, "b"), (1, "b")]
    assert len({data.seeded(*key).initial_seed() for key in keys}) == 3


def test_trigram_worked_by_hand():
    """Train a b a b a c, V = 3, Witten-Bell. After the first token come b a b a c: unigrams a 2, b 2, c 1, 3 types.

    Test a b a: p1(b) = (2 + 3/3) / (5 + 3) = 3/8 and p1(a) = 3/8. Bigrams after a: b 2, c 1 (2 types); after b: a 2
    (1 type). p2(b|a) = (2 + 2 · 3/8) / (3 + 2) = 11/20; p2(a|b) = (2 + 3/8) / (2 + 1) = 19/24. Trigrams: the start
    counts as (a, a): b 1 (1 type), so p3(b|a a) = (1 + 11/20) / 2 = 31/40; after (a, b): a 2 (1 type), so
    p3(a|a b) = (2 + 19/24) / 3 = 67/72.
    """
    a, b, c = range(3)
    loss = data.trigram_loss(np.array([a, b, a, b, a, c]), np.array([a, b, a]), 3)
    assert loss == pytest.approx(-(math.log(31 / 40) + math.log(67 / 72)) / 2)


def test_trigram_probabilities_sum_to_one_also_after_unseen_histories():
    train = np.random.default_rng(0).integers(0, 5, 40)
    for history in itertools.product(range(6), repeat=2):
        p = []
        for token in range(6):  # token 5 is never seen
            both, first = (data.trigram_loss(train, np.array(x), 6) for x in ([*history, token], [*history]))
            p.append(math.exp(first - 2 * both))  # losses are means over 2 targets and 1
        assert sum(p) == pytest.approx(1)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_the_trigram_counts_the_same_in_chunks(chunk):
    tokens, histories = np.random.default_rng(0).integers(0, 3, 50), np.array([0, 2, 4])
    for n in (1, 2, 3):
        padded = [int(tokens[0]), *map(int, tokens)]
        grams = [padded[i - n + 1:i + 1] for i in range(2, len(padded))]
        numbers = Counter(sum(digit * 3 ** (n - 1 - i) for i, digit in enumerate(gram)) for gram in grams)
        expected = sorted((number, count) for number, count in numbers.items() if number // 3 in histories)
        assert list(zip(*data.counted(tokens, n, 3, histories, chunk), strict=True)) == expected


@pytest.mark.parametrize(("files", "users", "message"), [
    ({}, 1, "--users 1: .* holds 0 users"),
    ({"a.txt": b"caf\xe9 " * 100}, 1, "a.txt: is not UTF-8"),
    ({"a.txt": "Grüße".encode("utf-16")}, 1, "a.txt: is not UTF-8"),
    ({"a.txt": b"short"}, 1, "the train text of user a has 5 bytes, .*--block-size 64"),
    ({"a.txt": words(0, 5000).encode()}, 2, "--users 2: .* holds 1 users"),
    ({"a.txt": b"x", "a/b.txt": b"x"}, 1, "rename one"),
    ({"a/test.txt": b"x"}, 1, "all three"),
    ({"a/test.txt": b"x" * 99, "a/train.txt": b"x" * 99, "a/valid.txt": b""}, 1, "valid text of user a has 0 bytes"),
    ({"a/.hidden": b"x", "a/blank": b" \n"}, 1, "holds 0 users"),
])
def test_bad_text_is_one_line_that_says_what_to_do(tmp_path, files, users, message):
    (tmp_path / "text").mkdir()
    for name, content in files.items():
        (tmp_path / "text" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        data.load(str(tmp_path / "text"), users)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "file.txt"])
def test_a_folder_that_isnt_there_is_one_line(name, tmp_path):
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(BadInput, match="not a folder|File name too long"):
        data.load(str(tmp_path / name), 1)


def test_more_training_text_than_there_is_is_refused(corpus):
    with pytest.raises(BadInput, match="user anna has 4.8 kB of training text, not --train-kb 50"):
        data.load(str(corpus), 4, [50] * 4)
    with pytest.raises(BadInput, match="--train-kb 900"):
        data.load("builtin", 4, [900] * 4)
