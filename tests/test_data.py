"""Text: nothing stands in two splits or with two users, every token is read once, and bad text is refused."""

import itertools
import math
from collections import Counter

import pytest
import torch

import data
from data import SPLITS, TEST, TRAIN, VALID, BadInput


def words(seed: int, size: int) -> str:
    """About `size` bytes of made-up words that differ from seed to seed."""
    numbers = torch.randint(10 ** 6, (size // 7,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"{number:06d}" for number in numbers)


@pytest.fixture
def corpus(tmp_path):
    """Two users with a file each, two with a folder of twelve."""
    for i, name in enumerate(("anna", "bert")):
        (tmp_path / f"{name}.txt").write_text(words(i, 6000))
    for i, name in enumerate(("cleo", "dora")):
        (tmp_path / name).mkdir()
        for j in range(12):
            (tmp_path / name / f"{j}.md").write_text(words(100 * (i + 1) + j, 500))
    return tmp_path


@pytest.mark.parametrize("where", list(data.BUILTIN))
def test_builtin_splits_and_shards_share_no_document_and_have_their_sizes(where):
    users = dict(data.builtin_users(where, [5000] * 8))
    assert list(users)[4:] == [f"{name}-2" for name in list(users)[:4]]
    documents = Counter(document for user in users.values() for split in SPLITS for document in user[split][:-1])
    assert max(documents.values()) == 1
    for user in users.values():
        sizes = {split: data.bytes_of(user[split]) for split in SPLITS}
        assert sizes == pytest.approx({TRAIN: 5000, VALID: 16000, TEST: 32000}, abs=3)


def test_no_users_test_text_stands_in_the_public_text():
    """But for lines that everyone writes, such as imports: fewer than one in twenty."""
    seen = {line.strip() for document in data.excerpts(data.public()) for line in document.splitlines()}
    assert len(seen) > 50_000
    for where in data.BUILTIN:
        for name, documents in data.builtin_users(where, [1000] * 4):
            lines = [line.strip() for document in documents[TEST] for line in document.splitlines()]
            long = [line for line in lines if len(line) > 30]
            assert sum(line in seen for line in long) < 0.05 * len(long), name


def test_one_file_is_cut_into_three_parts_that_dont_overlap(corpus):
    text = (corpus / "anna.txt").read_text()
    parts = dict(data.folder_users(str(corpus), [data.EVERYTHING]))["anna"]
    starts = [text.index(parts[split][0]) for split in (TEST, VALID, TRAIN)]
    ends = [start + len(parts[split][0]) for start, split in zip(starts, (TEST, VALID, TRAIN), strict=True)]
    assert starts[0] < ends[0] <= starts[1] < ends[1] <= starts[2] < ends[2]
    assert sum(len(parts[split][0]) for split in SPLITS) > len(text) - 200
    assert len(parts[TEST][0]) == len(parts[VALID][0]) == len(text) // 10


def test_a_folders_files_stay_whole_and_in_one_split(corpus):
    parts = dict(data.folder_users(str(corpus), [data.EVERYTHING] * 4))["dora"]
    files = {path.read_text() for path in (corpus / "dora").iterdir()}
    whole = [document for split in SPLITS for document in parts[split] if document in files]
    cut = [document for split in SPLITS for document in parts[split] if document not in files]
    assert len(whole) == len(set(whole)) >= 9
    assert all(sum(file.startswith(document) for file in files) == 1 for document in cut)
    assert not any(file in whole for document in cut for file in files if file.startswith(document))


def test_few_files_that_are_alike_or_one_that_is_large_are_cut_end_to_end(tmp_path):
    same = words(1, 3000)
    few = data.split_files([same, same], data.EVERYTHING)
    assert not any(few[TEST][0] in few[split][0] for split in (TRAIN, VALID))
    one_large = [words(i, 3000) for i in range(10)] + [words(99, 300_000)]
    assert sum(map(data.bytes_of, data.split_files(one_large, data.EVERYTHING).values())) > 329_000


def test_hidden_files_are_nobodys_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "fay").mkdir()
    (tmp_path / "fay" / ".DS_Store").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "fay" / "a.txt").write_text(words(0, 5000), encoding="utf-8-sig")
    (name, parts), = data.folder_users(str(tmp_path), [data.EVERYTHING])
    assert name == "fay"
    assert parts[TEST][0][0].isdigit()


def test_given_splits_are_taken_as_they_are(tmp_path):
    (tmp_path / "eva").mkdir()
    for split in SPLITS:
        (tmp_path / "eva" / f"{split}.txt").write_text(f"{split} text of eva")
    assert dict(data.folder_users(str(tmp_path), [5])) == {
        "eva": {TRAIN: ["train"], VALID: ["valid text of eva"], TEST: ["test text of eva"]}}


def test_duplicates_and_blank_documents_are_dropped():
    assert list(data.distinct(["a", " \n", "b", "a", ""])) == ["a", "b"]


def test_take_of_its_docstring_and_no_half_character():
    documents = iter(["abc", "def", "gh"])
    assert data.take(documents, 5) == ["abc", "de"]
    assert data.take(documents, 5) == ["gh"]
    assert data.take(iter(["aé"]), 2) == ["a"]


