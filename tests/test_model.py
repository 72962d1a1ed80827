"""The network: the sparse mixture against a dense one, roles, causality, sampling."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from model import (
    BACKBONE,
    GENERALIST,
    GPT,
    ROLES,
    ROUTER,
    SPECIALIST,
    GPTConfig,
    HeadLoss,
    MoE,
    Routing,
    by_expert,
    dense_gates,
    gpt2_name,
)

TINY = dict(vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8)


def tiny(seed: int = 0, **changes) -> GPT:
    """A small model in float64, its weights large enough for experts to differ."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def dense_mixture(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """The oracle: every expert on every token, gates written out from the definition."""
    scores = x @ moe.router.scores.weight.T  # (B, T, E)
    threshold = scores.sort(descending=True).values[..., moe.router.top_k - 1, None]
    weights = scores.exp() * (scores >= threshold)
    gates = weights / weights.sum(-1, keepdim=True)
    return sum(gates[..., e, None] * expert(x) for e, expert in enumerate(moe.experts))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mixture_equals_the_dense_one_in_output_and_all_gradients(top_k):
    moe = tiny(specialists=4, top_k=top_k).blocks[0].moe
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    sparse, dense = moe(x)[0], dense_mixture(moe, x)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    weight = torch.randn_like(sparse)
    inputs = [x, *moe.parameters()]
    of_sparse = torch.autograd.grad((sparse * weight).sum(), inputs)
    of_dense = torch.autograd.grad((dense * weight).sum(), inputs)
    for ours, oracle in zip(of_sparse, of_dense, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-11)


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_without_tokens_changes_nothing_and_learns_nothing(top_k):
    moe = tiny(specialists=3, top_k=top_k).blocks[0].moe
    with torch.no_grad():
        moe.router.scores.weight[2] = -100.0  # for positive inputs: never chosen
    x = torch.rand(2, 5, 8, dtype=torch.float64)
    y, routing = moe(x)
    assert 2 not in routing.chosen
    torch.testing.assert_close(y, dense_mixture(moe, x), rtol=0, atol=1e-12)
    y.sum().backward()
    assert all(not parameter.grad.any() for parameter in moe.experts[2].parameters())


def test_only_chosen_experts_compute():
    """With top-2 of 5, the experts together see each token twice."""
    moe = tiny(specialists=4, top_k=2).blocks[0].moe
    rows = []
    for expert in moe.experts:
        expert.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    moe(torch.randn(3, 5, 8, dtype=torch.float64))
    assert sum(rows) == 2 * 3 * 5


@pytest.mark.parametrize("specialists", [1, 3])
def test_mixture_passes_gradcheck(specialists):
    moe = tiny(n_embd=4, specialists=specialists).blocks[0].moe
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in moe.named_parameters()]

    def mixture(x, *parameters):
        return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), (x,))[0]

    assert gradcheck(mixture, (x, *moe.parameters()))


def block_copies(moe: MoE, x: torch.Tensor, scale: float) -> torch.Tensor:
    """The oracle of low-rank experts: each with its own copy of the whole block, changed, on every token."""
    tokens, block = x.flatten(0, 1), moe.experts.block
    gates = dense_gates(moe.router(tokens), len(moe.experts.changes))
    y = 0
    for gate, change in zip(gates.unbind(1), moe.experts.changes, strict=True):
        up = block.up.weight + scale * change.up.B @ change.up.A
        down = block.down.weight + scale * change.down.B @ change.down.A
        h = F.gelu(F.linear(tokens, up, block.up.bias), approximate=moe.experts.block.gelu.approximate)
        y = y + gate[:, None] * F.linear(h, down, block.down.bias)
    return y.view_as(x)


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize(("specialists", "top_k"), [(0, 2), (1, 2), (4, 2), (4, 1), (4, 5)])
def test_low_rank_experts_equal_a_block_copy_each_in_output_and_all_gradients(specialists, top_k, gelu):
    moe = tiny(specialists=specialists, top_k=top_k, expert="lora", lora_rank=4, gelu=gelu).blocks[0].moe
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    shared, copies = moe(x)[0], block_copies(moe, x, scale=16 / 4 ** 0.5)
    torch.testing.assert_close(shared, copies, rtol=1e-12, atol=1e-10)
    weight = torch.randn_like(shared)
    inputs = [x, *(parameter for parameter in moe.parameters() if parameter.requires_grad)]
    assert len(inputs) == 2 + 4 * (1 + specialists)
    of_shared = torch.autograd.grad((shared * weight).sum(), inputs)
    of_copies = torch.autograd.grad((copies * weight).sum(), inputs)
    for ours, oracle in zip(of_shared, of_copies, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-10)


def test_the_frozen_block_is_applied_once_to_a_token_and_learns_nothing():
    """However many experts a token goes to."""
    model = tiny(specialists=4, top_k=3, expert="lora")
    rows = []
    for layer in model.blocks:
        for matrix in (layer.moe.experts.block.up, layer.moe.experts.block.down):
            matrix.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    _, loss = model(*torch.randint(11, (2, 3, 6)))
    loss.backward()
    assert rows == [3 * 6] * 4
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (model.roles[name] != BACKBONE)
        assert (parameter.grad is None) == (model.roles[name] == BACKBONE)


def test_low_rank_models_have_their_roles():
    """Attention's two changes are generalists, as are the first expert's; all that is pretrained is backbone."""
    model = tiny(specialists=2, expert="lora", lora_rank=3)
    by_role = {role: set(model.having(role)) for role in ROLES}
    assert sum(map(len, by_role.values())) == len(model.roles)
    attention = {f"blocks.{i}.attention.{part}.change.{f}" for i in range(2) for part in ("qkv", "out") for f in "AB"}
    first = {f"blocks.{i}.moe.experts.changes.0.{part}.{f}" for i in range(2) for part in ("up", "down") for f in "AB"}
    assert by_role[GENERALIST] == attention | first
    assert by_role[BACKBONE] == {name for name in model.roles if gpt2_name(name)}
    assert by_role[SPECIALIST] == {name for name in model.roles if ".changes.1." in name or ".changes.2." in name}
    local = tiny(expert="lora", roles={GENERALIST: SPECIALIST})
    assert set(local.roles.values()) == {BACKBONE, SPECIALIST, ROUTER}


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_chunked_loss_equals_the_plain_one_in_value_and_gradients(rows, monkeypatch):
    monkeypatch.setattr(HeadLoss, "LOGITS", rows * 11)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (10, 11))
    targets = torch.randint(11, (10,))
    chunked, plain = HeadLoss.apply(hidden, weight, targets, True), F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(chunked, plain, rtol=0, atol=1e-12)
    for ours, oracle in zip(*(torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (chunked, plain)),
                            strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(HeadLoss.apply(hidden, weight, targets, False), plain)
    for learning in (hidden, weight):  # the other one is frozen
        loss = HeadLoss.apply(*(x if x is learning else x.detach() for x in (hidden, weight)), targets, True)
        plain = F.cross_entropy(hidden @ weight.T, targets)
        torch.testing.assert_close(torch.autograd.grad(loss, learning), torch.autograd.grad(plain, learning))


class Sizes(TorchDispatchMode):
    """Watches the size of every tensor that is made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(getattr(self, "largest", 0), result.numel())
        return result


