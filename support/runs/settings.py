"""Everything that determines a run: one dataclass, and the command line derived from it.

    python train.py --help
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from data import BUILTIN_TRAIN_KB, DataConfig
from methods import METHODS
from model import EXPERTS
from support.errors import BadInput
from support.pretrained.base import NAMES
from support.text.sources import BUILTIN, TABLES


@dataclass(frozen=True)
class Flag:
    """What a setting is for, and the values that it may have."""

    help: str
    kind: type = str
    low: float | None = None  # the smallest value
    high: float | None = None  # the largest
    above: float | None = None  # a bound that is itself too small
    below: float | None = None  # a bound that is itself too large
    choices: Collection[str] = ()
    many: bool = False  # several values, such as one for each user
    empty: bool = False  # whether a text may be empty
    usual: tuple[float, float] | None = None  # two defaults: of a small model, and of one that others pretrained

    def parse(self, text: str):
        """The value of a text from the command line. Raises ValueError."""
        return tuple(self.kind(part) for part in text.split(",")) if self.many else self.kind(text)

    def allows(self, value) -> bool:
        return all(
            (self.empty or one != "") and (not self.choices or one in self.choices)
            and (self.kind is not float or math.isfinite(one))
            and (self.low is None or one >= self.low) and (self.high is None or one <= self.high)
            and (self.above is None or one > self.above) and (self.below is None or one < self.below)
            for one in (value if self.many else [value]))

    @property
    def remedy(self) -> str:
        if self.choices:
            return f"take one of {', '.join(self.choices)}"
        if self.kind is str:
            return "give a name"
        bounds = (("above ", self.above), ("of at least ", self.low), ("at most ", self.high), ("below ", self.below))
        number = "a whole number" if self.kind is int else "a number"
        within = " and ".join(f"{word}{bound}" for word, bound in bounds if bound is not None)
        return f"give {number} {within}" + (", or several, separated by commas" if self.many else "")


def setting(default, help: str, kind: type = str, low: float | None = None, **values):
    """A field of settings; `values` as in Flag."""
    return field(default=default, metadata={"flag": Flag(help, kind, low, **values)})


def flags(kind: type) -> dict[str, Flag]:
    """Each field's name -> its flag, of a kind of settings."""
    return {f.name: f.metadata["flag"] for f in fields(kind)}


def as_text(value) -> str:
    """A value as the command line has it: as_text((1, 2)) -> "1,2", as_text(True) -> ""."""
    return "" if value is True else ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def refuse(name: str, value, why: str, remedy: str):
    """Raises BadInput."""
    raise BadInput(f"{f'`{name}` {as_text(value)}'.rstrip()}: {why}; {remedy}")


def check(settings) -> None:
    """Raise BadInput if a value isn't one that it may have; None always may."""
    for name, flag in flags(type(settings)).items():
        value = getattr(settings, name)
        if value is not None and not flag.allows(value):
            refuse(name, value, "not possible", flag.remedy)


SCRATCH = dict(n_layer=3, n_head=4, n_embd=128)  # the shape, where no base decides


def usual(small: float, large: float, help: str, kind: type, low: float | None = None, **values):
    """A setting with two defaults: what suits a small model, and one that others pretrained."""
    return setting(None, f"{help} (default: {small}, or {large} on SmolLM2 and the like)", kind, low,
                   usual=(small, large), **values)


@dataclass
class Training:
    """What training any model needs. Raises BadInput."""

    batch_size: int | None = usual(8, 2, "windows in a batch", int, 1, high=1_000_000)
    block_size: int | None = usual(64, 128, "tokens in a window", int, 1, high=1_000_000)
    lr: float | None = usual(6e-3, 2e-3, "the experts' highest learning rate", float, above=0)
    warmup: int | None = usual(100, 20, "steps up to the highest learning rate; at most a fifth of all steps", int, 0)
    weight_decay: float = setting(0.1, "AdamW's weight decay; none for routers", float, 0)
    n_layer: int | None = setting(None, "layers (default: 3; a base brings its own)", int, 1, high=1000)
    n_head: int | None = setting(None, "attention heads (default: 4; a base brings its own)", int, 1)
    n_embd: int | None = setting(None, "channels (default: 128; a base brings its own)", int, 1, high=1_000_000)
    seed: int = setting(0, "the seed of everything that is random", int, 0)
    device: str = setting("cpu", "cpu, cuda, cuda:1, mps, ...")
    compile: bool = setting(False, "compile the models with torch.compile", bool)
    overwrite: bool = setting(False, "start anew in a folder that is in use", bool)

    by_others = False  # whether it starts from a model that others pretrained

    def __post_init__(self):
        for name, flag in flags(type(self)).items():
            if flag.usual and getattr(self, name) is None:
                setattr(self, name, flag.usual[self.by_others])
        check(self)


