"""Each method's own part: worked by hand, against an independent formula, or where two methods must fall together."""

import math

import pytest
import torch

import methods
from bilevel import Alternation, Level, constant
from federated import Server, User, average, federated_round, size_of
from methods import METHODS, balance, fit, fix, flexlora_average, hetlora_average, kept, tail
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig, LowRank, Routing

V, T, C = 11, 6, 8


class Batches:
    """Random batches of a text of its own."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __next__(self):
        return torch.randint(V, (2, 2, T), generator=self.generator).unbind()


def user_of(method: str, seed: int = 0, specialists: int = 1, top_k: int = 2, rank: int = 4, **changes) -> User:
    """A user of a method, with low-rank experts on a random base; B starts at random, too."""
    row = METHODS[method]
    config = GPTConfig(V, T, 2, 2, C, specialists=specialists, top_k=top_k, expert="lora", lora_rank=rank,
                       **{"routed": row.routed, "roles": row.roles} | changes)
    model = GPT(config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRank):
                module.B.normal_(0, 0.1, generator=generator)
    lower = row.level(model.having(GENERALIST, SPECIALIST), Batches(seed), 1e-2, 0.1, constant)
    router = model.having(ROUTER)
    upper = row.router_level(router, Batches(seed + 100), 1e-2, 0.0, constant) if router else None
    return row.user(f"user{seed}", model, lower, upper, judge=lambda: iter([next(Batches(seed + 200))]))


def play(method: str, users: list[User], rounds: int = 2) -> Server:
    """Some rounds from the first user's generalists on."""
    server = METHODS[method].server(users[0].model.having(GENERALIST))
    for _ in range(rounds):
        list(federated_round(server, users, Alternation(3, 2, 1)))
    for user in users:
        server.deliver(user)
    return server


def change(A: list, B: list) -> dict:
    return {"up.A": torch.tensor(A), "up.B": torch.tensor(B)}


def product(message: dict, pair: str = "up", scaled: bool = True) -> torch.Tensor:
    A, B = message[f"{pair}.A"], message[f"{pair}.B"]
    return (16 / math.sqrt(len(A)) if scaled else 1) * B @ A


def random_change(rank: int, seed: int, n_in: int = 5, n_out: int = 7) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"up.A": torch.randn(rank, n_in, generator=generator), "up.B": torch.randn(n_out, rank, generator=generator)}


# --- averages --------------------------------------------------------------------------------------------------------

def test_hetlora_average_worked_by_hand():
    """Ranks 1 and 2. BA = [[3, 0], [4, 0]] has the norm 5, BA = diag(9, 12) the norm 15: weights 1/4 and 3/4."""
    means = hetlora_average([change([[1.0, 0]], [[3.0], [4]]), change([[1.0, 0], [0, 1]], [[9.0, 0], [0, 12]])], [1, 1])
    assert torch.allclose(means["up.A"], torch.tensor([[1.0, 0], [0, 0.75]]))
    assert torch.allclose(means["up.B"], torch.tensor([[7.5, 0], [1, 9]]))
    tokens = hetlora_average([change([[1.0]], [[2.0]]), change([[1.0]], [[1.0]])], [1, 2])  # norms 2 and 1
    assert tokens["up.B"].item() == pytest.approx(1.5)


def test_hetlora_average_with_equal_ranks_and_norms_is_the_plain_mean():
    one, two = random_change(3, 0), random_change(3, 1)
    two["up.B"] *= product(one, scaled=False).norm() / product(two, scaled=False).norm()
    means, plain = hetlora_average([one, two], [1, 1]), average([one, two], [1, 1])
    assert all(torch.allclose(means[name], plain[name], atol=1e-6) for name in plain)


def test_hetlora_average_of_changes_that_are_zero_is_zero():
    zero = change([[1.0, 2]], [[0.0], [0]])
    assert torch.equal(hetlora_average([zero, zero], [1, 1])["up.B"], zero["up.B"])