def test_mixed_target_is_the_same_for_all_and_an_even_share_of_each(corpus):
    texts = data.load(str(corpus), 4, target="mixed", block_size=16)
    own = data.load(str(corpus), 4, block_size=16)
    shortest = min(text.test_bytes for text in own)
    for text, alone in zip(texts, own, strict=True):
        assert torch.equal(text.test, texts[0].test)
        assert torch.equal(text.train, alone.train)
        shared = data.tokenizer("bytes").decode_bytes(texts[0].test.tolist())
        start = data.tokenizer("bytes").decode_bytes(alone.test[:shortest // 4 - 100].tolist())
        assert start in shared
    assert texts[0].test_bytes == pytest.approx(shortest, abs=4)


def test_train_kb_cuts_only_the_training_text(corpus):
    short, full = data.load(str(corpus), 4, [1, 2, 1, 2], block_size=16), data.load(str(corpus), 4, block_size=16)
    assert [text.train_bytes for text in short] == [1000, 2000, 1000, 2000]
    for a, b in zip(short, full, strict=True):
        assert torch.equal(a.test, b.test)
        assert torch.equal(a.valid, b.valid)
        assert len(a.train) < len(b.train)


def test_loading_twice_gives_the_same_tokens():
    for one, two in zip(data.load("builtin", 4), data.load("builtin", 4), strict=True):
        assert all(torch.equal(getattr(one, split), getattr(two, split)) for split in SPLITS)


def test_byte_tokenizer_returns_any_text():
    encoding = data.tokenizer("bytes")
    text = "naïve <|endoftext|> \0 \r\n 漢字"
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.encode_ordinary("é") == [0xC3, 0xA9]
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert data.encode(["ab", "c"], encoding).tolist() == [256, 97, 98, 256, 99]


def test_a_gpt2_table_that_cannot_be_had_is_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    with pytest.raises(BadInput, match="--tokenizer gpt2: .*TIKTOKEN_CACHE_DIR") as error:
        data.tokenizer("gpt2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 41, 50])
def test_ordered_windows_read_every_token_once_in_order(length):
    tokens = torch.arange(length)
    inputs, targets = zip(*data.ordered_windows(tokens, 2, 8), strict=True)
    assert torch.equal(torch.cat([part.flatten() for part in inputs]), tokens[:-1])
    assert torch.equal(torch.cat([part.flatten() for part in targets]), tokens[1:])
    assert all(part.shape[0] <= 2 and part.shape[1] <= 8 for part in inputs)


def test_random_windows_are_windows_and_reach_both_ends():
    tokens = torch.arange(20)
    stream = data.RandomWindows([tokens], [data.seeded("test")], 4, 8)
    seen = set()
    for inputs, targets in itertools.islice(stream, 50):
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
        seen |= set(inputs.flatten().tolist()) | set(targets.flatten().tolist())
    assert seen == set(range(20))


def test_a_users_batches_dont_depend_on_who_else_is_there():
    texts = [torch.arange(100), torch.arange(1000, 1200)]
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
    loss = data.trigram_loss(torch.tensor([a, b, a, b, a, c]), torch.tensor([a, b, a]), 3)
    assert loss == pytest.approx(-(math.log(31 / 40) + math.log(67 / 72)) / 2)


def test_trigram_probabilities_sum_to_one_also_after_unseen_histories():
    train = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0))
    for history in itertools.product(range(6), repeat=2):
        p = []
        for token in range(6):  # token 5 is never seen
            both, first = (data.trigram_loss(train, torch.tensor(x), 6) for x in ([*history, token], [*history]))
            p.append(math.exp(first - 2 * both))  # losses are means over 2 targets and 1
        assert sum(p) == pytest.approx(1)


@pytest.mark.parametrize(("files", "users", "message"), [
    ({}, 1, "--users 1: .* holds 0 users"),
    ({"a.txt": b"caf\xe9 " * 100}, 1, "a.txt: byte 3 is not UTF-8"),
    ({"a.txt": b"short"}, 1, "the .* text of user a has .* tokens"),
    ({"a.txt": words(0, 5000).encode()}, 2, "--users 2: .* holds 1 users"),
    ({"a.txt": b"x", "a/b.txt": b"x"}, 1, "rename one"),
    ({"a/test.txt": b"x"}, 1, "all three"),
    ({"a/.hidden": b"x"}, 1, "of user a has 1 tokens"),
])
def test_bad_text_is_one_line_that_says_what_to_do(tmp_path, files, users, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        data.load(str(tmp_path), users)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "x" * 300])
def test_a_folder_that_isnt_there_is_one_line(name, tmp_path):
    with pytest.raises(BadInput, match="not a folder|File name too long"):
        data.load(str(tmp_path / name), 1)


def test_more_training_text_than_there_is_is_refused(corpus):
    with pytest.raises(BadInput, match="--train-kb 50: user anna has only 5 kB"):
        data.load(str(corpus), 4, [50] * 4)
    with pytest.raises(BadInput, match="--train-kb 900"):
        data.load("builtin", 4, [900] * 4)