HYPER = "; ".join(f"{','.join(f'{name}={value}' for name, value in method.hyper.items())} of {label}"
                  for label, method in METHODS.items() if method.hyper)


@dataclass
class Settings(Training):
    """Run one method, from its settings to its table. A single value is repeated for every user.

    Raises BadInput.
    """

    users: int = setting(4, "number of users", int, 1, high=100_000)
    specialists: tuple[int, ...] = setting(
        (1,), "specialist experts in a layer: one number for all users, or one for each", int, 0, high=1000, many=True)
    generalists: int = setting(1, "generalist experts in a layer", int, 0, high=1000)
    top_k: int = setting(
        2, "experts for a token; a user with fewer uses all it has; with 1 the router can't learn", int, 1)
    method: str = setting("comigs", f"a row of methods.py: {', '.join(METHODS)}", choices=METHODS)
    set: str | None = setting(None, f"a method's hyper-parameters, where they are to differ from its row's: {HYPER}")
    expert: str = setting("mlp", "mlp: feed-forward blocks; lora: low-rank changes of the base's, which is frozen",
                          choices=tuple(EXPERTS))
    lora_rank: tuple[int, ...] = setting(
        (8,), "rank of the changes; most methods that average them need one for all", int, 1, high=10_000, many=True)
    init_from: str = setting("scratch", f"where the weights start: scratch, {', '.join(NAMES)}, a .gguf, "
                                        "or a file such as lab/pretrain.py writes")
    dtype: str = setting("auto", "of what is frozen, and of the work on it; auto: bfloat16 on SmolLM2 and the like, "
                                 "where the processor multiplies in it", choices=("auto", "float32", "bfloat16"))
    data: str = setting("builtin", f"{', '.join(BUILTIN)}, a folder with a NAME.txt or a NAME/ for each "
                                   "user, or a .csv or .jsonl file")
    user_field: str | None = setting(None, "a table's field that says whose text a row is (default: user)")
    text_field: str | None = setting(None, "a table's field that holds the text (default: text)")
    cache: str = setting("out/cache", "folder for a base's loss on a text")
    short_users: str = setting("refuse", "what to do about users with too little text", choices=("refuse", "leave-out"))
    target: str = setting("own", "whose text is used for validation and testing: the user's own, or an even mix of "
                                 "all users'", choices=("own", "mixed"))
    train_kb: tuple[float, ...] | None = setting(
        None, f"training text in kB (default: {BUILTIN_TRAIN_KB} of a builtin, else all "
              "there is)", float, 0.001, high=1e9, many=True)
    valid_kb: tuple[float, ...] | None = setting(
        None, "validation text in kB, from its beginning (default: all that is held out)", float, 0.001, high=1e9,
        many=True)
    tokenizer: str | None = setting(None, "what a token is: bytes, gpt2, or a .gguf's or smollm2's (default: bytes, or "
                                          "the base's)")
    experts_see: str = setting("train", "the text that experts learn from: training text, or validation text as well",
                               choices=("train", "both"))
    router_lr: float | None = setting(None, "the routers' learning rate (default: as --lr, or five times that on "
                                            "SmolLM2 and the like)", float, above=0)
    router_every: int = setting(30, "expert steps between two visits to the router", int, 1)
    router_steps: int | None = usual(5, 10, "router steps in such a visit", int, 0)
    rounds: int | None = usual(64, 10, "communication rounds", int, 1)
    local_steps: int = setting(10, "expert steps of a user in a round", int, 1)
    average: str = setting("uniform", "a user's weight in the average: the same for all, or its training tokens",
                           choices=("uniform", "tokens"))
    participation: float = setting(1.0, "the fraction of users called in a round", float, above=0, high=1)
    drop_rate: float = setting(0.0, "the chance that a called user vanishes before it answers", float, 0, below=1)
    clip_update: float | None = setting(None, "the largest norm of an update; longer ones are cut", float, above=0)
    dp_noise: float = setting(0.0, "noise on the average, in multiples of largest norm / number of answers", float, 0)
    eval_every: int | None = usual(8, 1, "rounds between two glances at validation text", int, 1)
    save_every: int | None = usual(16, 5, "rounds between two checkpoints", int, 1)
    out: str | None = setting(None, "folder of the run (default: a new one under out/)")
    resume: bool = setting(False, "continue the run in --out from its newest checkpoint, with its settings", bool)

    def __post_init__(self):
        super().__post_init__()
        for name, flag in flags(Settings).items():
            value = getattr(self, name)
            if flag.many and value is not None:
                if len(value) not in (1, self.users):
                    refuse(name, value, f"{len(value)} numbers for {self.users} users", "give one, or one per user")
                setattr(self, name, tuple(value) * (self.users if len(value) == 1 else 1))
        for wrong, name, why, remedy in (
            (self.generalists + min(self.specialists) == 0, "generalists",
             "a user with `specialists` 0 has no expert", "give either at least 1"),
            (self.expert == "lora" and self.init_from == "scratch", "expert",
             "changes a base, and `init_from` scratch has none", "give `init_from` smollm2, or a file"),
            (self.expert != "lora" and self.dtype == "bfloat16", "dtype", "is of what is frozen, and nothing is",
             "give `expert` lora, or leave it out"),
            (self.init_from != "scratch" and self.n_layer, "n_layer", "`init_from` has its own", "leave it out"),
            (self.init_from != "scratch" and self.n_embd, "n_embd", "`init_from` has its own", "leave it out"),
            *((getattr(self, name) and Path(self.data).suffix not in TABLES, name, f"`data` {self.data} isn't a table",
               "leave it out") for name in ("user_field", "text_field")),
            (self.dp_noise and not self.clip_update, "dp_noise", "needs a bound", "give `clip_update`"),
            (self.dp_noise and self.average != "uniform", "dp_noise", "is for equal weights", "take `average` uniform"),
            (self.dp_noise and self.target == "mixed", "dp_noise",
             "doesn't hide text that others' routers learn from", "take `target` own"),
            (self.dp_noise and self.users == 1, "dp_noise", "hides a user among others", "give `users` 2 or more"),
            (self.resume and self.overwrite, "overwrite", "not together with `resume`", "take one of them"),
        ):
            if wrong:
                refuse(name, getattr(self, name), why, remedy)
        row = METHODS[self.method]
        if unknown := self.hyper.keys() - row.hyper.keys():
            refuse("set", self.set, f"`method` {self.method} has no {', '.join(sorted(unknown))}",
                   f"it has {', '.join(row.hyper)}" if row.hyper else "leave it out")
        row.check(self)

    @property
    def by_others(self) -> bool:
        """Whether it starts from a language model that others pretrained: anything but our own .pt."""
        return self.init_from != "scratch" and Path(self.init_from).suffix != ".pt"

    @property
    def data_config(self) -> DataConfig:
        """The settings that decide which text users have."""
        return DataConfig(**{f.name: getattr(self, f.name) for f in fields(DataConfig)})

    @property
    def hyper(self) -> dict[str, float]:
        """The method's hyper-parameters: its row's values, or those that are set."""
        return METHODS[self.method].hyper | values_of(self.set)

    @property
    def rate_of_routers(self) -> float:
        return self.router_lr or self.lr * (5 if self.by_others else 1)

    @property
    def title(self) -> str:
        """What is run, in a line."""
        method, data, base = METHODS[self.method], Path(self.data).resolve().name, Path(self.init_from).name
        router = f"{self.top_k} for each token" if method.routed else "no router"
        return (f"{self.method}: {method.summary}. Text: {data}, target: {self.target}. Base: {base}. Experts: "
                f"{self.expert}, {router}. {self.rounds} rounds of {self.local_steps} steps, seed {self.seed}.")


