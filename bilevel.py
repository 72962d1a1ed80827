"""The two levels and their alternation, for one user.

    upper level    min over φ                L(X_valid; Θ*, φ)    the router, on text from the target distribution
    lower level    Θ* in argmin over Θ       L(X_train; Θ, φ)     everything else that learns, on the user's own text

The generalists in Θ are common to all users, and their lower level is the sum of the users' losses: the average that
the server takes after each round (federated.py) stands for that.

A level owns its parameters, its stream of batches and its optimizer. Its step differentiates with respect to its own
parameters only, so no gradient of one level ever reaches the other.

    python -m pytest tests/test_bilevel.py
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from model import GPT, dense_gates

Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) token numbers each


def cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """The experts' schedule, as a factor: linear up over `warmup` steps, a cosine down to a tenth at `steps`."""
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
    return factor


def constant(step: int) -> float:
    """The routers' schedule."""
    return 1.0


class Level:
    """One level: the parameters it moves, the batches it learns from, its AdamW and its learning-rate schedule.

    hyper: the method's hyper-parameters, by name. memory: what a method remembers here, tensors and numbers by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], batches: Iterator[Batch], lr: float,
                 weight_decay: float = 0.0, schedule: Callable[[int], float] = constant,
                 hyper: dict[str, float] | None = None):
        self.parameters = list(parameters.values())
        self.batches, self.hyper, self.memory = batches, hyper or {}, {}
        self.optimizer = torch.optim.AdamW(self.parameters, lr, (0.9, 0.95), weight_decay=weight_decay, fused=True)
        self.schedule = LambdaLR(self.optimizer, schedule)

    @property
    def steps(self) -> int:
        """Steps taken in the user's life."""
        return self.schedule.last_epoch

    def step(self, model: GPT) -> Tensor:
        """Take one step down the loss on this level's next batch. Returns that loss as it was before, in nats."""
        loss, extra = self.losses(model, *next(self.batches))
        self.differentiate(loss + extra)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()

    def losses(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | float]:
        """The loss, and what a method adds to it (methods.py), which is descended but never reported."""
        _, loss = model(idx, targets)
        return loss, 0.0

    def differentiate(self, loss: Tensor) -> None:
        loss.backward(inputs=self.parameters)  # of this level only: nothing lands in the other's .grad

    def state(self) -> dict:
        """Everything that the next steps depend on, besides the parameters."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                "batches": self.batches.state(), "memory": self.memory}

    def load(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load(state["batches"])
        self.memory = state["memory"]


@dataclass(frozen=True)
class Rhythm:
    """When each level takes its steps."""

    local_steps: int  # expert steps in a round
    router_every: int  # expert steps between two visits to the upper level, counted over the user's life
    router_steps: int  # router steps in such a visit


def alternate(model: GPT, lower: Level, upper: Level | None, rhythm: Rhythm) -> Tensor:
    """One user's work in one round (alternating minimisation). Returns the mean training loss, in nats.

    `upper` is None for methods without a router to teach.
    """
    losses = []
    for _ in range(rhythm.local_steps):
        losses.append(lower.step(model))  # 1. Θ ← Θ − η ∇_Θ L(X_train; Θ, φ)
        if upper and lower.steps % rhythm.router_every == 0:
            for _ in range(rhythm.router_steps):
                upper.step(model)  # 2. φ ← φ − η' ∇_φ L(X_valid; Θ, φ)
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(model: GPT, batches: Iterator[Batch], gates: Tensor | None = None) -> tuple[float, Tensor]:
    """Mean cross-entropy over all targets, in nats, and the mean gate of each expert in each layer, (L, E).

    gates (L, E): weights that stand in for the routers'.
    """
    loss, sums, count = 0.0, 0.0, 0
    for idx, targets in batches:
        hidden, routings = model.trunk(idx, gates)
        loss += model.loss(hidden, targets).item() * targets.numel()
        sums += torch.stack([dense_gates(routing, model.config.n_experts).sum(0) for routing in routings])
        count += targets.numel()
    return loss / count, sums / count
