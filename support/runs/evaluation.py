"""Evaluation of users: lines of metrics.jsonl, rows of result.json, and the printed table."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import data
from bilevel import Batch, evaluate
from data import Text
from federated import User
from methods import METHODS
from model import GENERALIST, ROLES, SPECIALIST
from support.errors import Diverged
from support.runs.settings import Settings
from support.server.privacy import sentence
from support.text.trigram import trigram_loss

DIVERGED = 100.0  # nats; a uniform guess has a loss below 11 with GPT-2's vocabulary
# The columns of result.json whose means over the users it has, too.
MEANS = (
    "valid_ppl_local",
    "valid_ppl",
    "test_ppl_local",
    "test_ppl",
    "test_bpb_local",
    "test_bpb",
)
CURVE_TOKENS = 2048  # tokens of a user's validation text for one point of its curve


def whole_text(settings: Settings, tokens: np.ndarray) -> Iterator[Batch]:
    return data.ordered_windows(tokens, settings.block_size, settings.device)


def part_of_text(settings: Settings, tokens: np.ndarray) -> Iterator[Batch]:
    """Windows spread evenly over a text, or the whole text if it is short."""
    if len(tokens) <= CURVE_TOKENS:
        return whole_text(settings, tokens)
    count = max(1, CURVE_TOKENS // settings.block_size)
    return data.spread_windows(tokens, count, settings.block_size, settings.device)


def check_loss(settings: Settings, user: User, loss: float) -> None:
    """Raises Diverged."""
    if loss < DIVERGED:
        return
    cause = f"`dp_noise` {settings.dp_noise}" if settings.dp_noise else f"`lr` {settings.lr}"
    raise Diverged(
        f"{cause}: the loss of user {user.name} has grown to {loss:.3g}; use a smaller one"
    )


def evaluate_user(
    settings: Settings, user: User, batches: Iterator[Batch]
) -> tuple[float, list[float]]:
    """The loss in nats, and the sum of the generalists' mean gates by layer. Raises Diverged."""
    loss, gates = evaluate(user.model, batches, user.fixed_gates)  # gates: (L, E)
    check_loss(settings, user, loss)
    generalist = [role == GENERALIST for role in user.model.config.expert_roles]
    return loss, gates[:, generalist].sum(1).tolist()


def initial_test_loss(settings: Settings, user: User, text: Text) -> float:
    """The loss on test text before the first round, in nats."""
    user.before_evaluation()
    loss, _ = evaluate(user.model, whole_text(settings, text.test), user.fixed_gates)
    return loss


def metrics_line(
    settings: Settings, number: int, user: User, text: Text, train_loss: float | None
) -> dict:
    """A user's line in metrics.jsonl after round `number`.

    train_loss: mean over the round's steps; None if the user wasn't selected.
    """
    user.before_evaluation()
    valid_loss, share = evaluate_user(settings, user, part_of_text(settings, text.valid))
    return {
        "round": number,
        "user": text.name,
        "train_loss": train_loss,
        "valid_loss": valid_loss,
        "generalist_share": share,
        "bytes_up": user.bytes_up,
        "bytes_down": user.bytes_down,
    }


def evaluate_at_end(settings: Settings, user: User, text: Text) -> dict:
    """The user's losses on its whole validation and test text, in nats, and the generalists' share.

    It is called right after the last local steps, and again with the last average.
    """
    user.before_evaluation()
    valid_loss, _ = evaluate_user(settings, user, whole_text(settings, text.valid))
    test_loss, share = evaluate_user(settings, user, whole_text(settings, text.test))
    return {"valid_loss": valid_loss, "test_loss": test_loss, "generalist_share": share}