def values_of(text: str | None) -> dict[str, float]:
    """values_of("lambda=0.1,gamma=0.9") -> {"lambda": 0.1, "gamma": 0.9}. Raises BadInput."""
    try:
        pairs = [part.split("=") for part in text.split(",")] if text else []
        return {name.strip(): finite(number) for name, number in pairs}
    except ValueError:
        refuse("set", text, "not names and numbers", "write it as lambda=0.1,gamma=0.9")


def swept_by(text: str | None) -> tuple[str, list[float]]:
    """swept_by("lambda=0.01,0.1") -> ("lambda", [0.01, 0.1]). Raises BadInput."""
    name, _, numbers = (text or "").partition("=")
    try:
        return name.strip(), list(dict.fromkeys(map(finite, numbers.split(",")))) if text else []
    except ValueError:
        refuse("sweep", text, "not a name and numbers", "write it as lambda=0.01,0.1")


def finite(text: str) -> float:
    """Raises ValueError."""
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def plain(settings) -> dict:
    """Settings as JSON has them."""
    return json.loads(json.dumps(asdict(settings)))


def as_arguments(settings) -> list[str]:
    """The command line that gives these settings."""
    given = {name: getattr(settings, name) for name in flags(type(settings))}
    return [word for name, value in given.items() if value is not None and value is not False
            for word in (option(name), as_text(value)) if word]


