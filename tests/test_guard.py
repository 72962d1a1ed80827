"""The guard refuses uploads that can't be averaged, clips long updates, and adds normal noise."""

import copy

import pytest
import torch

from federated import Server
from support.server.guard import Guard
from support.server.privacy import epsilon
from tiny import Stranger, same, seeded

SHAPE = (200, 200)
HELD = {"a": torch.zeros(SHAPE), "b": torch.zeros(SHAPE)}


def full(number: float) -> dict[str, torch.Tensor]:
    return {name: torch.full(SHAPE, float(number)) for name in HELD}


def aggregate(guard: Guard, *uploads) -> int:
    """The guard aggregates the uploads of user0, user1, ..."""
    shapes = {name: tensor.shape for name, tensor in HELD.items()}
    by_user = {}
    for number, upload in enumerate(uploads):
        by_user[Stranger(f"user{number}", 1.0, shapes)] = upload
    return guard.aggregate(by_user)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (torch.full(SHAPE, torch.nan), "b isn't finite, or beyond 1e+30"),
        (torch.full(SHAPE, -torch.inf), "b isn't finite, or beyond 1e+30"),
        (torch.full(SHAPE, 3e38), "b isn't finite, or beyond 1e+30"),
        (torch.zeros(200, 9), "b has shape (200, 9), not (200, 200)"),
        (torch.zeros(SHAPE).double(), "b isn't torch.float32"),
        ([0.0] * 200, "b isn't torch.float32"),
    ],
)
def test_an_upload_with_a_broken_tensor_is_refused_and_the_others_are_averaged(broken, reason):
    guard = Guard(Server(HELD))
    assert aggregate(guard, full(1), full(3), {"a": HELD["a"], "b": broken}) == 2
    assert guard.refused == [("user2", reason)]
    assert same(full(2), guard.generalists)


@pytest.mark.parametrize("upload", [HELD | {"c": torch.zeros(1)}, {}, None])
def test_an_upload_without_the_right_tensors_is_refused(upload):
    guard = Guard(Server(HELD))
    assert aggregate(guard, upload) == 0
    assert guard.refused == [("user0", "not the tensors that the server expects")]


@pytest.mark.parametrize(("factor", "bound", "left"), [(1, 2.5, 0.5), (1e6, 2.5, 0.5), (1, 5.1, 1)])
def test_a_long_update_is_scaled_to_the_bound_and_a_short_one_stays(factor, bound, left):
    """An update of 3 and 4, whose norm is 5; and one a million times as long."""
    update = full(0)
    update["a"][0, 0] = 3.0
    update["b"][1, 1] = 4.0
    guard = Guard(Server(full(1)), bound)
    aggregate(guard, {name: 1 + factor * tensor for name, tensor in update.items()})
    expected = {name: 1 + left * tensor for name, tensor in update.items()}
    torch.testing.assert_close(guard.generalists, expected)


@pytest.mark.parametrize("generator", [seeded(1), None])
def test_noise_is_normal_and_independent_between_tensors(generator):
    """z = 2, C = 3, two accepted uploads: a deviation of 3. A normal's fourth moment is 3 σ⁴."""
    guard = Guard(Server(HELD), bound=3.0, noise=2.0, generator=generator)
    aggregate(guard, HELD, HELD, full(torch.nan))
    one, two = (tensor.flatten() for tensor in guard.generalists.values())
    for noise in (one, two):
        assert noise.mean().item() == pytest.approx(0, abs=0.09)
        assert noise.std().item() == pytest.approx(3, rel=0.03)
        assert ((noise / 3) ** 4).mean().item() == pytest.approx(3, rel=0.1)
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 0.03


@pytest.mark.parametrize(("noise", "uploads"), [(2.0, []), (2.0, [None]), (0.0, [HELD])])
def test_without_uploads_or_without_noise_the_average_stays(noise, uploads):
    guard = Guard(Server(HELD), bound=3.0, noise=noise, generator=seeded(1))
    aggregate(guard, *uploads)
    assert same(HELD, guard.generalists)


def test_a_guard_continues_from_a_saved_state():
    one = Guard(Server(HELD), bound=3.0, noise=2.0, generator=seeded(1))
    two = Guard(Server(HELD), bound=3.0, noise=2.0, generator=seeded(2))
    aggregate(one, HELD, None)
    two.load(copy.deepcopy(one.state()))
    aggregate(one, HELD, None)
    aggregate(two, HELD, None)
    assert same(one.generalists, two.generalists)
    assert len(one.refused) == 2
    assert one.refused == two.refused


def test_epsilon_is_the_published_one_and_falls_with_noise_rounds_and_participation():
    """dp-accounting tests that 4.530877117 sensitivities, of two bounds, are (1, 1e-6)-private."""
    pytest.importorskip("dp_accounting", reason="dp-accounting isn't installed")
    assert epsilon(2 * 4.530877117, 1, 10, 10, 1e-6) == pytest.approx(1, abs=1e-5)
    most = epsilon(noise=4, rounds=10, users=100, selected=100, delta=1e-3)
    assert epsilon(noise=8, rounds=10, users=100, selected=100, delta=1e-3) < most
    assert epsilon(noise=4, rounds=5, users=100, selected=100, delta=1e-3) < most
    assert epsilon(noise=4, rounds=10, users=100, selected=10, delta=1e-3) < most
