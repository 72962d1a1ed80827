"""The two levels and their alternation, for one user.

The problem of the paper is bi-level:

    upper level    min over φ_i          L(X_i^valid; Θ*, φ_i)                    the router
    lower level    Θ* = argmin over Θ    Σ_i L(X_i^train; θ^G, θ_i^S, φ_i)        the experts

`alternate` approximates it, in three ways:

- Θ* is not the argmin. A few steps on Θ are followed by a few steps on φ, and so on.
- The router's gradient holds Θ fixed. The dependence of Θ* on φ (the hypergradient) is dropped, so
  what remains is alternating minimization of two losses. At its fixed points each level is at a
  minimum given the other. They need not solve the bi-level problem.
- θ^G is common to all users, and the sum over users is replaced by averaging (federated.py).

A "step" on either level is an AdamW step. Its moments stay on the device, even when the server's
average replaces the parameters.

A level owns its parameters, its stream of batches and its optimizer. Its step differentiates with
respect to its own parameters only, so no gradient of one level ever reaches the other.

    python -m pytest tests/test_bilevel.py
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from model import GPT, Routing

Batch = tuple[Tensor, Tensor]  # inputs and, one token later, targets: (B, T) token numbers each


def cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """The experts' learning rate as a factor of its highest value.

    It rises linearly for `warmup` steps, then falls along a cosine to a tenth at `steps`.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2

    return factor


def constant(step: int) -> float:
    """The routers' learning rate as a factor."""
    return 1.0


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but neither to biases, norms nor embeddings.

    A head that is also the token embedding counts as an embedding, an lm_head of its own doesn't.
    """
    return parameter.dim() > 1 and not name.endswith("embedding.weight")


class Level:
    """One level: its parameters, the batches that train them, AdamW and a learning-rate schedule.

    parameters: by name. weight_decay: for the parameters that `decays` selects.
    hyper: the method's hyper-parameters, by name.
    memory: a method's state between steps, by name. Checkpoints save it.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        batches: Iterator[Batch],
        lr: float,
        weight_decay: float = 0.0,
        schedule: Callable[[int], float] = constant,
        hyper: dict[str, float] | None = None,
    ):
        self.parameters = list(parameters.values())
        self.batches = batches
        self.hyper = hyper or {}
        self.memory = {}
        decayed = [p for name, p in parameters.items() if decays(name, p)]
        others = [p for name, p in parameters.items() if not decays(name, p)]
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)
        self.schedule = LambdaLR(self.optimizer, schedule)

    @property
    def steps(self) -> int:
        """Steps so far, over all rounds."""
        return self.schedule.last_epoch

    def step(self, model: GPT) -> Tensor:
        """Take one step on this level's next batch. Returns the loss before the step, in nats."""
        idx, targets = next(self.batches)
        loss, objective = self.objective(model, idx, targets)
        self.differentiate(objective)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()

    def objective(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, which is reported, and the objective, which is minimized.

        A method may add terms to the objective.
        """
        _, loss = model(idx, targets)
        return loss, loss

    def differentiate(self, objective: Tensor) -> None:
        """Compute gradients. `inputs` restricts them to the parameters of this level."""
        objective.backward(inputs=self.parameters)

    def state(self) -> dict:
        """The state of the level, without its parameters."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state(),
            "memory": self.memory,
        }

    def load(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load(state["batches"])
        self.memory = state["memory"]


@dataclass(frozen=True)
class Rhythm:
    """When each level takes its steps."""

    local_steps: int  # expert steps in a round
    router_every: int  # expert steps between two turns of the router, counted over all rounds
    router_steps: int  # router steps in a turn


def alternate(model: GPT, lower: Level, upper: Level | None, rhythm: Rhythm) -> Tensor:
    """One user's local steps in a round, by alternating minimization.

    Returns the mean training loss, in nats. upper: None if the method doesn't train a router.
    """
    losses = []
    for _ in range(rhythm.local_steps):
        loss = lower.step(model)  # Θ_i ← Θ_i − η ∇_Θ L(X_i^train; Θ_i, φ_i)
        losses.append(loss)
        if upper is not None and lower.steps % rhythm.router_every == 0:
            for _ in range(rhythm.router_steps):
                upper.step(model)  # φ_i ← φ_i − η' ∇_φ L(X_i^valid; Θ_i, φ_i)
    return torch.stack(losses).mean()


def dense_gates(routing: Routing, E: int) -> Tensor:
    """The weight of every expert for every token, 0 for an expert that isn't selected: (N, E).

    gates [[.7, .3]], selected [[2, 0]], E = 3 -> [[.3, 0, .7]]
    """
    zeros = routing.gates.new_zeros(len(routing.gates), E)
    return zeros.scatter(1, routing.selected, routing.gates)


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterator[Batch], fixed_gates: Tensor | None = None
) -> tuple[float, Tensor]:
    """Mean cross-entropy over all targets, in nats, and the mean gate of every expert, (L, E).

    fixed_gates (L, E): gates for every token, which replace the routers'.
    """
    total_loss, total_gates, count = 0.0, 0.0, 0
    for idx, targets in batches:
        hidden, routings = model.trunk(idx, fixed_gates)
        total_loss += model.loss(hidden, targets).item() * targets.numel()
        gates = [dense_gates(routing, model.config.n_experts) for routing in routings]  # L × (N, E)
        total_gates += torch.stack([layer.sum(0) for layer in gates])  # (L, E)
        count += targets.numel()
    return total_loss / count, total_gates / count
