"""The command line of settings, and the exit status of a command."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from support.errors import BadInput
from support.runs.flags import Flag, as_text, flags, refuse
from support.runs.settings import LANGUAGE_MODEL, SMALL_MODEL, Settings, Training

GROUPS = {  # the headings of train.py --help
    "users and experts": "users specialists generalists top_k method set expert lora_rank "
    "init_from dtype",
    "text": "data user_field text_field short_users target train_kb valid_kb tokenizer",
    "learning": "batch_size block_size lr warmup weight_decay router_lr router_decay router_every "
    "router_steps experts_see n_layer n_head n_embd",
    "federation": "rounds local_steps average participation drop_rate clip_update dp_noise",
    "run": "out resume overwrite eval_every save_every seed device compile",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message}; see --help")


def option(name: str) -> str:
    """option("train_kb") -> "--train-kb"."""
    return "--" + name.replace("_", "-")


def heading(name: str, kind: type) -> str:
    """The heading of --help under which a setting is listed."""
    if issubclass(kind, Training):
        for title, names in GROUPS.items():
            if name in names.split():
                return title
    return "settings"


def placeholder(flag: Flag) -> str:
    """The placeholder of a flag's value in --help."""
    if flag.many:
        return "LIST"
    if flag.choices and len(flag.choices) < 6:
        return "|".join(flag.choices)
    return {int: "N", float: "X", str: "NAME"}[flag.kind]


def help_text(name: str, flag: Flag, default: Any) -> str:
    """A flag's help, with its default."""
    if default is not None:
        return f"{flag.help} (default: {as_text(default)})"
    if name in SMALL_MODEL:
        small = SMALL_MODEL[name]
        large = LANGUAGE_MODEL[name]
        return f"{flag.help} (default: {small}; {large} on a language model such as SmolLM2)"
    return flag.help


def parser_of(kind: type) -> Parser:
    """A parser for the flags of a settings class."""
    summary = kind.__doc__.split(". ")[0] + "."
    parser = Parser(
        usage="%(prog)s [settings]",
        description=summary,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {title: parser.add_argument_group(title) for title in ("settings", *GROUPS)}
    for each in fields(kind):
        flag = each.metadata["flag"]
        group = groups[heading(each.name, kind)]
        if flag.kind is bool:
            group.add_argument(option(each.name), action="store_true", help=flag.help)
        else:
            text = help_text(each.name, flag, each.default)
            group.add_argument(option(each.name), metavar=placeholder(flag), help=text)
    return parser


def parse_known(arguments: list[str] | None, kind: type) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into the settings of `kind`, by name, and all other arguments.

    arguments: None for this process's arguments. Raises BadInput.
    """
    texts, rest = parser_of(kind).parse_known_args(arguments)
    values = {}
    for name, text in vars(texts).items():
        flag = flags(kind)[name]
        if flag.kind is bool:
            values[name] = True
            continue
        try:
            values[name] = flag.parse(text)
        except ValueError:
            refuse(name, text, "invalid", f"expected {flag.expected}")
    return values, rest


def parse_all(arguments: list[str] | None, kind: type) -> dict[str, Any]:
    """Like parse_known, but refuses all other arguments. Raises BadInput."""
    values, rest = parse_known(arguments, kind)
    if rest:
        raise BadInput(f"{' '.join(rest)}: unknown; see --help")
    return values


def parsed(arguments: list[str] | None, kind: type = Settings) -> Any:
    """An instance of `kind` from a command line. Raises BadInput."""
    return kind(**parse_all(arguments, kind))


def as_arguments(settings: Any) -> list[str]:
    """The command line of settings."""
    arguments = []
    for name in flags(type(settings)):
        value = getattr(settings, name)
        if value is None or value is False:
            continue
        arguments.append(option(name))
        if value is not True:
            arguments.append(as_text(value))
    return arguments


def swept_by(text: str | None) -> tuple[str, list[float]]:
    """swept_by("lambda=0.01,0.1") -> ("lambda", [0.01, 0.1]). Raises BadInput."""
    if not text:
        return "", []
    name, _, numbers = text.partition("=")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) for value in values):
        refuse("sweep", text, "invalid", "expected a name and numbers, such as lambda=0.01,0.1")
    return name.strip(), list(dict.fromkeys(values))


# --- exit status ---

OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
)


def as_flags(message: str) -> str:
    """as_flags("`train_kb` 0: invalid") -> "--train-kb 0: invalid"."""
    return re.sub(r"`(\w+)`", lambda name: option(name[1]), message)


def run_command(command: str, work: Callable[[], object], if_stopped: str) -> int:
    """Run a command.

    Returns its exit status: 0, 2 after bad input, 130 if the user stopped it. Bugs in the
    program raise tracebacks.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for a terminal without Unicode
    try:
        work()
        return 0
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        hint = stop.args[0] if stop.args else if_stopped
        print(f"{command}: stopped; {hint}", file=sys.stderr)
        return 130
    except BadInput as error:
        problem = as_flags(str(error))
    except OSError as error:
        file = error.filename or "a file"
        problem = f"{file}: {error.strerror or error}; check the disk and its permissions"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        problem = "out of memory; use a smaller --n-embd, --batch-size or --users"
    process = f", process {os.environ['RANK']}" if "RANK" in os.environ else ""
    print(f"{command}{process}: {problem}", file=sys.stderr)
    return 2
