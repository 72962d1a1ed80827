"""Several methods and seeds side by side.

    python compare.py --methods local,fedavg,comigs --seeds 3 [any flag of train.py]
    python compare.py --methods local,fedavg,comigs --rates 2e-3,6e-3,2e-2 --plot

Finished runs with the same settings are reused, and interrupted runs are resumed, so this command
can be stopped and started again. If text or a base was replaced under the same name, use another
--out.
"""

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from methods import METHODS
from support.errors import BadInput, Diverged, optional
from support.files import read_json
from support.report import plots
from support.report.tables import Row, caption, summarize, write_all
from support.runs.code import code_digest
from support.runs.command_line import as_flags, parse_known, parsed, run_command, swept_by
from support.runs.flags import check_values, setting
from support.runs.folder import inputs_differ, read_config, runs_of_other_code
from support.runs.settings import Settings, all_hyper, plain
from train import Run


@dataclass
class Comparison:
    """How runs are compared. All other flags are those of train.py. Raises BadInput."""

    seeds: int = setting(3, "number of seeds, counted from --seed", int, low=1)
    rates: tuple[float, ...] | None = setting(
        None,
        "candidate learning rates; each row's is chosen on validation text with the first seed",
        float,
        above=0,
        many=True,
    )
    out: str = setting("out/compare", "folder of the runs and of the tables")
    sweep: str | None = setting(
        None,
        "a hyper-parameter and its candidate values, such as lambda=0.01,0.1; chosen like "
        "the rates, for rows that have it",
    )
    plot: bool = setting(False, "also draw table.png and table.svg (needs matplotlib)", bool)
    anew: bool = setting(False, "repeat runs that were made by different code", bool)

    def __post_init__(self):
        check_values(self)
        self.sweep_name, self.sweep_values = swept_by(self.sweep)


@dataclass
class OfMethods(Comparison):
    """Compare several methods, with any flag of train.py. Raises BadInput."""

    methods: tuple[str, ...] = setting(
        ("comigs", "local", "fedavg", "centralized"),
        "the rows of the table",
        many=True,
        choices=METHODS,
    )


def finish(settings: Settings, anew: bool, bar: tqdm) -> Path:
    """Start or resume a run, unless it has ended. Returns its folder.

    Advances the bar by the run's rounds × users. Raises BadInput.
    """
    folder = Path(settings.out)
    if (folder / "config.json").exists():
        config = read_config(folder / "config.json")
        these = {"out": settings.out, "overwrite": settings.overwrite}
        same = Settings(**config["settings"] | these) == settings
        same_hyper = config["hyper"] == settings.hyper
        if same and anew and config.get("code") != code_digest(settings.method):
            settings = replace(settings, overwrite=True)
        elif same and same_hyper and (folder / "result.json").exists():
            bar.update(settings.rounds * settings.users)
            return folder
        elif same and same_hyper:
            settings = replace(settings, overwrite=False, resume=True)
    run = Run(settings)
    run.play(bar)
    run.write_page()
    return folder


def choices_of(row: Settings, comparison: Comparison) -> dict[str, Settings]:
    """The candidate settings of a row, by name: "0.002", or "0.002 mu=0.1"."""
    choices = {}
    for rate in comparison.rates or (row.lr,):
        settings = replace(row, lr=rate)
        if comparison.sweep_name not in row.hyper:
            choices[str(rate)] = settings
            continue
        for value in comparison.sweep_values:
            hyper = f"{comparison.sweep_name}={value}"
            given = f"{row.set},{hyper}" if row.set else hyper
            choices[f"{rate} {hyper}"] = replace(settings, set=given)
    return choices


@dataclass
class Played:
    """The runs of a row of the table."""

    folders: list[Path] = field(default_factory=list)  # of the seeds that didn't diverge
    valid_ppl: dict[str, float] = field(default_factory=dict)  # of each choice, with the first seed


