"""Tiny models, users with random text, and rounds in which everything that crosses is watched."""

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import Rhythm, constant
from federated import Message, Server, User, federated_round, size_of
from methods import METHODS
from model import BACKBONE, GENERALIST, GPT, ROLES, ROUTER, SPECIALIST, GPTConfig
from rivals import JudgingUser

SHAPE = dict(vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8)
LLAMA = dict(
    n_kv_head=1,
    n_hidden=12,
    feed_forward="swiglu",
    norm="rms",
    rotary_base=100.0,
    rotary_factors=[1.0, 2.0],
    bias=False,
    tied=False,
)


def same(one: dict, two: dict) -> bool:
    """Whether two dictionaries hold the same bits, for the names in the first one."""
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Batches:
    """Random batches of 2 windows, and a list of those that were taken."""

    def __init__(self, seed: int):
        self.generator, self.taken = seeded(seed), []

    def __next__(self):
        self.taken.append(torch.randint(11, (2, 2, 6), generator=self.generator).unbind())
        return self.taken[-1]


def tiny(seed: int = 0, spread: float = 0.5, **config) -> GPT:
    """A model in float64 with weights from N(0, spread²), large enough for all parts to show."""
    model = GPT(GPTConfig(**SHAPE | config)).double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, spread, generator=generator)
    return model


def as_in(dtype: str, **config) -> GPT:
    """A low-rank model whose frozen numbers are in that dtype, and the others in float32."""
    model = tiny(**config, expert="lora", dtype=dtype).float()
    for parameter in model.having(BACKBONE).values():
        parameter.data = parameter.to(getattr(torch, dtype))
    return model


def tiny_user(method: str = "comigs", seed: int = 0, schedule=constant, **config) -> User:
    """A user of a method, with a model and text of its own; its experts follow the schedule."""
    row = METHODS[method]
    model = tiny(seed, 0.3, **{"routed": row.routed, "roles": row.roles} | config)
    experts = model.having(GENERALIST, SPECIALIST)
    lower = row.level(experts, Batches(seed), 1e-2, 0.1, schedule, row.hyper)
    router = model.having(ROUTER)
    upper = None
    if router:
        upper = row.router_level(router, Batches(seed + 100), 1e-2, 0.0, constant, row.hyper)
    user = row.user(f"user{seed}", model, lower, upper, hyper=row.hyper)
    if isinstance(user, JudgingUser):
        user.validation_windows = lambda: iter([next(Batches(seed + 200))])
    return user


class Watched(TorchDispatchMode):
    """Records the size of the largest tensor that is made, and how many rows go through GELU."""

    largest = rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        self.rows += len(result) if function is torch.ops.aten.gelu.default else 0
        return result


def bits(user: User, *roles: str) -> dict[str, torch.Tensor]:
    """Copies of a user's parameters that have one of these roles, or of all."""
    parameters = user.model.having(*roles or ROLES)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@dataclass(frozen=True, eq=False)
class Stranger:
    """All that a server may know of a user."""

    name: str
    weight: float
    shared: dict[str, torch.Size]


class Wire:
    """A server that records every message, and shows the server strangers instead of users."""

    def __init__(self, server: Server):
        self.server = server
        self.down = []
        self.up = {}

    def broadcast(self, shapes: dict[str, torch.Size]) -> Message:
        message = self.server.broadcast(shapes)
        self.down.append(message)
        return message

    def aggregate(self, uploads: dict[User, Message]) -> int:
        self.up = uploads
        strangers = {}
        for user, message in uploads.items():
            strangers[Stranger(user.name, user.weight, user.shared)] = message
        return self.server.aggregate(strangers)


def memory(tensors) -> set[int]:
    """The addresses of the tensors' numbers."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def play(server: Server, users: list[User], rounds: int = 2, dropped=()) -> Server:
    """Some rounds, in which every message is checked.

    Messages hold generalists of the user and nothing else, in memory that no model uses, without
    gradients, and their bytes are counted. Every user uploads who isn't dropped.
    """
    for _ in range(rounds):
        wire = Wire(server)
        before = [(user.bytes_down, user.bytes_up) for user in users]
        rhythm = Rhythm(local_steps=3, router_every=2, router_steps=1)
        federated_round(wire, users, rhythm, dropped)
        assert wire.up.keys() == set(users) - set(dropped)
        private = memory(parameter for user in users for parameter in user.model.parameters())
        for user, download, (bytes_down, bytes_up) in zip(users, wire.down, before, strict=True):
            upload = wire.up.get(user, {})
            generalists = user.model.having(GENERALIST)
            assert download.keys() == generalists.keys()
            if user in wire.up:
                assert upload.keys() == generalists.keys()
            for tensor in (*download.values(), *upload.values()):
                assert type(tensor) is torch.Tensor  # and no parameter
                assert tensor.requires_grad is False
                assert tensor.grad_fn is None
            for name, tensor in upload.items():
                assert torch.equal(tensor, generalists[name])
            crossed = [*download.values(), *upload.values(), *server.generalists.values()]
            assert not memory(crossed) & private
            assert user.bytes_down - bytes_down == size_of(download)
            assert user.bytes_up - bytes_up == size_of(upload)
    return server