def test_a_training_step_never_holds_the_logits_of_all_positions(monkeypatch):
    monkeypatch.setattr(HeadLoss, "LOGITS", 4 * 500)
    model = GPT(GPTConfig(500, 16, 1, 2, 8, expert="lora"))
    with Sizes() as sizes:
        model(*torch.randint(500, (2, 4, 16)))[1].backward()
    assert sizes.largest <= 500 * 8  # the head's weight; all logits would be 64 times 500


def test_bfloat16_changes_the_loss_by_rounding_only_and_all_factors_learn(monkeypatch):
    """As on a GPU, with a CPU's autocast."""
    model = GPT(GPTConfig(**TINY, specialists=3, expert="lora"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    batch = torch.randint(11, (2, 8, 6))
    exact = model(*batch)[1].item()
    monkeypatch.setattr(model_module, "precision", lambda x: torch.autocast("cpu", torch.bfloat16))
    _, loss = model(*batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.05)
    assert loss.item() != exact
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_pairs_of_by_experts_docstring():
    routing = Routing(torch.tensor([[0.7, 0.3], [0.6, 0.4]]), torch.tensor([[2, 0], [2, 1]]))
    token, expert, gates, counts = by_expert(routing, 3)
    assert (token.tolist(), expert.tolist(), counts) == ([0, 1, 0, 1], [0, 1, 2, 2], [1, 1, 2])
    torch.testing.assert_close(gates, torch.tensor([[0.3], [0.4], [0.7], [0.6]]))


def test_gates_are_a_softmax_over_the_chosen_scores():
    router = tiny(specialists=2, top_k=2).blocks[0].moe.router
    with torch.no_grad():
        router.scores.weight.zero_()
        router.scores.weight[:, 0] = torch.tensor([1.0, 3.0, 2.0])
    x = torch.zeros(1, 8, dtype=torch.float64)
    x[0, 0] = 1
    gates, chosen, _ = router(x)
    assert chosen.tolist() == [[1, 2]]
    e = torch.e
    torch.testing.assert_close(gates, torch.tensor([[e / (1 + e), 1 / (1 + e)]], dtype=torch.float64))


def test_dense_gates_of_its_docstring():
    routing = Routing(torch.tensor([[0.7, 0.3]]), torch.tensor([[2, 0]]))
    torch.testing.assert_close(dense_gates(routing, 3), torch.tensor([[0.3, 0.0, 0.7]]))


def test_without_a_router_the_experts_are_averaged():
    moe = tiny(specialists=2, top_k=2, routed=False).blocks[0].moe
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(moe(x)[0], sum(expert(x) for expert in moe.experts) / 3)
    assert moe.router is None


def test_every_parameter_has_one_role_and_experts_are_generalists_first():
    model = tiny(generalists=1, specialists=2)
    by_role = {role: set(model.having(role)) for role in ROLES}
    assert sum(map(len, by_role.values())) == len(set().union(*by_role.values())) == len(list(model.parameters()))
    experts = {name for name in model.roles if ".experts." in name}
    assert by_role[SPECIALIST] == {name for name in experts if ".experts.0." not in name}
    assert by_role[ROUTER] == {f"blocks.{layer}.moe.router.scores.weight" for layer in range(2)}
    assert by_role[GENERALIST] == set(model.roles) - by_role[SPECIALIST] - by_role[ROUTER]


def test_a_parameter_without_a_role_is_refused():
    class Forgetful(GPT):
        def find_roles(self):
            self.extra = torch.nn.Linear(2, 2)
            return super().find_roles()

    with pytest.raises(AssertionError):
        Forgetful(GPTConfig(**TINY))


def test_a_method_can_give_a_role_another_one():
    model = tiny(specialists=2, roles={SPECIALIST: GENERALIST})
    assert not model.having(SPECIALIST)
    assert model.config.expert_roles == [GENERALIST] * 3
    with pytest.raises(AssertionError):
        tiny(roles={SPECIALIST: "nonsense"})


def test_no_token_sees_a_later_one():
    model = tiny(specialists=3)
    idx = torch.randint(11, (1, 6))
    changed = idx.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 11
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_loss_is_the_cross_entropy_of_the_logits():
    model = tiny()
    idx, targets = torch.randint(11, (2, 2, 6))
    logits, nothing = model(idx)
    also_nothing, loss = model(idx, targets)
    assert nothing is None
    assert also_nothing is None
    p = logits.softmax(-1).gather(2, targets[..., None])
    torch.testing.assert_close(loss, -p.log().mean())


def test_a_forward_pass_leaves_nothing_in_the_model():
    """Routing is returned by the trunk, (N, k) for each layer, and stored nowhere."""
    model = tiny(specialists=3)
    attributes = [set(vars(module)) for module in model.modules()]
    _, routings = model.trunk(torch.randint(11, (2, 5)))
    assert [routing.chosen.shape for routing in routings] == [(10, 2)] * 2
    torch.testing.assert_close(routings[0].gates.sum(-1), torch.ones(10, dtype=torch.float64))
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert not list(model.buffers())


def test_generate_appends_tokens_beyond_the_block_size_and_repeats_with_its_generator():
    model = tiny()
    idx = torch.randint(11, (2, 3))
    first, second = (model.generate(idx, 10, 0.8, top_k=5, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert first.shape == (2, 13)
    assert torch.equal(first[:, :3], idx)
    assert torch.equal(first, second)


@torch.no_grad()
def test_a_token_behind_a_past_is_computed_as_in_the_whole_text():
    model = tiny()
    idx = torch.randint(11, (2, TINY["block_size"]))
    hidden, _ = model.trunk(idx)
    pasts = [[] for _ in model.blocks]
    parts = [model.trunk(part, pasts)[0] for part in idx.split([3, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), hidden)
    with pytest.raises(AssertionError, match="more than block_size"):
        model.trunk(idx[:, :1], pasts)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 20])
def test_a_cache_changes_no_token_also_beyond_the_block_size(temperature, prompt):
    model = tiny()
    idx = torch.randint(11, (2, prompt))
    one, two = (model.generate(idx, 40, temperature, generator=torch.Generator().manual_seed(1), cache=cache)
                for cache in (True, False))
    assert torch.equal(one, two)


def test_generate_takes_only_the_top_k_and_at_temperature_0_the_best():
    model = tiny()
    idx = torch.randint(11, (1, 3))
    scores = model(idx)[0][0, -1]
    assert model.generate(idx, 1, temperature=0)[0, -1] == scores.argmax()
    sampled = {model.generate(idx, 1, 100.0, top_k=3)[0, -1].item() for _ in range(60)}
    assert sampled == set(scores.topk(3).indices.tolist())


def test_a_generator_decides_the_initial_weights_and_the_global_seed_is_left_alone():
    torch.manual_seed(5)
    one = GPT(GPTConfig(**TINY), torch.Generator().manual_seed(3))
    torch.manual_seed(6)
    two = GPT(GPTConfig(**TINY), torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    torch.manual_seed(6)
    assert not torch.equal(GPT(GPTConfig(**TINY)).tokens.weight, one.tokens.weight)


def test_the_start_is_gpt2s():
    """Weights of deviation 0.02, those into the residual stream 0.02/√(2L), biases 0, norms 1."""
    model = GPT(GPTConfig(257, 64, 2, 4, 128), torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == float("weight" in name)).all()
        elif parameter.ndim == 1:
            assert not parameter.any()
        else:
            expected = 0.01 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("wrong", [dict(n_embd=9), dict(generalists=0, specialists=0)])
def test_an_impossible_shape_is_refused(wrong):
    with pytest.raises(ValueError, match="n_embd|expert"):
        GPTConfig(**TINY | wrong)
