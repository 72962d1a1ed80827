"""What is measured of a user's model, in the course of a run and at its end, and the table of that."""

import math
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

import data
from bilevel import evaluate
from data import Text
from federated import User
from methods import METHODS
from model import GENERALIST, ROLES
from support.errors import Diverged
from support.files import kept
from support.pretrained.base import Base
from support.runs.settings import Settings
from support.server.privacy import sentence
from support.text.trigram import trigram_loss

DIVERGED = 100.0  # nats; guessing at random costs less than 11, with GPT-2's vocabulary
GLANCE = 2048  # tokens of a user's validation text that a point of its curve is made of


def whole(settings: Settings, tokens: np.ndarray) -> Iterator[data.Batch]:
    return data.ordered_windows(tokens, settings.block_size, settings.device)


def glance(settings: Settings, tokens: np.ndarray) -> Iterator[data.Batch]:
    """Windows that are spread over a text; a short one is read whole."""
    if len(tokens) <= GLANCE:
        return whole(settings, tokens)
    return data.spread_windows(tokens, max(1, GLANCE // settings.block_size), settings.block_size, settings.device)


def measure(settings: Settings, user: User, batches: Iterator[data.Batch]) -> tuple[float, list[float]]:
    """The loss in nats, and the generalists' mean gate in each layer. Raises Diverged."""
    loss, gates = evaluate(user.model, batches, user.gates)  # gates: (L, E)
    check_loss(settings, user, loss)
    generalist = [role == GENERALIST for role in user.model.config.expert_roles]
    return loss, gates[:, generalist].sum(1).tolist()


def check_loss(settings: Settings, user: User, loss: float) -> None:
    """Raises Diverged."""
    if not loss < DIVERGED:
        flag = f"`dp_noise` {settings.dp_noise}" if settings.dp_noise else f"`lr` {settings.lr}"
        raise Diverged(f"{flag}: the loss of user {user.name} has grown to {loss:.3g}; take a smaller one")


def untrained(settings: Settings, start: Base, user: User, text: Text) -> float:
    """The loss in nats on test text before the first round. Low-rank changes are none at all then, so that it is the
    base's, the same in every run: it is computed once, and kept."""
    config, batches = user.model.config, whole(settings, text.test)
    if config.expert != "lora":
        return evaluate(user.model, batches, user.gates)[0]
    first = torch.eye(config.n_experts)[:1].expand(config.n_layer, -1)  # the gates of no mixture
    key = start.sha256, start.config, sha256(text.test).hexdigest(), torch.__version__
    return kept(Path(settings.cache), key, lambda: evaluate(user.model, batches, first)[0])


def line_of(settings: Settings, number: int, user: User, text: Text, train_loss: float | None) -> dict:
    """A user's line in metrics.jsonl after a round, with a glance at its validation text."""
    loss, share = measure(settings, user, glance(settings, text.valid))
    return {"round": number, "user": text.name, "train_loss": train_loss, "valid_loss": loss,
            "generalist_share": share, "bytes_up": user.bytes_up, "bytes_down": user.bytes_down}


def row_of(settings: Settings, user: User, text: Text, before: float) -> dict:
    """A user's row in result.json; its text is read whole. before: the loss on test text at the start."""
    config = user.model.config
    (valid, _), (loss, share) = (measure(settings, user, whole(settings, tokens)) for tokens in (text.valid, text.test))
    return {"name": text.name, "generalists": config.generalists, "specialists": config.specialists,
            "train_bytes": text.train_bytes, "train_tokens": len(text.train),
            "parameters": {role: sum(p.numel() for p in user.model.having(role).values()) for role in ROLES},
            "valid_ppl": math.exp(valid), "test_ppl_start": math.exp(before), "test_ppl": math.exp(loss),
            "test_bpb": loss * (len(text.test) - 1) / math.log(2) / text.test_bytes,
            "trigram_ppl": math.exp(trigram_loss(text.train, text.test, config.vocab_size)), "generalist_share": share}


def counts_of(user: User) -> dict:
    """What a user has learned from and exchanged in all."""
    return {"tokens_seen": sum(level.steps * level.batches.tokens_per_batch for level in user.levels),
            "bytes_up": user.bytes_up, "bytes_down": user.bytes_down}


def result_of(settings: Settings, rows: list[dict], counts: list[dict], refused: int, seconds: float) -> dict:
    """What result.json holds."""
    return {"method": settings.method, "seed": settings.seed, "seconds": round(seconds, 1), "rounds": settings.rounds,
            **{name: sum(user[name] for user in counts) for name in counts[0]}, "refused": refused,
            **{f"mean_{name}": sum(row[name] for row in rows) / len(rows)
               for name in ("valid_ppl", "test_ppl", "test_bpb")}, "users": rows}


def table(result: dict, path: Path) -> str:
    """The result as a person reads it."""
    lines = [f"{'user':<14}{'experts':>9}{'parameters':>12}{'train kB':>10}{'test perplexity':>20}{'trigram':>9}"
             f"{'bits/byte':>11}{'to generalists':>16}"]
    for user in result["users"]:
        share = f"{sum(user['generalist_share']) / len(user['generalist_share']):.0%}"
        lines.append(
            f"{user['name']:<14}{user['generalists']:>5}G {user['specialists']}S{sum(user['parameters'].values()):>12,}"
            f"{user['train_bytes'] / 1000:>10.0f}{user['test_ppl_start']:>10.1f} → {user['test_ppl']:<7.2f}"
            f"{user['trigram_ppl']:>9.2f}{user['test_bpb']:>11.3f}"
            f"{share if METHODS[result['method']].routed else '–':>15}")
    lines.append(f"{'mean':<45}{'':>13}{result['mean_test_ppl']:<7.2f}{'':>9}{result['mean_test_bpb']:>11.3f}")
    lines.append(f"{result['method']}, seed {result['seed']}: {result['rounds']} rounds in {result['seconds']:.0f} s; "
                 f"users sent {result['bytes_up'] / 1e6:.1f} MB and received {result['bytes_down'] / 1e6:.1f} MB; "
                 f"everything is in {path}")
    if "privacy" in result:
        lines.append(sentence(result["privacy"]))
    return "\n".join(lines)