def test_changes_that_only_some_users_have_are_averaged_over_those():
    extra = {f"extra.{factor}": random_change(2, 2)[f"up.{factor}"] for factor in "AB"}
    for merge in (hetlora_average, flexlora_average):
        means = merge([random_change(2, 0), random_change(2, 1) | extra], [1, 1])
        scaled = merge is hetlora_average
        assert torch.allclose(product(means, "extra", scaled), product(extra, "extra"), atol=1e-4)


@pytest.mark.parametrize("method", ["hetlora", "flexlora"])
def test_the_server_cuts_to_each_users_shapes(method):
    server = METHODS[method].server(random_change(4, 0))
    server.generalists = server.merge([random_change(rank, rank) for rank in (1, 4)], [1, 1])
    for rank in (1, 2, 4):
        shapes = {"up.A": torch.Size((rank, 5)), "up.B": torch.Size((7, rank))}
        assert {name: tensor.shape for name, tensor in server.cut(shapes).items()} == shapes
    assert fit(torch.ones(2, 2), (1, 3)).tolist() == [[1, 1, 0]]


def test_flexlora_with_one_user_returns_the_users_product():
    own = random_change(3, 0)
    server = METHODS["flexlora"].server(own)
    server.generalists = server.merge([own], [1])
    back = server.cut({name: tensor.shape for name, tensor in own.items()})
    assert torch.allclose(product(back), product(own), atol=1e-4)


def test_flexlora_gives_each_rank_the_best_change_of_that_rank():
    """Independently: W projected on the eigenvectors of W Wᵀ with the largest eigenvalues."""
    answers, weights = [random_change(rank, rank) for rank in (1, 2, 4)], [1.0, 2.0, 3.0]
    W = sum(weight * product(answer) for answer, weight in zip(answers, weights, strict=True)) / 6
    server = METHODS["flexlora"].server(answers[-1])
    server.generalists = server.merge(answers, weights)
    _, vectors = torch.linalg.eigh(W @ W.T)  # ascending
    for rank in (1, 2, 4):
        top = vectors[:, -rank:]
        cut = server.cut({"up.A": torch.Size((rank, 5)), "up.B": torch.Size((7, rank))})
        assert torch.allclose(product(cut), top @ top.T @ W, atol=1e-3)


def test_pcl_mixes_by_the_softmax_of_minus_perplexity_worked_by_hand(monkeypatch):
    """A model full of ones has the perplexity 1 here, of threes 1 + ln 2, of fives 1 + ln 4: weights 4/7, 2/7, 1/7."""
    user = user_of("pcl")
    perplexities = {1.0: 1.0, 3.0: 1 + math.log(2), 5.0: 1 + math.log(4)}

    def evaluate(model, batches):
        number, = {p.mean().item() for p in model.having(GENERALIST).values()}
        return math.log(perplexities[number]), None

    monkeypatch.setattr(methods, "evaluate", evaluate)
    answers = [{name: torch.full(shape, number) for name, shape in user.shared.items()} for number in perplexities]
    server = METHODS["pcl"].server(answers[0])
    server.generalists = server.merge(answers, [1, 1, 1])
    server.deliver(user)
    mixed = (4 * 1 + 2 * 3 + 1 * 5) / 7
    assert all(torch.allclose(p, torch.full_like(p, mixed)) for p in user.model.having(GENERALIST).values())
    assert user.bytes_down == 3 * size_of(answers[0])  # all three models, and nothing more


def test_pcl_with_equal_users_is_fedavg():
    """Users whose texts are the same send the same model, whatever the trust."""
    ends = []
    for method in ("pcl", "fedavg"):
        users = [user_of(method), user_of(method)]
        play(method, users)
        ends.append(users[1].model.having(GENERALIST))
    assert all(torch.allclose(p, ends[1][name], atol=1e-5) for name, p in ends[0].items())


# --- roles -----------------------------------------------------------------------------------------------------------

