"""Run the tour: print its text, its code and the output of the code on this machine.

    python -m lab.play

The steps are those of docs/tour.md. Exit status 1 if an output differs from the page's.
"""

import doctest
import sys
from pathlib import Path

TOUR = Path(__file__).parent.parent / "docs" / "tour.md"


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


class Player(doctest.DocTestRunner):
    """Shows every example and its output."""

    def report_start(self, out, test, example):
        first, *rest = example.source.splitlines()
        out(indented(f">>> {first}"))
        for line in rest:
            out(indented(f"... {line}"))

    def report_success(self, out, test, example, got):
        out(indented(got))

    def report_failure(self, out, test, example, got):
        out(indented(got))
        out(f"!!! line {example.lineno + 1} of the tour shows:\n")
        out(indented(example.want))


def play(page: str) -> int:
    """Run a page's examples in order, and print the whole page.

    Returns the number of outputs that differ.
    """
    player = Player(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    names = {}  # names that the examples define
    for part in doctest.DocTestParser().parse(page):
        if isinstance(part, str):
            print(part, end="")
            continue
        test = doctest.DocTest([part], names, "tour", str(TOUR), part.lineno, None)
        player.run(test, clear_globs=False)
        names = test.globs  # DocTest copies the names that it gets
    return player.failures


def main() -> int:
    different = play(TOUR.read_text(encoding="utf-8"))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
