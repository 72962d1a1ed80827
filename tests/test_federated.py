"""The federation: what is averaged, what crosses, and one round worked out by hand."""

import itertools

import pytest
import torch
from torch import nn

from bilevel import Level, Rhythm
from federated import Server, User, average, federated_round, size_of
from model import GENERALIST, ROUTER, SPECIALIST
from support.server.guard import Guard
from tiny import bits, play, same, tiny, tiny_user


def federation(specialists=(0, 1, 3), **config) -> tuple[Server, list[User]]:
    users = [tiny_user(seed=i, specialists=S, **config) for i, S in enumerate(specialists)]
    largest = tiny(99, specialists=max(specialists), **config)
    return Server(largest.having(GENERALIST)), users


def test_average_worked_by_hand():
    """(3·1 + 1·3) / 4 and (3·2 + 1·6) / 4; a tensor that one user has is that user's."""
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}
    two = {"a": torch.tensor([3.0, 6.0])}
    means = average([one, two], [3, 1])
    assert means["a"].tolist() == [1.5, 3]
    assert means["b"].tolist() == [5]


def test_the_order_of_users_doesnt_matter_to_the_average():
    messages = [tiny(seed).having(GENERALIST) for seed in range(4)]
    weights = [1.0, 2.0, 3.0, 4.0]
    expected = average(messages, weights)
    order = [2, 0, 3, 1]
    permuted = average([messages[i] for i in order], [weights[i] for i in order])
    for name, mean in expected.items():
        torch.testing.assert_close(permuted[name], mean, rtol=1e-14, atol=1e-14)


class Line(nn.Module):
    """Three numbers: y = generalist + specialist + router, with the loss (y − target)²."""

    def __init__(self, *numbers: float):
        super().__init__()
        roles = zip((GENERALIST, SPECIALIST, ROUTER), numbers, strict=True)
        self.numbers = nn.ParameterDict({role: torch.tensor([number]) for role, number in roles})

    def having(self, *roles):
        return {role: parameter for role, parameter in self.numbers.items() if role in roles}

    def forward(self, _, target):
        return None, (sum(self.numbers.values()) - target).square().sum()


def line_user(name: str, specialist: float, train: float, valid: float, weight: float) -> User:
    """A user whose targets are always the same."""
    model = Line(77.0, specialist, 0.0)
    train_batches = itertools.repeat((None, train))
    valid_batches = itertools.repeat((None, valid))
    lower = Level(model.having(GENERALIST, SPECIALIST), train_batches, lr=0.1)
    upper = Level(model.having(ROUTER), valid_batches, lr=0.01)
    return User(name, model, lower, upper, weight)


def test_a_round_worked_by_hand():
    """AdamW's first step is its learning rate, against the sign of the gradient.

    The server holds 1. User a: y = 1 + 0 + 0 is below its training target 5, so generalist and
    specialist rise by 0.1; then y = 1.2 is above its validation target −5, so the router falls by
    0.01. User b: y = 1 + 2 + 0 is above −5 and then below 5. With weights 3 and 1, the average is
    (3 · 1.1 + 1 · 0.9) / 4 = 1.05.
    """
    a = line_user("a", specialist=0.0, train=5.0, valid=-5.0, weight=3)
    b = line_user("b", specialist=2.0, train=-5.0, valid=5.0, weight=1)
    server = Server({GENERALIST: torch.tensor([1.0])})
    rhythm = Rhythm(local_steps=1, router_every=1, router_steps=1)
    assert federated_round(server, [a, b], rhythm) == {a: 16.0, b: 64.0}
    for user, expected in ((a, (1.1, 0.1, -0.01)), (b, (0.9, 1.9, 0.01))):
        roles = (GENERALIST, SPECIALIST, ROUTER)
        numbers = [user.model.numbers[role].item() for role in roles]
        assert numbers == pytest.approx(expected, abs=1e-6)
        assert user.bytes_up == 4
    assert server.generalists[GENERALIST].item() == pytest.approx(1.05, abs=1e-6)


