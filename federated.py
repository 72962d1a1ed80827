"""The federation: users who learn, and a server that averages what they have in common.

Between a user and the server there is one kind of message, a dictionary of generalist tensors by name. Text, batches,
specialists, routers, gradients and optimizers stay in the `User`. (Where the average is weighted, the server knows
each user's weight, too.)

    python -m pytest tests/test_federated.py
"""

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor

from bilevel import Batch, Level, Rhythm, alternate
from model import GENERALIST, GPT

Message = dict[str, Tensor]  # generalist tensors by name


def size_of(message: Message) -> int:
    """Bytes on the wire."""
    return sum(tensor.nbytes for tensor in message.values())


class User:
    """A device: its model, its two levels (which hold its text), and a count of the bytes that left and reached it.

    weight: in the server's average. judge: gives some of the user's validation text, for methods that need a
    device's opinion of a model. gates (L, E): what the model is used with instead of its routers' gates, if a method
    says so. hyper: the method's hyper-parameters, by name. memory: what a method remembers on the device, tensors and
    numbers by name.
    """

    def __init__(self, name: str, model: GPT, lower: Level, upper: Level | None, weight: float = 1.0,
                 judge: Callable[[], Iterator[Batch]] | None = None, hyper: dict[str, float] | None = None):
        self.name, self.model, self.lower, self.upper = name, model, lower, upper
        self.weight, self.judge, self.gates, self.hyper, self.memory = weight, judge, None, hyper or {}, {}
        self.bytes_up = self.bytes_down = 0

    @property
    def levels(self) -> list[Level]:
        return [level for level in (self.lower, self.upper) if level]

    @property
    def shared(self) -> dict[str, torch.Size]:
        """The names and shapes of this user's generalist tensors."""
        return {name: parameter.shape for name, parameter in self.model.having(GENERALIST).items()}

    def receive(self, message: Message) -> None:
        """What reaches the device."""
        self.bytes_down += size_of(message)
        self.adopt(message)

    @torch.no_grad()
    def adopt(self, message: Message) -> None:
        """θ_i^G ← θ^G."""
        for name, parameter in self.model.having(GENERALIST).items():
            parameter.copy_(message[name])

    def learn(self, rhythm: Rhythm) -> float:
        """A round's local work. Returns the mean training loss, in nats."""
        return alternate(self.model, self.lower, self.upper, rhythm).item()

    def answer(self) -> Message:
        """What leaves the device."""
        message = {name: parameter.detach().clone() for name, parameter in self.model.having(GENERALIST).items()}
        self.bytes_up += size_of(message)
        return message

    def settle(self) -> None:
        """What a method does on the device before a model is used: nothing, here."""


def average(answers: list[Message], weights: list[float]) -> Message:
    """θ^G = Σ_i w_i θ_i^G / Σ_i w_i, each tensor over the users who have it.

    average([{"a": 1, "b": 5}, {"a": 3}], [1, 1]) -> {"a": 2, "b": 5}
    """
    names = dict.fromkeys(name for answer in answers for name in answer)
    means = {}
    for name in names:
        held = [(answer[name], weight) for answer, weight in zip(answers, weights, strict=True) if name in answer]
        means[name] = sum(tensor * weight for tensor, weight in held) / sum(weight for _, weight in held)
    return means


class Server:
    """Holds θ^G. (In a run, support/server/guard.py stands at its door and refuses answers that can't be averaged.)

    hyper, memory: as a user's. bounded: whether an answer is a change of what was given, whose norm can be bounded.
    """

    bounded = True

    def __init__(self, generalists: Message, hyper: dict[str, float] | None = None):
        self.generalists = {name: tensor.detach().clone() for name, tensor in generalists.items()}
        self.hyper, self.memory = hyper or {}, {}

    def give(self, shapes: dict[str, torch.Size]) -> Message:
        """What goes to a user who has generalists of these names and shapes."""
        return {name: self.generalists[name] for name in shapes}

    def take(self, answers: dict[User, Message]) -> int:
        """θ^G ← mean of θ_i^G; where nobody answers, it stays. Returns how many answers are in the mean."""
        if answers:
            self.generalists |= self.merge(list(answers.values()), [user.weight for user in answers])
        return len(answers)

    def merge(self, answers: list[Message], weights: list[float]) -> Message:
        """What becomes of the users' answers."""
        return average(answers, weights)


def federated_round(server: Server, users: Iterable[User], rhythm: Rhythm,
                    lost: Collection[User] = ()) -> dict[User, float]:
    """One round with the users who are called. Returns each user's mean training loss, in nats.

    lost: those of them who vanish before they answer.
    """
    losses, answers = {}, {}
    for user in users:
        user.receive(server.give(user.shared))  # 1. θ_i^G ← θ^G
        losses[user] = user.learn(rhythm)  # 2. both levels, on the device
        if user not in lost:
            answers[user] = user.answer()  # 3. θ_i^G, and nothing else, leaves it
    server.take(answers)  # 4. θ^G ← Σ w_i θ_i^G / Σ w_i
    return losses
