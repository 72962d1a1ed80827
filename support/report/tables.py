"""The tables of a comparison: a row per method, over its seeds and users.

There is one table for each moment at which a run is tested (PROTOCOLS), one of costs, and one of
validation losses. They are written as Markdown, LaTeX and JSON. All results by seed and user are
written as CSV.
"""

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from methods import METHODS, LeakyLevel
from model import GENERALIST, ROUTER, SPECIALIST
from support.files import read_json, read_lines, write_json, write_text
from support.report.intervals import Interval, behind
from support.runs.evaluation import MEANS

PROTOCOLS = {
    "local": "tested right after each user's last local steps, before the last average",
    "averaged": "tested with the last average",
}
SUFFIX = {"local": "_local", "averaged": ""}  # of a protocol's columns in result.json


@dataclass
class Measured:
    """Test perplexities of a row by one protocol."""

    users: dict[str, list[float]]  # each user's, by seed
    mean: list[float]  # over users, by seed
    worst: list[float]  # of the users, by seed
    hurt: float | None  # fraction of users with a higher perplexity than with local


@dataclass
class Row:
    """A row of the tables: test perplexities over seeds, and costs per user."""

    choice: str  # the learning rate, and a hyper-parameter if one was swept
    valid_ppl_by_choice: dict[str, float | None]  # with the first seed; None: it diverged
    seeds: list[int]
    texts: list  # each user's name and a digest of its text
    contender: bool  # False: its experts learn from text that other methods' experts can't read
    mixed_target: bool  # all users have the same test text
    measured: dict[str, Measured | None]  # by protocol; None: it wasn't measured
    trained: float  # trained parameters
    sent: float  # parameters that are sent in a round
    bytes_up: float  # in a round
    bytes_down: float
    trigram: list[float]  # perplexity of each user's trigram
    start: list[float]  # each user's perplexity before training
    seconds: float  # of a run
    valid_loss_by_round: dict[int, float]  # in nats, mean over seeds and users

    def mean_ppl(self, protocol: str) -> float:
        """Test perplexity, mean over users and seeds."""
        return statistics.mean(self.measured[protocol].mean)

    def scores(self, protocol: str) -> dict[tuple[int, str], float]:
        """Test perplexity by seed and user, for a paired test.

        With a mixed target all users have the same test text: then it is their mean, by seed.
        """
        measured = self.measured[protocol]
        if self.mixed_target:
            means = zip(self.seeds, measured.mean, strict=True)
            return {(seed, "all users"): mean for seed, mean in means}
        scores = {}
        for name, values in measured.users.items():
            for seed, value in zip(self.seeds, values, strict=True):
                scores[seed, name] = value
        return scores


def read_result(folder: Path) -> dict:
    return read_json(folder / "result.json")


def summarize(folders: list[Path], valid_ppl: dict[str, float], local: list[Path]) -> Row:
    """The row of a method's runs, one per seed.

    valid_ppl: the validation perplexity of each choice. local: the runs of method local.
    """
    runs = [read_result(folder) for folder in folders]
    local_runs = [read_result(folder) for folder in local]
    config = read_json(folders[0] / "config.json")
    settings = config["settings"]
    first = runs[0]
    users_rounds = first["rounds"] * len(first["users"])
    finite = {}
    for choice, ppl in valid_ppl.items():
        finite[choice] = ppl if math.isfinite(ppl) else None
    return Row(
        choice=min(valid_ppl, key=valid_ppl.get),
        valid_ppl_by_choice=finite,
        seeds=[run["seed"] for run in runs],
        texts=config["texts"],
        contender=is_contender(settings),
        mixed_target=settings["target"] == "mixed",
        measured={protocol: measure(runs, local_runs, protocol) for protocol in PROTOCOLS},
        trained=mean_parameters(runs, (GENERALIST, SPECIALIST, ROUTER)),
        sent=mean_parameters(runs, (GENERALIST,)),
        bytes_up=statistics.mean(run["bytes_up"] / users_rounds for run in runs),
        bytes_down=statistics.mean(run["bytes_down"] / users_rounds for run in runs),
        trigram=[user["trigram_ppl"] for user in first["users"]],
        start=[user["test_ppl_start"] for user in first["users"]],
        seconds=statistics.mean(run["seconds"] for run in runs),
        valid_loss_by_round=curve(folders),
    )


