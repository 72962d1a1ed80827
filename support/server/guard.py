"""Between the users and the server: answers that can't be averaged are refused, long updates are clipped, the average
gets noise.

    server = Guard(Server(generalists), bound=1.0, noise=0.5, generator=torch.Generator())
"""

import secrets

import numpy as np
import torch
from torch import Tensor

from federated import Message, Server, User

LARGEST = 1e30  # a number that an answer may hold, so that sums stay finite


def fault(answer: Message, wanted: dict[str, torch.Size], held: Message) -> str | None:
    """Why an answer can't be averaged, unless it is finite tensors of the names, shapes and types that are wanted."""
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


def secret_normal(shape: torch.Size) -> Tensor:
    """Numbers from N(0, 1), from the operating system: √2 · erf⁻¹(2u − 1), with u from (0, 1), of 52 bits."""
    bits = np.frombuffer(secrets.token_bytes(8 * shape.numel()), np.uint64) >> 12
    return 2 ** 0.5 * torch.erfinv(torch.from_numpy((bits + 0.5) / 2 ** 51 - 1)).view(shape)


class Guard:
    """A server behind a guard.

    bound: C, of an update's norm, if there is one. noise: z; with a bound, every number of an average of n answers gets
    noise from N(0, (z·C/n)²) (DP-FedAvg, McMahan et al. 2018, for equal weights). It is drawn by the generator; without
    one, from the operating system, so that nobody can draw it again.
    """

    def __init__(self, server: Server, bound: float | None = None, noise: float = 0.0,
                 generator: torch.Generator | None = None):
        self.server, self.bound, self.noise, self.generator = server, bound, noise, generator
        self.refused: list[tuple[str, str]] = []  # users, and what was wrong with their answers

    @property
    def generalists(self) -> Message:
        return self.server.generalists

    def give(self, shapes: dict[str, torch.Size]) -> Message:
        return self.server.give(shapes)

    def take(self, answers: dict[User, Message]) -> int:
        sound = {}
        for user, answer in answers.items():
            if reason := fault(answer, user.shared, self.generalists):
                self.refused.append((user.name, reason))
            else:
                sound[user] = clip(answer, self.generalists, self.bound) if self.bound else answer
        n = self.server.take(sound)
        if n and self.bound and self.noise:
            self.blur(self.noise * self.bound / n)
        return n

    def blur(self, spread: float) -> None:
        """θ^G ← θ^G + N(0, spread²)."""
        for name, tensor in self.generalists.items():
            normal = (torch.randn(tensor.shape, generator=self.generator) if self.generator
                      else secret_normal(tensor.shape))
            self.generalists[name] = tensor + spread * normal.to(tensor)

    def state(self) -> dict:
        """Everything that the next rounds depend on, and who was refused."""
        return {"generalists": self.generalists, "memory": self.server.memory, "refused": self.refused,
                "generator": self.generator and self.generator.get_state()}

    def load(self, state: dict) -> None:
        self.server.generalists, self.server.memory = state["generalists"], state["memory"]
        self.refused = state["refused"]
        if self.generator:
            self.generator.set_state(state["generator"].cpu())
