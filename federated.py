"""The federation: users who learn, and a server that averages what they have in common.

Between a user and the server there is one kind of message, a dictionary of generalist tensors by name. Text, batches,
specialists, routers, gradients and optimizers stay in the `User`. (Where the average is weighted, the server knows
each user's weight, too.)

    python -m pytest tests/test_federated.py
"""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from bilevel import Alternation, Batch, Level, alternate
from model import GENERALIST, GPT

Message = dict[str, Tensor]  # generalist tensors by name
LARGEST = 1e30  # a number that an answer may hold, so that sums stay finite


def size_of(message: Message) -> int:
    """Bytes on the wire."""
    return sum(tensor.nbytes for tensor in message.values())


class User:
    """A device: its model, its two levels (which hold its text), and a count of the bytes that left and reached it.

    `judge` gives a few batches of its validation text, for methods that need a device's opinion of a model.
    """

    def __init__(self, name: str, model: GPT, lower: Level, upper: Level | None, weight: float = 1.0,
                 judge: Callable[[], Iterator[Batch]] | None = None):
        self.name, self.model, self.lower, self.upper, self.judge = name, model, lower, upper, judge
        self.weight = weight  # in the server's average
        self.version = -1  # of the generalists it holds
        self.bytes_up = self.bytes_down = 0

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

    def learn(self, plan: Alternation) -> float:
        """A round's local work. Returns the mean training loss, in nats."""
        return alternate(self.model, self.lower, self.upper, plan).item()

    def answer(self) -> Message:
        """What leaves the device."""
        message = {name: parameter.detach().clone() for name, parameter in self.model.having(GENERALIST).items()}
        self.bytes_up += size_of(message)
        return message

    def settle(self) -> None:
        """What a method does on the device once a model is to be used: nothing, here."""


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


def fault(answer: Message, wanted: dict[str, torch.Size], held: Message) -> str | None:
    """Why an answer can't be averaged, if it isn't finite tensors of the names, shapes and types that are wanted."""
    if not isinstance(answer, dict) or answer.keys() != wanted.keys():
        return "not the tensors that are wanted"
    for name, tensor in answer.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != held[name].dtype:
            return f"{name} isn't {held[name].dtype}"
        if tensor.shape != wanted[name]:
            return f"{name} has shape {tuple(tensor.shape)}, not {tuple(wanted[name])}"
        if not (tensor.abs() < LARGEST).all():
            return f"{name} isn't finite, or beyond {LARGEST:.0e}"
    return None


def clip(answer: Message, held: Message, bound: float) -> Message:
    """The update Δ_i = θ_i^G − θ^G, made shorter where it is longer than the bound: θ^G + Δ_i · min(1, C / ‖Δ_i‖)."""
    norm = sum((tensor - held[name]).square().sum() for name, tensor in answer.items()) ** 0.5
    return {name: torch.lerp(held[name], tensor, min(1.0, bound / max(norm.item(), 1e-12)))
            for name, tensor in answer.items()}


class Server:
    """Holds θ^G, and how often it was averaged.

    bound: C, of an update's norm, if there is one. noise: z; with a bound, every number of the average gets noise from
    N(0, (z·C/n)²), n being the answers in it (DP-FedAvg, McMahan et al. 2018, for equal weights).
    """

    def __init__(self, generalists: Message, bound: float | None = None, noise: float = 0.0,
                 generator: torch.Generator | None = None):
        self.generalists = {name: tensor.detach().clone() for name, tensor in generalists.items()}
        self.bound, self.noise, self.generator = bound, noise, generator
        self.version = 0
        self.refused: list[tuple[str, str]] = []  # users, and what was wrong with their answers

    def state(self) -> dict:
        return {"generalists": self.generalists, "version": self.version, "refused": self.refused,
                "generator": self.generator and self.generator.get_state()}

    def load(self, state: dict) -> None:
        self.generalists, self.version, self.refused = (state[name] for name in ("generalists", "version", "refused"))
        if self.generator:
            self.generator.set_state(state["generator"].cpu())

    def merge(self, answers: list[Message], weights: list[float]) -> Message:
        """What becomes of the users' answers."""
        return average(answers, weights)

    def cut(self, shapes: dict[str, torch.Size]) -> Message:
        """What of θ^G goes to a user who has a place for tensors of these names and shapes."""
        return {name: self.generalists[name] for name in shapes}

    def deliver(self, user: User) -> None:
        """Send a user its part of θ^G, unless the user holds it already."""
        if user.version < self.version:
            user.receive(self.cut(user.shared))
            user.version = self.version

    def sound(self, answers: list[tuple[User, Message]]) -> tuple[list[Message], list[float]]:
        """The answers that can be averaged, within the bound, and their weights."""
        sound, weights = [], []
        for user, answer in answers:
            if reason := fault(answer, user.shared, self.generalists):
                self.refused.append((user.name, reason))
            else:
                sound.append(clip(answer, self.generalists, self.bound) if self.bound else answer)
                weights.append(user.weight)
        return sound, weights

    def combine(self, answers: list[tuple[User, Message]]) -> None:
        """θ^G ← mean of θ_i^G, over the answers that are sound; if there is none, it stays."""
        sound, weights = self.sound(answers)
        if sound:
            self.generalists |= self.merge(sound, weights)
        self.finish(len(sound))

    def finish(self, number: int) -> None:
        """What follows an average of so many answers."""
        if number:
            self.version += 1
            if self.bound and self.noise:
                self.blur(self.noise * self.bound / number)

    def blur(self, spread: float) -> None:
        """θ^G ← θ^G + N(0, spread²)."""
        for name, tensor in self.generalists.items():
            noise = torch.randn(tensor.shape, generator=self.generator).to(tensor)
            self.generalists[name] = tensor + spread * noise


def federated_round(server: Server, called: list[User], plan: Alternation,
                    lost: Collection[User] = ()) -> Iterator[tuple[User, float]]:
    """One round. Yields each user and its mean training loss when it is done; averages when asked for one more.

    lost: the users who vanish before they answer.
    """
    answers = []
    for user in called:
        server.deliver(user)  # 1. θ_i^G ← θ^G
        loss = user.learn(plan)  # 2. both levels, on the device
        user.version = -1  # what it holds now is θ_i^G, its own
        if user not in lost:
            answers.append((user, user.answer()))  # 3. only θ_i^G leaves it
        yield user, loss
    server.combine(answers)  # 4. θ^G ← mean of θ_i^G
