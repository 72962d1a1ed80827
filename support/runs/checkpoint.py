"""Checkpoints, from which a run continues bit for bit. They load with weights_only=True."""

import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import Level
from federated import User
from model import GPT
from support.errors import BadInput
from support.files import write
from support.runs.command_line import OUT_OF_MEMORY

FORMAT = 7  # of checkpoints


class TrainedUser(NamedTuple):
    """A user of a checkpoint: its model, and the gates that replace its routers', if any."""

    name: str
    model: GPT
    fixed_gates: Tensor | None


def user_state(user: User) -> dict:
    """Everything that a user's next steps depend on, without the weights that come from a base."""
    parameters = user.model.parameters_to_save()
    gradients = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    return {
        "name": user.name,
        "config": asdict(user.model.config),
        "parameters": {name: parameter.data for name, parameter in parameters.items()},
        "gradients": gradients,  # only comigs-leaky has any between two rounds
        "lower": user.lower.state(),
        "upper": None if user.upper is None else user.upper.state(),
        "fixed_gates": user.fixed_gates,
        "memory": user.memory,
        "bytes_up": user.bytes_up,
        "bytes_down": user.bytes_down,
    }


def restore_model(model: GPT, state: dict) -> None:
    """Set a model's parameters to those of a user's state."""
    for name, parameter in model.parameters_to_save().items():
        parameter.data = state["parameters"][name].data  # .data: hetlora may have cut its shape


def restore_level(level: Level | None, state: dict | None) -> None:
    if level is not None:
        level.load(state)


def restore_user(user: User, state: dict) -> None:
    """Restore a user from a state."""
    restore_model(user.model, state)
    for name, parameter in user.model.parameters_to_save().items():
        parameter.grad = state["gradients"].get(name)
    restore_level(user.lower, state["lower"])
    restore_level(user.upper, state["upper"])
    user.fixed_gates = state["fixed_gates"]
    user.memory = state["memory"]
    user.bytes_up = state["bytes_up"]
    user.bytes_down = state["bytes_down"]


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write checkpoint.pt. The old one is kept until the new one is complete."""
    write(folder / "checkpoint.pt", lambda path: torch.save({"format": FORMAT, **state}, path))


def load_checkpoint(folder: Path, device: str = "cpu") -> dict | None:
    """The state in checkpoint.pt; None if there is no such file. Raises BadInput."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load doesn't compare checksums
        if broken is not None:
            raise damaged(path, f"wrong checksum of {broken}")
        state = torch.load(path, map_location=device, weights_only=True)
    except (BadInput, MemoryError, OSError):
        raise
    except Exception as error:  # a damaged file can fail in any way
        if OUT_OF_MEMORY.search(str(error)):
            raise
        raise damaged(path, f"{type(error).__name__}: {error}".splitlines()[0]) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise damaged(path, f"not format {FORMAT}")
    return state


def damaged(path: Path, reason: str) -> BadInput:
    return BadInput(
        f"the run in {path.parent}: {path.name} is damaged or from another version ({reason}); "
        "train it again with `overwrite`"
    )
