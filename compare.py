"""Several methods and seeds side by side.

    python compare.py --methods local,fedavg,comigs --seeds 3 [any flag of train.py]
    python compare.py --methods local,fedavg,comigs --rates 2e-3,6e-3,2e-2 --plot

A run that is already in the folder, with the same settings, isn't run again, and one that was cut off is continued, so
this can be stopped and started again. (If the base's file has been replaced, give another --out.)
"""

import json
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from methods import METHODS
from model import GENERALIST, ROUTER, SPECIALIST
from support import plots
from support.errors import BadInput, Diverged
from support.files import read_json, write_json, write_text
from support.folder import json_of
from support.settings import Settings, check, given_in, parsed, plain, setting, status_of
from train import Run


@dataclass
class Comparison:
    """How runs are compared. All other flags are train.py's. Raises BadInput."""

    seeds: int = setting(3, "number of seeds, counted from --seed", int, low=1)
    rates: tuple[float, ...] | None = setting(
        None, "learning rates to choose from, for each row by itself, on validation text, with the first seed",
        float, above=0, many=True)
    out: str = setting("out/compare", "folder of the runs, of table.md and of table.json")
    plot: bool = setting(False, "also draw table.png and table.svg (needs matplotlib)", bool)

    def __post_init__(self):
        check(self)


@dataclass
class OfMethods(Comparison):
    """Several methods side by side. All other flags are train.py's. Raises BadInput."""

    methods: tuple[str, ...] = setting(("comigs", "local", "fedavg", "centralized"), "the rows of the table",
                                       many=True, choices=tuple(METHODS))


Rows = dict[str, Settings]  # by label


def finished(settings: Settings, bar: tqdm) -> Path:
    """The folder of a run that has ended: earlier, or because it is played or continued now."""
    folder = Path(settings.out)
    config = folder / "config.json"
    if config.exists() and json_of(config)["settings"] | {"overwrite": settings.overwrite} == plain(settings):
        if (folder / "result.json").exists():
            bar.update(settings.rounds * settings.users)
            return folder
        settings = replace(settings, overwrite=False, resume=True)
    Run(settings).play(bar)
    return folder


def read(folder: Path) -> dict:
    return read_json(folder / "result.json")


def play(rows: Rows, comparison: Comparison) -> tuple[dict[str, list[Path]], dict[str, dict[float, float]]]:
    """Run all rows, each at its best rate. Returns the folders of each row's seeds, and the mean validation perplexity
    of its first seed at each rate."""
    def at(label: str, rate: float, seed: int) -> Settings:
        first = rows[label]
        return replace(first, lr=rate, seed=first.seed + seed,
                       out=f"{comparison.out}/{label.replace(' ', '-')}-lr{rate}-seed{first.seed + seed}")

    def trial(label: str, rate: float) -> float:
        """The mean validation perplexity of the first seed at a rate; infinity where it diverges."""
        try:
            return read(finished(at(label, rate, 0), bar))["mean_valid_ppl"]
        except Diverged:
            return math.inf

    rates = {label: comparison.rates or (first.lr,) for label, first in rows.items()}
    total = sum((len(rates[label]) + comparison.seeds) * row.rounds * row.users for label, row in rows.items())
    folders, tried = {}, {}
    with tqdm(total=total, unit="user", dynamic_ncols=True) as bar:
        for label in rows:
            tried[label] = {rate: trial(label, rate) for rate in rates[label]}
            best = min(tried[label], key=tried[label].get)  # where all diverge, the next line says so
            folders[label] = [finished(at(label, best, seed), bar) for seed in range(comparison.seeds)]
    return folders, tried


