"""A guard around the server: it refuses broken uploads, clips updates and adds noise.

server = Guard(Server(generalists), bound=1.0, noise=0.5, generator=torch.Generator())
"""

import secrets

import numpy as np
import torch
from torch import Tensor

from federated import Message, Server, User

LARGEST = 1e30  # the largest number that an upload may contain, so that sums stay finite


def check_upload(upload: Message, shapes: dict[str, torch.Size], held: Message) -> str | None:
    """Why an upload can't be averaged, or None if it can.

    shapes: the names and shapes of the user's generalists. held: the server's generalists.
    """
    if not isinstance(upload, dict) or upload.keys() != shapes.keys():
        return "not the tensors that the server expects"
    for name, tensor in upload.items():
        problem = check_tensor(tensor, shapes[name], held[name].dtype)
        if problem:
            return f"{name} {problem}"
    return None


def check_tensor(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> str | None:
    """Why a tensor can't be averaged, or None if it can."""
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        return f"isn't {dtype}"
    if tensor.shape != shape:
        return f"has shape {tuple(tensor.shape)}, not {tuple(shape)}"
    if not (tensor.abs() < LARGEST).all():  # also for NaN
        return f"isn't finite, or beyond {LARGEST:.0e}"
    return None


def clip(upload: Message, held: Message, bound: float) -> Message:
    """θ^G + Δ_i · min(1, C / ‖Δ_i‖), for the update Δ_i = θ_i^G − θ^G and the bound C."""
    squares = 0
    for name, tensor in upload.items():
        squares = squares + (tensor - held[name]).square().sum()
    norm = (squares**0.5).item()
    factor = min(1.0, bound / max(norm, 1e-12))
    return {name: torch.lerp(held[name], tensor, factor) for name, tensor in upload.items()}


def system_normal(shape: torch.Size) -> Tensor:
    """Samples of N(0, 1) from the operating system's randomness, which can't be reproduced.

    √2 · erf⁻¹(2u − 1), where u is uniform on (0, 1) and has 52 random bits.
    """
    bits = np.frombuffer(secrets.token_bytes(8 * shape.numel()), np.uint64) >> 12
    uniform = torch.from_numpy((bits + 0.5) / 2**51 - 1)  # on (−1, 1)
    return 2**0.5 * torch.erfinv(uniform).view(shape)


class Guard:
    """A server behind a guard.

    bound: C, the maximum norm of an update (None: updates aren't clipped).
    noise: z. With a bound, each number of an average of n uploads gets noise from N(0, (z·C/n)²),
        as in DP-FedAvg with equal weights (McMahan et al. 2018).
    generator: draws the noise (None: the operating system's randomness).
    """

    def __init__(
        self,
        server: Server,
        bound: float | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        self.server = server
        self.bound = bound
        self.noise = noise
        self.generator = generator
        self.refused: list[tuple[str, str]] = []  # users, and why their uploads were refused

    @property
    def generalists(self) -> Message:
        return self.server.generalists

    def broadcast(self, shapes: dict[str, torch.Size]) -> Message:
        return self.server.broadcast(shapes)

    def aggregate(self, uploads: dict[User, Message]) -> int:
        """Average the valid uploads. Returns their number."""
        accepted = {}
        for user, upload in uploads.items():
            problem = check_upload(upload, user.shared, self.generalists)
            if problem:
                self.refused.append((user.name, problem))
            elif self.bound:
                accepted[user] = clip(upload, self.generalists, self.bound)
            else:
                accepted[user] = upload
        count = self.server.aggregate(accepted)
        if count and self.bound and self.noise:
            self.add_noise(self.noise * self.bound / count)
        return count

    def add_noise(self, deviation: float) -> None:
        """θ^G ← θ^G + N(0, deviation²)."""
        for name, tensor in self.generalists.items():
            if self.generator:
                normal = torch.randn(tensor.shape, generator=self.generator)
            else:
                normal = system_normal(tensor.shape)
            self.generalists[name] = tensor + deviation * normal.to(tensor)

    def state(self) -> dict:
        """The state of the server and the refused uploads."""
        return {
            "generalists": self.generalists,
            "memory": self.server.memory,
            "refused": self.refused,
            "generator": self.generator.get_state() if self.generator else None,
        }

    def load(self, state: dict) -> None:
        self.server.generalists = state["generalists"]
        self.server.memory = state["memory"]
        self.refused = state["refused"]
        if self.generator:
            self.generator.set_state(state["generator"].cpu())
