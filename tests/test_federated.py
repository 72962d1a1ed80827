"""The federation: what is averaged, what crosses, and one round worked out by hand."""

import re

import pytest
import torch
from torch import nn

from bilevel import Alternation, Level, constant
from federated import Server, User, average, clip, federated_round, size_of
from model import GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig


class Batches:
    """Random batches of a text of its own."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __next__(self):
        return torch.randint(11, (2, 2, 4), generator=self.generator).unbind()


def gpt_user(name: str, specialists: int, seed: int, **changes) -> User:
    model = GPT(GPTConfig(11, 4, 2, 2, 8, specialists=specialists, **changes), torch.Generator().manual_seed(seed))
    router = model.having(ROUTER)
    return User(name, model, Level(model.having(GENERALIST, SPECIALIST), Batches(seed), 1e-2, 0.1, constant),
                Level(router, Batches(seed + 100), 1e-2, 0.0, constant) if router else None)


def federation(specialists=(0, 1, 3), **changes) -> tuple[Server, list[User]]:
    users = [gpt_user(f"user{i}", s, i, **changes) for i, s in enumerate(specialists)]
    return Server(gpt_user("server", max(specialists), 99, **changes).model.having(GENERALIST)), users


def test_average_worked_by_hand():
    one, two = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}, {"a": torch.tensor([3.0, 6.0])}
    even = average([one, two], [1, 1])
    assert even["a"].tolist() == [2, 4]
    assert even["b"].tolist() == [5]  # over the one user who has it
    assert average([one, two], [3, 1])["a"].tolist() == [1.5, 3]  # (3·1 + 1·3) / 4, (3·2 + 1·6) / 4


class Line(nn.Module):
    """Three numbers: y = generalist + specialist + router, loss (y − target)². A batch is its own target."""

    def __init__(self, generalist: float, specialist: float, router: float):
        super().__init__()
        self.numbers = nn.ParameterDict({GENERALIST: torch.tensor([generalist]),
                                         SPECIALIST: torch.tensor([specialist]), ROUTER: torch.tensor([router])})

    def having(self, *roles):
        return {role: parameter for role, parameter in self.numbers.items() if role in roles}

    def forward(self, _, target):
        return None, (sum(p for p in self.numbers.values()) - target).square().sum()


class Target:
    def __init__(self, value: float):
        self.value = value

    def __next__(self):
        return None, torch.tensor(self.value)


def test_a_round_worked_by_hand():
    """AdamW's first step is its learning rate, against the sign of the gradient: 0.1 for experts, 0.01 for routers.

    The server holds 1. User a: y = 1 + 0 + 0 is below its training target 5, so generalist and specialist rise by 0.1;
    then y = 1.2 is above its validation target −5, so the router falls by 0.01. User b: y = 1 + 2 + 0 is above −5 and
    then below 5. Weights 3 and 1: (3 · 1.1 + 1 · 0.9) / 4 = 1.05.
    """
    users = []
    for name, specialist, train, valid, weight in (("a", 0.0, 5.0, -5.0, 3), ("b", 2.0, -5.0, 5.0, 1)):
        model = Line(generalist=77.0, specialist=specialist, router=0.0)
        users.append(User(name, model, Level(model.having(GENERALIST, SPECIALIST), Target(train), 0.1, 0.0, constant),
                          Level(model.having(ROUTER), Target(valid), 0.01, 0.0, constant), weight))
    server = Server({GENERALIST: torch.tensor([1.0])})
    losses = {user.name: loss for user, loss in federated_round(server, users, Alternation(1, 1, 1))}
    assert losses == {"a": 16.0, "b": 64.0}
    for user, expected in zip(users, ((1.1, 0.1, -0.01), (0.9, 1.9, 0.01)), strict=True):
        numbers = [user.model.numbers[role].item() for role in (GENERALIST, SPECIALIST, ROUTER)]
        assert numbers == pytest.approx(expected, abs=1e-6)
    assert server.generalists[GENERALIST].item() == pytest.approx(1.05, abs=1e-6)
    assert [user.bytes_up for user in users] == [4, 4]


@pytest.mark.parametrize("changes", [{}, {"roles": {SPECIALIST: GENERALIST}}, {"expert": "lora"}])
def test_only_generalists_cross_between_user_and_server_and_their_bytes_are_counted(changes, monkeypatch):
    """All that goes through a user's two doors, over several rounds: names, roles, sizes, and tensors of their own."""
    server, users = federation(**changes)
    crossed = []
    receive, answer = User.receive, User.answer

    def watched_receive(user, message):
        crossed.append(("down", user, message))
        return receive(user, message)

    def watched_answer(user):
        message = answer(user)
        crossed.append(("up", user, message))
        return message

    monkeypatch.setattr(User, "receive", watched_receive)
    monkeypatch.setattr(User, "answer", watched_answer)
    for _ in range(3):
        list(federated_round(server, users, Alternation(2, 2, 1)))
    assert [(way, user.name) for way, user, _ in crossed] == [
        (way, f"user{i}") for _ in range(3) for i in range(3) for way in ("down", "up")]
    for _, user, message in crossed:
        assert all(type(tensor) is torch.Tensor for tensor in message.values())
        assert {user.model.roles[name] for name in message} == {GENERALIST}
        private = {p.data_ptr() for p in user.model.parameters()}
        assert not private & {tensor.data_ptr() for tensor in message.values()}
        assert not any(tensor.requires_grad or tensor.grad is not None for tensor in message.values())
    own = {"version", "refused", "bound", "noise", "generator"}
    assert vars(server).keys() == {"generalists", *own}  # and nothing else stays with the server
    for user in users:
        for way, counted in (("up", user.bytes_up), ("down", user.bytes_down)):
            assert counted == sum(size_of(message) for w, u, message in crossed if (w, u) == (way, user)) > 0


