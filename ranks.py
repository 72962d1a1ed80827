"""Several processes, under torchrun: each plays some of the users, and their answers meet in one all_reduce a round.

    torchrun --nproc-per-node 2 train.py --users 4 --specialists 1,2,4,8

User i belongs to rank i mod n. What else passes between processes is what a simulation writes to its folder: figures,
and the users' states for the checkpoint, which rank 0 writes.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from federated import Message, Server, User

PATIENCE = timedelta(seconds=60)  # with a process that doesn't answer


def join(device: str) -> str:
    """Meet the other processes, if there are any. Returns this one's device."""
    if "RANK" not in os.environ:
        return device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own(everyones: list) -> list:
    """This process's part of a list with an entry for each user."""
    return everyones[rank()::count()]


def gathered(mine: list) -> list:
    """The whole list again, from each process's part of it."""
    if count() == 1:
        return mine
    parts = [None] * count()
    dist.all_gather_object(parts, mine)
    return [parts[i % count()][i // count()] for i in range(sum(map(len, parts)))]


class Together(Server):
    """A server in every process; all hold the same θ^G."""

    def combine(self, answers: list[tuple[User, Message]]) -> None:
        """θ^G ← Σ w_i θ_i^G / Σ w_i, each tensor over the users of all processes who have it."""
        sound, weights = self.sound(answers)
        sums = {name: torch.zeros_like(tensor) for name, tensor in self.generalists.items()}
        totals = dict.fromkeys(sums, 0.0)
        for answer, weight in zip(sound, weights, strict=True):
            for name, tensor in answer.items():
                sums[name] += weight * tensor
                totals[name] += weight
        flat = torch.cat([tensor.flatten() for tensor in sums.values()])
        flat = torch.cat([flat, flat.new_tensor([*totals.values(), len(sound)])])
        dist.all_reduce(flat)
        *parts, totals, number = flat.split([*(tensor.numel() for tensor in sums.values()), len(sums), 1])
        for (name, tensor), part, total in zip(sums.items(), parts, totals.tolist(), strict=True):
            if total:
                self.generalists[name] = part.view_as(tensor) / total
        self.finish(int(number.item()))
