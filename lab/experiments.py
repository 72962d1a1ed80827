"""The experiments of docs/results.md, each one command; started again, it continues where it was stopped.

    python -m lab.experiments languages [--seeds 3] [any flag of compare.py or train.py]
    python -m lab.experiments --help

Rows are runs of train.py that share the flags of their base. Learning rates are chosen on validation text, with seed 0,
from the same list for all methods, in one experiment of a base. The others take what was chosen; those on SmolLM2 take
the paper's rate, since not all methods have been tried at others. The runs of docs/results.md are kept:
`--out docs/runs/languages` takes those that are there, and adds what is missing.
"""

import sys
from typing import NamedTuple

from compare import Comparison, compare, split
from methods import METHODS
from support.errors import BadInput
from support.runs.command_line import parsed, run_command


class Base(NamedTuple):
    """What runs on a base have in common."""

    flags: str
    rate: float  # that most methods chose
    others: dict[str, float]  # what the others chose

    def run(self, method: str, more: str = "") -> str:
        """The flags of one run."""
        return f"{self.flags} --method {method} --lr {self.others.get(method, self.rate)} {more}"

    def runs(self, methods: tuple[str, ...], more: str = "") -> dict[str, str]:
        """A row for each method."""
        return {method: self.run(method, more) for method in methods}


SMOLLM2 = Base("--init-from smollm2 --expert lora --rounds 20 --router-steps 10 --batch-size 1 --eval-every 10",
               2e-3, {})
BYTES = Base("--init-from out/base/base.pt --expert lora --rounds 20 --router-steps 10 --eval-every 10",
             6e-3, dict.fromkeys(("fedavg", "comigs-2g", "hetlora", "flexlora", "ffa-lora"), 2e-2))
SCRATCH = Base("--rounds 64 --router-lr 3e-3", 3e-3, {"comigs": 6e-3})

SIMPLEST = ("local", "fedavg", "comigs")
PAPER = ("local", "fedavg", "pcl", "pfedmoe", "fdlora", "comigs", "comigs-2g", "comigs-2s", "comigs-uniform",
         "comigs-leaky", "comigs-apart")
TELLING = ("local", "fedavg", "pcl", "fdlora", "comigs", "comigs-uniform", "comigs-apart")
ABLATIONS = ("local", "comigs", "comigs-uniform", "comigs-train", "comigs-joint", "pfedmoe", "comigs-leaky")


BOTH = "--experts-see both"  # so that nobody has more text to learn from than another
SLOW = "--router-lr 2e-3"  # of CoMiGS: on SmolLM2 the experts' rate, as in the authors' code; a third of it on bytes
NAMES = {"": "", BOTH: " both", SLOW: " router 2e-3"}


def paper(more: str) -> dict[str, str]:
    """The paper's methods on SmolLM2."""
    return {**SMOLLM2.runs(PAPER, more), f"comigs{NAMES[SLOW]}": SMOLLM2.run("comigs", f"{SLOW} {more}")}


def overfitting(base: Base, text: str, kBs: tuple[int, ...], specialists: tuple[int, ...]) -> dict[str, str]:
    """Text per user × number of specialists, with a quarter as much validation text; of `local`, as many experts."""
    most, rows = max(specialists), {}
    for method, S, more in [*(("comigs", S, "") for S in specialists), ("comigs", most, SLOW),
                            *((method, most, "") for method in ("comigs-train", "fdlora", "local")),
                            ("comigs", most, BOTH), ("local", most, BOTH)]:
        for kB in kBs:
            rows[f"{method} {kB} kB {S} S{NAMES[more]}"] = base.run(
                method, f"--data {text} --train-kb {kB} --valid-kb {kB / 4} --specialists {S} --eval-every 5 {more}")
    return rows


def sizes(base: Base, text: str, kBs: tuple[int, ...], ranks: str) -> dict[str, str]:
    """Devices with 1, 2, 4, 8 specialists, and rivals with one expert of as many parameters, of these ranks."""
    flags = f"--data {text} --train-kb {','.join(map(str, kBs))} --valid-kb {','.join(str(kB / 4) for kB in kBs)}"
    ours, theirs = f"{flags} --specialists 1,2,4,8", f"{flags} --specialists 0 --lora-rank {ranks}"
    return {**base.runs(("comigs", "comigs-train", "comigs-apart", "fdlora", "local"), ours),
            **base.runs(("hetlora", "flexlora"), theirs),
            **{f"comigs{NAMES[more]}": base.run("comigs", f"{ours} {more}") for more in (SLOW, BOTH)},
            f"flexlora{NAMES[BOTH]}": base.run("flexlora", f"{theirs} {BOTH}")}


