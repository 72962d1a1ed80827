"""The table of methods: what each one sends, keeps and refuses."""

import itertools

import pytest
import torch

from bilevel import Level
from methods import METHODS
from model import BACKBONE, GENERALIST, ROUTER, SPECIALIST
from support.errors import BadInput
from support.runs.settings import Settings
from support.server.guard import Guard
from tiny import Batches, bits, play, same, tiny_user


def lora_user(method: str, seed: int = 0, **config):
    return tiny_user(method, seed, **{"expert": "lora", "lora_rank": 4} | config)


SENT = {  # the factors that are sent, and whether the paper's specialist is sent, too
    **dict.fromkeys(
        (
            "comigs",
            "comigs-uniform",
            "comigs-train",
            "comigs-joint",
            "comigs-leaky",
            "comigs-apart",
            "pfedmoe",
            "fdlora",
        ),
        ({"lora_A", "lora_B"}, False),
    ),
    **dict.fromkeys(
        ("comigs-2g", "fedavg", "pcl", "hetlora", "flexlora"), ({"lora_A", "lora_B"}, True)
    ),
    **dict.fromkeys(("local", "comigs-2s", "centralized"), (set(), False)),
    "ffa-lora": ({"lora_B"}, True),
    "fedsa-lora": ({"lora_A"}, True),
}


@pytest.mark.parametrize("method", METHODS)
def test_only_generalists_cross_and_the_backbone_keeps_its_bits(method):
    """`play` checks every message."""
    row = METHODS[method]
    users = [lora_user(method, seed) for seed in range(3)]
    before = [bits(user, BACKBONE) for user in users]
    play(Guard(row.server(users[0].model.having(GENERALIST), row.hyper)), users)
    for user, backbone in zip(users, before, strict=True):
        assert same(backbone, user.model.having(BACKBONE))


@pytest.mark.parametrize("method", SENT)
def test_each_method_sends_its_factors_and_experts(method):
    factors, specialist = SENT[method]
    user = lora_user(method)
    assert {name.rpartition(".")[2] for name in user.shared} == factors
    assert any("adapters.1." in name for name in user.shared) == specialist
    assert any("adapters.0." in name for name in user.shared) == bool(factors)
    assert any("attention" in name for name in user.shared) == bool(factors)
    frozen = [name for name in user.model.having(BACKBONE) if name.endswith("lora_A")]
    assert bool(frozen) == (method == "ffa-lora")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(method="hetlora"), "`expert` lora"),
        (dict(method="comigs-apart", generalists=0), "both kinds"),
        (dict(method="pcl", users=2, specialists=(1, 2)), "one number"),
        (
            dict(method="fedavg", users=2, expert="lora", init_from="x", lora_rank=(1, 2)),
            "lora_rank",
        ),
        (dict(method="pcl", clip_update=1.0), "clip_update"),
        (
            dict(method="fedavg", users=2, specialists=(1, 2), clip_update=1.0, dp_noise=1.0),
            "dp_noise",
        ),
    ],
)
def test_a_run_that_a_method_cant_have_is_refused(wrong, message):
    with pytest.raises(BadInput, match=f"`method` {wrong['method']}.*{message}"):
        Settings(**wrong)


def test_only_comigs_leaky_leaks():
    leaky = set()
    for name, method in METHODS.items():
        for level in (method.level, method.router_level):
            if level.differentiate is not Level.differentiate:
                leaky.add(name)
    assert leaky == {"comigs-leaky"}


def test_leaky_levels_carry_their_gradients_into_each_others_next_step():
    """A router step after three expert steps descends the sum of all four gradients."""
    user = lora_user("comigs-leaky")
    train, valid = next(Batches(0)), next(Batches(1))
    user.lower.batches = itertools.repeat(train)
    user.upper.batches = itertools.repeat(valid)
    router = list(user.model.having(ROUTER).values())
    experts = list(user.model.having(GENERALIST, SPECIALIST).values())
    descended = []
    user.upper.optimizer.register_step_pre_hook(
        lambda *_: descended.extend(parameter.grad.clone() for parameter in router)
    )
    accumulated = []
    for _ in range(3):
        accumulated.append(torch.autograd.grad(user.model(*train)[1], router))
        user.lower.step(user.model)
    accumulated.append(torch.autograd.grad(user.model(*valid)[1], router))
    left = torch.autograd.grad(user.model(*valid)[1], experts)
    user.upper.step(user.model)
    expected = [sum(gradients) for gradients in zip(*accumulated, strict=True)]
    torch.testing.assert_close(descended, expected)
    torch.testing.assert_close([parameter.grad for parameter in experts], list(left))
