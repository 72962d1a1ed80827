"""What several runs come to: a row for each method, over its seeds and users, as Markdown and LaTeX; and all figures by
seed and user as CSV, for other programs."""

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from model import GENERALIST, ROUTER, SPECIALIST
from support.files import read_json, read_lines, write_json, write_text


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


def latex(rows: list[list[str]], caption: str) -> str:
    def line(row: list[str]) -> str:
        return " & ".join(re.sub(r"([%&_#${}])", r"\\\1", cell).replace("±", r"$\pm$") for cell in row) + r" \\"
    return "\n".join([r"\begin{table}", rf"\caption{{{line([caption])[:-3]}}}",
                      rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}", line(rows[0]), r"\hline",
                      *map(line, rows[1:]), r"\end{tabular}", r"\end{table}", ""])


def table(summaries: dict[str, dict]) -> list[list[str]]:
    """Cells: test perplexity by user and over users, mean ± standard deviation over seeds, and what it costs. Below,
    the first row's models as they start, and the trigrams, if they are the same for all."""
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
    return rows


COLUMNS = ("Perplexity on test text, each user's and their mean, ± the standard deviation over seeds. rate: the "
           "learning rate, and what else was chosen on validation text. hurt: how many users do worse than with the "
           "same seed of local. trained, sent: parameters of a user that learn, and that it sends. kB: a user's, in a "
           "round. seconds: of a run.")


def caption(rows: list[dict], seeds: int) -> str:
    """What is common to all rows of settings."""
    def common(text: str, *names: str) -> str:
        values = [{str(row[name]) for row in rows} for name in names]
        return text.format(*(each.pop() if len(each) == 1 else "differing" for each in values))
    return " ".join([
        common("Text: {}, target: {}. Base: {}, experts: {}.", "data", "target", "init_from", "expert"),
        common("{} users, {} rounds of {} steps of {} × {} tokens;", "users", "rounds", "local_steps", "batch_size",
               "block_size"), f"{seeds} seed{'s' * (seeds > 1)}."])


def as_csv(records: Callable[[Path], Iterable[dict]], folders: dict[str, list[Path]], caption: str) -> str:
    """The caption in a first line that begins with #, names, and a line for each record of each run."""
    text, records = io.StringIO(), [{"row": label, "seed": read(folder)["seed"], **record}
                                    for label, runs in folders.items() for folder in runs for record in records(folder)]
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return f"# {caption}\n{text.getvalue()}"


def by_user(folder: Path) -> Iterable[dict]:
    """What each user of a run came to."""
    for user in read(folder)["users"]:
        yield {"user": user["name"], **{name: user[name] for name in (
            "specialists", "test_ppl_start", "valid_ppl", "test_ppl", "test_bpb", "trigram_ppl")},
            **{f"{role}_parameters": count for role, count in user["parameters"].items()}}


def by_round(folder: Path) -> Iterable[dict]:
    """The users' curves in a run, losses in nats."""
    for line in read_lines(folder / "metrics.jsonl"):
        yield line | {"generalist_share": statistics.mean(line["generalist_share"])}


def write_all(out: Path, summaries: dict[str, dict], folders: dict[str, list[Path]], caption: str) -> str:
    """table.md, .tex and .json; and figures by seed and user: table.csv, the ends, and curves.csv, the way. Returns the
    table as Markdown."""
    cells = table(summaries)
    text = markdown(cells)
    write_text(out / "table.md", f"{text}\n\n{caption} {COLUMNS}\n\n{curves(summaries)}\n")
    write_text(out / "table.tex", latex(cells, f"{caption} {COLUMNS}"))
    write_text(out / "table.csv", as_csv(by_user, folders, f"{caption} ppl: perplexity. bpb: bits per byte."))
    write_text(out / "curves.csv", as_csv(by_round, folders, f"{caption} Losses in nats; bytes so far."))
    write_json(out / "table.json", summaries)
    return text


def curves(summaries: dict[str, dict]) -> str:
    """Markdown: validation loss in nats, mean over users and seeds, after so many rounds."""
    rounds = list(dict.fromkeys(number for row in summaries.values() for number in row["valid_loss_by_round"]))
    return markdown([["validation loss after round", *map(str, rounds)], *(
        [label, *(f"{row['valid_loss_by_round'].get(number, float('nan')):.3f}" for number in rounds)]
        for label, row in summaries.items())])