def is_contender(settings: dict) -> bool:
    """Whether a run's experts learn from their user's training text only."""
    method = METHODS[settings["method"]]
    leaks = issubclass(method.level, LeakyLevel)
    return not method.pooled and not leaks and settings["experts_see"] == "train"


def measure(runs: list[dict], local_runs: list[dict], protocol: str) -> Measured | None:
    """A row's test perplexities by one protocol. local_runs: those of method local."""
    ppl = f"test_ppl{SUFFIX[protocol]}"
    if any(run[f"mean_{ppl}"] is None for run in runs):
        return None
    users = {}
    for i, user in enumerate(runs[0]["users"]):
        users[user["name"]] = [run["users"][i][ppl] for run in runs]
    return Measured(
        users=users,
        mean=[run[f"mean_{ppl}"] for run in runs],
        worst=[max(user[ppl] for user in run["users"]) for run in runs],
        hurt=fraction_hurt(runs, local_runs, ppl),
    )


def mean_parameters(runs: list[dict], roles: tuple[str, ...]) -> float:
    """The mean number of parameters that a user has in some roles."""
    counts = []
    for run in runs:
        for user in run["users"]:
            counts.append(sum(user["parameters"][role] for role in roles))
    return statistics.mean(counts)


def fraction_hurt(runs: list[dict], local_runs: list[dict], ppl: str) -> float | None:
    """The fraction of users with a higher perplexity than with local and the same seed, or None.

    ppl: the column of result.json.
    """
    local_users = {
        run["seed"]: run["users"] for run in local_runs if run[f"mean_{ppl}"] is not None
    }
    worse = []
    for run in runs:
        if run["seed"] in local_users:
            for ours, theirs in zip(run["users"], local_users[run["seed"]], strict=True):
                worse.append(ours[ppl] > theirs[ppl])
    return statistics.mean(worse) if worse else None


def curve(folders: list[Path]) -> dict[int, float]:
    """Validation loss after each evaluated round, mean over seeds and users."""
    losses = {}
    for folder in folders:
        for line in read_lines(folder / "metrics.jsonl"):
            losses.setdefault(line["round"], []).append(line["valid_loss"])
    return {number: statistics.mean(values) for number, values in losses.items()}


# --- who is first ---


def candidates(rows: dict[str, Row], label: str) -> list[str]:
    """The rows with the same text as this one, of which one is first.

    Rows whose experts learn from more text than others can't be first, unless all do.
    """
    same_text = [name for name in rows if rows[name].texts == rows[label].texts]
    return [name for name in same_text if rows[name].contender] or same_text


def first_of(rows: dict[str, Row], label: str, protocol: str) -> str:
    """The candidate with the lowest mean. A row that lacks seeds (they diverged) can't be first."""
    names = candidates(rows, label)
    most = max(len(rows[name].seeds) for name in names)
    complete = [name for name in names if len(rows[name].seeds) == most]
    return min(complete, key=lambda name: rows[name].mean_ppl(protocol))


def lags(rows: dict[str, Row], protocol: str) -> dict[str, Interval | None]:
    """How far each row is behind the first one. None for a first row."""
    intervals = {}
    for label, row in rows.items():
        first = first_of(rows, label, protocol)
        intervals[label] = None
        if label != first:
            intervals[label] = behind(row.scores(protocol), rows[first].scores(protocol))
    return intervals


def clear_winners(rows: dict[str, Row], intervals: dict[str, Interval | None]) -> list[str]:
    """The first rows to which no other candidate is level. intervals: those of lags."""
    winners = []
    for label, interval in intervals.items():
        if interval is None:
            others = [name for name in candidates(rows, label) if name != label]
            if all(intervals[name].low > 0 for name in others):
                winners.append(label)
    return winners


# --- the tables as text ---

