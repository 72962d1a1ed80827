"""The two levels: what each step moves, which text it learns from, and that nothing leaks."""

import itertools

import pytest
import torch

from bilevel import Level, Rhythm, alternate, constant, cosine, dense_gates, evaluate
from federated import User
from model import BACKBONE, GENERALIST, ROUTER, SPECIALIST
from tiny import Batches, seeded, tiny, tiny_user


def play(user: User, rounds: int, rhythm: Rhythm) -> list[float]:
    """Local work of some rounds. Returns each round's training loss."""
    return [user.local_update(rhythm) for _ in range(rounds)]


def test_every_step_of_either_level_uses_its_own_batchs_gradient_and_nothing_else():
    """When an optimizer steps, `.grad` is exactly the gradient of that level's newest batch.

    The oracle computes it afresh, and the other level has none. A single validation token in an
    expert's gradient, or a training token in a router's, would show.
    """
    user = tiny_user(specialists=2)
    checked = []

    def watch(level: Level, other: Level) -> None:
        def before_step(*_) -> None:
            _, loss = user.model(*level.batches.taken[-1])
            expected = torch.autograd.grad(loss, level.parameters, allow_unused=True)
            for parameter, gradient in zip(level.parameters, expected, strict=True):
                assert torch.equal(parameter.grad, gradient)
            for parameter in other.parameters:
                assert parameter.grad is None
            checked.append(level)

        level.optimizer.register_step_pre_hook(before_step)

    watch(user.lower, user.upper)
    watch(user.upper, user.lower)
    play(user, rounds=3, rhythm=Rhythm(local_steps=4, router_every=2, router_steps=3))
    assert checked.count(user.lower) == 12
    assert checked.count(user.upper) == 18
    assert all(parameter.grad is None for parameter in user.model.parameters())


def test_validation_text_reaches_the_experts_only_through_the_router():
    """With other validation text, but routers that don't move, experts end with the same bits."""
    ends = []
    for seed in (2, 3):
        user = tiny_user(specialists=2)
        user.upper = Level(user.model.having(ROUTER), Batches(seed), lr=0.0)
        play(user, rounds=1, rhythm=Rhythm(local_steps=6, router_every=2, router_steps=3))
        assert user.upper.steps == 9
        ends.append(user.model.having(GENERALIST, SPECIALIST))
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name])


def test_alternation_equals_a_naive_one():
    """Separate optimizers, gradients from torch.autograd.grad, the order of the paper.

    The experts' learning rate changes after every step of theirs. Each round returns its mean
    training loss.
    """
    factor = cosine(steps=6, warmup=2)
    user = tiny_user(specialists=2, schedule=factor)
    naive = tiny_user(specialists=2).model
    experts = list(naive.having(GENERALIST, SPECIALIST).values())
    router = list(naive.having(ROUTER).values())
    matrices = [parameter for parameter in experts if parameter.dim() > 1]
    embeddings = [naive.token_embedding.weight, naive.position_embedding.weight]
    decayed = [p for p in matrices if all(p is not embedding for embedding in embeddings)]
    others = [p for p in experts if all(p is not matrix for matrix in decayed)]
    groups = [dict(params=decayed, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    expert_optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    router_optimizer = torch.optim.AdamW(router, 1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    train, valid = Batches(0), Batches(100)

    def naive_step(parameters, optimizer, batch) -> float:
        _, loss = naive(*batch)
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return loss.item()

    losses = []
    for step in range(6):
        for group in expert_optimizer.param_groups:
            group["lr"] = 1e-2 * factor(step)
        losses.append(naive_step(experts, expert_optimizer, next(train)))
        if step in (2, 5):  # the third and the sixth
            for _ in range(2):
                naive_step(router, router_optimizer, next(valid))
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    rhythm = Rhythm(local_steps=2, router_every=3, router_steps=2)
    assert play(user, rounds=3, rhythm=rhythm) == pytest.approx(means, abs=1e-12)
    for ours, oracle in zip(user.model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-10)


def test_router_steps_are_due_by_the_steps_of_all_rounds():
    """After expert steps 3, 6 and 9 of 10. A step takes one batch."""
    user = tiny_user()
    due = []
    for _ in range(5):
        play(user, rounds=1, rhythm=Rhythm(local_steps=2, router_every=3, router_steps=4))
        due.append(user.upper.steps)
    assert due == [0, 4, 8, 8, 12]
    assert len(user.lower.batches.taken) == 10
    assert len(user.upper.batches.taken) == 12


def test_without_an_upper_level_only_experts_step():
    user = tiny_user()
    alternate(user.model, user.lower, None, Rhythm(local_steps=4, router_every=1, router_steps=1))
    assert user.lower.steps == 4
    assert user.upper.steps == 0


@pytest.mark.parametrize("kind", [{}, {"expert": "lora"}])
def test_weight_decay_shrinks_matrices_but_no_bias_norm_or_embedding(kind):
    """With a gradient of 0, AdamW multiplies by 1 − lr · decay = 0.99."""
    model = tiny(specialists=2, **kind)

    class Flat(Level):
        def objective(self, model, idx, targets):
            loss = 0 * sum(parameter.sum() for parameter in self.parameters)
            return loss, loss

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = itertools.repeat((None, None))
    for roles in ((GENERALIST, SPECIALIST), (ROUTER,)):
        Flat(model.having(*roles), batches, lr=0.1, weight_decay=0.1).step(model)
    undecayed = {"token_embedding.weight", "position_embedding.weight"}
    for name, parameter in model.named_parameters():
        trained = model.roles[name] != BACKBONE
        decayed = trained and parameter.dim() == 2 and name not in undecayed
        factor = 0.99 if decayed else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_cosine_warms_up_and_ends_at_a_tenth():
    factor = cosine(steps=110, warmup=10)
    assert [factor(step) for step in (0, 4, 10)] == [1 / 11, 5 / 11, 1]
    assert [factor(step) for step in (60, 110, 10_000)] == pytest.approx([0.55, 0.1, 0.1])
    assert constant(10_000) == 1.0


@pytest.mark.parametrize("gates", [None, torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])])
def test_evaluate_takes_means_over_tokens_not_batches(gates):
    """Of the loss, and of each layer's gates."""
    model = tiny(specialists=2)
    generator = seeded(0)
    batches = []
    for size in ((3, 6), (1, 2)):
        batches.append(torch.randint(11, (2, *size), generator=generator).unbind())
    mean_loss, mean_gates = evaluate(model, iter(batches), gates)
    losses = [model(*batch, gates)[1].item() for batch in batches]
    assert mean_loss == pytest.approx((18 * losses[0] + 2 * losses[1]) / 20)
    for layer in range(2):
        all_gates = [dense_gates(model.trunk(idx, gates)[1][layer], 3) for idx, _ in batches]
        torch.testing.assert_close(mean_gates[layer], torch.cat(all_gates).mean(0))
