"""The table of a comparison: a row per method, over its seeds and users.

It is written as Markdown, LaTeX and JSON. All results by seed and user are written as CSV.
"""

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from model import GENERALIST, ROUTER, SPECIALIST
from support.files import read_json, read_lines, write_json, write_text


@dataclass
class Row:
    """A row of the table: test perplexities over seeds, and costs per user."""

    choice: str  # the learning rate, and a hyper-parameter if one was swept
    valid_ppl_by_choice: dict[str, float | None]  # with the first seed; None: it diverged
    users: dict[str, list[float]]  # each user's test perplexity, by seed
    mean: list[float]  # over users, by seed
    worst: list[float]  # of the users, by seed
    hurt: float | None  # fraction of users with a higher perplexity than with local
    trained: float  # trained parameters
    sent: float  # parameters that are sent in a round
    bytes_up: float  # in a round
    bytes_down: float
    trigram: list[float]  # perplexity of each user's trigram
    start: list[float]  # each user's perplexity before training
    seconds: float  # of a run
    valid_loss_by_round: dict[int, float]  # in nats, mean over seeds and users


def read_result(folder: Path) -> dict:
    return read_json(folder / "result.json")


def summarize(folders: list[Path], valid_ppl: dict[str, float], local: list[Path]) -> Row:
    """The row of a method's runs, one per seed.

    valid_ppl: the validation perplexity of each choice. local: the runs of method local.
    """
    runs = [read_result(folder) for folder in folders]
    first = runs[0]
    users_rounds = first["rounds"] * len(first["users"])
    by_user = {}
    for i, user in enumerate(first["users"]):
        by_user[user["name"]] = [run["users"][i]["test_ppl"] for run in runs]
    finite = {}
    for choice, ppl in valid_ppl.items():
        finite[choice] = ppl if math.isfinite(ppl) else None
    return Row(
        choice=min(valid_ppl, key=valid_ppl.get),
        valid_ppl_by_choice=finite,
        users=by_user,
        mean=[run["mean_test_ppl"] for run in runs],
        worst=[max(user["test_ppl"] for user in run["users"]) for run in runs],
        hurt=fraction_hurt(runs, [read_result(folder) for folder in local]),
        trained=mean_parameters(runs, (GENERALIST, SPECIALIST, ROUTER)),
        sent=mean_parameters(runs, (GENERALIST,)),
        bytes_up=statistics.mean(run["bytes_up"] / users_rounds for run in runs),
        bytes_down=statistics.mean(run["bytes_down"] / users_rounds for run in runs),
        trigram=[user["trigram_ppl"] for user in first["users"]],
        start=[user["test_ppl_start"] for user in first["users"]],
        seconds=statistics.mean(run["seconds"] for run in runs),
        valid_loss_by_round=curve(folders),
    )


def mean_parameters(runs: list[dict], roles: tuple[str, ...]) -> float:
    """The mean number of parameters that a user has in some roles."""
    counts = []
    for run in runs:
        for user in run["users"]:
            counts.append(sum(user["parameters"][role] for role in roles))
    return statistics.mean(counts)


def fraction_hurt(runs: list[dict], local_runs: list[dict]) -> float | None:
    """The fraction of users with a higher perplexity than with local and the same seed, or None."""
    local_users = {run["seed"]: run["users"] for run in local_runs}
    worse = []
    for run in runs:
        if run["seed"] in local_users:
            for ours, theirs in zip(run["users"], local_users[run["seed"]], strict=True):
                worse.append(ours["test_ppl"] > theirs["test_ppl"])
    return statistics.mean(worse) if worse else None


def curve(folders: list[Path]) -> dict[int, float]:
    """Validation loss after each evaluated round, mean over seeds and users."""
    losses = {}
    for folder in folders:
        for line in read_lines(folder / "metrics.jsonl"):
            losses.setdefault(line["round"], []).append(line["valid_loss"])
    return {number: statistics.mean(values) for number, values in losses.items()}


# --- the table as text ---

COLUMNS = (
    "Test perplexity of each user and their mean, ± the standard deviation over seeds, after "
    "the last average. rate: the learning rate and other choices made on validation text. "
    "hurt: the share of users with a higher perplexity than with local and the same seed. "
    "trained, sent: a user's trained parameters, and those that it sends. kB up, kB down: "
    "per user and round. seconds: per run."
)


def mean_and_deviation(values: list[float]) -> str:
    """mean_and_deviation([1.0, 2.0, 3.0]) -> "2.00 ± 1.00"."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2f}"


def cells_of(label: str, row: Row) -> list[str]:
    """A row's cells."""
    cells = [label, row.choice]
    for values in (*row.users.values(), row.mean, row.worst):
        cells.append(mean_and_deviation(values))
    cells.append("–" if row.hurt is None else f"{row.hurt:.0%}")
    for number in (row.trained, row.sent, row.bytes_up / 1000, row.bytes_down / 1000):
        cells.append(f"{number:,.0f}")
    cells.append(f"{row.seconds:.0f}")
    return cells


