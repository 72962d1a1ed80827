"""Several processes under torchrun: each trains some users, and all_reduce adds up their sums.

    torchrun --nproc-per-node 2 train.py --users 4 --specialists 1,2,4,8

User i belongs to process i mod n. Only sums of weighted generalists pass between the processes'
servers. The first process also collects what a run writes to its folder. Without torchrun there is
one process, and every function here returns what it is given.
"""

import atexit
import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from federated import Message, Server, User
from methods import METHODS
from support.runs.flags import refuse
from support.runs.folder import Folder
from support.runs.settings import Settings

TIMEOUT = timedelta(days=1)  # to wait for a slow process; a failed one is noticed at once
Item = TypeVar("Item")


def join(settings: Settings) -> None:
    """Connect to the other processes under torchrun, each on its own GPU with `device` cuda.

    Raises BadInput.
    """
    if "RANK" not in os.environ:
        return
    processes = int(os.environ["WORLD_SIZE"])
    method = METHODS[settings.method]
    if processes > settings.users:
        refuse("users", settings.users, f"too few for {processes} processes", "use fewer processes")
    if processes > 1 and method.pooled:
        refuse("method", settings.method, "trains a single model", "use one process")
    if processes > 1 and method.server is not Server:
        refuse(
            "method", settings.method, "has a server that needs more than sums", "use one process"
        )
    if dist.is_initialized():
        return
    if settings.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if settings.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)  # without it the process can abort at its end


def index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return index() == 0


def mine(everyones: list[Item]) -> list[Item]:
    """This process's entries of a list with one entry per user."""
    return everyones[index() :: count()]


def select(users: list[User], numbers: list[int]) -> list[User]:
    """The users with these numbers that belong to this process."""
    return [users[i // count()] for i in numbers if i % count() == index()]


def gather(entries: list[Item]) -> list[Item]:
    """All processes' entries in the order of users: the inverse of `mine`."""
    if count() == 1:
        return entries
    parts = [None] * count()
    dist.all_gather_object(parts, entries)
    total = sum(len(part) for part in parts)
    return [parts[i % count()][i // count()] for i in range(total)]


def total(number: float) -> float:
    """The sum of all processes' numbers."""
    return sum(gather([number]))


class SummingServer(Server):
    """A server in every process. All hold the same θ^G."""

    def aggregate(self, uploads: dict[User, Message]) -> int:
        """θ^G ← Σ w_i θ_i^G / Σ w_i, each tensor over the users of all processes who have it."""
        for name, tensor in self.generalists.items():
            weighted_sum = torch.zeros_like(tensor)
            weight = tensor.new_zeros(1)
            for user, message in uploads.items():
                if name in message:
                    weighted_sum += user.weight * message[name]
                    weight += user.weight
            dist.all_reduce(weighted_sum)
            dist.all_reduce(weight)
            if weight.item() > 0:
                self.generalists[name] = weighted_sum / weight
        return total(len(uploads))


LISTS = ("users", "initial_losses", "local_ends")  # of a checkpoint, with an entry per user


class SharedFolder:
    """A run's folder under torchrun: the first process reads and writes it for all."""

    def __init__(self, settings: Settings, config: dict):
        """Raises BadInput in the first process."""
        self.folder = Folder(settings, config) if is_first() else None
        path = self.folder.path if is_first() else None
        self.path = gather([path])[0]

    def log(self, lines: list[dict]) -> None:
        lines = gather(lines)
        if self.folder is not None:
            self.folder.log(lines)

    def save(self, state: dict) -> None:
        state = dict(state)
        for name in LISTS:
            state[name] = gather(state[name])
        refused = []
        for of_process in gather([state["server"]["refused"]]):
            refused += of_process
        state["server"] = state["server"] | {"refused": refused}
        if self.folder is not None:
            self.folder.save(state)

    def load(self) -> dict | None:
        state, *_ = gather([self.folder.load() if self.folder is not None else None])
        if state is None:
            return None
        for name in LISTS:
            state[name] = mine(state[name])
        if not is_first():
            state["server"]["refused"] = []  # the first process keeps those of all
        return state

    def finish(self, result: dict) -> None:
        if self.folder is not None:
            self.folder.finish(result)


def run_folder(settings: Settings, config: dict) -> Folder | SharedFolder:
    """The folder of a run. Raises BadInput."""
    return Folder(settings, config) if count() == 1 else SharedFolder(settings, config)
