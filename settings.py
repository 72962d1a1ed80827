"""Everything that determines a run: one dataclass, and the command line derived from it.

    python train.py --help
"""

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

import base
from corpora import BUILTIN, PUBLIC, TABLES, BadInput
from data import BUILTIN_TRAIN_KB
from federated import Server
from methods import METHODS
from model import EXPERTS, GENERALIST, SPECIALIST


@dataclass(frozen=True)
class Flag:
    """What a field of Settings is for, and the values that it may have."""

    name: str
    help: str
    kind: type
    low: float | None = None  # the smallest value
    high: float | None = None  # the largest
    above: float | None = None  # a bound that is itself too small
    below: float | None = None  # a bound that is itself too large
    choices: tuple[str, ...] = ()
    many: bool = False  # several values, such as one for each user

    def parse(self, text: str):
        """The value of a text from the command line. Raises BadInput."""
        if self.kind is bool:
            return True
        try:
            return tuple(self.kind(part) for part in text.split(",")) if self.many else self.kind(text)
        except ValueError:
            self.refuse(text)

    def check(self, value) -> None:
        """Raise BadInput if the value isn't one that it may have."""
        for one in value if self.many else [value]:
            unknown = one == "" or (self.choices and one not in self.choices)
            infinite = self.kind is float and not math.isfinite(one)
            small = (self.low is not None and one < self.low) or (self.above is not None and one <= self.above)
            large = (self.high is not None and one > self.high) or (self.below is not None and one >= self.below)
            if unknown or infinite or small or large:
                self.refuse(value)

    def refuse(self, value, why: str = "not possible", remedy: str | None = None):
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        raise BadInput(f"{self.name} {value}: {why}; {remedy or self.remedy}")

    @property
    def remedy(self) -> str:
        if self.choices:
            return f"take one of {', '.join(self.choices)}"
        if self.kind is str:
            return "give a name"
        number = "a whole number" if self.kind is int else "a number"
        bound = f"above {self.above}" if self.low is None else f"of at least {self.low}"
        limit = f" and at most {self.high}" if self.high is not None else ""
        limit += f" and below {self.below}" if self.below is not None else ""
        return f"give {number} {bound}{limit}" + (", or several, with commas between" if self.many else "")


def setting(default, help: str, kind: type = str, **values):
    """A field of Settings; `values` as in Flag."""
    return field(default=default, metadata=dict(help=help, kind=kind, **values))


SCRATCH = dict(n_layer=3, n_head=4, n_embd=128)  # the shape, where no base decides


@dataclass
class Training:
    """What training any model needs. Raises BadInput."""

    batch_size: int = setting(8, "windows in a batch", int, low=1, high=1_000_000)
    block_size: int = setting(64, "tokens in a window", int, low=1, high=1_000_000)
    lr: float = setting(6e-3, "learning rate at its highest, of the experts", float, above=0)
    warmup: int = setting(100, "steps up to the highest learning rate, at most a fifth of all", int, low=0)
    weight_decay: float = setting(0.1, "of AdamW; routers with a level of their own have none", float, low=0)
    n_layer: int | None = setting(None, "layers; default: 3, or the base's", int, low=1, high=1000)
    n_head: int | None = setting(None, "attention heads; default: 4, or the base's, or of 64 channels each", int, low=1)
    n_embd: int | None = setting(None, "channels; default: 128, or the base's", int, low=1, high=1_000_000)
    seed: int = setting(0, "of everything random", int, low=0)
    device: str = setting("cpu", "cpu, cuda (in bfloat16), cuda:1, mps, ...")
    compile: bool = setting(False, "compile the models with torch.compile", bool)
    overwrite: bool = setting(False, "start anew in a folder that is in use", bool)

    def __post_init__(self):
        check(self)
        for name, flag in flags(type(self)).items():
            value = getattr(self, name)
            if flag.many and value is not None and len(value) not in (1, self.users):
                flag.refuse(value, f"{len(value)} numbers for {self.users} users", "give one, or one per user")
            if flag.many and value is not None and len(value) == 1:
                setattr(self, name, value * self.users)
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError, ImportError):
            raise BadInput(f"--device {self.device}: this machine has no such device; take cpu") from None