COLUMNS = (
    "Test perplexity of each user and their mean, ± the standard deviation over seeds. "
    "behind: how much higher than the first row's the mean is, with a 95 % confidence interval (a "
    "paired t-test). Its pairs are users and seeds; with a mixed target, where all users have the "
    "same test text, they are seeds. level: the interval contains 0. The first mean is bold if no "
    "other row is level. centralized, comigs-leaky and rows whose experts also learn from "
    "validation text can't be first, unless all rows are such. "
    "rate: the learning rate and other choices, made on validation text with the last average. "
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


def lag_cell(lag: Interval | None) -> str:
    """lag_cell(Interval(0.012, -0.001, 0.025)) -> "level: +1.2 % (-0.1 to +2.5)"."""
    if lag is None:
        return "first"
    if math.isinf(lag.high):
        return f"level: {100 * lag.mean:+.1f} % (one pair)"
    text = f"{100 * lag.mean:+.1f} % ({100 * lag.low:+.1f} to {100 * lag.high:+.1f})"
    return f"level: {text}" if lag.is_level else text


def cells_of(label: str, row: Row, protocol: str, lag: Interval | None, bold: bool) -> list[str]:
    """A row's cells by one protocol."""
    measured = row.measured[protocol]
    mean = mean_and_deviation(measured.mean)
    hurt = "–" if measured.hurt is None else f"{measured.hurt:.0%}"
    return [
        label,
        row.choice,
        *(mean_and_deviation(values) for values in measured.users.values()),
        f"**{mean}**" if bold else mean,
        lag_cell(lag),
        mean_and_deviation(measured.worst),
        hurt,
    ]


def reference_cells(label: str, values: list[float]) -> list[str]:
    """The cells of a row without training: perplexities by user, their mean and the worst."""
    users = [f"{number:.2f}" for number in values]
    return [label, "", *users, f"{statistics.mean(values):.2f}", "", f"{max(values):.2f}", ""]


def table(rows: dict[str, Row], protocol: str) -> list[list[str]]:
    """All cells by one protocol. The last rows are the first row's models before training, and
    the trigrams."""
    intervals = lags(rows, protocol)
    winners = clear_winners(rows, intervals)
    first = next(iter(rows.values()))
    users = first.measured[protocol].users
    cells = [["", "rate", *users, "mean", "behind", "worst user", "hurt"]]
    for label, row in rows.items():
        cells.append(cells_of(label, row, protocol, intervals[label], label in winners))
    cells.append(reference_cells("no training", first.start))
    if all(row.trigram == first.trigram for row in rows.values()):
        cells.append(reference_cells("trigram", first.trigram))
    return cells


def costs(rows: dict[str, Row]) -> list[list[str]]:
    """Cells: what a row costs."""
    cells = [["", "trained", "sent", "kB up", "kB down", "seconds"]]
    for label, row in rows.items():
        numbers = (row.trained, row.sent, row.bytes_up / 1000, row.bytes_down / 1000, row.seconds)
        cells.append([label, *(f"{number:,.0f}" for number in numbers)])
    return cells


def all_tables(rows: dict[str, Row]) -> dict[str, list[list[str]]]:
    """The cells of all tables, by title. A protocol by which a row wasn't measured is left out."""
    tables = {}
    for protocol, title in PROTOCOLS.items():
        if all(row.measured[protocol] is not None for row in rows.values()):
            tables[f"{protocol}: {title}"] = table(rows, protocol)
    tables["costs"] = costs(rows)
    return tables


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
    text = re.sub(r"([%&_#${}])", r"\\\1", text).replace("±", r"$\pm$")
    return re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)


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

USER_COLUMNS = ("specialists", "test_ppl_start", *MEANS, "trigram_ppl")


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

    folders: the runs of each row. Returns the tables as Markdown.
    """
    sections = []
    environments = []
    for title, cells in all_tables(rows).items():
        sections.append(f"**{title}**\n\n{markdown(cells)}")
        environments.append(latex(cells, f"{title}. {caption} {COLUMNS}"))
    text = "\n\n".join(sections)
    write_text(out / "table.md", f"{text}\n\n{caption} {COLUMNS}\n\n{markdown(curves(rows))}\n")
    write_text(out / "table.tex", "\n".join(environments))
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
