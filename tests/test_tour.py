"""The tour's outputs are what its code prints."""

from lab.play import TOUR, play


def test_the_tours_outputs_are_what_its_code_prints(capsys):
    assert play(TOUR.read_text(encoding="utf-8")) == 0
    assert "\n    >>> " in capsys.readouterr().out


def test_play_shows_and_counts_outputs_that_differ(capsys):
    page = "Two and two:\n\n    >>> 2 + 2\n    5\n    >>> 1 / 0\n"
    assert play(page) == 2
    printed = capsys.readouterr().out
    shown = "Two and two:\n\n    >>> 2 + 2\n    4\n!!! line 3 of the tour shows:\n    5\n"
    assert printed.startswith(shown)
    assert "ZeroDivisionError" in printed