SENT = {  # the last parts of the names of what is sent, and whether experts of both kinds are
    "comigs": ({"A", "B"}, False), "comigs-2g": ({"A", "B"}, True), "fedavg": ({"A", "B"}, True),
    "comigs-uniform": ({"A", "B"}, False), "comigs-train": ({"A", "B"}, False), "comigs-joint": ({"A", "B"}, False),
    "comigs-leaky": ({"A", "B"}, False), "comigs-apart": ({"A", "B"}, False),
    "pfedmoe": ({"A", "B"}, False), "fdlora": ({"A", "B"}, False),
    "pcl": ({"A", "B"}, True), "hetlora": ({"A", "B"}, True), "flexlora": ({"A", "B"}, True),
    "ffa-lora": ({"B"}, True), "fedsa-lora": ({"A"}, True), "local": (set(), False), "comigs-2s": (set(), False),
    "centralized": (set(), False),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sends_these_parameters_and_never_a_router_or_the_backbone(method):
    user = user_of(method)
    sent = user.answer().keys()
    factors, both = SENT[method]
    assert {name.rpartition(".")[2] for name in sent} == factors
    assert any(".changes.1." in name for name in sent) == both  # the specialist of the paper's model
    assert any(".changes.0." in name for name in sent) == bool(factors)
    assert any("attention" in name for name in sent) == bool(factors)


def test_ffa_lora_learns_B_only_and_its_average_of_products_is_the_product_of_averages():
    users = [user_of("ffa-lora", seed) for seed in (0, 1)]
    users[1].model.load_state_dict(users[0].model.having(BACKBONE), strict=False)  # train.build does it
    before = {name: p.clone() for name, p in users[0].model.having(BACKBONE).items()}
    answers = []
    for user in users:
        user.learn(Alternation(3, 2, 1))
        answers.append(user.answer())
    assert all(torch.equal(p, before[name]) for name, p in users[1].model.having(BACKBONE).items())
    means = average(answers, [1, 1])
    for name, B in means.items():
        A = before[name.removesuffix("B") + "A"]
        assert torch.allclose(B @ A, (answers[0][name] @ A + answers[1][name] @ A) / 2, atol=1e-6)


def test_comigs_joint_with_no_specialists_and_no_router_is_fedavg():
    """A router over one expert changes nothing: its gate is 1."""
    ends = []
    for method in ("comigs-joint", "fedavg"):
        users = [user_of(method, seed, specialists=0) for seed in (0, 1)]
        for user in users:
            user.model.load_state_dict(user_of("fedavg", 0, specialists=0).model.state_dict(), strict=False)
        ends.append(play(method, users).generalists)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6) for name in ends[1])


@pytest.mark.parametrize(("top_k", "same"), [(3, True), (2, False)])
def test_pfedmoe_is_comigs_joint_where_every_expert_is_chosen_and_nowhere_else(top_k, same):
    ends = []
    for method in ("pfedmoe", "comigs-joint"):
        users = [user_of(method, seed, specialists=2, top_k=top_k) for seed in (0, 1)]
        play(method, users)
        ends.append(dict(users[1].model.named_parameters()))
    close = [torch.allclose(ends[0][name], ends[1][name], rtol=1e-3, atol=2e-4) for name in ends[1]]
    assert all(close) == same


# --- local steps -----------------------------------------------------------------------------------------------------

def test_the_balancing_loss_worked_by_hand():
    """Two experts of three for two tokens. Choices 0, 1 and 0, 2: f = 1/2, 1/4, 1/4. Scores whose softmax is
    1/2, 1/4, 1/4 and 1/4, 1/4, 1/2: P = 3/8, 1/4, 3/8. E Σ f P = 3 (12 + 4 + 6) / 64."""
    scores = torch.tensor([[2.0, 1, 1], [1, 1, 2]]).log()
    routing = Routing(torch.full((2, 2), 0.5), torch.tensor([[0, 1], [0, 2]]), scores)
    assert balance(routing).item() == pytest.approx(3 * 22 / 64)


def test_the_balancing_loss_is_1_and_flat_where_every_expert_is_chosen():
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = balance(Routing(scores.softmax(-1), torch.arange(3).expand(5, 3), scores))
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert scores.grad.abs().max() < 1e-7


