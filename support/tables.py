"""What several runs come to: a row for each method, over its seeds and users, as Markdown."""

import math
import statistics
from pathlib import Path

from model import GENERALIST, ROUTER, SPECIALIST
from support.files import read_json, read_lines


def read(folder: Path) -> dict:
    return read_json(folder / "result.json")


def summarize(folders: list[Path], tried: dict[str, float], rivals: list[Path] | None) -> dict:
    """A row: test perplexities over seeds, by user and over users, and costs per user. `rivals`: runs of `local`."""
    runs = [read(folder) for folder in folders]
    first, users = runs[0], len(runs[0]["users"])
    curve = {}
    for line in (line for folder in folders for line in read_lines(folder / "metrics.jsonl")):
        curve.setdefault(line["round"], []).append(line["valid_loss"])

    def over_users(*roles: str) -> float:
        return statistics.mean(sum(user["parameters"][role] for role in roles) for run in runs for user in run["users"])

    def per_round(what: str) -> float:
        return statistics.mean(run[what] for run in runs) / first["rounds"] / users

    theirs = {run["seed"]: run["users"] for run in map(read, rivals or [])}
    pairs = [(our["test_ppl"], their["test_ppl"]) for run in runs if run["seed"] in theirs
             for our, their in zip(run["users"], theirs[run["seed"]], strict=True)]
    return {
        "choice": min(tried, key=tried.get),
        "valid_ppl_by_choice": {choice: ppl if math.isfinite(ppl) else None for choice, ppl in tried.items()},
        "users": {user["name"]: [run["users"][i]["test_ppl"] for run in runs] for i, user in enumerate(first["users"])},
        "mean": [run["mean_test_ppl"] for run in runs],
        "worst": [max(user["test_ppl"] for user in run["users"]) for run in runs],
        "hurt": statistics.mean(our > their for our, their in pairs) if pairs else None,
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
        rows.append([label, row["choice"], *(mean_and_deviation(values) for values in row["users"].values()),
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
