"""The two levels: what each step moves, what it learns from, and that nothing leaks between them."""

import pytest
import torch

from bilevel import Level, Rhythm, alternate, constant, cosine, evaluate
from federated import User
from model import GENERALIST, ROUTER, SPECIALIST, dense_gates
from tiny import Batches, seeded, tiny, tiny_user


def play(user: User, rounds: int, *rhythm: int) -> list[float]:
    return [alternate(user.model, user.lower, user.upper, Rhythm(*rhythm)).item() for _ in range(rounds)]


def test_every_step_of_either_level_uses_its_own_batch_gradient_and_nothing_else():
    """Over several alternations, when an optimizer steps, `.grad` is exactly the gradient of that level's newest batch,
    computed afresh, and the other level has none. A single validation token in an expert's gradient, or a training
    token in a router's, would show."""
    user, checked = tiny_user(specialists=2), []

    def watch(level: Level, other: Level):
        def before_step(*_):
            _, loss = user.model(*level.batches.taken[-1])
            expected = torch.autograd.grad(loss, level.parameters, allow_unused=True)
            for parameter, gradient in zip(level.parameters, expected, strict=True):
                assert torch.equal(parameter.grad, gradient)
            assert all(parameter.grad is None for parameter in other.parameters)
            checked.append(level)
        level.optimizer.register_step_pre_hook(before_step)

    watch(user.lower, user.upper)
    watch(user.upper, user.lower)
    play(user, 3, 4, 2, 3)
    assert (checked.count(user.lower), checked.count(user.upper)) == (12, 18)
    assert all(parameter.grad is None for parameter in user.model.parameters())


def test_validation_text_reaches_the_experts_only_through_the_router():
    """With other validation text, but routers that don't move, the experts end with the same bits."""
    ends = []
    for seed in (2, 3):
        user = tiny_user(specialists=2)
        user.upper = Level(user.model.having(ROUTER), Batches(seed), 0.0, 0.0, constant)
        play(user, 1, 6, 2, 3)
        assert user.upper.steps == 9
        ends.append(user.model.having(GENERALIST, SPECIALIST))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_alternation_equals_a_naive_one():
    """Against separate optimizers fed with torch.autograd.grad, in the order that the paper gives, with a learning rate
    of the experts that changes after every step of theirs. Each round reports its mean training loss."""
    factor = cosine(6, 2)
    user, naive = tiny_user(specialists=2, schedule=factor), tiny_user(specialists=2).model
    experts, router = (list(naive.having(*roles).values()) for roles in ((GENERALIST, SPECIALIST), (ROUTER,)))
    of_experts = torch.optim.AdamW(experts, betas=(0.9, 0.95), weight_decay=0.1)
    of_router = torch.optim.AdamW(router, 1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    train, valid, losses = Batches(0), Batches(100), []

    def naive_step(parameters, optimizer, batch) -> float:
        _, loss = naive(*batch)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        return loss.item()

    for step in range(6):
        of_experts.param_groups[0]["lr"] = 1e-2 * factor(step)
        losses.append(naive_step(experts, of_experts, next(train)))
        if step in (2, 5):  # the third and the sixth
            for _ in range(2):
                naive_step(router, of_router, next(valid))
    assert play(user, 3, 2, 3, 2) == pytest.approx([sum(losses[i:i + 2]) / 2 for i in (0, 2, 4)], abs=1e-12)
    for ours, oracle in zip(user.model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-10)


def test_router_steps_are_due_by_the_users_life_not_by_the_round():
    """And never where there is no upper level. A step takes one batch."""
    user, due = tiny_user(), []
    for _ in range(5):
        play(user, 1, 2, 3, 4)
        due.append(user.upper.steps)
    assert due == [0, 4, 8, 8, 12]  # after expert steps 3, 6 and 9 of 10
    alternate(user.model, user.lower, None, Rhythm(4, 1, 1))
    assert [len(level.batches.taken) for level in (user.lower, user.upper)] == [14, 12]


def test_cosine_warms_up_and_ends_at_a_tenth():
    factor = cosine(steps=110, warmup=10)
    assert [factor(step) for step in (0, 4, 10)] == [1 / 11, 5 / 11, 1]
    assert [factor(step) for step in (60, 110, 10_000)] == pytest.approx([0.55, 0.1, 0.1])


@pytest.mark.parametrize("given", [None, torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])])
def test_evaluate_takes_means_over_tokens_not_batches_of_the_loss_and_of_each_layers_gates(given):
    model, generator = tiny(specialists=2), seeded(0)
    batches = [torch.randint(11, (2, *size), generator=generator).unbind() for size in ((3, 6), (1, 2))]
    loss, gates = evaluate(model, iter(batches), given)
    losses = [model(*batch, given)[1].item() for batch in batches]
    assert loss == pytest.approx((18 * losses[0] + 2 * losses[1]) / 20)
    for layer in range(2):
        each = torch.cat([dense_gates(model.trunk(idx, given)[1][layer], 3) for idx, _ in batches])
        torch.testing.assert_close(gates[layer], each.mean(0))
