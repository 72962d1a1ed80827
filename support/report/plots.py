"""The plot of a comparison, with matplotlib, which is optional."""

import statistics
from pathlib import Path

from support.files import write
from support.report.tables import Row


def draw_comparison(rows: dict[str, Row], path: Path) -> None:
    """Test perplexities, best first, and curves of validation loss, as a .png and an .svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1 + 0.35 * max(10, len(rows))), layout="constrained")
    points, lines = figure.subplots(1, 2)
    ranked = sorted(rows, key=lambda label: rows[label].mean_ppl("averaged"))
    draw_perplexities(points, {label: rows[label] for label in ranked})
    draw_curves(lines, {label: rows[label] for label in ranked})
    with rc_context({"svg.fonttype": "none"}):  # the .svg keeps text as text
        for format in ("png", "svg"):

            def save(temporary: Path, format: str = format) -> None:
                figure.savefig(temporary, format=format)

            write(path.with_suffix(f".{format}"), save)


def draw_perplexities(axes, rows: dict[str, Row]) -> None:
    """Mean over users and seeds, with the standard deviation over seeds, by each protocol."""
    for protocol, mark in (("averaged", "o"), ("local", "x")):
        labels = [label for label in rows if rows[label].measured[protocol] is not None]
        means = []
        deviations = []
        for label in labels:
            by_seed = rows[label].measured[protocol].mean
            means.append(statistics.mean(by_seed))
            deviations.append(statistics.stdev(by_seed) if len(by_seed) > 1 else 0)
        axes.errorbar(means, labels, xerr=deviations, fmt=mark, capsize=3, label=protocol)
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("test perplexity, mean over users")
    axes.legend()


def draw_curves(axes, rows: dict[str, Row]) -> None:
    styles = ("solid", "dashed", "dotted")
    for number, (label, row) in enumerate(rows.items()):
        rounds = list(row.valid_loss_by_round)
        losses = list(row.valid_loss_by_round.values())
        style = styles[number // 10 % 3]
        axes.plot(rounds, losses, f"C{number % 10}", label=label, linestyle=style)
    axes.set_xlabel("round")
    axes.set_ylabel("validation loss, nats")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