@dataclass
class Settings(Training):
    """One run. Values that are given once for all users are repeated for each. Raises BadInput."""

    users: int = setting(4, "number of users", int, low=1, high=100_000)
    specialists: tuple[int, ...] = setting((1,), "specialist experts per layer", int, low=0, high=1000, many=True)
    generalists: int = setting(1, "generalist experts per layer", int, low=0, high=1000)
    top_k: int = setting(2, "experts per token; a user with fewer uses all it has; with 1 the router can't learn", int,
                         low=1)
    method: str = setting("comigs", "a row of methods.py", choices=tuple(METHODS))
    data: str = setting("builtin", f"text: {', '.join((*BUILTIN, *PUBLIC))}, a folder with a NAME.txt or a NAME/ for "
                                   "each user, or a .csv or .jsonl file")
    user_field: str | None = setting(None, "of a .csv or .jsonl file: the field that says whose text it is; default: "
                                           "user")
    text_field: str | None = setting(None, "likewise, the field that holds the text; default: text")
    source: str | None = setting(None, "where a public corpus is read from, in the place of its own source: a file, an "
                                       "address, a data set")
    cache: str = setting("out/cache", "folder for downloaded text and for tokens")
    short_users: str = setting("refuse", "users with too little text: refuse the run, or leave them out",
                               choices=("refuse", "leave-out"))
    target: str = setting("own", "validation and test text: the user's own, or an even mix of all users'",
                          choices=("own", "mixed"))
    train_kb: tuple[float, ...] | None = setting(
        None, f"training text in kB; default: {BUILTIN_TRAIN_KB} of a builtin, 2000 of what is streamed, else all "
              "there is", float, low=0.001, high=1e9, many=True)
    expert: str = setting("mlp", "mlp: feed-forward blocks; lora: low-rank changes of the base's, which is frozen",
                          choices=tuple(EXPERTS))
    lora_rank: tuple[int, ...] = setting((8,), "rank of the changes; most methods that average them need one for all",
                                         int, low=1, high=10_000, many=True)
    init_from: str = setting("scratch", f"where weights start: scratch, {', '.join(base.NAMES)}, or a file such as "
                                        "pretrain.py writes")
    tokenizer: str | None = setting(None, "what a token is; default: bytes, or the base's", choices=("bytes", "gpt2"))
    experts_see: str = setting("train", "text that experts learn from: the training text, or the validation text too, "
                                        "for a comparison in which all methods learn from both",
                               choices=("train", "both"))
    average: str = setting("uniform", "a user's weight in the average: the same, or its number of training tokens",
                           choices=("uniform", "tokens"))
    participation: float = setting(1.0, "part of the users that is called in a round", float, above=0, high=1)
    drop_rate: float = setting(0.0, "chance that a user who was called vanishes before it answers", float, low=0,
                               below=1)
    clip_update: float | None = setting(None, "largest norm of a user's update; a longer one is made shorter", float,
                                        above=0)
    dp_noise: float = setting(0.0, "noise on the average of clipped updates, in multiples of largest norm / number",
                              float, low=0)
    rounds: int = setting(64, "communication rounds", int, low=1)
    local_steps: int = setting(10, "expert steps of a user in a round", int, low=1)
    router_every: int = setting(30, "expert steps between two visits to the router", int, low=1)
    router_steps: int = setting(5, "router steps in such a visit", int, low=0)
    router_lr: float | None = setting(None, "routers' learning rate; default: as --lr", float, above=0)
    eval_every: int = setting(16, "rounds between evaluations on validation text", int, low=1)
    plot: bool = setting(False, "draw curves.png and curves.svg, too (needs matplotlib)", bool)
    tensorboard: bool = setting(False, "log losses and shares for TensorBoard, too (needs tensorboard)", bool)
    out: str | None = setting(None, "folder of the run; default: a new one under out/")
    resume: bool = setting(False, "go on with the run in --out, from its newest checkpoint, with its settings", bool)

    def __post_init__(self):
        super().__post_init__()
        together = int(os.environ.get("WORLD_SIZE", 1))
        alone = METHODS[self.method].pooled or METHODS[self.method].server is not Server
        if together > self.users or (together > 1 and alone):
            raise BadInput(f"--method {self.method} --users {self.users}: not for {together} processes; take one, or "
                           "another method and more users")
        if self.resume and self.overwrite:
            raise BadInput("--resume: can't be along with --overwrite; take one of them")
        if self.dp_noise and not self.clip_update:
            flags(Settings)["dp_noise"].refuse(self.dp_noise, "needs a bound", "give --clip-update")
        if self.clip_update and METHODS[self.method].server is not Server:
            flags(Settings)["clip_update"].refuse(self.clip_update, f"--method {self.method} doesn't average updates",
                                                  "leave it out")
        alike = METHODS[self.method].roles.get(SPECIALIST) != GENERALIST or len(set(self.specialists)) == 1
        if self.dp_noise and not alike:
            flags(Settings)["dp_noise"].refuse(self.dp_noise, f"{self.method} averages experts that not all users have",
                                               "give one number of --specialists for all")
        if self.dp_noise and self.average != "uniform":
            flags(Settings)["dp_noise"].refuse(self.dp_noise, "is for equal weights", "take --average uniform")
        if self.generalists + min(self.specialists) == 0:
            raise BadInput("--generalists 0: a user with --specialists 0 has no expert; give either at least 1")
        if self.plot:
            need("matplotlib", "--plot")
        if self.tensorboard:
            need("tensorboard", "--tensorboard")
        if self.source and self.data not in PUBLIC:
            flags(Settings)["source"].refuse(self.source, f"--data {self.data} is no public corpus",
                                             f"take one of {', '.join(PUBLIC)}, or leave it out")
        for name in ("user_field", "text_field"):
            if getattr(self, name) and Path(self.data).suffix not in TABLES:
                flags(Settings)[name].refuse(getattr(self, name), f"--data {self.data} is no table", "leave it out")
        method, ranks = METHODS[self.method], set(self.lora_rank)
        if method.needs == "lora" and self.expert != "lora":
            raise BadInput(f"--method {self.method}: is about low-rank changes; give --expert lora, and a base")
        if method.needs == "both" and not (self.generalists and min(self.specialists)):
            raise BadInput(f"--method {self.method}: needs both kinds of experts; give each user at least 1 of each")
        if method.sizes == "nothing" and len(set(self.specialists)) > 1:
            raise BadInput(f"--method {self.method}: needs users of one size; give one number of --specialists for all")
        if method.sizes != "ranks" and self.expert == "lora" and len(ranks) > 1:
            flags(Settings)["lora_rank"].refuse(
                self.lora_rank, f"--method {self.method} averages the users' changes", "give one rank for all")
        if self.expert == "lora" and self.init_from == "scratch":
            raise BadInput("--expert lora: changes a base, and --init-from scratch has none; give --init-from a file")

    @property
    def title(self) -> str:
        return f"{self.method} on {self.data}, seed {self.seed}"


