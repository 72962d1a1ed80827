"""What routers learned about words: the class of a token, and the shares."""

import numpy as np
import pytest

import data
import train
from conftest import SCHEDULE, SHAPE, refusal
from lab import words
from support.runs.checkpoint import TrainedUser
from tiny import tiny


def test_a_token_has_the_class_of_the_word_that_it_is_a_part_of():
    pieces = ["Der", " Bau", "m", " 7", "0", ", ", "ei", "NE", ") ", "\n", "l'", "é"]
    found = words.classes(pieces, {"articles": "der eine"})
    assert [" ".join(sorted(classes)) for classes in found] == [
        "articles beginnings",
        "beginnings other words",
        "continuations other words",
        "digits",
        "digits",
        "punctuation",
        "articles beginnings",
        "articles continuations",
        "punctuation",
        "",
        "beginnings other words punctuation",
        "beginnings other words",
    ]


def test_shares_are_the_generalists_mean_gates_over_the_tokens_of_a_class(monkeypatch):
    """Tokens END, d, e, r, space, 1, comma, b; two generalists, one specialist."""
    gates = np.zeros((2, 8, 3))
    gates[0, 1:4, 0] = [0.1, 0.2, 0.3]
    gates[0, 1:4, 1] = 0.5
    gates[1, 5, 1] = 1.0
    monkeypatch.setattr(words.page, "gates_of", lambda user, tokens: gates)
    user = TrainedUser("de", tiny(generalists=2, specialists=1), None)
    bytewise = data.tokenizer("bytes")
    shares = words.shares(user, data.encode("der 1,bc", bytewise), bytewise)
    expected = {
        "all": (8, [0.2625, 0.125]),
        "articles": (3, [0.7, 0]),
        "other words": (1, [0, 0]),
        "digits": (1, [0, 1]),
        "punctuation": (1, [0, 0]),
        "beginnings": (2, [0.3, 0]),
        "continuations": (2, [0.75, 0]),
    }
    assert shares.keys() == expected.keys()
    for name, (count, share) in shares.items():
        assert count == expected[name][0]
        assert share.tolist() == pytest.approx(expected[name][1])
    lines = words.report({"de": shares}, parts=2).splitlines()
    header = "| user | tokens | count | all layers | 1 to 1 | 2 to 2 | above all tokens' |"
    assert lines[0] == header
    assert lines[3] == "| de | articles | 3 | 35.0% | 70.0% | 0.0% | in 1 of 2 layers |"


def test_the_command_prints_a_table_or_one_line_about_the_folder(corpus, capsys):
    assert train.main(f"{SHAPE} {SCHEDULE} --data text --out run".split()) == 0
    capsys.readouterr()
    assert words.main(["--run", "run"]) == 0
    printed = capsys.readouterr().out
    assert "| anna | all | " in printed
    assert "| cleo | digits | " in printed
    assert "--run out: holds no checkpoint.pt" in refusal(capsys, [], words.main)
