"""The parts of rivals: worked by hand, or against an independent formula."""

import math

import pytest
import torch

import rivals
from bilevel import Rhythm
from federated import User, federated_round, size_of
from methods import METHODS
from model import GENERALIST, ROUTER, SPECIALIST, Routing
from rivals import adapters_of, flexlora_average, hetlora_average, kept_rank, load_balancing_loss
from tiny import Batches, bits, play, same, seeded, tiny_user


def lora_user(method: str = "comigs", seed: int = 0, **config):
    return tiny_user(method, seed, **{"expert": "lora", "lora_rank": 4} | config)


def adapter(A: list, B: list) -> dict:
    return {"up.lora_A": torch.tensor(A), "up.lora_B": torch.tensor(B)}


def random_adapter(rank: int, seed: int, name: str = "up") -> dict:
    generator = seeded(seed)
    A = torch.randn(rank, 5, generator=generator, dtype=torch.float64)
    B = torch.randn(7, rank, generator=generator, dtype=torch.float64)
    return {f"{name}.lora_A": A, f"{name}.lora_B": B}


def product(message: dict, name: str = "up", alpha: float = 16) -> torch.Tensor:
    """s·BA."""
    A, B = message[f"{name}.lora_A"], message[f"{name}.lora_B"]
    return alpha / math.sqrt(len(A)) * B @ A


def shapes_of(message: dict) -> dict:
    return {name: tensor.shape for name, tensor in message.items()}


# --- HetLoRA


def test_hetlora_average_worked_by_hand():
    """Ranks 1 and 2. BA = [[3, 0], [4, 0]] has the norm 5, BA = diag(9, 12) 15: weights ¼ and ¾."""
    one = adapter([[1.0, 0]], [[3.0], [4]])
    two = adapter([[1.0, 0], [0, 1]], [[9.0, 0], [0, 12]])
    means = hetlora_average([one, two], [1, 1])
    assert torch.allclose(means["up.lora_A"], torch.tensor([[1.0, 0], [0, 0.75]]))
    assert torch.allclose(means["up.lora_B"], torch.tensor([[7.5, 0], [1, 9]]))


def test_hetlora_average_counts_the_users_weights_too():
    """Norms 2 and 1, weights 1 and 2: the plain mean of B = 2 and 1."""
    means = hetlora_average([adapter([[1.0]], [[2.0]]), adapter([[1.0]], [[1.0]])], [1, 2])
    assert means["up.lora_B"].item() == pytest.approx(1.5)


def test_hetlora_average_of_adapters_that_change_nothing_is_their_mean():
    zero = adapter([[1.0, 2]], [[0.0], [0]])
    assert same(zero, hetlora_average([zero, zero], [1, 1]))


@pytest.mark.parametrize("merge", [hetlora_average, flexlora_average])
def test_adapters_that_only_some_users_have_are_averaged_over_those(merge):
    extra = random_adapter(2, 2, "extra")
    means = merge([random_adapter(2, 0), random_adapter(2, 1) | extra], [1, 1])
    alpha = 16
    if merge is flexlora_average:  # the scale is in its product
        alpha = math.sqrt(len(means["extra.lora_A"]))
    assert torch.allclose(product(means, "extra", alpha), product(extra, "extra"))


def test_hetlora_sends_each_user_its_ranks_and_keeps_those_of_absent_users():
    before = random_adapter(4, 0)
    small = random_adapter(2, 1)
    server = METHODS["hetlora"].server(before)
    server.generalists |= server.merge([small], [1])
    A = torch.cat([small["up.lora_A"], before["up.lora_A"][2:], torch.zeros(1, 5)])
    B = torch.cat([small["up.lora_B"], before["up.lora_B"][:, 2:], torch.zeros(7, 1)], 1)
    for rank in (1, 3, 5):
        message = server.broadcast(shapes_of(random_adapter(rank, 0)))
        torch.testing.assert_close(message, {"up.lora_A": A[:rank], "up.lora_B": B[:, :rank]})


def test_hetloras_penalty_worked_by_hand():
    """Ranks 2, the second is the tail: 8 adapters of experts (2 layers, 2 experts, 2 matrices), not
    attention's 4. ‖A[1]‖ = 5, ‖B[:, 1]‖ = 2, λ = 0.01."""
    user = lora_user("hetlora", lora_rank=2)
    batch = next(Batches(0))
    with torch.no_grad():
        for each in adapters_of(user.model):
            each.lora_A[1] = 0
            each.lora_A[1, :2] = torch.tensor([3.0, 4])
            each.lora_B[:, 1] = 0
            each.lora_B[0, 1] = 2
    loss, objective = user.lower.objective(user.model, *batch)
    assert loss.item() == user.model(*batch)[1].item()
    assert (objective - loss).item() == pytest.approx(0.01 * 8 * 5 * 2)