def summarize(folders: list[Path], tried: dict[float, float], rivals: list[Path] | None) -> dict:
    """A row: test perplexities over seeds, by user and over users, and costs per user. `rivals`: runs of `local`."""
    runs = [read(folder) for folder in folders]
    first, users = runs[0], len(runs[0]["users"])
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    curve = {}
    for line in (line for one in lines for line in one):
        curve.setdefault(line["round"], []).append(line["valid_loss"])

    def over_users(*roles: str) -> float:
        return statistics.mean(sum(user["parameters"][role] for role in roles) for run in runs for user in run["users"])

    def per_round(what: str) -> float:
        return statistics.mean(run[what] for run in runs) / first["rounds"] / users

    pairs = [(ours["test_ppl"], theirs["test_ppl"]) for run, folder in zip(runs, rivals or [], strict=bool(rivals))
             for ours, theirs in zip(run["users"], read(folder)["users"], strict=True)]
    return {
        "rate": min(tried, key=tried.get), "valid_ppl_by_rate": tried,
        "users": {user["name"]: [run["users"][i]["test_ppl"] for run in runs] for i, user in enumerate(first["users"])},
        "mean": [run["mean_test_ppl"] for run in runs],
        "worst": [max(user["test_ppl"] for user in run["users"]) for run in runs],
        "hurt": statistics.mean(ours > theirs for ours, theirs in pairs) if pairs else None,
        "trained": over_users(GENERALIST, SPECIALIST, ROUTER), "sent": over_users(GENERALIST),
        "bytes_up": per_round("bytes_up"), "bytes_down": per_round("bytes_down"),
        "trigram": [user["trigram_ppl"] for user in first["users"]],
        "start": [user["test_ppl_start"] for user in first["users"]],
        "seconds": statistics.mean(run["seconds"] for run in runs),
        "valid_loss_by_round": {number: statistics.mean(losses) for number, losses in curve.items()}}


def mean_and_deviation(values: list[float]) -> str:
    """mean_and_deviation([1.0, 2.0, 3.0]) -> "2.00 ± 1.00"."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def table(summaries: dict[str, dict]) -> str:
    """Markdown: test perplexity by user and over users, mean ± standard deviation over seeds, and what it costs; kB are
    per user and round. Below, the first row's models as they start, and the trigrams, if they are the same for all."""
    any_row = next(iter(summaries.values()))
    rows = [["", "rate", *any_row["users"], "mean", "worst user", "hurt", "trained", "sent", "kB up", "kB down",
             "seconds"]]
    for label, row in summaries.items():
        rows.append([label, f"{row['rate']:g}", *(mean_and_deviation(values) for values in row["users"].values()),
                     mean_and_deviation(row["mean"]), mean_and_deviation(row["worst"]),
                     "–" if row["hurt"] is None else f"{row['hurt']:.0%}", f"{row['trained']:,.0f}",
                     f"{row['sent']:,.0f}", f"{row['bytes_up'] / 1000:,.0f}", f"{row['bytes_down'] / 1000:,.0f}",
                     f"{row['seconds']:.0f}"])
    for label, key in (("no training", "start"), ("trigram", "trigram")):
        values = any_row[key]
        if key == "start" or all(row[key] == values for row in summaries.values()):
            numbers = [*values, statistics.mean(values), max(values)]
            rows.append([label, "", *(f"{number:.2f}" for number in numbers), *[""] * 6])
    return markdown(rows)


def curves(summaries: dict[str, dict]) -> str:
    """Markdown: validation loss in nats, mean over users and seeds, after so many rounds."""
    rounds = list(dict.fromkeys(number for row in summaries.values() for number in row["valid_loss_by_round"]))
    return markdown([["validation loss after round", *map(str, rounds)], *(
        [label, *(f"{row['valid_loss_by_round'].get(number, float('nan')):.3f}" for number in rounds)]
        for label, row in summaries.items())])


def compare(rows: Rows, comparison: Comparison) -> None:
    """Run all rows, write table.md, table.json and the drawing and print the table. Raises BadInput."""
    if comparison.plot:
        plots.need("matplotlib", "plot")
    if comparison.rates and any(row.experts_see == "both" for row in rows.values()):
        raise BadInput("`rates`: can't be judged by validation text that experts learn from; leave `experts_see` out")
    folders, tried = play(rows, comparison)
    summaries = {label: summarize(folders[label], tried[label], folders.get("local")) for label in rows}
    out, text = Path(comparison.out), table(summaries)
    write_text(out / "table.md", f"{text}\n\n{curves(summaries)}\n")
    write_json(out / "table.json", summaries)
    print(text)
    if comparison.plot:
        plots.draw_comparison(summaries, out / "table")


def split(arguments: list[str] | None, kind: type[Comparison]) -> tuple[Comparison, list[str]]:
    """A command line's flags of a comparison, and those of its runs. Raises BadInput."""
    given, rest = given_in(arguments, kind)
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
    return status_of("compare.py", from_command_line, "the runs that ended are kept")


if __name__ == "__main__":
    sys.exit(main())
