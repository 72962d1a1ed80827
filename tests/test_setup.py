"""pyproject.toml, for uv, and the requirements files, for pip, ask for the same packages."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages(file: str) -> set[str]:
    return set((ROOT / file).read_text().split())


def test_requirements_files_are_those_of_the_project():
    groups = PROJECT["dependency-groups"]
    dev = [package for package in groups["dev"] if isinstance(package, str)]
    assert packages("requirements.txt") == {*PROJECT["project"]["dependencies"], *groups["test"]}
    assert packages("requirements-dev.txt") == set(dev)
    extras = PROJECT["project"]["optional-dependencies"]
    assert packages("flower/requirements.txt") == set(extras["flower"])


def test_every_module_is_part_of_the_project():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == set(PROJECT["tool"]["setuptools"]["py-modules"])
