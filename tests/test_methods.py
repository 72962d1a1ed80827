"""Each method's own part: worked by hand, against an independent formula, or where two methods must fall together."""

import itertools
import math
from functools import partial

import pytest
import torch

import rivals
from bilevel import Level, Rhythm
from federated import User, federated_round, size_of
from methods import METHODS
from model import BACKBONE, GENERALIST, ROUTER, SPECIALIST, Routing
from rivals import adapters_of, flexlora_average, hetlora_average, kept_rank, load_balancing_loss
from support.errors import BadInput
from support.runs.settings import Settings
from support.server.guard import Guard
from tiny import Batches, bits, play, same, seeded, tiny_user

lora_user = partial(tiny_user, expert="lora", lora_rank=4)


def change(A: list, B: list) -> dict:
    return {"up.lora_A": torch.tensor(A), "up.lora_B": torch.tensor(B)}


def random_change(rank: int, seed: int, pair: str = "up") -> dict:
    generator = seeded(seed)
    return {f"{pair}.{factor}": torch.randn(shape, generator=generator, dtype=torch.float64)
            for factor, shape in (("A", (rank, 5)), ("B", (7, rank)))}


def product(message: dict, pair: str = "up", alpha: float = 16) -> torch.Tensor:
    A, B = message[f"{pair}.lora_A"], message[f"{pair}.lora_B"]
    return alpha / math.sqrt(len(A)) * B @ A


def test_hetlora_average_worked_by_hand():
    """Ranks 1 and 2. BA = [[3, 0], [4, 0]] has the norm 5, BA = diag(9, 12) the norm 15: weights 1/4 and 3/4."""
    means = hetlora_average([change([[1.0, 0]], [[3.0], [4]]), change([[1.0, 0], [0, 1]], [[9.0, 0], [0, 12]])], [1, 1])
    assert torch.allclose(means["up.lora_A"], torch.tensor([[1.0, 0], [0, 0.75]]))
    assert torch.allclose(means["up.lora_B"], torch.tensor([[7.5, 0], [1, 9]]))
    tokens = hetlora_average([change([[1.0]], [[2.0]]), change([[1.0]], [[1.0]])], [1, 2])  # norms 2 and 1
    assert tokens["up.lora_B"].item() == pytest.approx(1.5)
    zero = change([[1.0, 2]], [[0.0], [0]])
    assert same(zero, hetlora_average([zero, zero], [1, 1]))


@pytest.mark.parametrize("merge", [hetlora_average, flexlora_average])
def test_changes_that_only_some_users_have_are_averaged_over_those(merge):
    extra = random_change(2, 2, "extra")
    means = merge([random_change(2, 0), random_change(2, 1) | extra], [1, 1])
    alpha = 16 if merge is hetlora_average else math.sqrt(len(means["extra.lora_A"]))  # the scale is in FlexLoRA's product
    assert torch.allclose(product(means, "extra", alpha), product(extra, "extra"))


def test_hetlora_gives_the_ranks_one_has_a_place_for_and_keeps_those_of_users_who_are_away():
    before, small = random_change(4, 0), random_change(2, 1)
    server = METHODS["hetlora"].server(before)
    server.generalists |= server.merge([small], [1])
    A = torch.cat([small["up.lora_A"], before["up.lora_A"][2:], torch.zeros(1, 5)])
    B = torch.cat([small["up.lora_B"], before["up.lora_B"][:, 2:], torch.zeros(7, 1)], 1)
    for rank in (1, 3, 5):
        given = server.broadcast({"up.lora_A": torch.Size((rank, 5)), "up.lora_B": torch.Size((7, rank))})
        torch.testing.assert_close(given, {"up.lora_A": A[:rank], "up.lora_B": B[:, :rank]})


def test_flexlora_gives_each_rank_the_best_change_of_that_rank():
    """Independently: W projected on the eigenvectors of W Wᵀ with the largest eigenvalues."""
    answers, weights = [random_change(rank, rank) for rank in (1, 2, 4)], [1.0, 2.0, 3.0]
    W = sum(weight * product(answer) for answer, weight in zip(answers, weights, strict=True)) / 6
    server = METHODS["flexlora"].server(answers[-1])
    server.generalists = server.merge(answers, weights)
    _, vectors = torch.linalg.eigh(W @ W.T)  # ascending
    for rank, answer in zip((1, 2, 4), answers, strict=True):
        given = server.broadcast({name: tensor.shape for name, tensor in answer.items()})
        assert all(tensor.shape == answer[name].shape for name, tensor in given.items())
        assert torch.allclose(product(given), vectors[:, -rank:] @ vectors[:, -rank:].T @ W)


