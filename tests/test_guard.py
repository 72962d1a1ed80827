"""The guard: answers that can't be averaged are refused, long updates are clipped, and noise is as it should be."""

import copy

import pytest
import torch

from federated import Server
from support.server.guard import Guard
from support.server.privacy import epsilon
from tiny import Stranger, same, seeded

HELD = {"a": torch.zeros(200, 200), "b": torch.zeros(200, 200)}


def full(number: float, **others) -> dict:
    return {name: torch.full_like(tensor, number) for name, tensor in HELD.items()} | others


def take(guard: Guard, *answers) -> int:
    """The guard takes the answers of user0, user1, ..., of whom tensors of HELD's shapes were wanted."""
    wanted = {name: tensor.shape for name, tensor in HELD.items()}
    return guard.take({Stranger(f"user{i}", 1.0, wanted): answer for i, answer in enumerate(answers)})


@pytest.mark.parametrize(("poison", "reason"), [
    (full(0, b=torch.full((200, 200), torch.nan)), "b isn't finite, or beyond 1e+30"),
    (full(0, b=torch.full((200, 200), -torch.inf)), "b isn't finite, or beyond 1e+30"),
    (full(0, b=torch.full((200, 200), 3e38)), "b isn't finite, or beyond 1e+30"),
    (full(0, b=torch.zeros(200, 9)), "b has shape (200, 9), not (200, 200)"),
    (full(0, b=torch.zeros(200, 200).double()), "b isn't torch.float32"),
    (full(0, b=[0.0] * 200), "b isn't torch.float32"),
    (full(0, c=torch.zeros(1)), "not the tensors that are wanted"),
    ({}, "not the tensors that are wanted"),
    (None, "not the tensors that are wanted"),
])
def test_a_poisoned_answer_is_refused_and_named_and_the_others_are_averaged(poison, reason):
    guard = Guard(Server(HELD))
    assert take(guard, full(1), full(3), poison) == 2
    assert guard.refused == [("user2", reason)]
    assert same(full(2), guard.generalists)


@pytest.mark.parametrize(("factor", "bound", "left"), [(1, 2.5, 0.5), (1e6, 2.5, 0.5), (1, 5.1, 1)])
def test_a_long_update_gets_the_bounds_norm_and_keeps_its_direction_and_a_short_one_stays(factor, bound, left):
    """An update of 3 and 4, of norm 5; and a million times that."""
    guard, update = Guard(Server(full(1)), bound), full(0)
    update["a"][0, 0], update["b"][1, 1] = 3.0, 4.0
    take(guard, {name: 1 + factor * tensor for name, tensor in update.items()})
    torch.testing.assert_close(guard.generalists, {name: 1 + left * tensor for name, tensor in update.items()})


def test_noise_is_normal_of_the_right_spread_and_each_tensors_own():
    """z = 2, C = 3, and two answers that count: a standard deviation of 3. A normal number's fourth moment is 3 σ⁴."""
    guard = Guard(Server(HELD), 3.0, 2.0, seeded(1))
    take(guard, HELD, HELD, full(torch.nan))
    one, two = (tensor.flatten() for tensor in guard.generalists.values())
    for drawn in (one, two):
        assert drawn.mean().item() == pytest.approx(0, abs=0.06)
        assert drawn.std().item() == pytest.approx(3, rel=0.02)
        assert ((drawn / 3) ** 4).mean().item() == pytest.approx(3, rel=0.06)
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 0.03


@pytest.mark.parametrize(("noise", "answers"), [(2.0, []), (2.0, [None]), (0.0, [HELD])])
def test_without_answers_or_without_noise_the_average_stays(noise, answers):
    guard = Guard(Server(HELD), 3.0, noise, seeded(1))
    take(guard, *answers)
    assert same(HELD, guard.generalists)


def test_noise_comes_from_the_guards_generator_alone_whose_state_a_guard_can_load():
    one, two = (Guard(Server(HELD), 3.0, 2.0, seeded(seed)) for seed in (1, 2))
    for guard in (one, two):
        take(guard, HELD, None)
    assert not same(one.generalists, two.generalists)
    two.load(copy.deepcopy(one.state()))
    for _ in range(2):
        assert same(one.generalists, two.generalists)
        assert one.refused == two.refused != []
        take(one, HELD, None)
        take(two, HELD, None)


def test_epsilon_is_the_accountants_published_one_and_falls_with_noise_and_participation():
    """dp-accounting's tests: noise of 4.530877117 sensitivities is (1, 1e-6)-private. Ours are two bounds."""
    pytest.importorskip("dp_accounting", reason="dp-accounting isn't installed")
    assert epsilon(2 * 4.530877117, 1, 10, 10, 1e-6) == pytest.approx(1, abs=1e-5)
    most = epsilon(4, 10, 100, 100, 1e-3)
    assert all(epsilon(*less, 1e-3) < most for less in ((8, 10, 100, 100), (4, 5, 100, 100), (4, 10, 100, 10)))
