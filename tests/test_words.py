"""What routers learned about words: which token is what, and the shares."""

import numpy as np

import data
import train
from conftest import SCHEDULE, SHAPE, refusal
from lab import languages, words
from support.runs.folder import Learned
from tiny import tiny


def test_a_token_is_of_the_class_of_the_word_that_it_is_a_part_of():
    pieces = ["Der", " Bau", "m", " 7", "0", ", ", "ei", "NE", ") ", "\n", "l'", "é"]
    kinds = [" ".join(sorted(found)) for found in words.classes(pieces, {"articles": "der eine"})]
    assert kinds == ["articles beginnings", "beginnings other words", "continuations other words", "digits", "digits",
                     "punctuation", "articles beginnings", "articles continuations", "punctuation", "",
                     "beginnings other words punctuation", "beginnings other words"]


def test_shares_are_the_generalists_mean_gates_over_a_classs_tokens(monkeypatch):
    gates = np.zeros((2, 8, 3))  # layers, tokens (END, d, e, r, space, 1, comma, b), experts: G, G, S
    gates[0, 1:4, 0], gates[0, 1:4, 1], gates[1, 5, 1] = [0.1, 0.2, 0.3], 0.5, 1.0
    monkeypatch.setattr(words.page, "gates_of", lambda user, tokens: gates)
    user = Learned("de", tiny(generalists=2, specialists=1), None)
    bytewise = data.tokenizer("bytes")
    found = words.shares(user, data.encode("der 1,bc", bytewise), bytewise)
    assert {name: (count, share.round(4).tolist()) for name, (count, share) in found.items()} == {
        "all": (8, [0.2625, 0.125]), "articles": (3, [0.7, 0]), "other words": (1, [0, 0]), "digits": (1, [0, 1]),
        "punctuation": (1, [0, 0]), "beginnings": (2, [0.3, 0]), "continuations": (2, [0.75, 0])}
    rows = words.report({"de": found}, parts=2).splitlines()
    assert rows[0] == "| user | tokens | count | all layers | 1 to 1 | 2 to 2 | above all tokens' |"
    assert rows[3] == "| de | articles | 3 | 35.0% | 70.0% | 0.0% | in 1 of 2 layers |"


def test_it_is_one_command(corpus, capsys):
    assert train.main(f"{SHAPE} {SCHEDULE} --data text --out run".split()) == 0
    capsys.readouterr()
    assert words.main(["--run", "run"]) == 0
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("| anna | all | ", "| cleo | digits | "))
    assert "--run out: holds no checkpoint.pt" in refusal(capsys, [], words.main)
    assert "holds no checkpoint" in refusal(capsys, ["--run", "text"], words.main)


def test_a_section_is_what_there_is_to_read():
    page = """<html><head><title>no</title></head><body><div class="navheader"><div>no</div><p>no</p></div>
        <h2>Title</h2><p>Some   <em>more</em>\n text.</p><pre>a  b\n  c</pre><ul><li>one</li></ul><hr></body></html>"""
    assert languages.Section(page).text == "Title\n\nSome more text.\na  b\n  c\none\n"
