"""Who gets which text: nothing stands in two splits or with two users, documents stay whole, and copies count once."""

from collections import Counter

import numpy as np
import pytest

import splits
from corpora import BUILTIN, EVERYTHING, BadInput, Corpus, Piece, excerpts, public
from splits import HELD_OUT, SPLITS, TEST, TRAIN, VALID
from texts import words


def corpus_of(pieces: list[Piece]) -> Corpus:
    return Corpus("", lambda: iter(pieces))


def dealt(pieces: list[Piece], train: int = EVERYTHING) -> dict[str, dict[str, list[str]]]:
    """User -> split -> its documents, or parts of them, in the order of the corpus."""
    corpus = corpus_of(pieces)
    users = splits.survey(corpus)
    chosen, _ = splits.choose(users, "here", [train] * len(users), 0, "refuse", {})
    result, seen = {user: {split: [] for split in SPLITS} for user in chosen}, Counter()
    for user, text, meant in splits.filled(corpus):
        for split, part in chosen[user][meant].cut(seen[user, meant], text):
            result[user][split].append(part)
        seen[user, meant] += 1
    return result


@pytest.mark.parametrize("where", list(BUILTIN))
def test_builtin_splits_and_shards_share_no_document_and_have_their_sizes(where):
    users = dict(splits.builtin_users(where, [5000] * 8))
    assert list(users)[4:] == [f"{name}-2" for name in list(users)[:4]]
    documents = Counter(document for user in users.values() for split in SPLITS for document in user[split][:-1])
    assert max(documents.values()) == 1
    for user in users.values():
        sizes = {split: splits.bytes_of(user[split]) for split in SPLITS}
        assert sizes == pytest.approx({TRAIN: 5000, VALID: 16000, TEST: 32000}, abs=3)


def test_no_users_test_text_stands_in_the_public_text():
    """But for lines that everyone writes, such as imports: fewer than one in twenty."""
    seen = {line.strip() for document in excerpts(public()) for line in document.splitlines()}
    assert len(seen) > 50_000
    for where in BUILTIN:
        for name, documents in splits.builtin_users(where, [1000] * 4):
            lines = [line.strip() for document in documents[TEST] for line in document.splitlines()]
            long = [line for line in lines if len(line) > 30]
            assert sum(line in seen for line in long) < 0.05 * len(long), name


def test_documents_stay_whole_and_stand_in_one_split():
    documents = [words(n, 500) for n in range(40)]
    user = dealt([Piece("a", document) for document in documents])["a"]
    assert sorted(document for split in SPLITS for document in user[split]) == sorted(documents)
    total = splits.bytes_of(documents)
    for split in (TEST, VALID):  # a tenth each, and what is left of the document that fills it
        assert total // 10 <= splits.bytes_of(user[split]) < total // 10 + 500


def test_held_out_documents_dont_depend_on_how_much_training_text_is_wanted():
    pieces = [Piece("a", words(n, 500)) for n in range(40)]
    short, full = dealt(pieces, 3000)["a"], dealt(pieces)["a"]
    assert short[TEST] == full[TEST]
    assert short[VALID] == full[VALID]
    assert 3000 <= splits.bytes_of(short[TRAIN]) < 3500
    assert set(short[TRAIN]) < set(full[TRAIN])


def test_the_held_out_part_of_much_text_is_no_larger_than_it_has_to_be():
    user = dealt([Piece("a", words(n, 4000)) for n in range(200)])["a"]
    for split, size in HELD_OUT.items():
        assert size <= splits.bytes_of(user[split]) < size + 4000


def test_copies_count_once_wherever_they_stand():
    documents = [words(n, 300) for n in range(30)]
    user = dealt([Piece("a", document) for document in documents + documents[::-1]])["a"]
    everywhere = Counter(document for split in SPLITS for document in user[split])
    assert everywhere == Counter(documents)


def test_of_copies_at_several_users_the_firsts_counts():
    common = [words(n, 300) for n in range(20)]
    own = {name: [words(1000 * ord(name) + n, 300) for n in range(20)] for name in "ab"}
    users = dealt([Piece(name, text) for name in "ba" for text in common + own[name]])
    everywhere = Counter(document for user in users.values() for split in SPLITS for document in user[split])
    assert max(everywhere.values()) == 1
    assert set(common) < {document for split in SPLITS for document in users["a"][split]}