@pytest.mark.parametrize("config", [{}, {"roles": {SPECIALIST: GENERALIST}}, {"expert": "lora"}])
def test_only_generalists_cross_and_their_bytes_are_counted(config):
    """Between users of different sizes and a guarded server. `play` checks every message."""
    server, users = federation(**config)
    play(Guard(server, bound=1.0), users, rounds=3)
    for user in users:
        size = size_of(user.model.having(GENERALIST))
        assert size > 0
        assert user.bytes_up == user.bytes_down == 3 * size


def test_a_download_replaces_generalists_and_keeps_specialists_routers_and_moments():
    server, users = federation()
    play(server, users, rounds=1)
    for user in users:
        private = bits(user, SPECIALIST, ROUTER)
        moments = [state["exp_avg"].clone() for state in user.lower.optimizer.state.values()]
        user.download(server.broadcast(user.shared))
        assert same(user.model.having(GENERALIST), server.generalists)
        assert same(private, user.model.having(SPECIALIST, ROUTER))
        for before, state in zip(moments, user.lower.optimizer.state.values(), strict=True):
            assert torch.equal(before, state["exp_avg"])


def test_a_message_that_is_only_evaluated_isnt_counted():
    server, users = federation()
    users[0].set_generalists(server.broadcast(users[0].shared))
    assert same(users[0].model.having(GENERALIST), server.generalists)
    assert users[0].bytes_down == 0


def test_without_uploads_the_generalists_stay():
    server, users = federation()
    before = {name: tensor.clone() for name, tensor in server.generalists.items()}
    play(server, users, rounds=1, dropped=users)
    assert same(before, server.generalists)


def test_generalists_that_no_upload_has_stay():
    """The experts that only larger users have."""
    server, users = federation(roles={SPECIALIST: GENERALIST})
    before = {name: tensor.clone() for name, tensor in server.generalists.items()}
    play(server, users[:1], rounds=1)
    missing = before.keys() - users[0].shared.keys()
    assert missing
    assert same({name: before[name] for name in missing}, server.generalists)


def test_the_average_is_over_the_users_who_upload_and_absent_users_get_it_later():
    server, users = federation()
    absent = bits(users[2])
    play(server, users[:2], rounds=1, dropped=users[:1])
    assert same(users[1].model.having(GENERALIST), server.generalists)
    assert [user.bytes_up > 0 for user in users] == [False, True, False]
    assert same(absent, bits(users[2]))
    users[2].local_update = lambda rhythm: 0.0
    rhythm = Rhythm(local_steps=1, router_every=1, router_steps=1)
    federated_round(server, users[2:], rhythm, dropped=users[2:])
    assert same(users[2].model.having(GENERALIST), server.generalists)


def ends(method: str, users: int, **config) -> list[dict]:
    """All parameters of some users after two rounds of a method, with the same start for all."""
    members = [tiny_user(method, seed, **config) for seed in range(users)]
    start = tiny(99, **config)
    for user in members:
        user.model.load_state_dict(start.state_dict(), strict=False)
    server = Server(members[0].model.having(GENERALIST))
    play(server, members)
    for user in members:
        user.download(server.broadcast(user.shared))
    return [bits(user) for user in members]


def test_for_one_user_comigs_equals_comigs_2s_bit_for_bit():
    """An average of one user changes nothing, so generalists and specialists are the same."""
    (shared,) = ends("comigs", users=1, specialists=2)
    (private,) = ends("comigs-2s", users=1, specialists=2)
    assert shared.keys() == private.keys()
    assert same(shared, private)


def test_without_specialists_comigs_equals_fedavg():
    """The router has one expert, whose gate is 1."""
    comigs = ends("comigs", users=3, specialists=0)
    fedavg = ends("fedavg", users=3, specialists=0)
    for one, two in zip(comigs, fedavg, strict=True):
        for name, parameter in two.items():
            torch.testing.assert_close(one[name], parameter, rtol=1e-12, atol=1e-12)