def test_specialists_and_routers_keep_their_bits_through_averaging_and_delivery():
    server, users = federation()
    for user in users:
        user.learn(Alternation(2, 2, 1))
    own = [{name: p.clone() for name, p in user.model.having(SPECIALIST, ROUTER).items()} for user in users]
    server.generalists = average([user.answer() for user in users], [1, 1, 1])
    for user, before in zip(users, own, strict=True):
        server.deliver(user)
        assert all(torch.equal(user.model.having(SPECIALIST, ROUTER)[name], before[name]) for name in before)
        assert all(torch.equal(p, server.generalists[name]) for name, p in user.model.having(GENERALIST).items())


def test_users_start_a_round_from_the_same_generalists_and_their_own_specialists():
    server, users = federation(specialists=(1, 1))
    for user in users:
        server.deliver(user)
    one, two = (user.model for user in users)
    assert all(torch.equal(p, two.having(GENERALIST)[name]) for name, p in one.having(GENERALIST).items())
    assert not any(torch.equal(p, two.having(SPECIALIST)[name])
                   for name, p in one.having(SPECIALIST).items() if p.ndim == 2)


def test_bytes_are_those_of_the_tensors_sent_and_nothing_is_sent_twice():
    server, users = federation()
    for _ in range(2):
        list(federated_round(server, users, Alternation(1, 5, 1)))
    for user in users:
        server.deliver(user)
        server.deliver(user)  # holds it already
        size = sum(4 * p.numel() for p in user.model.having(GENERALIST).values())
        assert size_of(user.answer()) == size
        assert user.bytes_up == (2 + 1) * size  # two rounds and the answer above
        assert user.bytes_down == 3 * size  # the start and two averages


def test_where_every_role_is_generalist_all_users_end_the_same():
    """FedAvg: after a round, users hold the same model, as far as they have the same experts."""
    server, users = federation((1, 1), roles={SPECIALIST: GENERALIST, ROUTER: GENERALIST})
    list(federated_round(server, users, Alternation(2, 1, 1)))
    for user in users:
        server.deliver(user)
    one, two = (dict(user.model.named_parameters()) for user in users)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_where_nothing_is_generalist_nothing_crosses():
    server, users = federation((1, 1), roles={GENERALIST: SPECIALIST})
    list(federated_round(server, users, Alternation(2, 1, 1)))
    assert server.generalists == {}
    assert [(user.bytes_up, user.bytes_down) for user in users] == [(0, 0)] * 2
    assert set(users[0].model.roles.values()) == {SPECIALIST, ROUTER}


# --- absent users and poisoned answers -------------------------------------------------------------------------------

def average_of(users: list[User], names) -> dict:
    return average([{name: user.model.having(GENERALIST)[name].detach() for name in names} for user in users],
                   [1] * len(users))


