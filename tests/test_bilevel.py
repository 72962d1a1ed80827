"""The two levels: what each step moves, what it learns from, and that nothing leaks between them."""

import itertools
import math

import pytest
import torch

from bilevel import Alternation, Level, alternate, constant, cosine, evaluate
from model import GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig

VOCAB, B, T = 13, 2, 5


class Stream:
    """Random batches that remembers the last one it gave."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.given = 0

    def __next__(self):
        self.given += 1
        self.last = torch.randint(VOCAB, (2, B, T), generator=self.generator).unbind()
        return self.last


def one_user(specialists: int = 2) -> tuple[GPT, Level, Level]:
    model = GPT(GPTConfig(VOCAB, T, 2, 2, 8, specialists=specialists), torch.Generator().manual_seed(0)).double()
    lower = Level(model.having(GENERALIST, SPECIALIST), Stream(1), 1e-2, 0.1, constant)
    upper = Level(model.having(ROUTER), Stream(2), 1e-2, 0.0, constant)
    return model, lower, upper


def test_every_step_of_either_level_uses_its_own_batch_gradient_and_nothing_else():
    """Over several alternations, when an optimizer steps, `.grad` is exactly the gradient of that level's newest batch,
    computed afresh, and the other level has none. A single validation token in an expert's gradient, or a training
    token in a router's, would show."""
    model, lower, upper = one_user()
    checked = {"lower": 0, "upper": 0}

    def watch(name: str, level: Level, other: Level):
        def before_step(*_):
            _, loss = model(*level.batches.last)
            expected = torch.autograd.grad(loss, level.parameters, allow_unused=True)
            for parameter, gradient in zip(level.parameters, expected, strict=True):
                assert torch.equal(parameter.grad, gradient)
            assert all(parameter.grad is None for parameter in other.parameters)
            checked[name] += 1
        level.optimizer.register_step_pre_hook(before_step)

    watch("lower", lower, upper)
    watch("upper", upper, lower)
    for _ in range(3):
        alternate(model, lower, upper, Alternation(4, 2, 3))
    assert checked == {"lower": 12, "upper": 18}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("which", ["lower", "upper"])
def test_a_step_moves_its_own_level_only(which):
    model, lower, upper = one_user()
    level = {"lower": lower, "upper": upper}[which]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    level.step(model)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    own = model.having(ROUTER) if which == "upper" else model.having(GENERALIST, SPECIALIST)
    assert moved == own.keys()


def test_validation_text_reaches_the_experts_only_through_the_router():
    """With other validation text, but routers that don't move, the experts end with the same bits."""
    ends = []
    for seed in (2, 3):
        model, lower, upper = one_user()
        upper.batches = Stream(seed)
        for group in upper.optimizer.param_groups:
            group["lr"] = 0.0
        upper.schedule.base_lrs = [0.0]
        alternate(model, lower, upper, Alternation(6, 2, 3))
        assert upper.steps == 9
        ends.append(model.having(GENERALIST, SPECIALIST))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_alternation_equals_a_naive_one():
    """Against separate optimizers fed with torch.autograd.grad, in the order that the paper gives."""
    model, lower, upper = one_user()
    naive, _, _ = one_user()
    experts, router = naive.having(GENERALIST, SPECIALIST), naive.having(ROUTER)
    settings = dict(betas=(0.9, 0.95))
    optimizers = {"experts": torch.optim.AdamW(experts.values(), 1e-2, weight_decay=0.1, **settings),
                  "router": torch.optim.AdamW(router.values(), 1e-2, weight_decay=0.0, **settings)}
    train, valid = Stream(1), Stream(2)

    def naive_step(parameters, optimizer, batch):
        _, loss = naive(*batch)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()

    for step in range(1, 7):
        naive_step(list(experts.values()), optimizers["experts"], next(train))
        if step % 3 == 0:
            for _ in range(2):
                naive_step(list(router.values()), optimizers["router"], next(valid))
    for _ in range(3):
        alternate(model, lower, upper, Alternation(2, 3, 2))
    for ours, oracle in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-10)


def test_router_steps_are_due_by_the_users_life_not_by_the_round():
    model, lower, upper = one_user()
    due = []
    for _ in range(5):
        alternate(model, lower, upper, Alternation(local_steps=2, router_every=3, router_steps=4))
        due.append(upper.steps)
    assert due == [0, 4, 8, 8, 12]  # after expert steps 3, 6 and 9 of 10
    assert (lower.batches.given, upper.batches.given) == (10, 12)


def test_without_an_upper_level_no_validation_batch_is_drawn():
    model, lower, upper = one_user()
    alternate(model, lower, None, Alternation(4, 1, 1))
    assert upper.batches.given == 0


def test_cosine_warms_up_and_ends_at_a_tenth():
    factor = cosine(steps=110, warmup=10)
    assert [factor(step) for step in (0, 4)] == [1 / 11, 5 / 11]
    assert factor(10) == 1
    assert math.isclose(factor(60), 0.55)
    assert math.isclose(factor(110), 0.1)
    assert math.isclose(factor(10_000), 0.1)
    assert constant(7) == 1


def test_evaluate_weighs_every_token_alike_and_returns_mean_gates():
    """Batches of different sizes: the mean is over targets, not over batches."""
    model, _, _ = one_user()
    batches = [torch.randint(VOCAB, (2, 3, T)).unbind(), torch.randint(VOCAB, (2, 1, 2)).unbind()]
    loss, gates = evaluate(model, iter(batches))
    losses = [model(*batch)[1].item() for batch in batches]
    assert math.isclose(loss, (15 * losses[0] + 2 * losses[1]) / 17)
    assert gates.shape == (2, 3)
    torch.testing.assert_close(gates.sum(1), torch.ones(2, dtype=torch.float64))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_learning_lowers_the_loss_on_a_batch_that_repeats():
    model, lower, upper = one_user()
    batch = next(Stream(9))
    lower.batches = upper.batches = itertools.repeat(batch)
    before = model(*batch)[1]
    alternate(model, lower, upper, Alternation(20, 5, 2))
    assert model(*batch)[1] < 0.7 * before
