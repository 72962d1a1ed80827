"""The tour can't rot."""

from lab.play import TOUR, play


def test_the_tours_outputs_are_what_its_code_prints(capsys):
    assert play(TOUR.read_text(encoding="utf-8")) == 0
    assert capsys.readouterr().out.count("\n## ") == 12


def test_play_shows_and_counts_an_output_that_differs(capsys):
    assert play("Two and two:\n\n    >>> 2 + 2\n    5\n    >>> 1 / 0\n") == 2
    printed = capsys.readouterr().out
    assert "Two and two:\n\n    >>> 2 + 2\n    4\n!!! line 3 of the tour says:\n    5\n" in printed
    assert "ZeroDivisionError" in printed
