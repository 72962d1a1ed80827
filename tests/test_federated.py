"""The federation: what is averaged, what crosses, and one round worked out by hand."""

import itertools

import pytest
import torch
from torch import nn

from bilevel import Level, Rhythm, constant
from federated import Server, User, average, federated_round, size_of
from model import GENERALIST, ROUTER, SPECIALIST
from support.server.guard import Guard
from tiny import bits, play, same, tiny, tiny_user


def federation(specialists=(0, 1, 3), **config) -> tuple[Server, list[User]]:
    users = [tiny_user(seed=i, specialists=s, **config) for i, s in enumerate(specialists)]
    return Server(tiny(99, specialists=max(specialists), **config).having(GENERALIST)), users


def test_average_worked_by_hand():
    one, two = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}, {"a": torch.tensor([3.0, 6.0])}
    means = average([one, two], [3, 1])
    assert means["a"].tolist() == [1.5, 3]  # (3·1 + 1·3) / 4, (3·2 + 1·6) / 4
    assert means["b"].tolist() == [5]  # over the one user who has it


class Line(nn.Module):
    """Three numbers: y = generalist + specialist + router, loss (y − target)². A batch is nothing and its target."""

    def __init__(self, *numbers: float):
        super().__init__()
        roles = zip((GENERALIST, SPECIALIST, ROUTER), numbers, strict=True)
        self.numbers = nn.ParameterDict({role: torch.tensor([number]) for role, number in roles})

    def having(self, *roles):
        return {role: parameter for role, parameter in self.numbers.items() if role in roles}

    def forward(self, _, target):
        return None, (sum(self.numbers.values()) - target).square().sum()


def test_a_round_worked_by_hand():
    """AdamW's first step is its learning rate, against the sign of the gradient: 0.1 for experts, 0.01 for routers.

    The server holds 1. User a: y = 1 + 0 + 0 is below its training target 5, so generalist and specialist rise by 0.1;
    then y = 1.2 is above its validation target −5, so the router falls by 0.01. User b: y = 1 + 2 + 0 is above −5 and
    then below 5. Weights 3 and 1: (3 · 1.1 + 1 · 0.9) / 4 = 1.05.
    """
    users = []
    for name, specialist, train, valid, weight in (("a", 0.0, 5.0, -5.0, 3), ("b", 2.0, -5.0, 5.0, 1)):
        model = Line(77.0, specialist, 0.0)
        train, valid = (itertools.repeat((None, target)) for target in (train, valid))
        users.append(User(name, model, Level(model.having(GENERALIST, SPECIALIST), train, 0.1, 0.0, constant),
                          Level(model.having(ROUTER), valid, 0.01, 0.0, constant), weight))
    server = Server({GENERALIST: torch.tensor([1.0])})
    assert federated_round(server, users, Rhythm(1, 1, 1)) == {users[0]: 16.0, users[1]: 64.0}
    for user, expected in zip(users, ((1.1, 0.1, -0.01), (0.9, 1.9, 0.01)), strict=True):
        numbers = [user.model.numbers[role].item() for role in (GENERALIST, SPECIALIST, ROUTER)]
        assert numbers == pytest.approx(expected, abs=1e-6)
    assert server.generalists[GENERALIST].item() == pytest.approx(1.05, abs=1e-6)
    assert [user.bytes_up for user in users] == [4, 4]


@pytest.mark.parametrize("config", [{}, {"roles": {SPECIALIST: GENERALIST}}, {"expert": "lora"}])
def test_only_generalists_cross_between_users_and_a_guarded_server_and_their_bytes_are_counted(config):
    """`play` watches over several rounds, here with users of different sizes; test_methods.py has every method."""
    server, users = federation(**config)
    play(Guard(server, bound=1.0), users, rounds=3)
    for user in users:
        assert user.bytes_up == user.bytes_down == 3 * size_of(user.model.having(GENERALIST)) > 0


def test_users_take_the_servers_generalists_and_keep_the_bits_of_their_specialists_and_routers():
    """A message is counted; one that is only adopted, to be looked at, isn't."""
    server, users = federation()
    for user, take in zip(users, (User.download, User.set_generalists, User.download), strict=True):
        own = bits(user, SPECIALIST, ROUTER)
        take(user, server.broadcast(user.shared))
        assert same(user.model.having(GENERALIST), server.generalists)
        assert same(own, user.model.having(SPECIALIST, ROUTER))
    size = sum(8 * parameter.numel() for parameter in users[0].model.having(GENERALIST).values())
    assert [(user.bytes_down, user.bytes_up) for user in users] == [(size, 0), (0, 0), (size, 0)]


def test_the_average_is_over_those_who_answer_and_the_others_take_it_when_they_are_called_again():
    """And where nobody answers, it stays."""
    server, users = federation()
    before, away = {name: tensor.clone() for name, tensor in server.generalists.items()}, bits(users[2])
    play(server, users[:2], rounds=1, dropped=users)
    assert same(before, server.generalists)
    play(server, users[:2], rounds=1, dropped=users[:1])  # the third isn't called
    assert same(users[1].model.having(GENERALIST), server.generalists)
    assert [user.bytes_up > 0 for user in users] == [False, True, False]
    assert same(away, bits(users[2]))
    users[2].local_update = lambda rhythm: 0.0
    federated_round(server, users[2:], Rhythm(1, 1, 1), dropped=users[2:])
    assert same(users[2].model.having(GENERALIST), server.generalists)
