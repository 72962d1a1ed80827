"""The curves of a run for matplotlib and for TensorBoard; both packages are optional."""

import importlib.util
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
