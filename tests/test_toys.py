"""Small problems that show what the method does: a hand-solved bi-level one, and two users."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bilevel import Level, Rhythm, alternate, cosine
from federated import Server, User, federated_round
from model import GENERALIST, ROUTER, SPECIALIST
from tiny import seeded


class Quadratic(nn.Module):
    """Two numbers, with L_train = (Θ − φ)²/2 and L_valid = (Θ − 1)²/2 + φ²/2."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.8]))
        self.phi = nn.Parameter(torch.tensor([0.9]))

    def forward(self, split, _):
        if split == "train":
            return None, (self.theta - self.phi).square().sum() / 2
        return None, (self.theta - 1).square().sum() / 2 + self.phi.square().sum() / 2


def bilevel_loss(phi: float) -> float:
    """L_valid(Θ*(φ), φ), the true upper level. The lower level's solution is Θ*(φ) = φ."""
    model = Quadratic()
    with torch.no_grad():
        model.theta.fill_(phi)
        model.phi.fill_(phi)
    return model("valid", None)[1].item()


def test_where_the_alternation_ends_and_how_far_that_is_from_the_bilevel_optimum():
    """Worked by hand.

    The true problem: Θ*(φ) = φ, so L_valid(Θ*(φ), φ) = (φ − 1)²/2 + φ²/2 is least at φ = Θ = 1/2.
    Its value there is 1/4.

    The alternation ends where ∂L_train/∂Θ = Θ − φ = 0 and, with Θ held fixed, ∂L_valid/∂φ = φ = 0:
    at φ = Θ = 0, a distance of 1/2 in each, with L_valid = 1/2. The hypergradient that it drops is
    (Θ − 1) · dΘ*/dφ = −1 there.
    """
    model = Quadratic()
    schedule = cosine(steps=1500, warmup=0)
    lower = Level({"theta": model.theta}, itertools.repeat(("train", None)), 0.02, 0.0, schedule)
    upper = Level({"phi": model.phi}, itertools.repeat(("valid", None)), 0.02, 0.0, schedule)
    alternate(model, lower, upper, Rhythm(local_steps=1500, router_every=3, router_steps=3))
    assert model.theta.item() == pytest.approx(0, abs=0.01)
    assert model.phi.item() == pytest.approx(0, abs=0.01)
    assert model("valid", None)[1].item() == pytest.approx(1 / 2, abs=0.01)
    optimum = min((i / 100 for i in range(-100, 101)), key=bilevel_loss)
    assert optimum == 1 / 2
    assert bilevel_loss(optimum) == pytest.approx(1 / 4)


class Unigram(nn.Module):
    """A generalist and a specialist that guess the next token without looking, and their gates."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.numbers = nn.ParameterDict(
            {
                GENERALIST: torch.zeros(vocab_size),
                SPECIALIST: torch.zeros(vocab_size),
                ROUTER: torch.zeros(2),
            }
        )

    def having(self, *roles: str) -> dict[str, nn.Parameter]:
        return {role: self.numbers[role] for role in roles}

    @property
    def gates(self) -> torch.Tensor:
        return self.numbers[ROUTER].softmax(0)

    def forward(self, _, targets):
        experts = torch.stack([self.numbers[GENERALIST], self.numbers[SPECIALIST]])  # (2, V)
        logits = self.gates @ experts  # (V,)
        return None, F.cross_entropy(logits.expand(len(targets), -1), targets)


def generalist_shares(train: list[torch.Tensor], valid: list[torch.Tensor]) -> list[float]:
    """The generalist's gate of each user, after some rounds. Texts are (n,) tokens of 10."""
    users = []
    for number, (train_text, valid_text) in enumerate(zip(train, valid, strict=True)):
        model = Unigram(10)
        train_batches = itertools.repeat((None, train_text))
        valid_batches = itertools.repeat((None, valid_text))
        lower = Level(model.having(GENERALIST, SPECIALIST), train_batches, lr=0.05)
        upper = Level(model.having(ROUTER), valid_batches, lr=0.05)
        users.append(User(f"user{number}", model, lower, upper))
    server = Server(Unigram(10).having(GENERALIST))
    for _ in range(50):
        federated_round(server, users, Rhythm(local_steps=2, router_every=2, router_steps=2))
    return [user.model.gates[0].item() for user in users]


def test_generalists_get_more_weight_if_validation_text_is_a_mix_of_both_users():
    """One user's text is tokens 0 to 4, the other's 5 to 9."""
    texts = [torch.arange(5), torch.arange(5, 10)]
    own = generalist_shares(texts, valid=texts)
    mixed = generalist_shares(texts, valid=[torch.arange(10), torch.arange(10)])
    for own_share, mixed_share in zip(own, mixed, strict=True):
        assert own_share < 0.2
        assert mixed_share > 0.8


def test_a_router_taught_on_training_text_prefers_specialists_which_have_memorized_it():
    """Text is noise: ten tokens at random. Each user trains on twenty, and memorizes them."""
    train = [torch.randint(10, (20,), generator=seeded(seed)) for seed in (0, 1)]
    unseen = [torch.randint(10, (1000,), generator=seeded(seed)) for seed in (10, 11)]
    on_train = generalist_shares(train, valid=train)
    on_unseen = generalist_shares(train, valid=unseen)
    for train_share, unseen_share in zip(on_train, on_unseen, strict=True):
        assert train_share < 0.5 < unseen_share