MORE, LESS = (5, 10, 20, 40), (40, 20, 10, 5)  # kB of users with 1, 2, 4, 8 specialists
# Per layer and unit of rank, a byte model's attention has 6 C parameters and an expert 10 C; SmolLM2's 2,688 and 6,336.
BYTES_RANKS, SMOLLM2_RANKS = "13,18,28,48", "14,19,30,53"

EXPERIMENTS = {  # name -> what it asks, and label -> flags of train.py
    "languages": ("four languages, own text", paper("--data languages")),
    "languages-both": ("as languages, but experts also learn from the validation text",
                       SMOLLM2.runs(SIMPLEST, f"--data languages {BOTH}")),
    "news": ("four topics of AG News, mixed target", paper("--data agnews --target mixed")),
    "domains": ("four domains, own text", paper("--data builtin --train-kb 140")),
    "text": ("overfitting: text per user and number of specialists",
             overfitting(SMOLLM2, "languages", (10, 40), (1, 7))),
    "more": ("devices of different size: more specialists where there is more text",
             sizes(SMOLLM2, "languages", MORE, SMOLLM2_RANKS)),
    "less": ("devices of different size: more specialists where there is less text",
             sizes(SMOLLM2, "languages", LESS, SMOLLM2_RANKS)),
    "A": ("dissimilar users, own text: all methods", BYTES.runs(
        tuple(name for name in METHODS if name != "comigs-joint"))),  # which is pfedmoe's double here
    "B": ("similar users, own text", BYTES.runs(TELLING, "--data builtin-python")),
    "C": ("dissimilar users, mixed target", BYTES.runs((*TELLING, "comigs-leaky"), "--target mixed")),
    "C-python": ("similar users, mixed target", BYTES.runs(TELLING, "--data builtin-python --target mixed")),
    "C-news": ("AG News, mixed target", BYTES.runs(TELLING, "--data agnews --train-kb 40 --target mixed")),
    "D": ("overfitting: text per user and number of specialists",
          overfitting(BYTES, "builtin", (5, 20, 60), (0, 1, 7))),
    "E-more": ("devices of different size: more specialists where there is more text",
               sizes(BYTES, "builtin", MORE, BYTES_RANKS)),
    "E-less": ("devices of different size: more specialists where there is less text",
               sizes(BYTES, "builtin", LESS, BYTES_RANKS)),
    "F": ("ablations, where a router has to choose: top-2 of four experts", BYTES.runs(ABLATIONS, "--specialists 3")),
    "both": ("as A, but experts also learn from the validation text", BYTES.runs(SIMPLEST, BOTH)),
    "both-mixed": ("as C, but experts also learn from the validation text",
                   BYTES.runs(SIMPLEST, f"--target mixed {BOTH}")),
    "scratch": ("as A, but from scratch", SCRATCH.runs((*SIMPLEST, "centralized"))),
}
CHOOSING = {"languages": "1e-3,2e-3,4e-3", "A": "2e-3,6e-3,2e-2"}  # where a base's rates are chosen, and from which


def experiment(arguments: list[str]) -> None:
    """Raises BadInput."""
    name, *more = arguments or ["--help"]
    if name in ("-h", "--help"):
        print("\n".join([__doc__, *(f"{name:<16}{title}" for name, (title, _) in EXPERIMENTS.items())]))
        return
    if name not in EXPERIMENTS:
        raise BadInput(f"{name}: not an experiment; the first word is one of {', '.join(EXPERIMENTS)}")
    title, flags = EXPERIMENTS[name]
    tuning = ["--rates", CHOOSING[name]] if name in CHOOSING else []
    comparison, rest = split(["--out", f"out/{name}", *tuning, *more], Comparison)
    rows = {label: parsed([*own.split(), *rest]) for label, own in flags.items()}
    print(title)
    compare(rows, comparison)


def main(arguments: list[str] | None = None) -> int:
    return run_command("lab.experiments", lambda: experiment(sys.argv[1:] if arguments is None else arguments),
                     "the runs that ended are kept")


if __name__ == "__main__":
    sys.exit(main())
