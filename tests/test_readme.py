"""The README keeps up with the code."""

import re
from pathlib import Path

from experiments import EXPERIMENTS
from methods import METHODS
from settings import Settings, flags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_formulas_point_to_the_lines_that_implement_them():
    """A row ends with a link to a line, and the line's code."""
    rows = re.findall(r"\[(\w+\.py):(\d+)\]\(\1#L\2\) \| `(.+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 8
    for file, number, code in rows:
        assert code in (ROOT / file).read_text().splitlines()[int(number) - 1], f"{file}:{number}"


def test_every_flag_is_in_the_table_with_its_default():
    rows = dict(re.findall(r"^\| `(--[\w-]+)[^`]*` \|.* \| ([^|]*) \|$", README, re.MULTILINE))
    assert set(rows) == {flag.name for flag in flags(Settings).values()}
    for name, flag in flags(Settings).items():
        default = getattr(Settings, name)
        if default is not None and flag.kind is not bool:
            value, = default if flag.many else [default]
            assert rows[flag.name] == str(value), flag.name


def test_every_method_is_in_the_table_and_every_experiment_is_told():
    assert set(METHODS) == set(re.findall(r"^\| `([\w-]+)` \| [^|]+ \| [^|]+ \| [^|]+ \|$", README, re.MULTILINE))
    assert all(f"python experiments.py {name}" in README for name in EXPERIMENTS)


def test_every_file_is_in_the_tour():
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"^\| `(\w+\.py)`", README, re.MULTILINE))
