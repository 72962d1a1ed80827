"""Several methods and seeds side by side.

    python compare.py --methods local,fedavg,comigs --seeds 3 [any flag of train.py]
    python compare.py --methods local,fedavg,comigs --rates 2e-3,6e-3,2e-2 --plot

A run that is already in the folder, with the same settings, isn't run again, and one that was cut off is continued, so
this can be stopped and started again. (Where text or a base has been replaced under the same name, give another
--out.)
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from methods import METHODS
from support.errors import BadInput, Diverged, optional
from support.files import read_json
from support.report import plots
from support.report.tables import caption, summarize, write_all
from support.runs.folder import code, doubts, json_of
from support.runs.command_line import as_flags, parse_known, parsed, run_command, swept_by
from support.runs.flags import check_values, setting
from support.runs.settings import Settings, all_hyper, plain
from train import Run


@dataclass
class Comparison:
    """How runs are compared. All other flags are train.py's. Raises BadInput."""

    seeds: int = setting(3, "number of seeds, counted from --seed", int, low=1)
    rates: tuple[float, ...] | None = setting(
        None, "learning rates to choose from, for each row by itself, on validation text, with the first seed",
        float, above=0, many=True)
    out: str = setting("out/compare", "folder of the runs and of the tables")
    sweep: str | None = setting(None, "a hyper-parameter, and values that rows which have it choose from in the same "
                                      "way, as lambda=0.01,0.1")
    plot: bool = setting(False, "also draw table.png and table.svg (needs matplotlib)", bool)
    anew: bool = setting(False, "play a run again that is there, but was made by other code", bool)

    def __post_init__(self):
        check_values(self)
        self.swept = swept_by(self.sweep)  # a hyper-parameter, and its values


@dataclass
class OfMethods(Comparison):
    """Several methods side by side; all flags of train.py are flags of this, too. Raises BadInput."""

    methods: tuple[str, ...] = setting(("comigs", "local", "fedavg", "centralized"), "the rows of the table",
                                       many=True, choices=METHODS)


Rows = dict[str, Settings]  # by label


def finished(settings: Settings, anew: bool, bar: tqdm) -> Path:
    """The folder of a run that has ended: earlier, or because it is played or continued now."""
    folder = Path(settings.out)
    kept = json_of(folder / "config.json") if (folder / "config.json").exists() else None
    here = {"out": settings.out, "overwrite": settings.overwrite}
    if kept and Settings(**kept["settings"] | here) == settings:
        again = anew and kept.get("code") != code()
        settings = replace(settings, overwrite=again, resume=not again)
        if settings.resume and (folder / "result.json").exists():
            bar.update(settings.rounds * settings.users)
            return folder
    run = Run(settings)
    run.play(bar)
    run.show()
    return folder


def choices(row: Settings, comparison: Comparison) -> dict[str, Settings]:
    """What a row may choose from, by name: "0.002", or "0.002 mu=0.1"."""
    rates = [replace(row, lr=rate) for rate in comparison.rates or (row.lr,)]
    name, values = comparison.swept
    if name not in row.hyper:
        return {str(each.lr): each for each in rates}
    return {f"{each.lr} {name}={value}": replace(each, set=",".join(filter(None, [each.set, f"{name}={value}"])))
            for each in rates for value in values}


def play(rows: Rows, comparison: Comparison) -> tuple[dict[str, list[Path]], dict[str, dict[str, float]]]:
    """Run all rows, each with its best choice. Returns the folders of each row's seeds, and the mean validation
    perplexity of its first seed with each choice. A run that diverges is named and left out."""
    def played(label: str, choice: str, seed: int, bar: tqdm) -> Path | None:
        row = offered[label][choice]
        seed += row.seed
        out = f"{comparison.out}/{f'{label} lr{choice} seed{seed}'.replace(' ', '-')}"
        try:
            return finished(replace(row, seed=seed, out=out), comparison.anew, bar)
        except Diverged as error:
            bar.write(f"{label}, seed {seed}: {as_flags(str(error))}", file=sys.stderr)
            return None

    offered = {label: choices(row, comparison) for label, row in rows.items()}
    total = sum((len(offered[label]) + comparison.seeds) * row.rounds * row.users for label, row in rows.items())
    folders, tried = {}, {}
    with tqdm(total=total, unit="user", dynamic_ncols=True) as bar:
        for label in rows:
            firsts = {choice: played(label, choice, 0, bar) for choice in offered[label]}
            tried[label] = {choice: read_json(folder / "result.json")["mean_valid_ppl"] if folder else math.inf
                            for choice, folder in firsts.items()}
            best = min(tried[label], key=tried[label].get)
            runs = [played(label, best, seed, bar) for seed in range(comparison.seeds)] if firsts[best] else []
            folders[label] = [folder for folder in runs if folder]
    return folders, tried


def compare(rows: Rows, comparison: Comparison) -> None:
    """Run all rows, write the table in several forms and the drawing, print the table. Raises BadInput."""
    if comparison.plot:
        optional("matplotlib", "`plot`", "pip install matplotlib")
    if (comparison.rates or comparison.sweep) and any(row.experts_see == "both" for row in rows.values()):
        raise BadInput("`rates`, `sweep`: can't be judged by validation text that experts learn from; leave "
                       "`experts_see` out")
    if comparison.sweep and not any(comparison.swept[0] in row.hyper for row in rows.values()):
        raise BadInput(f"`sweep` {comparison.sweep}: no row has such a hyper-parameter; there are {all_hyper()}")
    folders, tried = play(rows, comparison)
    summaries, configs = {}, [json_of(run / "config.json") for runs in folders.values() for run in runs]
    for doubt in doubts(configs):
        print(doubt, file=sys.stderr)
    for label, runs in folders.items():
        few = f" ({len(runs)} of {comparison.seeds} seeds)" if len(runs) < comparison.seeds else ""
        if runs:
            summaries[label + few] = summarize(runs, tried[label], folders.get("local"))
    if not summaries:
        raise Diverged(f"`lr`, `rates` {comparison.rates}: every run diverged; take smaller ones")
    out = Path(comparison.out)
    print(write_all(out, summaries, folders, caption([plain(row) for row in rows.values()], comparison.seeds)))
    if comparison.plot:
        plots.draw_comparison(summaries, out / "table")


def split(arguments: list[str] | None, kind: type[Comparison]) -> tuple[Comparison, list[str]]:
    """A command line's flags of a comparison, and those of its runs. Raises BadInput."""
    given, rest = parse_known(arguments, kind)
    for flag in rest:
        if flag == "--resume":
            raise BadInput("`resume`: a comparison always continues where it was; leave it out")
        if flag.partition("=")[0] == "--method":
            raise BadInput("`method`: the rows are different methods; leave it out, or give `methods`")
    return kind(**given), rest


def from_command_line() -> None:
    comparison, rest = split(None, OfMethods)
    compare({method: parsed([*rest, "--method", method]) for method in comparison.methods}, comparison)


def main() -> int:
    return run_command("compare.py", from_command_line, "the runs that ended are kept")


if __name__ == "__main__":
    sys.exit(main())