def test_pcl_mixes_by_the_softmax_of_minus_perplexity_worked_by_hand(monkeypatch):
    """A model full of ones has the perplexity 1 here, of threes 1 + ln 2, of fives 1 + ln 4: weights 4/7, 2/7, 1/7."""
    user, losses = lora_user("pcl"), {1.0: 0.0, 3.0: math.log(1 + math.log(2)), 5.0: math.log(1 + math.log(4))}

    def evaluate(model, batches):
        number, = {p.mean().item() for p in model.having(GENERALIST).values()}
        return losses[number], None

    monkeypatch.setattr(rivals, "evaluate", evaluate)
    answers = [{name: torch.full(shape, number) for name, shape in user.shared.items()} for number in losses]
    server = METHODS["pcl"].server(answers[0])
    server.generalists = server.merge(answers, [1, 1, 1])
    user.download(server.broadcast(user.shared))
    mixed = (4 * 1 + 2 * 3 + 1 * 5) / 7
    assert all(torch.allclose(p, torch.full_like(p, mixed)) for p in user.model.having(GENERALIST).values())
    assert user.bytes_down == 3 * size_of(answers[0])  # all three models, and nothing more


@pytest.mark.parametrize(("one", "two", "config", "equal"), [
    ("pcl", "fedavg", dict(seed=0), True),  # users of the same text send the same model, whatever the trust
    ("comigs-joint", "fedavg", dict(specialists=0), True),  # a router over one expert: its gate is 1
    ("pfedmoe", "comigs-joint", dict(specialists=2, top_k=3), True),  # where every expert is chosen, all is balanced
    ("pfedmoe", "comigs-joint", dict(specialists=2, top_k=2), False),
])
def test_where_methods_fall_together(one, two, config, equal):
    ends = []
    for method in (one, two):
        users = [lora_user(method, **{"seed": seed} | config) for seed in (0, 1)]
        for user in users:
            user.model.load_state_dict(lora_user(two, **config).model.state_dict(), strict=False)
        server = METHODS[method].server(users[0].upload(), METHODS[method].hyper)
        users[1].set_generalists(play(server, users).broadcast(users[1].shared))
        ends.append(users[1].model.having(GENERALIST))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(p, ends[1][name]) for name, p in ends[0].items()) == equal


SENT = {  # the last parts of the names of what is sent, and whether experts of both kinds are
    **dict.fromkeys(("comigs", "comigs-uniform", "comigs-train", "comigs-joint", "comigs-leaky", "comigs-apart",
                     "pfedmoe", "fdlora"), ({"A", "B"}, False)),
    **dict.fromkeys(("comigs-2g", "fedavg", "pcl", "hetlora", "flexlora"), ({"A", "B"}, True)),
    **dict.fromkeys(("local", "comigs-2s", "centralized"), (set(), False)),
    "ffa-lora": ({"B"}, True), "fedsa-lora": ({"A"}, True),
}


@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_method_only_its_generalists_cross_and_its_backbone_keeps_its_bits(method):
    """`play` watches everything that goes either way."""
    users = [lora_user(method, seed) for seed in range(3)]
    before = [bits(user, BACKBONE) for user in users]
    play(Guard(METHODS[method].server(users[0].model.having(GENERALIST), METHODS[method].hyper)), users)
    assert all(same(backbone, user.model.having(BACKBONE)) for user, backbone in zip(users, before, strict=True))