class Player:
    """Runs all rows, with one progress bar."""

    def __init__(self, rows: dict[str, Settings], comparison: Comparison):
        self.comparison = comparison
        self.choices = {label: choices_of(row, comparison) for label, row in rows.items()}
        self.rows = rows

    def play(self) -> dict[str, Played]:
        """Run all rows, each with its best choice. A run that diverges is reported and left out."""
        total = 0
        for label, row in self.rows.items():
            runs = len(self.choices[label]) + self.comparison.seeds
            total += runs * row.rounds * row.users
        with tqdm(total=total, unit="user", dynamic_ncols=True) as bar:
            return {label: self.play_row(label, bar) for label in self.rows}

    def play_row(self, label: str, bar: tqdm) -> Played:
        played = Played()
        for choice in self.choices[label]:
            folder = self.play_run(label, choice, 0, bar)
            played.valid_ppl[choice] = math.inf
            if folder is not None:
                played.valid_ppl[choice] = read_json(folder / "result.json")["mean_valid_ppl"]
        best = min(played.valid_ppl, key=played.valid_ppl.get)
        if played.valid_ppl[best] < math.inf:
            for seed in range(self.comparison.seeds):
                folder = self.play_run(label, best, seed, bar)
                if folder is not None:
                    played.folders.append(folder)
        return played

    def play_run(self, label: str, choice: str, seed: int, bar: tqdm) -> Path | None:
        """The folder of a run that has ended; None if it diverged."""
        settings = self.choices[label][choice]
        seed += settings.seed
        name = f"{label} lr{choice} seed{seed}".replace(" ", "-")
        settings = replace(settings, seed=seed, out=f"{self.comparison.out}/{name}")
        try:
            return finish(settings, self.comparison.anew, bar)
        except Diverged as error:
            bar.write(f"{label}, seed {seed}: {as_flags(str(error))}", file=sys.stderr)
            return None


def check(rows: dict[str, Settings], comparison: Comparison) -> None:
    """Raise BadInput if rows can't be compared like this."""
    if comparison.plot:
        optional("matplotlib", "`plot`", "pip install matplotlib")
    chosen = comparison.rates or comparison.sweep
    if chosen and any(row.experts_see == "both" for row in rows.values()):
        raise BadInput(
            "`rates`, `sweep`: can't be chosen on validation text that trains the "
            "experts; leave `experts_see` out"
        )
    name = comparison.sweep_name
    if comparison.sweep and not any(name in row.hyper for row in rows.values()):
        raise BadInput(
            f"`sweep` {comparison.sweep}: no row has this hyper-parameter; expected one of "
            f"{all_hyper()}"
        )


def warn(folders: list[Path]) -> None:
    """Report runs that may not belong in one table."""
    configs = [read_config(folder / "config.json") for folder in folders]
    others = runs_of_other_code(configs)
    if others:
        print(
            f"{others} of these {len(configs)} runs were made by other code; --anew repeats them",
            file=sys.stderr,
        )
    if inputs_differ(configs):
        print(
            "some of these runs had other text or another base than the rest; use another --out",
            file=sys.stderr,
        )


def compare(rows: dict[str, Settings], comparison: Comparison) -> None:
    """Run all rows, write the table and the plot, and print the table. Raises BadInput."""
    check(rows, comparison)
    played = Player(rows, comparison).play()
    warn([folder for row in played.values() for folder in row.folders])
    local = played["local"].folders if "local" in played else []
    summaries: dict[str, Row] = {}
    for label, row in played.items():
        if row.folders:
            missing = len(row.folders) < comparison.seeds
            note = f" ({len(row.folders)} of {comparison.seeds} seeds)" if missing else ""
            summaries[label + note] = summarize(row.folders, row.valid_ppl, local)
    if not summaries:
        raise Diverged("`lr`: every run diverged; use a smaller one")
    out = Path(comparison.out)
    folders = {label: row.folders for label, row in played.items()}
    text = caption([plain(row) for row in rows.values()], comparison.seeds)
    print(write_all(out, summaries, folders, text))
    if comparison.plot:
        plots.draw_comparison(summaries, out / "table")


def split(arguments: list[str] | None, kind: type[Comparison]) -> tuple[Comparison, list[str]]:
    """Split a command line into the comparison's flags and those of its runs. Raises BadInput."""
    given, rest = parse_known(arguments, kind)
    for flag in rest:
        name = flag.partition("=")[0]
        if name == "--resume":
            raise BadInput("`resume`: a comparison always continues; leave it out")
        if name == "--method":
            raise BadInput("`method`: each row has a method; leave it out, or use `methods`")
    return kind(**given), rest


def from_command_line() -> None:
    """Raises BadInput."""
    comparison, rest = split(None, OfMethods)
    rows = {method: parsed([*rest, "--method", method]) for method in comparison.methods}
    compare(rows, comparison)


def main() -> int:
    return run_command("compare.py", from_command_line, "finished runs are kept")


if __name__ == "__main__":
    sys.exit(main())
