"""The federation: users who train, and a server that averages their generalists.

One kind of message passes between a user and the server: a dictionary of generalist tensors by
name. Text, batches, specialists, routers, gradients and optimizer states stay in `User`. (If the
average is weighted by tokens, the server also knows each user's weight.)

    python -m pytest tests/test_federated.py
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from bilevel import Level, Rhythm, alternate
from model import GENERALIST, GPT

Message = dict[str, Tensor]  # generalist tensors by name


def size_of(message: Message) -> int:
    """The size of a message, in bytes."""
    return sum(tensor.nbytes for tensor in message.values())


class User:
    """A device: its model, its two levels with its text, and counts of the bytes it exchanged.

    weight: the user's weight in the server's average. hyper, memory: as in bilevel.Level.
    """

    fixed_gates: Tensor | None = None  # (L, E), which replace the router's; a method may set them

    def __init__(
        self,
        name: str,
        model: GPT,
        lower: Level,
        upper: Level | None,
        weight: float = 1.0,
        hyper: dict[str, float] | None = None,
    ):
        self.name = name
        self.model = model
        self.lower = lower
        self.upper = upper
        self.weight = weight
        self.hyper = hyper or {}
        self.memory = {}
        self.bytes_up = 0
        self.bytes_down = 0

    @property
    def levels(self) -> list[Level]:
        """The levels that this user trains."""
        return [self.lower] if self.upper is None else [self.lower, self.upper]

    @property
    def shared(self) -> dict[str, torch.Size]:
        """The names and shapes of this user's generalist tensors."""
        return {name: parameter.shape for name, parameter in self.model.having(GENERALIST).items()}

    def download(self, message: Message) -> None:
        """Receive the server's generalists."""
        self.bytes_down += size_of(message)
        self.set_generalists(message)

    @torch.no_grad()
    def set_generalists(self, message: Message) -> None:
        """θ_i^G ← θ^G."""
        for name, parameter in self.model.having(GENERALIST).items():
            parameter.copy_(message[name])

    def local_update(self, rhythm: Rhythm) -> float:
        """Train both levels for a round. Returns the mean training loss, in nats."""
        return alternate(self.model, self.lower, self.upper, rhythm).item()

    def upload(self) -> Message:
        """θ_i^G. Nothing else of the model leaves the device."""
        message = self.copy_generalists()
        self.bytes_up += size_of(message)
        return message

    def copy_generalists(self) -> Message:
        """θ_i^G, copied."""
        generalists = self.model.having(GENERALIST)
        return {name: parameter.detach().clone() for name, parameter in generalists.items()}

    def before_evaluation(self) -> None:
        """Prepare the model for evaluation. Methods may override this."""


def average(messages: list[Message], weights: list[float]) -> Message:
    """θ^G = Σ_i w_i θ_i^G / Σ_i w_i, each tensor over the users who have it.

    average([{"a": 1, "b": 5}, {"a": 3}], [1, 1]) -> {"a": 2, "b": 5}

    LoRA factors are averaged like all other tensors, as in the paper. The mean of factors isn't the
    mean of their products: mean(B) · mean(A) ≠ mean(B A).
    """
    names = dict.fromkeys(name for message in messages for name in message)
    means = {}
    for name in names:
        total, total_weight = 0, 0
        for message, weight in zip(messages, weights, strict=True):
            if name in message:
                total = total + message[name] * weight
                total_weight += weight
        means[name] = total / total_weight
    return means


class Server:
    """Holds θ^G. In a run, support/server/guard.py checks every message before it gets here.

    hyper, memory: as in bilevel.Level.
    """

    def __init__(self, generalists: Message, hyper: dict[str, float] | None = None):
        self.generalists = {name: tensor.detach().clone() for name, tensor in generalists.items()}
        self.hyper = hyper or {}
        self.memory = {}

    def broadcast(self, shapes: dict[str, torch.Size]) -> Message:
        """The generalists for a user whose tensors have these names and shapes."""
        return {name: self.generalists[name] for name in shapes}

    def aggregate(self, uploads: dict[User, Message]) -> int:
        """θ^G ← the average of the uploads, if there are any. Returns their number."""
        if uploads:
            weights = [user.weight for user in uploads]
            self.generalists |= self.merge(list(uploads.values()), weights)
        return len(uploads)

    def merge(self, messages: list[Message], weights: list[float]) -> Message:
        """Merge the users' messages into one. Methods may override this."""
        return average(messages, weights)


def federated_round(
    server: Server, users: Iterable[User], rhythm: Rhythm, dropped: Collection[User] = ()
) -> dict[User, float]:
    """One round with the selected users. Returns each user's mean training loss, in nats.

    dropped: those of the users who disappear before they upload.
    """
    losses, uploads = {}, {}
    for user in users:
        user.download(server.broadcast(user.shared))  # 1. θ_i^G ← θ^G
        losses[user] = user.local_update(rhythm)  # 2. both levels, on the device
        if user not in dropped:
            uploads[user] = user.upload()  # 3. θ_i^G, and nothing else
    server.aggregate(uploads)  # 4. θ^G ← Σ w_i θ_i^G / Σ w_i
    return losses
