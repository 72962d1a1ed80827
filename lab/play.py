"""The tour, step by step, with the numbers of this machine: what docs/tour.md says, and what its code prints now.

    python -m lab.play

Exit status 1 if an output isn't the page's. The page is the only source of the steps.
"""

import doctest
import sys
from pathlib import Path

TOUR = Path(__file__).parent.parent / "docs" / "tour.md"


class Player(doctest.DocTestRunner):
    """Shows every example as it runs, and what it printed, whatever that is."""

    def report_start(self, out, test, example):
        first, *more = example.source.splitlines()
        out("".join(f"    {line}\n" for line in [f">>> {first}", *(f"... {line}" for line in more)]))

    def report_success(self, out, test, example, got):
        out("".join(f"    {line}\n" for line in got.splitlines()))

    def report_failure(self, out, test, example, got):
        self.report_success(out, test, example, got)
        out(f"!!! line {example.lineno + 1} of the tour says:\n")
        self.report_success(out, test, example, example.want)


def play(tour: str) -> int:
    """Run a page's examples in order, and show all of it. Returns how many outputs differ."""
    player, names = Player(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), {}
    for part in doctest.DocTestParser().parse(tour):
        if isinstance(part, str):
            print(part, end="")
        else:
            test = doctest.DocTest([part], names, "tour", str(TOUR), part.lineno, None)
            player.run(test, clear_globs=False)
            names = test.globs
    return player.failures


if __name__ == "__main__":
    sys.exit(play(TOUR.read_text(encoding="utf-8")) > 0)
