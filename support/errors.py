"""What a command says when it can't do what was asked."""

import importlib
from types import ModuleType


class BadInput(ValueError):
    """One line: the setting, its value, what is wrong, and a remedy. Settings stand in backticks, by field:

        `train_kb` 0: not possible; give a number of at least 0.001

    The command line makes flags of them (settings.status_of) and exits with status 2.
    """


def optional(module: str, wanted: str, remedy: str) -> ModuleType:
    """A module of an optional package. wanted: the setting that asks for it, and its value. Raises BadInput."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{wanted}: needs a library that isn't here; {remedy}") from None


class Diverged(BadInput):
    """A loss grew without bound: the learning rate, or the noise, was too large."""
