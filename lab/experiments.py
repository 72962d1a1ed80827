"""The experiments of docs/results.md. Each is one command and resumes if repeated.

    python -m lab.experiments languages [--seeds 3] [any flag of compare.py or train.py]
    python -m lab.experiments --help

A row is a run of train.py; rows on the same base share its flags. A method's learning rate is
that of its base's table below. On the byte base it was chosen for every method from the same list,
on validation text with seed 0, by `A --rates 2e-3,6e-3,2e-2`. (On SmolLM2 it is the paper's,
because only some methods were tried at others. From scratch it was chosen among the rates that
docs/notes.md lists.) The runs of docs/results.md are kept: `--out
docs/runs/A` reuses them and adds the missing ones.
"""

import sys
from dataclasses import dataclass, field

from compare import Comparison, compare, split
from methods import METHODS
from support.errors import BadInput
from support.runs.command_line import parsed, run_command

Rows = dict[str, str]  # label -> flags of train.py


@dataclass
class Base:
    """The flags and rates of all runs on one base."""

    flags: str
    rate: float  # of most methods
    other_rates: dict[str, float] = field(default_factory=dict)  # of the others

    def flags_of(self, method: str, more: str = "") -> str:
        """The flags of one run."""
        rate = self.other_rates.get(method, self.rate)
        return f"{self.flags} --method {method} --lr {rate} {more}"

    def rows(self, methods: tuple[str, ...], more: str = "") -> Rows:
        """A row for each method."""
        return {method: self.flags_of(method, more) for method in methods}


SMOLLM2 = Base(
    "--init-from smollm2 --expert lora --rounds 20 --router-steps 10 --batch-size 1 "
    "--eval-every 10",
    rate=2e-3,
)
BYTES = Base(
    "--init-from out/base/base.pt --expert lora --rounds 20 --router-steps 10 --eval-every 10",
    rate=6e-3,
    other_rates={
        "fedavg": 2e-2,
        "comigs-2g": 2e-2,
        "hetlora": 2e-2,
        "flexlora": 2e-2,
        "ffa-lora": 2e-2,
    },
)
SCRATCH = Base("--rounds 64 --router-lr 3e-3", rate=3e-3, other_rates={"comigs": 6e-3})

BASICS = ("local", "fedavg", "comigs")
PAPER = (
    "local",
    "fedavg",
    "pcl",
    "pfedmoe",
    "fdlora",
    "comigs",
    "comigs-2g",
    "comigs-2s",
    "comigs-uniform",
    "comigs-leaky",
    "comigs-apart",
)
MAIN = ("local", "fedavg", "pcl", "fdlora", "comigs", "comigs-uniform", "comigs-apart")
ABLATIONS = (
    "local",
    "comigs",
    "comigs-uniform",
    "comigs-train",
    "comigs-joint",
    "pfedmoe",
    "comigs-leaky",
)
ALL = tuple(name for name in METHODS if name != "comigs-joint")  # which equals pfedmoe with k = E

BOTH = "--experts-see both"  # all methods learn from the same amount of text
SLOW = "--router-lr 2e-3"  # the experts' rate on SmolLM2, a third of it on the byte base


def paper(flags: str) -> Rows:
    """The paper's methods on SmolLM2."""
    rows = SMOLLM2.rows(PAPER, flags)
    rows["comigs router 2e-3"] = SMOLLM2.flags_of("comigs", f"{SLOW} {flags}")
    return rows


def overfitting(
    base: Base, text: str, train_kb: tuple[int, ...], specialists: tuple[int, ...]
) -> Rows:
    """Text per user × number of specialists. Validation text is a quarter of the training text."""
    most = max(specialists)
    variants = [("comigs", S, "", "") for S in specialists]
    variants.append(("comigs", most, SLOW, " router 2e-3"))
    for method in ("comigs-apart", "comigs-train", "fdlora", "local", "fedavg"):
        variants.append((method, most, "", ""))
    for method in ("comigs", "local"):
        variants.append((method, most, BOTH, " both"))
    rows = {}
    for method, S, more, suffix in variants:
        for kb in train_kb:
            flags = (
                f"--data {text} --train-kb {kb} --valid-kb {kb / 4} --specialists {S} "
                f"--eval-every 5 {more}"
            )
            rows[f"{method} {kb} kB {S} S{suffix}"] = base.flags_of(method, flags)
    return rows