@dataclass
class Pretraining(Training):
    """The training of a base. Raises BadInput."""

    steps: int = setting(8000, "training steps", int, low=1)
    out: str = setting("out/base", "folder for base.pt")


def flags(kind: type) -> dict[str, Flag]:
    """Each field's name -> its flag, of a kind of settings; its own fields come first."""
    own_first = sorted(fields(kind), key=lambda f: f.name not in kind.__annotations__)
    return {f.name: Flag("--" + f.name.replace("_", "-"), **f.metadata) for f in own_first}


def check(settings) -> None:
    """Raise BadInput if a value isn't one that it may have; None always may."""
    for name, flag in flags(type(settings)).items():
        if getattr(settings, name) is not None:
            flag.check(getattr(settings, name))


def need(package: str, flag: str) -> None:
    """Raise BadInput if an optional package isn't there."""
    if importlib.util.find_spec(package) is None:
        raise BadInput(f"{flag}: needs {package}, which isn't installed; pip install {package}")


def status_of(command: str, work: Callable[[], object], if_stopped: str) -> int:
    """Do the work of a command. Returns its exit status: 0, 2 after bad input, 130 where the user stopped it."""
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("alloc|memory|Storage size", str(error)):
            raise
        print(f"{command}: there isn't enough memory for this; take a smaller --n-embd, --batch-size, --users, ...",
              file=sys.stderr)
        return 2
    except BadInput as error:
        process = f", process {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"{command}{process}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{command}: {error.filename or 'a file'}: {error.strerror or error}; check the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{command}: stopped; {stop.args[0] if stop.args else if_stopped}", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message}; see --help")


def parse_settings(arguments: list[str] | None = None, kind: type = Settings) -> Training:
    """The settings, of some kind, of a command line; None: of this process. Raises BadInput."""
    settings, rest = parse_known(arguments, kind)
    refuse_rest(rest)
    return settings


def refuse_rest(arguments: list[str]) -> None:
    """Raises BadInput if there are any."""
    if arguments:
        raise BadInput(f"{' '.join(arguments)}: not known; see --help")


def parse_known(arguments: list[str] | None, kind: type) -> tuple[object, list[str]]:
    """The settings of some kind, and the arguments that are none of its. Raises BadInput."""
    given, rest = parse_given(arguments, kind)
    return kind(**given), rest


def parse_given(arguments: list[str] | None, kind: type) -> tuple[dict, list[str]]:
    """The fields of some kind of settings that are on a command line, and the other arguments. Raises BadInput."""
    parser = Parser(description=kind.__doc__.split(". ")[0] + ".", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for name, flag in flags(kind).items():
        if flag.kind is bool:
            parser.add_argument(flag.name, action="store_true", help=flag.help)
        else:
            default = getattr(kind, name)
            text = ",".join(map(str, default)) if flag.many and default else default
            values = "LIST" if flag.many else "|".join(flag.choices) or flag.kind.__name__.upper()
            parser.add_argument(flag.name, metavar=values,
                                help=flag.help + (f" (default: {text})" if text is not None else ""))
    given, rest = parser.parse_known_args(arguments)
    return {name: flags(kind)[name].parse(text) for name, text in vars(given).items()}, rest
