"""The drawing of a comparison, with matplotlib, which is optional."""

import statistics
from pathlib import Path

from support.files import write


def draw_comparison(summaries: dict[str, dict], path: Path) -> None:
    """Test perplexities, best first, and curves of validation loss, as a .png and an .svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 1 + 0.35 * max(10, len(summaries))), layout="constrained")
    points, lines = figure.subplots(1, 2)
    ranked = dict(sorted(summaries.items(), key=lambda item: statistics.mean(item[1]["mean"])))
    means = [statistics.mean(row["mean"]) for row in ranked.values()]
    deviations = [statistics.stdev(row["mean"]) if len(row["mean"]) > 1 else 0 for row in ranked.values()]
    points.errorbar(means, list(ranked), xerr=deviations, fmt="o", capsize=3)
    points.invert_yaxis()
    points.grid(axis="y", alpha=0.3)
    points.set_xlabel("test perplexity, mean over users")
    for number, (label, row) in enumerate(ranked.items()):
        lines.plot(*zip(*row["valid_loss_by_round"].items(), strict=True), f"C{number % 10}", label=label,
                   linestyle=("solid", "dashed", "dotted")[number // 10 % 3])
    lines.set_xlabel("round")
    lines.set_ylabel("validation loss, nats")
    lines.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    with rc_context({"svg.fonttype": "none"}):  # letters stay letters
        for kind in ("png", "svg"):
            write(path.with_suffix(f".{kind}"), lambda temporary, kind=kind: figure.savefig(temporary, format=kind))