def test_the_balancing_loss_is_of_the_scores_that_the_router_gives_to_what_it_sees(monkeypatch):
    user = user_of("pfedmoe", specialists=2)
    seen, given = [], []
    for block in user.model.blocks:
        block.moe_norm.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(0, 1)))
    monkeypatch.setattr(methods, "balance", lambda routing: given.append(routing.scores) or routing.scores.sum())
    user.lower.losses(user.model, *next(Batches(0)))
    for block, normed, scores in zip(user.model.blocks, seen, given, strict=True):
        assert torch.equal(scores, block.moe.router.scores(normed))


def test_the_balancing_loss_isnt_reported():
    user, plain = user_of("pfedmoe", specialists=2), user_of("comigs-joint", specialists=2)
    assert user.lower.step(user.model).item() == plain.lower.step(plain.model).item()


def test_the_leak_carries_each_levels_gradients_into_the_others_next_step():
    user = user_of("comigs-leaky")
    expected = {name: 0 for name in user.model.having(ROUTER)}
    for _ in range(3):
        batch = next(user.lower.batches)
        user.lower.batches = iter([batch])
        _, loss = user.model(*batch)
        gradients = torch.autograd.grad(loss, list(user.model.having(ROUTER).values()))
        expected = {name: expected[name] + g for name, g in zip(expected, gradients, strict=True)}
        user.lower.step(user.model)
        user.lower.batches = Batches(int(loss * 1e4))
    for name, router in user.model.having(ROUTER).items():
        assert torch.allclose(router.grad, expected[name], atol=1e-6)
        assert router.grad.abs().max() > 0
    user.upper.step(user.model)
    assert all(p.grad.abs().max() > 0 for name, p in user.model.having(GENERALIST).items())
    clean = user_of("comigs")
    clean.lower.step(clean.model)
    assert all(p.grad is None for p in clean.model.parameters())


@pytest.mark.parametrize("method", ["fdlora", "comigs-apart"])
def test_experts_that_learn_apart_learn_each_without_the_other(method):
    """Each expert's gradient is that of a model in which it has all the weight."""
    user = user_of(method)
    batch = next(Batches(7))
    mean, again = user.lower.losses(user.model, *batch)
    (mean + again).backward()
    for weight, role in ((1.0, GENERALIST), (0.0, SPECIALIST)):
        fix(user.model, weight)
        experts = [p for name, p in user.model.having(role).items() if "experts" in name]
        alone = torch.autograd.grad(user.model(*batch)[1], experts)
        assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(experts, alone, strict=True))


def test_of_experts_that_learn_apart_the_router_learns_from_their_mixture():
    user, plain = user_of("comigs-apart"), user_of("comigs")
    user.lower.step(user.model)
    plain.model.load_state_dict(user.model.state_dict())
    assert user.upper.step(user.model).item() == plain.upper.step(plain.model).item()
    assert all(torch.equal(p, user.model.having(ROUTER)[name]) for name, p in plain.model.having(ROUTER).items())


def test_fdlora_fuses_with_the_weight_of_least_loss():
    user = user_of("fdlora")
    for _ in range(20):
        user.lower.step(user.model)
    user.settle()
    chosen = user.model.blocks[0].moe.weights
    with torch.no_grad():
        batch = next(user.judge())
        losses = {}
        for tenths in range(11):
            fix(user.model, tenths / 10)
            losses[tenths / 10] = user.model(*batch)[1].item()
    best = min(losses, key=losses.get)
    assert chosen == pytest.approx([best, 1 - best])
    assert losses[best] < losses[0.5]


def test_hetloras_tail_worked_by_hand():
    assert [kept(rank) for rank in (1, 2, 8, 200)] == [1, 1, 7, 198]
    model = user_of("hetlora", rank=2).model
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRank):
                module.A.fill_(9.0)
                module.A[1] = torch.tensor([3.0, 4] + [0] * (module.A.shape[1] - 2))
                module.B.zero_()
                module.B[0, 1] = 2.0
    assert tail(model).item() == pytest.approx(2 * (2 + 2 * 2) * 5 * 2)  # layers × changes × ‖A[1]‖ × ‖B[:, 1]‖


