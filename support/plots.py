"""Curves of runs for matplotlib and for TensorBoard; both packages are optional."""

import importlib.util
import statistics
from pathlib import Path

from support.errors import BadInput
from support.files import write


def need(package: str, setting: str) -> None:
    """Raises BadInput if an optional package isn't there."""
    if importlib.util.find_spec(package) is None:
        raise BadInput(f"`{setting}`: needs {package}, which isn't installed; pip install {package}")


def save_figure(figure: "matplotlib.figure.Figure", path: Path) -> None:  # noqa: F821
    """Write a figure as .png and .svg."""
    from matplotlib import rc_context
    with rc_context({"svg.fonttype": "none"}):  # letters stay letters
        for kind in ("png", "svg"):
            write(path.with_suffix(f".{kind}"), lambda temporary, kind=kind: figure.savefig(temporary, format=kind))


def plot(metrics: list[dict], path: Path) -> None:
    """Draw training (dashed) and validation loss by round, and the generalists' share, a colour for each user."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 5), layout="constrained")
    losses, parts = figure.subplots(1, 2)
    for number, user in enumerate(dict.fromkeys(line["user"] for line in metrics)):
        lines = [line for line in metrics if line["user"] == user]
        rounds, colour = [line["round"] for line in lines], f"C{number % 10}"
        losses.plot(rounds, [line["valid_loss"] for line in lines], colour, label=user)
        losses.plot(rounds, [line["train_loss"] for line in lines], colour, linestyle="dashed")
        parts.plot(rounds, [sum(line["generalist_share"]) / len(line["generalist_share"]) for line in lines], colour)
    losses.set(xlabel="round", ylabel="loss, nats: validation, and training (dashed)")
    parts.set(xlabel="round", ylabel="generalists' share, mean over layers", ylim=(0, 1))
    losses.legend()
    save_figure(figure, path)


def draw_comparison(summaries: dict[str, dict], path: Path) -> None:
    """Test perplexities, best first, and curves of validation loss, as a .png and an .svg."""
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
    save_figure(figure, path)


def board(folder: Path) -> "SummaryWriter":  # noqa: F821
    """What TensorBoard reads."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder / "tensorboard")


def show_on(board: "SummaryWriter", lines: list[dict]) -> None:  # noqa: F821
    """The figures of an evaluation's lines, a chart each with a curve for each user."""
    for line in lines:
        share = line["generalist_share"]
        figures = {name: line[name] for name in ("train_loss", "valid_loss", "bytes_up", "bytes_down")} | {
            f"generalist_share/layer {layer + 1}": each for layer, each in enumerate(share)}
        for name, figure in figures.items():
            if figure is not None:
                board.add_scalar(f"{name}/{line['user']}", figure, line["round"])
    board.flush()
