"""Flags: fields of a dataclass with a help text and the values that they allow.

    @dataclass
    class Options:
        steps: int = setting(8000, "training steps", int, low=1)

support/runs/command_line.py reads such a dataclass from the command line.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from support.errors import BadInput


@dataclass(frozen=True)
class Flag:
    """The help text and the allowed values of a setting."""

    help: str
    kind: type = str
    low: float | None = None  # value >= low
    high: float | None = None  # value <= high
    above: float | None = None  # value > above
    below: float | None = None  # value < below
    choices: Collection[str] = ()
    many: bool = False  # a list of values, such as one per user
    empty: bool = False  # whether the text may be empty

    def parse(self, text: str) -> Any:
        """The value of a text from the command line. Raises ValueError."""
        if self.many:
            return tuple(self.kind(part) for part in text.split(","))
        return self.kind(text)

    def allows(self, value: Any) -> bool:
        """Whether a value, or each value of a list, is allowed."""
        if self.many:
            return all(self.allows_one(each) for each in value)
        return self.allows_one(value)

    def allows_one(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind is str:
            return self.empty or value != ""
        if self.kind is float and not math.isfinite(value):
            return False
        if self.low is not None and value < self.low:
            return False
        if self.high is not None and value > self.high:
            return False
        if self.above is not None and value <= self.above:
            return False
        return self.below is None or value < self.below

    @property
    def expected(self) -> str:
        """The allowed values, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is str:
            return "a name"
        bounds = []
        if self.above is not None:
            bounds.append(f"above {self.above}")
        if self.low is not None:
            bounds.append(f"of at least {self.low}")
        if self.high is not None:
            bounds.append(f"at most {self.high}")
        if self.below is not None:
            bounds.append(f"below {self.below}")
        number = "a whole number" if self.kind is int else "a number"
        several = ", or several separated by commas" if self.many else ""
        return f"{number} {' and '.join(bounds)}{several}"


def setting(default: Any, help: str, kind: type = str, **values: Any) -> Any:
    """A dataclass field that is a flag. `values` are other fields of Flag."""
    return field(default=default, metadata={"flag": Flag(help, kind, **values)})


def flags(kind: type) -> dict[str, Flag]:
    """The flags of a dataclass, by field name."""
    return {each.name: each.metadata["flag"] for each in fields(kind)}


def check_values(settings: Any) -> None:
    """Raise BadInput if a setting has a value that its flag doesn't allow. None is allowed."""
    for name, flag in flags(type(settings)).items():
        value = getattr(settings, name)
        if value is not None and not flag.allows(value):
            refuse(name, value, "invalid", f"expected {flag.expected}")


def as_text(value: Any) -> str:
    """A value as written on the command line: as_text((1, 2)) -> "1,2", as_text(True) -> ""."""
    if value is True:
        return ""
    if isinstance(value, tuple | list):
        return ",".join(str(each) for each in value)
    return str(value)


def refuse(name: str, value: Any, problem: str, remedy: str) -> NoReturn:
    """Raise BadInput for a setting and its value."""
    setting_and_value = f"`{name}` {as_text(value)}".rstrip()
    raise BadInput(f"{setting_and_value}: {problem}; {remedy}")