def test_hetloras_loss_has_the_tail_beside_it_and_reports_without():
    user = user_of("hetlora")
    batch = next(Batches(0))
    loss, extra = user.lower.losses(user.model, *batch)
    assert loss.item() == user.model(*batch)[1].item()
    assert extra.item() == pytest.approx(0.01 * tail(user.model).item())


@pytest.mark.parametrize(("factor", "rank"), [(0.5, 3), (2.0, 4)])
def test_a_rank_is_pruned_for_good_where_its_tail_shrinks(factor, rank, monkeypatch):
    """From rank 4, of which γr keeps 3. Parameters, moments, messages and the server's cut follow."""
    users = [user_of("hetlora", seed) for seed in (0, 1)]

    def learn(user, plan):
        user.lower.step(user.model)
        with torch.no_grad():
            for module in user.model.modules():
                if isinstance(module, LowRank):
                    module.A[kept(len(module.A)):] *= factor ** 2
        return 0.0

    monkeypatch.setattr(User, "learn", learn)
    server = METHODS["hetlora"].server(users[0].model.having(GENERALIST))
    list(federated_round(server, users, Alternation(1, 1, 1)))
    monkeypatch.undo()
    for user in users:
        for name, shape in user.shared.items():
            assert shape["AB".index(name[-1])] == rank
            assert user.lower.optimizer.state[user.model.having(GENERALIST)[name]]["exp_avg"].shape == shape
        before = user.bytes_up
        assert size_of(user.answer()) == user.bytes_up - before == size_of(user.model.having(GENERALIST))
    loss, = {user.name: loss for user, loss in federated_round(server, users[:1], Alternation(2, 1, 1))}.values()
    assert math.isfinite(loss)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.pooled])
def test_whatever_the_method_only_generalists_cross_and_all_their_bytes_are_counted(method, monkeypatch):
    users = [user_of(method, seed) for seed in range(3)]
    crossed = {"up": [], "down": []}
    receive, answer = User.receive, User.answer

    def watched_receive(user, message):
        crossed["down"].append((user, message))
        return receive(user, message)

    def watched_answer(user):
        crossed["up"].append((user, answer(user)))
        return crossed["up"][-1][1]

    monkeypatch.setattr(User, "receive", watched_receive)
    monkeypatch.setattr(User, "answer", watched_answer)
    server = play(method, users)
    for user, message in crossed["up"] + crossed["down"]:
        assert {user.model.roles[name] for name in message} <= {GENERALIST}
        private = {p.data_ptr() for p in user.model.parameters()}
        assert not private & {tensor.data_ptr() for tensor in message.values() if tensor.numel()}
        assert not any(tensor.requires_grad or tensor.grad is not None for tensor in message.values())
    assert vars(server).keys() == {"generalists", "version", "refused", "bound", "noise", "generator"}
    for user in users:
        for way, counted in (("up", user.bytes_up), ("down", user.bytes_down)):
            assert counted == sum(size_of(message) for who, message in crossed[way] if who is user)


def test_only_the_leaky_level_differentiates_with_respect_to_everything():
    assert [name for name, method in METHODS.items()
            if method.level.differentiate is not Level.differentiate] == ["comigs-leaky"]


def test_hetlora_keeps_the_ranks_of_users_who_are_away():
    server = METHODS["hetlora"].server(random_change(4, 0))
    before = {name: tensor.clone() for name, tensor in server.generalists.items()}
    small = random_change(1, 1)
    server.generalists |= server.merge([small], [1])
    assert torch.allclose(server.generalists["up.A"][:1], small["up.A"])
    assert torch.equal(server.generalists["up.A"][1:], before["up.A"][1:])
    assert torch.equal(server.generalists["up.B"][:, 1:], before["up.B"][:, 1:])
