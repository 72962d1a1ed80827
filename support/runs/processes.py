"""Several processes, under torchrun: each plays some of the users, and their answers meet in one all_reduce a round.

    torchrun --nproc-per-node 2 train.py --users 4 --specialists 1,2,4,8

User i belongs to process i mod n. What else passes between processes is whether to stop, and what a simulation writes
to its folder: figures, and the users' states for the checkpoint, which the first process writes.
"""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from federated import Message, Server, User
from methods import METHODS
from support.runs.settings import Settings, refuse

PATIENCE = timedelta(days=1)  # with a process that is slower; one that has died is noticed at once


def join(settings: Settings) -> None:
    """Meet the other processes, if there are any, each on a GPU of its own where there are some. Raises BadInput."""
    together, method = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1, METHODS[settings.method]
    for wrong, name, why in (
        (together > settings.users, "users", f"too few for {together} processes"),
        (together > 1 and method.pooled, "method", "one model, which processes can't share"),
        (together > 1 and method.server is not Server, "method", "has a server of its own, and processes exchange "
                                                                 "only sums"),
    ):
        if wrong:
            refuse(name, getattr(settings, name), why, "take fewer processes")
    if "RANK" in os.environ and not dist.is_initialized():
        if settings.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if settings.device.startswith("cuda") else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)  # else its threads can be cut off at the end, which is an abort


def index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own(everyones: list) -> list:
    """This process's part of a list with an entry for each user."""
    return everyones[index()::count()]


def gathered(mine: list) -> list:
    """The whole list again, from each process's part of it."""
    if count() == 1:
        return mine
    parts = [None] * count()
    dist.all_gather_object(parts, mine)
    return [parts[i % count()][i // count()] for i in range(sum(map(len, parts)))]


class Together(Server):
    """A server in every process; all hold the same θ^G."""

    def take(self, answers: dict[User, Message]) -> int:
        """θ^G ← Σ w_i θ_i^G / Σ w_i, each tensor over the users of all processes who have it."""
        if not self.generalists:
            return len(answers)
        sums = {name: torch.zeros_like(tensor) for name, tensor in self.generalists.items()}
        weights = dict.fromkeys(sums, 0.0)
        for user, answer in answers.items():
            for name, tensor in answer.items():
                sums[name] += user.weight * tensor
                weights[name] += user.weight
        last = torch.tensor([*weights.values(), len(answers)]).to(next(iter(sums.values())))
        flat = torch.cat([*(tensor.flatten() for tensor in sums.values()), last])
        dist.all_reduce(flat)
        *parts, totals, n = flat.split([*(tensor.numel() for tensor in sums.values()), len(sums), 1])
        for (name, tensor), part, total in zip(sums.items(), parts, totals.tolist(), strict=True):
            if total:
                self.generalists[name] = part.view_as(tensor) / total
        return int(n.item())
