"""The experiments of docs/results.md, each one command; started again, it continues where it was stopped.

    python -m lab.pretrain
    python -m lab.experiments A [--seeds 3] [any flag of compare.py or train.py]
    python -m lab.experiments --help

Rows are runs of train.py that share the flags in COMMON. Their learning rates were chosen on validation text, in A,
with seed 0, from the same list for all methods; A chooses again, the others take what was chosen.
"""

import sys

from compare import Comparison, compare, split
from methods import METHODS
from support.errors import BadInput
from support.settings import parsed, status_of

COMMON = "--init-from out/base/base.pt --expert lora --rounds 20 --router-steps 10 --eval-every 10"
RATES = "2e-3,6e-3,2e-2"
CHOSEN = {"comigs-2g": 2e-2, "ffa-lora": 2e-2, "hetlora": 2e-2}  # and 6e-3 of all others

TELLING = ("local", "fedavg", "pcl", "fdlora", "comigs", "comigs-uniform", "comigs-apart")
ABLATIONS = ("local", "comigs", "comigs-uniform", "comigs-train", "comigs-joint", "pfedmoe", "comigs-leaky")


def run_of(method: str, flags: str = "") -> str:
    return f"--method {method} --lr {CHOSEN.get(method, 6e-3)} {flags}"


def methods(names: tuple[str, ...], flags: str) -> dict[str, str]:
    """A row for each method."""
    return {name: run_of(name, flags) for name in names}


def overfitting() -> dict[str, str]:
    """Text per user × number of specialists; of `local`, as many experts."""
    return {f"{method} {kB} kB {S} S": run_of(method, f"--train-kb {kB} --specialists {S} --eval-every 5")
            for method, sizes in (("comigs", (0, 1, 7)), ("local", (7,))) for kB in (5, 20, 80) for S in sizes}


def sizes(train_kb: str) -> dict[str, str]:
    """Devices with 1, 2, 4, 8 specialists, and rivals with one expert of as many parameters: of 8 + 5 S ranks, which
    are attention's, too."""
    rivals = "--specialists 0 --lora-rank 13,18,28,48"
    return {"comigs": run_of("comigs", f"--specialists 1,2,4,8 --train-kb {train_kb}"),
            **methods(("hetlora", "flexlora"), f"{rivals} --train-kb {train_kb}")}


EXPERIMENTS = {  # name -> what it asks, and label -> flags of train.py
    "A": ("high heterogeneity, in distribution: all methods", methods(  # but one that is pfedmoe's double here
        tuple(name for name in METHODS if name != "comigs-joint"), "--data builtin")),
    "B": ("low heterogeneity, in distribution", methods(TELLING, "--data builtin-python")),
    "C": ("high heterogeneity, out of distribution", methods((*TELLING, "comigs-leaky"),
                                                             "--data builtin --target mixed")),
    "C-python": ("low heterogeneity, out of distribution", methods(TELLING, "--data builtin-python --target mixed")),
    "C-news": ("AG News, out of distribution", methods(TELLING, "--data agnews --train-kb 40 --target mixed")),
    "D": ("overfitting: text per user and number of specialists", overfitting()),
    "E-more": ("devices of different size: more specialists where there is more text", sizes("5,10,20,40")),
    "E-less": ("devices of different size: more specialists where there is less text", sizes("40,20,10,5")),
    "F": ("ablations, where a router has to choose: top-2 of four experts", methods(ABLATIONS, "--specialists 3")),
    "scratch": ("as A, but from scratch", {
        method: f"--method {method} --lr {rate} --init-from scratch --expert mlp --rounds 64 --router-steps 5 "
                "--router-lr 3e-3 --eval-every 16"
        for method, rate in {"local": 3e-3, "fedavg": 3e-3, "comigs": 6e-3, "centralized": 3e-3}.items()}),
    "both": ("as A, but experts also learn from the validation text", methods(
        ("local", "fedavg", "comigs"), "--experts-see both")),
    "both-mixed": ("as C, but experts also learn from the validation text", methods(
        ("local", "fedavg", "comigs"), "--target mixed --experts-see both")),
}


def experiment(arguments: list[str]) -> None:
    """Raises BadInput."""
    name, *more = arguments or ["--help"]
    if name in ("-h", "--help"):
        print("\n".join([__doc__, *(f"{name:<12}{title}" for name, (title, _) in EXPERIMENTS.items())]))
        return
    if name not in EXPERIMENTS:
        raise BadInput(f"{name}: not an experiment; the first word is one of {', '.join(EXPERIMENTS)}")
    title, flags = EXPERIMENTS[name]
    tuning = ["--rates", RATES] if name == "A" else []
    comparison, rest = split(["--out", f"out/{name}", *tuning, *more], Comparison)
    rows = {label: parsed([*COMMON.split(), *own.split(), *rest]) for label, own in flags.items()}
    print(title)
    compare(rows, comparison)


def main(arguments: list[str] | None = None) -> int:
    return status_of("lab.experiments", lambda: experiment(sys.argv[1:] if arguments is None else arguments),
                     "the runs that ended are kept")


if __name__ == "__main__":
    sys.exit(main())