def test_self_pruning_keeps_all_but_a_hundredth_of_the_ranks_and_at_least_one():
    assert [kept_rank(rank, 0.99) for rank in (1, 2, 8, 200)] == [1, 1, 7, 198]


@pytest.mark.parametrize(("factor", "rank"), [(0.5, 3), (2.0, 4)])
def test_ranks_are_pruned_for_good_if_their_tail_shrinks(factor, rank, monkeypatch):
    """From rank 4, of which γr keeps 3. Kept numbers and moments stay; messages follow."""
    users = [lora_user("hetlora", seed) for seed in (0, 1)]
    expected = {}

    def local_update(user, rhythm):
        user.lower.step(user.model)
        for each in adapters_of(user.model):
            each.lora_A.data[3:] *= factor
            for parameter, dim in ((each.lora_A, 0), (each.lora_B, 1)):
                moments = user.lower.optimizer.state[parameter]
                tensors = (parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"])
                cut = [tensor.narrow(dim, 0, rank).clone() for tensor in tensors]
                expected[user, parameter] = cut
        return 0.0

    monkeypatch.setattr(User, "local_update", local_update)
    server = METHODS["hetlora"].server(users[0].upload())
    play(server, users, rounds=1)
    monkeypatch.undo()
    for user in users:
        for name, shape in user.shared.items():
            assert shape[0 if name.endswith("lora_A") else 1] == rank
    for (user, parameter), tensors in expected.items():
        moments = user.lower.optimizer.state[parameter]
        now = (parameter, moments["exp_avg"], moments["exp_avg_sq"])
        assert all(torch.equal(a, b) for a, b in zip(now, tensors, strict=True))
    losses = federated_round(server, users, Rhythm(local_steps=2, router_every=1, router_steps=1))
    assert all(math.isfinite(loss) for loss in losses.values())


# --- FlexLoRA


def test_flexlora_sends_each_user_the_best_approximation_of_its_rank():
    """The oracle projects W on the eigenvectors of W Wᵀ with the largest eigenvalues."""
    ranks = (1, 2, 4)
    weights = [1.0, 2.0, 3.0]
    messages = [random_adapter(rank, rank) for rank in ranks]
    server = METHODS["flexlora"].server(messages[-1])
    server.generalists = server.merge(messages, weights)
    W = 0
    for message, weight in zip(messages, weights, strict=True):
        W = W + weight * product(message) / 6
    _, vectors = torch.linalg.eigh(W @ W.T)  # ascending
    for rank, message in zip(ranks, messages, strict=True):
        sent = server.broadcast(shapes_of(message))
        assert shapes_of(sent) == shapes_of(message)
        best = vectors[:, -rank:]
        assert torch.allclose(product(sent), best @ best.T @ W)


# --- PCL


def test_pcl_mixes_by_the_softmax_of_minus_perplexity_worked_by_hand(monkeypatch):
    """Perplexities 1, 1 + ln 2 and 1 + ln 4: weights 4/7, 2/7 and 1/7 of models of 1, 3 and 5."""
    user = lora_user("pcl")
    losses = {1.0: 0.0, 3.0: math.log(1 + math.log(2)), 5.0: math.log(1 + math.log(4))}

    def evaluate(model, batches):
        (number,) = {p.mean().item() for p in model.having(GENERALIST).values()}
        return losses[number], None

    monkeypatch.setattr(rivals, "evaluate", evaluate)
    messages = []
    for number in losses:
        messages.append({name: torch.full(shape, number) for name, shape in user.shared.items()})
    server = METHODS["pcl"].server(messages[0])
    server.generalists = server.merge(messages, [1, 1, 1])
    user.download(server.broadcast(user.shared))
    mixed = (4 * 1 + 2 * 3 + 1 * 5) / 7
    for parameter in user.model.having(GENERALIST).values():
        assert torch.allclose(parameter, torch.full_like(parameter, mixed))
    assert user.bytes_down == 3 * size_of(messages[0])  # all three models


# --- pFedMoE


def test_the_load_balancing_loss_worked_by_hand():
    """Three experts, two tokens. Choices 0, 1 and 0, 2: f = ½, ¼, ¼. A softmax of ½, ¼, ¼ and of
    ¼, ¼, ½: P = ⅜, ¼, ⅜. E Σ f P = 3 (12 + 4 + 6) / 64."""
    logits = torch.tensor([[2.0, 1, 1], [1, 1, 2]]).log()
    routing = Routing(torch.full((2, 2), 0.5), torch.tensor([[0, 1], [0, 2]]), logits)
    assert load_balancing_loss(routing).item() == pytest.approx(3 * 22 / 64)


def test_pfedmoe_adds_a_hundredth_of_the_mean_balancing_loss_and_reports_the_loss_alone():
    """The oracle computes them from what the routers see, which is the normalized input."""
    user = lora_user("pfedmoe", specialists=2)
    batch = next(Batches(0))
    seen = []
    for block in user.model.blocks:
        block.moe_norm.register_forward_hook(
            lambda module, inputs, output: seen.append(output.flatten(0, 1))
        )
    loss, objective = user.lower.objective(user.model, *batch)
    balancing = 0
    for block, normalized in zip(user.model.blocks, seen, strict=True):
        balancing += load_balancing_loss(block.moe.router(normalized)).item()
    assert (objective - loss).item() == pytest.approx(0.01 * balancing / 2)  # two layers
    reported = user.lower.step(user.model).item()
    assert reported == loss.item() == lora_user(specialists=2).model(*batch)[1].item()


# --- FDLoRA, and comigs-apart


@pytest.mark.parametrize("method", ["fdlora", "comigs-apart"])
def test_separate_experts_learn_each_without_the_other(method):
    """Each expert's gradient is that of a model in which it has all the weight."""
    user = lora_user(method)
    batch = next(Batches(7))
    reported, objective = user.lower.objective(user.model, *batch)
    objective.backward()
    alone = []
    for role, gates in ((GENERALIST, [1.0, 0.0]), (SPECIALIST, [0.0, 1.0])):
        _, loss = user.model(*batch, torch.tensor([gates] * 2))
        alone.append(loss.item())
        experts = [p for name, p in user.model.having(role).items() if "experts" in name]
        expected = torch.autograd.grad(loss, experts)
        torch.testing.assert_close([p.grad for p in experts], list(expected))
    assert reported.item() == pytest.approx(sum(alone) / 2)


def test_of_separate_experts_the_router_learns_from_their_mixture():
    """Exactly as in comigs with the same experts."""
    user, plain = lora_user("comigs-apart"), lora_user("comigs")
    user.lower.step(user.model)
    plain.model.load_state_dict(user.model.state_dict())
    before = bits(plain, ROUTER)
    assert user.upper.step(user.model).item() == plain.upper.step(plain.model).item()
    assert same(bits(user, ROUTER), bits(plain, ROUTER))
    assert not same(bits(plain, ROUTER), before)


def test_fdlora_fuses_with_the_weight_of_least_loss():
    """Evenly over two generalists and over two specialists."""
    user = lora_user("fdlora", specialists=2, generalists=2)
    for _ in range(20):
        user.lower.step(user.model)
    user.before_evaluation()
    losses = []
    for w in range(11):
        gates = [w / 20, w / 20, (10 - w) / 20, (10 - w) / 20]
        batch = next(user.validation_windows())
        losses.append(user.model(*batch, torch.tensor([gates] * 2))[1].item())
    best = losses.index(min(losses))
    expected = [best / 20, best / 20, (10 - best) / 20, (10 - best) / 20]
    assert user.fixed_gates.tolist() == [pytest.approx(expected)] * 2
    assert min(losses) < losses[5]


# --- where methods are equal


@pytest.mark.parametrize(
    ("one", "two", "config", "equal"),
    [
        ("pcl", "fedavg", dict(seed=0), True),  # with the same text, all users send the same model
        ("comigs-joint", "fedavg", dict(specialists=0), True),  # one expert, whose gate is 1
        ("pfedmoe", "comigs-joint", dict(specialists=2, top_k=3), True),  # all experts are selected
        ("pfedmoe", "comigs-joint", dict(specialists=2, top_k=2), False),
    ],
)
def test_where_two_methods_are_equal(one, two, config, equal):
    ends = []
    for method in (one, two):
        users = [lora_user(method, **{"seed": seed} | config) for seed in (0, 1)]
        start = lora_user(two, **config).model.state_dict()
        for user in users:
            user.model.load_state_dict(start, strict=False)
        server = METHODS[method].server(users[0].upload(), METHODS[method].hyper)
        play(server, users)
        users[1].set_generalists(server.broadcast(users[1].shared))
        ends.append(users[1].model.having(GENERALIST))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(p, ends[1][name]) for name, p in ends[0].items()) == equal