def result_row(
    settings: Settings, user: User, text: Text, initial_loss: float, local: dict, averaged: dict
) -> dict:
    """A user's row in result.json.

    initial_loss: that of initial_test_loss, in nats. local, averaged: those of evaluate_at_end.
    """
    config = user.model.config
    bits_per_byte = (len(text.test) - 1) / math.log(2) / text.test_bytes  # of a loss of 1
    parameters = {}
    for role in ROLES:
        parameters[role] = sum(parameter.numel() for parameter in user.model.having(role).values())
    return {
        "name": text.name,
        "generalists": config.expert_roles.count(GENERALIST),
        "specialists": config.expert_roles.count(SPECIALIST),
        "train_bytes": text.train_bytes,
        "train_tokens": len(text.train),
        "parameters": parameters,
        "valid_ppl_local": math.exp(local["valid_loss"]),
        "valid_ppl": math.exp(averaged["valid_loss"]),
        "test_ppl_start": math.exp(initial_loss),
        "test_ppl_local": math.exp(local["test_loss"]),
        "test_ppl": math.exp(averaged["test_loss"]),
        "test_bpb_local": local["test_loss"] * bits_per_byte,
        "test_bpb": averaged["test_loss"] * bits_per_byte,
        "trigram_ppl": math.exp(trigram_loss(text.train, text.test, config.vocab_size)),
        "generalist_share": averaged["generalist_share"],
    }


def counters(user: User) -> dict:
    """The tokens that a user has learned from, and the bytes that it has exchanged."""
    tokens = sum(level.steps * level.batches.tokens_per_batch for level in user.levels)
    return {"tokens_seen": tokens, "bytes_up": user.bytes_up, "bytes_down": user.bytes_down}


def result_of(
    settings: Settings,
    rows: list[dict],
    counts: list[dict],
    refused: int,
    seconds: float,
    privacy: dict,
) -> dict:
    """The content of result.json.

    rows: one result_row per text. counts: the counters of each user. refused: number of refused
    uploads. privacy: that of privacy.guarantee.
    """
    result = {
        "method": settings.method,
        "seed": settings.seed,
        "seconds": round(seconds, 1),
        "rounds": settings.rounds,
    }
    for name in ("tokens_seen", "bytes_up", "bytes_down"):
        result[name] = sum(user[name] for user in counts)
    result["refused"] = refused
    for name in MEANS:
        result[f"mean_{name}"] = sum(row[name] for row in rows) / len(rows)
    return result | {"users": rows} | privacy


def refused_uploads(number: int, refused: list[tuple[str, str]]) -> list[str]:
    """A line for each upload that was refused in round `number`.

    refused: names of users, and reasons.
    """
    lines = []
    for name, reason in refused:
        lines.append(f"round {number}: the upload of user {name} was refused: {reason}")
    return lines


# --- the table ---


def table(result: dict, path: Path) -> str:
    """A result, to be printed. path: the folder of the run."""
    routed = METHODS[result["method"]].routed
    header = (
        f"{'user':<14}{'experts':>9}{'parameters':>12}{'train kB':>10}{'untrained':>11}{'local':>8}"
        f"{'averaged':>10}{'trigram':>9}{'bits/byte':>11}{'to generalists':>16}"
    )
    lines = [header]
    for user in result["users"]:
        lines.append(table_line(user, routed))
    local, ppl = result["mean_test_ppl_local"], result["mean_test_ppl"]
    bpb = result["mean_test_bpb"]
    lines.append(f"{'mean':<45}{'':>11}{local:>8.2f}{ppl:>10.2f}{'':>9}{bpb:>11.3f}")
    lines.append(
        "test perplexity: before training, right after the last local steps, with the last average"
    )
    sent = result["bytes_up"] / 1e6
    received = result["bytes_down"] / 1e6
    lines.append(
        f"{result['method']}, seed {result['seed']}: {result['rounds']} rounds in "
        f"{result['seconds']:.0f} s; users sent {sent:.1f} MB and received {received:.1f} MB; "
        f"all files are in {path}"
    )
    if "privacy" in result:
        lines.append(sentence(result["privacy"]))
    return "\n".join(lines)


def table_line(user: dict, routed: bool) -> str:
    """A user's line of the table."""
    experts = f"{user['generalists']}G {user['specialists']}S"
    parameters = sum(user["parameters"].values())
    start = user["test_ppl_start"]
    local = user["test_ppl_local"]
    averaged = user["test_ppl"]
    share = "–"
    if routed:
        layers = user["generalist_share"]
        share = f"{sum(layers) / len(layers):.0%}"
    return (
        f"{user['name']:<14}{experts:>9}{parameters:>12,}{user['train_bytes'] / 1000:>10.0f}"
        f"{start:>11.1f}{local:>8.2f}{averaged:>10.2f}"
        f"{user['trigram_ppl']:>9.2f}{user['test_bpb']:>11.3f}{share:>16}"
    )
