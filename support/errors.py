"""Bad input: what a command reports in one line, instead of a traceback."""

import importlib
from types import ModuleType


class BadInput(ValueError):
    """One line: the setting and its value, the problem, a remedy. Settings are in backticks:

        `train_kb` 0: invalid; expected a number of at least 0.001

    The command line prints them as flags and exits with status 2 (support/runs/command_line.py).
    """


class Diverged(BadInput):
    """A loss grew without bound: the learning rate or the noise was too large."""


def optional(module: str, wanted: str, remedy: str) -> ModuleType:
    """A module of an optional package. Raises BadInput if it isn't installed.

    wanted: the setting that needs it, and its value.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{wanted}: needs a package that isn't installed; {remedy}") from None