def sizes(base: Base, text: str, train_kb: tuple[int, ...], ranks: str) -> Rows:
    """Users with 1, 2, 4 and 8 specialists; rivals have one expert with as many parameters."""
    train = ",".join(str(kb) for kb in train_kb)
    valid = ",".join(str(kb / 4) for kb in train_kb)
    flags = f"--data {text} --train-kb {train} --valid-kb {valid}"
    ours = f"{flags} --specialists 1,2,4,8"
    theirs = f"{flags} --specialists 0 --lora-rank {ranks}"
    methods = ("comigs", "comigs-train", "comigs-apart", "fdlora", "local", "fedavg")
    rows = base.rows(methods, ours)
    rows |= base.rows(("hetlora", "flexlora"), theirs)
    rows["comigs router 2e-3"] = base.flags_of("comigs", f"{ours} {SLOW}")
    rows["comigs both"] = base.flags_of("comigs", f"{ours} {BOTH}")
    rows["flexlora both"] = base.flags_of("flexlora", f"{theirs} {BOTH}")
    return rows


MORE = (5, 10, 20, 40)  # kB of users with 1, 2, 4, 8 specialists
LESS = (40, 20, 10, 5)
# Per layer and unit of rank, a byte model's attention has 6 C parameters and an expert 10 C;
# SmolLM2's have 2,688 and 6,336.
BYTES_RANKS = "13,18,28,48"
SMOLLM2_RANKS = "14,19,30,53"

EXPERIMENTS = {  # name -> title and rows
    "languages": ("four languages, own text", paper("--data languages")),
    "languages-both": (
        "as languages, but experts also learn from the validation text",
        SMOLLM2.rows(BASICS, f"--data languages {BOTH}"),
    ),
    "news": ("four topics of AG News, mixed target", paper("--data agnews.jsonl --target mixed")),
    "domains": ("four domains, own text", paper("--data builtin --train-kb 140")),
    "text": (
        "overfitting: text per user and number of specialists",
        overfitting(SMOLLM2, "languages", train_kb=(10, 40), specialists=(1, 7)),
    ),
    "more": (
        "devices of different sizes: users with more text have more specialists",
        sizes(SMOLLM2, "languages", MORE, SMOLLM2_RANKS),
    ),
    "less": (
        "devices of different sizes: users with less text have more specialists",
        sizes(SMOLLM2, "languages", LESS, SMOLLM2_RANKS),
    ),
    "A": ("different users, own text: all methods", BYTES.rows(ALL)),
    "B": ("similar users, own text", BYTES.rows(MAIN, "--data builtin-python")),
    "C": ("different users, mixed target: all methods", BYTES.rows(ALL, "--target mixed")),
    "C-python": (
        "similar users, mixed target",
        BYTES.rows(MAIN, "--data builtin-python --target mixed"),
    ),
    "C-news": (
        "AG News, mixed target",
        BYTES.rows(MAIN, "--data agnews.jsonl --train-kb 40 --target mixed"),
    ),
    "D": (
        "overfitting: text per user and number of specialists",
        overfitting(BYTES, "builtin", train_kb=(5, 20, 60), specialists=(0, 1, 7)),
    ),
    "E-more": (
        "devices of different sizes: users with more text have more specialists",
        sizes(BYTES, "builtin", MORE, BYTES_RANKS),
    ),
    "E-less": (
        "devices of different sizes: users with less text have more specialists",
        sizes(BYTES, "builtin", LESS, BYTES_RANKS),
    ),
    "F": (
        "ablations with a router that selects: top-2 of four experts",
        BYTES.rows(ABLATIONS, "--specialists 3"),
    ),
    "both": ("as A, but experts also learn from the validation text", BYTES.rows(BASICS, BOTH)),
    "both-mixed": (
        "as C, but experts also learn from the validation text",
        BYTES.rows(BASICS, f"--target mixed {BOTH}"),
    ),
    "scratch": ("as A, but from scratch", SCRATCH.rows((*BASICS, "centralized"))),
}


def experiment(arguments: list[str]) -> None:
    """Run the experiment that the first argument names. Raises BadInput."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        for name, (title, _) in EXPERIMENTS.items():
            print(f"{name:<16}{title}")
        return
    name, *flags = arguments
    if name not in EXPERIMENTS:
        raise BadInput(f"{name}: not an experiment; expected one of {', '.join(EXPERIMENTS)}")
    title, rows = EXPERIMENTS[name]
    comparison, rest = split(["--out", f"out/{name}", *flags], Comparison)
    print(title)
    compare({label: parsed([*row.split(), *rest]) for label, row in rows.items()}, comparison)


def main(arguments: list[str] | None = None) -> int:
    if arguments is None:
        arguments = sys.argv[1:]
    return run_command("lab.experiments", lambda: experiment(arguments), "finished runs are kept")


if __name__ == "__main__":
    sys.exit(main())