@pytest.mark.parametrize("method", SENT)
def test_what_each_method_sends_and_that_all_its_bytes_are_counted(method):
    """In FFA-LoRA, A is backbone, too."""
    users, (factors, both) = [lora_user(method, seed) for seed in range(3)], SENT[method]
    play(Guard(METHODS[method].server(users[0].model.having(GENERALIST), METHODS[method].hyper)), users)
    for user in users:
        assert {name.rpartition(".")[2] for name in user.shared} == factors
        assert any(".adapters.1." in name for name in user.shared) == both  # the specialist of the paper's model
        assert any(".adapters.0." in name for name in user.shared) == bool(factors)
        assert any("attention" in name for name in user.shared) == bool(factors)
        assert (user.bytes_up > 0, user.bytes_down > 0) == (bool(factors), bool(factors))
        assert any(name.endswith(".lora_A") for name in user.model.having(BACKBONE)) == (method == "ffa-lora")


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(method="hetlora"), "`expert` lora"),
    (dict(method="comigs-apart", generalists=0), "both kinds"),
    (dict(method="pcl", users=2, specialists=(1, 2)), "one number of `specialists`"),
    (dict(method="fedavg", users=2, expert="lora", init_from="x", lora_rank=(1, 2)), "one `lora_rank` for all"),
    (dict(method="pcl", clip_update=1.0), "leave `clip_update` out"),
    (dict(method="fedavg", users=2, specialists=(1, 2), clip_update=1.0, dp_noise=1.0), "with `dp_noise` give one"),
])
def test_a_run_that_cant_be_one_of_a_method_is_refused(wrong, message):
    with pytest.raises(BadInput, match=f"`method` {wrong['method']}.*{message}"):
        Settings(**wrong)


def test_the_balancing_loss_worked_by_hand():
    """Two experts of three for two tokens. Choices 0, 1 and 0, 2: f = 1/2, 1/4, 1/4. Scores whose softmax is
    1/2, 1/4, 1/4 and 1/4, 1/4, 1/2: P = 3/8, 1/4, 3/8. E Σ f P = 3 (12 + 4 + 6) / 64."""
    scores = torch.tensor([[2.0, 1, 1], [1, 1, 2]]).log()
    routing = Routing(torch.full((2, 2), 0.5), torch.tensor([[0, 1], [0, 2]]), scores)
    assert load_balancing_loss(routing).item() == pytest.approx(3 * 22 / 64)


def test_a_hundredth_of_the_layers_balancing_losses_stands_beside_the_loss_which_alone_is_reported():
    """Computed afresh from what the routers see, which is the normalised input."""
    user, batch, seen = lora_user("pfedmoe", specialists=2), next(Batches(0)), []
    for block in user.model.blocks:
        block.moe_norm.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(0, 1)))
    loss, extra = user.lower.losses(user.model, *batch)
    routings = [block.moe.router(normed) for block, normed in zip(user.model.blocks, seen, strict=True)]
    assert extra.item() == pytest.approx(0.01 * sum(load_balancing_loss(routing).item() for routing in routings))
    assert user.lower.step(user.model).item() == loss.item() == lora_user(specialists=2).model(*batch)[1].item()


def test_only_the_leaky_levels_carry_their_gradients_into_each_others_next_step():
    assert {name for name, method in METHODS.items() for level in (method.level, method.router_level)
            if level.differentiate is not Level.differentiate} == {"comigs-leaky"}
    user, train, valid = lora_user("comigs-leaky"), next(Batches(0)), next(Batches(1))
    user.lower.batches, user.upper.batches = itertools.repeat(train), itertools.repeat(valid)
    router, experts = (list(user.model.having(*roles).values()) for roles in ((ROUTER,), (GENERALIST, SPECIALIST)))
    piled, descended = [], []
    user.upper.optimizer.register_step_pre_hook(lambda *_: descended.extend(p.grad.clone() for p in router))
    for _ in range(3):
        piled.append(torch.autograd.grad(user.model(*train)[1], router))
        user.lower.step(user.model)
    piled.append(torch.autograd.grad(user.model(*valid)[1], router))
    left = torch.autograd.grad(user.model(*valid)[1], experts)
    user.upper.step(user.model)
    torch.testing.assert_close(descended, [sum(gradients) for gradients in zip(*piled, strict=True)])
    torch.testing.assert_close([p.grad for p in experts], list(left))