def reference_cells(label: str, values: list[float]) -> list[str]:
    """The cells of a row without training: perplexities by user, their mean and the worst."""
    numbers = [*values, statistics.mean(values), max(values)]
    return [label, "", *(f"{number:.2f}" for number in numbers), *[""] * 6]


def table(rows: dict[str, Row]) -> list[list[str]]:
    """All cells. The last rows are the first row's models before training, and the trigrams."""
    first = next(iter(rows.values()))
    header = [
        "",
        "rate",
        *first.users,
        "mean",
        "worst user",
        "hurt",
        "trained",
        "sent",
        "kB up",
        "kB down",
        "seconds",
    ]
    cells = [header]
    for label, row in rows.items():
        cells.append(cells_of(label, row))
    cells.append(reference_cells("no training", first.start))
    if all(row.trigram == first.trigram for row in rows.values()):
        cells.append(reference_cells("trigram", first.trigram))
    return cells


def curves(rows: dict[str, Row]) -> list[list[str]]:
    """Cells: validation loss in nats, mean over users and seeds, by round."""
    rounds = []
    for row in rows.values():
        for number in row.valid_loss_by_round:
            if number not in rounds:
                rounds.append(number)
    cells = [["validation loss after round", *(str(number) for number in rounds)]]
    for label, row in rows.items():
        losses = [row.valid_loss_by_round.get(number, math.nan) for number in rounds]
        cells.append([label, *(f"{loss:.3f}" for loss in losses)])
    return cells


def markdown(cells: list[list[str]]) -> str:
    header, *body = cells
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text for LaTeX."""
    return re.sub(r"([%&_#${}])", r"\\\1", text).replace("±", r"$\pm$")


def latex(cells: list[list[str]], caption: str) -> str:
    columns = "l" + "r" * (len(cells[0]) - 1)
    header, *body = [" & ".join(escaped(cell) for cell in line) + r" \\" for line in cells]
    lines = [
        r"\begin{table}",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        header,
        r"\hline",
        *body,
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def caption(rows: list[dict], seeds: int) -> str:
    """A sentence on the settings that all rows share."""

    def common(name: str) -> str:
        values = {str(row[name]) for row in rows}
        return values.pop() if len(values) == 1 else "differing"

    text = (
        f"Text: {common('data')}, target: {common('target')}. "
        f"Base: {common('init_from')}, experts: {common('expert')}. "
        f"{common('users')} users, {common('rounds')} rounds of {common('local_steps')} steps "
        f"of {common('batch_size')} × {common('block_size')} tokens; {seeds} seed"
    )
    return f"{text}s." if seeds > 1 else f"{text}."


# --- CSV ---

USER_COLUMNS = ("specialists", "test_ppl_start", "valid_ppl", "test_ppl", "test_bpb", "trigram_ppl")


def user_records(folder: Path) -> Iterable[dict]:
    """The results of each user of a run."""
    for user in read_result(folder)["users"]:
        record = {"user": user["name"]}
        for name in USER_COLUMNS:
            record[name] = user[name]
        for role, count in user["parameters"].items():
            record[f"{role}_parameters"] = count
        yield record


def curve_records(folder: Path) -> Iterable[dict]:
    """The lines of metrics.jsonl, with one share of the generalists for all layers."""
    for line in read_lines(folder / "metrics.jsonl"):
        yield line | {"generalist_share": statistics.mean(line["generalist_share"])}


def as_csv(records: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_all(out: Path, rows: dict[str, Row], folders: dict[str, list[Path]], caption: str) -> str:
    """Write table.md, table.tex, table.json, table.csv and curves.csv.

    folders: the runs of each row. Returns the table as Markdown.
    """
    cells = table(rows)
    text = markdown(cells)
    write_text(out / "table.md", f"{text}\n\n{caption} {COLUMNS}\n\n{markdown(curves(rows))}\n")
    write_text(out / "table.tex", latex(cells, f"{caption} {COLUMNS}"))
    write_json(out / "table.json", {label: asdict(row) for label, row in rows.items()})
    users = []
    losses = []
    for label, runs in folders.items():
        for folder in runs:
            key = {"row": label, "seed": read_result(folder)["seed"]}
            users += [key | record for record in user_records(folder)]
            losses += [key | record for record in curve_records(folder)]
    write_text(out / "table.csv", as_csv(users))
    write_text(out / "curves.csv", as_csv(losses))
    return text