def test_a_users_split_doesnt_depend_on_who_else_is_there():
    mine = [Piece("a", words(n, 500)) for n in range(20)]
    others = [Piece("b", words(100 + n, 300)) for n in range(20)]
    between = [piece for pair in zip(others, mine, strict=True) for piece in pair]
    assert dealt(between)["a"] == dealt(mine)["a"]


@pytest.mark.parametrize("pieces", [
    [words(0, 6000)],  # one text
    [words(0, 3000), words(1, 3000), words(0, 3000)],  # a few, two of them alike
    [words(n, 300) for n in range(10)] + [words(99, 30_000)],  # one outweighs the others
    ["é" * 3000],  # characters of two bytes
])
def test_running_text_is_cut_end_to_end_into_three_parts_that_dont_overlap(pieces):
    text = "".join(dict.fromkeys(pieces))
    user = dealt([Piece("a", piece) for piece in pieces])["a"]
    parts = ["".join(user[split]) for split in (TEST, VALID, TRAIN)]
    assert "".join(parts) == text
    assert [len(part.encode()) for part in parts[:2]] == pytest.approx([len(text.encode()) / 10] * 2, abs=2)


def test_a_long_document_is_running_text_however_much_there_is(monkeypatch):
    monkeypatch.setattr(splits, "DOCUMENT", 1000)
    user = dealt([Piece("a", words(n, 1100)) for n in range(50)])["a"]
    assert splits.bytes_of(user[TEST]) == pytest.approx(5500, abs=100)
    assert user[TEST][0].startswith(words(0, 1100)[:50])


def test_given_splits_are_taken_as_they_are_but_for_the_length_of_training():
    pieces = [Piece("a", f"{split} text", split) for split in SPLITS]
    assert dealt(pieces, 5)["a"] == {TRAIN: ["train"], VALID: ["valid text"], TEST: ["test text"]}


def test_blank_text_is_nobodys():
    corpus = corpus_of([Piece("a", " \n"), Piece("b", words(0, 2000)), Piece("b", "")])
    assert list(splits.survey(corpus)) == ["b"]
    assert dealt(list(corpus.pieces())[1:]).keys() == {"b"}


def test_users_with_too_little_are_refused_or_named_and_left_out():
    users = splits.survey(corpus_of(
        [Piece(name, words(n, 100 if name == "b" else 5000)) for n, name in enumerate("abcd")]))
    with pytest.raises(BadInput, match="--data here: the valid text of user b has 9 bytes, .*size 64;.*leave-out"):
        splits.choose(users, "here", [EVERYTHING] * 3, 64, "refuse", {})
    chosen, left_out = splits.choose(users, "here", [EVERYTHING] * 3, 64, "leave-out", {})
    assert list(chosen) == ["a", "c", "d"]
    assert list(left_out) == ["b"]
    assert "user b" in left_out["b"]
    chosen, left_out = splits.choose(users, "here", [EVERYTHING] * 2, 64, "leave-out", {"a": "for a reason"})
    assert list(chosen) == ["c", "d"]
    assert list(left_out) == ["a", "b"]
    with pytest.raises(BadInput, match="--users 4: .* holds 3 users, and 1 with too little text"):
        splits.choose(users, "here", [EVERYTHING] * 4, 64, "leave-out", {})
    with pytest.raises(BadInput, match="user a has 3.99.* kB of training text, not --train-kb 6"):
        splits.choose(users, "here", [6000] * 2, 64, "refuse", {})


def test_take_of_its_docstring_and_no_half_character():
    documents = iter(["abc", "def", "gh"])
    assert splits.take(documents, 5) == ["abc", "de"]
    assert splits.take(documents, 5) == ["gh"]
    assert splits.take(iter(["aé"]), 2) == ["a"]


def test_a_plan_covers_every_byte_once():
    """Of any pieces, in any of the ways: the ranges follow each other, and so do the places of the pieces."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        holding = splits.Holding()
        for _ in range(generator.integers(1, 40)):
            holding.add(bytes(generator.integers(0, 2, generator.integers(1, 6)).astype(np.uint8)))
        splits.find_copies([holding])
        plan, sizes = splits.plan(holding, "", EVERYTHING), np.array(holding.sizes)
        taken = plan.starts >= 0
        covered = [byte for start, size in zip(plan.starts[taken], sizes[taken], strict=True)
                   for byte in range(start, start + int(size))]
        assert sorted(covered) == list(range(len(covered)))
        ends = [place for split in (TEST, VALID, TRAIN) for place in plan.ranges[split]]
        assert [ends[0], ends[1], ends[3], ends[5]] == [0, ends[2], ends[4], len(covered)]