def test_the_average_is_over_those_who_answer_and_the_others_take_it_when_they_are_called_again():
    server, users = federation()
    for user in users:
        server.deliver(user)
    list(federated_round(server, users[:2], Alternation(2, 1, 1), lost=users[:1]))  # the third isn't called
    answered = users[1].model.having(GENERALIST)
    assert all(torch.equal(server.generalists[name], answered[name]) for name in answered)
    assert (users[0].bytes_up, users[2].bytes_up) == (0, 0)
    before = users[2].bytes_down
    list(federated_round(server, users[2:], Alternation(1, 1, 1)))
    assert users[2].bytes_down > before


def test_a_round_without_answers_passes_and_the_generalists_stay():
    server, users = federation()
    before = {name: tensor.clone() for name, tensor in server.generalists.items()}
    list(federated_round(server, users, Alternation(1, 1, 1), lost=users))
    assert server.version == 0
    assert all(torch.equal(server.generalists[name], before[name]) for name in before)
    for user in users:  # and whoever has learned since takes them again
        server.deliver(user)
        assert all(torch.equal(tensor, before[name]) for name, tensor in user.model.having(GENERALIST).items())


@pytest.mark.parametrize(("poison", "reason"), [
    (lambda answer: answer | {"norm.weight": torch.full((8,), torch.nan)}, "norm.weight isn't finite"),
    (lambda answer: answer | {"norm.weight": torch.full((8,), torch.inf)}, "norm.weight isn't finite"),
    (lambda answer: answer | {"norm.weight": torch.full((8,), 3e38)}, "norm.weight isn't finite, or beyond 1e.30"),
    (lambda answer: answer | {"norm.weight": torch.zeros(9)}, "norm.weight has shape .9,., not .8,."),
    (lambda answer: answer | {"norm.weight": torch.zeros(8).double()}, "norm.weight isn't torch.float32"),
    (lambda answer: answer | {"norm.weight": [0.0] * 8}, "norm.weight isn't torch.float32"),
    (lambda answer: answer | {"other": torch.zeros(1)}, "not the tensors that are wanted"),
    (lambda answer: {}, "not the tensors that are wanted"),
    (lambda answer: None, "not the tensors that are wanted"),
])
def test_a_poisoned_answer_is_refused_and_named_and_the_round_goes_on(poison, reason):
    server, users = federation()
    sound, answer = users[:2], users[2].answer
    users[2].answer = lambda: poison(answer())
    list(federated_round(server, users, Alternation(1, 1, 1)))
    (name, why), = server.refused
    assert name == "user2"
    assert re.search(reason, why)
    names = [name for name in users[0].shared if name in server.generalists]
    expected = average_of(sound, names)
    assert all(torch.equal(server.generalists[name], expected[name]) for name in names)


def test_a_clipped_update_has_the_bounds_norm_and_its_direction_and_a_short_one_stays():
    held = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    answer = {"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[7.0]])}  # an update of (0, 3, 4), of norm 5
    clipped = clip(answer, held, 2.5)
    assert torch.allclose(clipped["a"], torch.tensor([1.0, 3.5]))
    assert torch.allclose(clipped["b"], torch.tensor([[5.0]]))
    assert all(torch.equal(clip(answer, held, 5.1)[name], answer[name]) for name in answer)


def test_a_million_times_the_update_moves_the_average_by_no_more_than_the_bound():
    server, users = federation()
    server.bound = 0.5
    answer = users[0].answer

    def boosted():
        return {name: server.generalists[name] + 1e6 * (tensor - server.generalists[name])
                for name, tensor in answer().items()}
    users[0].answer = boosted
    before = {name: tensor.clone() for name, tensor in server.generalists.items()}
    list(federated_round(server, users, Alternation(1, 1, 1)))
    moved = sum((server.generalists[name] - before[name]).square().sum() for name in before).sqrt()
    assert 0 < moved <= 0.5 + 1e-4


def test_noise_has_the_spread_that_it_should():
    """z = 2, C = 3, two answers: a standard deviation of 3."""
    model = GPT(GPTConfig(500, 4, 1, 1, 32, specialists=0), torch.Generator().manual_seed(0))
    plain, noisy = (Server(model.having(GENERALIST), 3.0, z, torch.Generator().manual_seed(1)) for z in (0, 2.0))
    users = [gpt_user(name, 0, 0) for name in "ab"]
    message = {name: tensor.clone() for name, tensor in plain.generalists.items()}
    for server in (plain, noisy):
        for user in users:
            user.model = model
        server.combine([(user, message) for user in users])
    difference = torch.cat([(noisy.generalists[name] - plain.generalists[name]).flatten() for name in message])
    assert difference.std().item() == pytest.approx(3, rel=0.03)
    assert abs(difference.mean().item()) < 0.1