@pytest.mark.parametrize("method", ["fdlora", "comigs-apart"])
def test_experts_that_learn_apart_learn_each_without_the_other_and_leave_no_trace(method):
    """Each expert's gradient is that of a model in which it has all the weight. Then the model is used as before."""
    user, batch, alone = lora_user(method), next(Batches(7)), []
    before = user.model.trunk(batch[0])
    mean, extra = user.lower.losses(user.model, *batch)
    (mean + extra).backward()
    torch.testing.assert_close(user.model.trunk(batch[0]), before, rtol=0, atol=0)
    for role, gates in ((GENERALIST, [1.0, 0.0]), (SPECIALIST, [0.0, 1.0])):
        _, loss = user.model(*batch, torch.tensor([gates] * 2))
        experts = [p for name, p in user.model.having(role).items() if "experts" in name]
        torch.testing.assert_close([p.grad for p in experts], list(torch.autograd.grad(loss, experts)))
        alone.append(loss.item())
    assert mean.item() == pytest.approx(sum(alone) / 2)


def test_of_experts_that_learn_apart_the_router_learns_from_their_mixture():
    user, plain = lora_user("comigs-apart"), lora_user("comigs")
    user.lower.step(user.model)
    plain.model.load_state_dict(user.model.state_dict())
    before = bits(plain, ROUTER)
    assert user.upper.step(user.model).item() == plain.upper.step(plain.model).item()
    assert same(bits(user, ROUTER), bits(plain, ROUTER))
    assert not same(bits(plain, ROUTER), before)


def test_fdlora_fuses_with_the_weight_of_least_loss():
    user = lora_user("fdlora", specialists=2, generalists=2)
    for _ in range(20):
        user.lower.step(user.model)
    user.before_evaluation()
    grid = [[w / 20, w / 20, (10 - w) / 20, (10 - w) / 20] for w in range(11)]
    losses = [user.model(*next(user.judge()), torch.tensor([gates] * 2))[1].item() for gates in grid]
    assert user.fixed_gates.tolist() == [pytest.approx(grid[losses.index(min(losses))])] * 2
    assert min(losses) < losses[5]


def test_hetloras_tail_stands_beside_the_loss_worked_by_hand():
    """Ranks 2, of which the second would go: 2 · 6 changes with ‖A[1]‖ = 5 and ‖B[:, 1]‖ = 2, and λ = 0.01."""
    assert [kept_rank(rank, 0.99) for rank in (1, 2, 8, 200)] == [1, 1, 7, 198]
    user, batch = lora_user("hetlora", lora_rank=2), next(Batches(0))
    with torch.no_grad():
        for low in adapters_of(user.model):
            low.lora_A[1] = torch.tensor([3.0, 4] + [0] * (low.lora_A.shape[1] - 2))
            low.lora_B[:, 1] = torch.tensor([2.0] + [0] * (len(low.lora_B) - 1))
    loss, extra = user.lower.losses(user.model, *batch)
    assert (loss.item(), extra.item()) == (user.model(*batch)[1].item(), pytest.approx(0.01 * 12 * 5 * 2))


@pytest.mark.parametrize(("factor", "rank"), [(0.5, 3), (2.0, 4)])
def test_a_rank_is_pruned_for_good_where_its_tail_shrinks(factor, rank, monkeypatch):
    """From rank 4, of which γr keeps 3. Numbers and moments of what is kept stay; messages and the server follow."""
    users, held = [lora_user("hetlora", seed) for seed in (0, 1)], {}

    def learn(user, rhythm):
        user.lower.step(user.model)
        for low in adapters_of(user.model):
            low.lora_A.data[kept_rank(len(low.lora_A), 0.99):] *= factor
            for p, cut in ((low.lora_A, slice(rank)), (low.lora_B, (slice(None), slice(rank)))):
                state = user.lower.optimizer.state[p]
                held[user, p] = [tensor[cut].clone() for tensor in (p.detach(), state["exp_avg"], state["exp_avg_sq"])]
        return 0.0

    monkeypatch.setattr(User, "learn", learn)
    server = play(METHODS["hetlora"].server(users[0].upload()), users, rounds=1)
    monkeypatch.undo()
    assert all(shape["AB".index(name[-1])] == rank for user in users for name, shape in user.shared.items())
    for (user, p), expected in held.items():
        state = user.lower.optimizer.state[p]
        assert all(map(torch.equal, (p, state["exp_avg"], state["exp_avg_sq"]), expected))
    assert all(math.isfinite(loss) for loss in federated_round(server, users, Rhythm(2, 1, 1)).values())