def option(name: str) -> str:
    """option("train_kb") -> "--train-kb"."""
    return "--" + name.replace("_", "-")


# --- the command line ------------------------------------------------------------------------------------------------

GROUPS = {  # the headings of train.py --help
    "users and experts": "users specialists generalists top_k method set expert lora_rank init_from dtype",
    "text": "data user_field text_field cache short_users target train_kb valid_kb tokenizer",
    "learning": "batch_size block_size lr warmup weight_decay router_lr router_every router_steps experts_see n_layer "
                "n_head n_embd",
    "federation": "rounds local_steps average participation drop_rate clip_update dp_noise",
    "run": "out resume overwrite eval_every save_every seed device compile",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message}; see --help")


def given_in(arguments: list[str] | None, kind: type) -> tuple[dict, list[str]]:
    """The settings of some kind that are on a command line (None: this process's), and the arguments that are none of
    its. Raises BadInput."""
    parser = Parser(usage="%(prog)s [settings]", description=kind.__doc__.split(". ")[0] + ".", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    heading = {name: title for title, names in GROUPS.items() for name in names.split() if issubclass(kind, Training)}
    groups = {title: parser.add_argument_group(title) for title in ("settings", *GROUPS)}
    for name, flag in flags(kind).items():
        group = groups[heading.get(name, "settings")]
        default = getattr(kind, name)
        if flag.kind is bool:
            group.add_argument(option(name), action="store_true", help=flag.help)
        else:
            few = "|".join(flag.choices) if len(flag.choices) < 6 else ""
            values = "LIST" if flag.many else few or {int: "N", float: "X", str: "NAME"}[flag.kind]
            text = flag.help if default is None else f"{flag.help} (default: {as_text(default)})"
            group.add_argument(option(name), metavar=values, help=text)
    given, rest = parser.parse_known_args(arguments)
    values = {}
    for name, text in vars(given).items():
        try:
            values[name] = text if text is True else flags(kind)[name].parse(text)
        except ValueError:
            refuse(name, text, "not possible", flags(kind)[name].remedy)
    return values, rest


def parsed(arguments: list[str] | None, kind: type = Settings):
    """The settings of a command line with nothing else on it. Raises BadInput."""
    given, rest = given_in(arguments, kind)
    refuse_rest(rest)
    return kind(**given)


def refuse_rest(arguments: list[str]) -> None:
    """Raises BadInput if there are any."""
    if arguments:
        raise BadInput(f"{' '.join(arguments)}: not known; see --help")


def check_device(device: str) -> None:
    """Raises BadInput."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise BadInput(f"`device` {device}: this machine has no such device; take cpu") from None


def as_flags(message: str) -> str:
    """as_flags("`train_kb` 0: not possible") -> "--train-kb 0: not possible"."""
    return re.sub(r"`(\w+)`", lambda name: option(name[1]), message)


NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed")


def status_of(command: str, work: Callable[[], object], if_stopped: str) -> int:
    """Do the work of a command. Returns its exit status: 0, 2 after bad input, 130 where the user stopped it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the table's arrows, on a terminal without Unicode
    process = f", process {os.environ['RANK']}" if "RANK" in os.environ else ""
    try:
        work()
        return 0
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(f"{command}: stopped; {stop.args[0] if stop.args else if_stopped}", file=sys.stderr)
        return 130
    except BadInput as error:
        problem = as_flags(str(error))
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror or error}; check the disk and its permissions"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        problem = "there isn't enough memory for this; take a smaller --n-embd, --batch-size, --users, ..."
    print(f"{command}{process}: {problem}", file=sys.stderr)
    return 2
