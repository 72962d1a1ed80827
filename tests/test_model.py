"""The network: the mixture against a dense one, roles, initial weights, causality, sampling."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel import dense_gates
from model import (
    BACKBONE,
    GENERALIST,
    GPT,
    ROLES,
    ROUTER,
    SPECIALIST,
    GPTConfig,
    MLPExperts,
    MoE,
    Routing,
    rope_cache,
)
from support.sampling import KVCache, generate
from tiny import LLAMA, SHAPE, Watched, as_in, seeded, tiny

# --- the mixture against a dense one


def experts_of(moe: MoE) -> list:
    """Each expert as a function. A LoRA expert is the frozen block with weights W + s·BA."""
    if isinstance(moe.experts, MLPExperts):
        return list(moe.experts)
    block = moe.experts.block

    def adapted(linear, e: int, x: Tensor) -> Tensor:
        adapter = linear.adapters[e]
        scale = 16 / math.sqrt(len(adapter.lora_A))
        return F.linear(x, linear.weight + scale * adapter.lora_B @ adapter.lora_A, linear.bias)

    def expert(e: int, x: Tensor) -> Tensor:
        projected = [adapted(linear, e, x) for linear in block.input_projections]
        return adapted(block.down_proj, e, block.activation(*projected))

    return [lambda x, e=e: expert(e, x) for e in range(moe.n_experts)]


def dense_mixture(moe: MoE, x: Tensor, gates: Tensor | None = None) -> Tensor:
    """The oracle: every expert computes every token; gates (..., E), or those of the router."""
    if gates is None:
        scores = x @ moe.router.linear.weight.T  # (B, T, E)
        kth = scores.sort(descending=True).values[..., moe.router.top_k - 1, None]
        weights = scores.exp() * (scores >= kth)
        all_weights = scores.exp() if moe.router.top_k == 1 else weights
        gates = weights / all_weights.sum(-1, keepdim=True)
    return sum(gates[..., e, None] * expert(x) for e, expert in enumerate(experts_of(moe)))


def assert_same_output_and_gradients(ours: Tensor, oracle: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-10)
    weight = torch.randn(ours.shape, dtype=ours.dtype, generator=seeded(2))
    our_gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    oracle_gradients = torch.autograd.grad((oracle * weight).sum(), inputs)
    torch.testing.assert_close(our_gradients, oracle_gradients, rtol=1e-10, atol=1e-10)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def random_input(*shape: int) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64, generator=seeded(1))
    return x.requires_grad_()


KINDS = [
    dict(expert="mlp"),
    dict(expert="mlp", use_kernels=False),
    dict(expert="lora", lora_rank=3),
]


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("feed_forward", ["gelu-tanh", "swiglu"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mixture_equals_the_dense_one_in_output_and_all_gradients(kind, feed_forward, top_k):
    moe = tiny(specialists=4, top_k=top_k, feed_forward=feed_forward, **kind).blocks[0].moe
    x = random_input(3, 5, 8)
    inputs = [x, *trained(moe)]
    assert_same_output_and_gradients(moe(x)[0], dense_mixture(moe, x), inputs)


@pytest.mark.parametrize("feed_forward", ["gelu-tanh", "swiglu"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_fixed_gates_that_dont_sum_to_1_it_equals_the_dense_one_bias_included(
    kind, feed_forward
):
    moe = tiny(specialists=2, feed_forward=feed_forward, **kind).blocks[0].moe
    x = random_input(3, 5, 8)
    gates = torch.tensor([0.5, 1.5, 0.25], dtype=torch.float64)
    inputs = [x, *trained(moe.experts)]
    assert_same_output_and_gradients(moe(x, gates)[0], dense_mixture(moe, x, gates), inputs)
    block = moe.experts[0] if kind["expert"] == "mlp" else moe.experts.block
    assert block.down_proj.bias.abs().max() > 0.1


def test_swiglu_is_its_definition():
    """down(gate · sigmoid(gate) · up). The mixture's oracle uses the block's own activation."""
    expert = tiny(feed_forward="swiglu").blocks[0].moe.experts[0]
    x = random_input(3, 8)
    gate = expert.gate_proj(x)
    hidden = gate * gate.sigmoid() * expert.up_proj(x)
    torch.testing.assert_close(expert(x), expert.down_proj(hidden))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_only_selected_experts_compute_and_an_expert_without_tokens_learns_nothing(top_k, kind):
    """The experts together compute each token k times."""
    moe = tiny(specialists=3, top_k=top_k, **kind).blocks[0].moe
    with torch.no_grad():
        moe.router.linear.weight[2] = -100.0  # for positive inputs: never selected
    x = torch.rand(2, 5, 8, dtype=torch.float64, generator=seeded(1))
    with Watched() as watched:
        y, routing = moe(x)
    assert watched.rows == top_k * 2 * 5
    assert 2 not in routing.selected
    torch.testing.assert_close(y, dense_mixture(moe, x), rtol=0, atol=1e-10)
    y.sum().backward()
    part = "experts.2." if kind["expert"] == "mlp" else "adapters.2."
    idle = [parameter for name, parameter in moe.named_parameters() if part in name]
    assert len(idle) == 4
    for parameter in idle:
        assert parameter.grad is None or not parameter.grad.any()


# --- the router


def test_gates_are_a_softmax_over_the_selected_scores_worked_by_hand():
    router = tiny(specialists=2, top_k=2).blocks[0].moe.router
    with torch.no_grad():
        router.linear.weight.zero_()[:, 0] = torch.tensor([1.0, 3.0, 2.0])
    routing = router(torch.eye(8, dtype=torch.float64)[:1])
    assert routing.selected.tolist() == [[1, 2]]
    assert routing.gates[0].tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])


def test_with_top_1_the_gate_is_a_probability_of_all_experts_so_that_the_router_learns():
    """Worked by hand for one token; with a single expert the gate is 1."""
    router = tiny(specialists=2, top_k=1).blocks[0].moe.router
    with torch.no_grad():
        router.linear.weight.zero_()[:, 0] = torch.tensor([1.0, 3.0, 2.0]).log()
    routing = router(torch.eye(8, dtype=torch.float64)[:1])
    assert routing.selected.tolist() == [[1]]
    assert routing.gates[0].tolist() == pytest.approx([3 / 6])
    assert (tiny(specialists=0, top_k=1).trunk(torch.zeros(1, 6).long())[1][0].gates == 1).all()

    model = tiny(specialists=2, top_k=1)
    _, loss = model(*torch.randint(11, (2, 2, 6), generator=seeded(0)))
    loss.backward()
    for parameter in model.having(ROUTER).values():
        assert parameter.grad.any()


def test_a_router_by_kind_shares_a_kinds_weight_evenly_among_its_experts():
    """Worked by hand: scores ln 1 and ln 3, two generalists and three specialists."""
    router = tiny(generalists=2, specialists=3, by_kind=True).blocks[0].moe.router
    assert router.linear.weight.shape == (2, 8)
    with torch.no_grad():
        router.linear.weight.zero_()[:, 0] = torch.tensor([1.0, 3.0]).log()
    routing = router(torch.eye(8, dtype=torch.float64)[:1])
    assert routing.selected.tolist() == [[0, 1, 2, 3, 4]]
    assert routing.gates[0].tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4])


def test_a_router_by_kind_needs_both_kinds():
    for sizes in (dict(generalists=0), dict(specialists=0)):
        with pytest.raises(ValueError, match="at least one generalist and one specialist"):
            GPTConfig(**SHAPE, by_kind=True, **sizes)


def test_with_one_expert_of_each_kind_a_router_by_kind_is_the_plain_one():
    idx = torch.randint(11, (2, 6), generator=seeded(0))
    plain, by_kind = (tiny(by_kind=by_kind)(idx)[0] for by_kind in (False, True))
    assert torch.equal(plain, by_kind)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_whose_fixed_gate_is_0_are_skipped_and_nothing_changes(kind):
    """The output and all gradients are those of all experts, which is the oracle."""
    model = tiny(specialists=3, **kind)
    moe = model.blocks[0].moe
    x = random_input(2, 5, 8)
    gates = torch.tensor([0.0, 0.25, 0.0, 0.75], dtype=torch.float64)
    _, routing = moe(x, gates)
    assert routing.selected.tolist() == [[1, 3]] * 10
    inputs = [x, *(p for p in moe.experts.parameters() if p.requires_grad)]
    assert_same_output_and_gradients(moe(x, gates)[0], dense_mixture(moe, x, gates), inputs)


def test_dense_gates_of_its_docstring():
    routing = Routing(torch.tensor([[0.7, 0.3]]), torch.tensor([[2, 0]]))
    torch.testing.assert_close(dense_gates(routing, 3), torch.tensor([[0.3, 0.0, 0.7]]))


def test_without_a_router_experts_are_averaged():
    moe = tiny(specialists=2, routed=False).blocks[0].moe
    x = random_input(2, 3, 8)
    torch.testing.assert_close(moe(x)[0], sum(expert(x) for expert in moe.experts) / 3)


def test_fixed_gates_replace_each_layers_router_and_leave_nothing_behind():
    model = tiny(specialists=2)
    attributes = [set(vars(module)) for module in model.modules()]
    gates = torch.tensor([[0.2, 0.0, 0.8], [0.8, 0.0, 0.2]], dtype=torch.float64)
    _, routings = model.trunk(torch.randint(11, (2, 6)), fixed_gates=gates)
    assert attributes == [set(vars(module)) for module in model.modules()]
    for routing, expected in zip(routings, gates, strict=True):
        assert torch.equal(dense_gates(routing, 3), expected.expand(12, 3))


@pytest.mark.parametrize("top_k", [2, 4])
def test_in_bfloat16_gates_are_float32_sum_to_1_and_are_close_to_the_exact_ones(top_k):
    idx = torch.randint(11, (8, 6), generator=seeded(0))
    exact = as_in("float32", specialists=3, top_k=top_k).trunk(idx)[1][0].gates
    rounded = as_in("bfloat16", specialists=3, top_k=top_k).trunk(idx)[1][0].gates
    assert rounded.dtype == torch.float32
    assert (rounded.sum(-1) - 1).abs().max() < 1e-6
    assert 0 < (rounded - exact).abs().max() < 0.03


# --- roles


def by_role(model: GPT) -> dict[str, set[str]]:
    return {role: set(model.having(role)) for role in ROLES}


def matching(model: GPT, pattern: str) -> set[str]:
    return {name for name in model.roles if re.search(pattern, name)}


def test_from_scratch_all_parameters_are_generalists_but_later_experts_and_routers():
    model = tiny(generalists=2, specialists=2)
    roles = by_role(model)
    assert roles[SPECIALIST] == matching(model, r"experts\.[23]\.")
    assert roles[ROUTER] == {f"blocks.{i}.moe.router.linear.weight" for i in range(2)}
    assert roles[BACKBONE] == set()


def test_with_lora_all_parameters_are_backbone_but_adapters_and_routers():
    """Attention's adapters are generalists, as are the first expert's. The backbone is frozen."""
    model = tiny(specialists=2, expert="lora")
    roles = by_role(model)
    assert roles[GENERALIST] == matching(model, r"adapters\.0\.")
    assert any("attention" in name for name in roles[GENERALIST])
    assert roles[SPECIALIST] == matching(model, r"adapters\.[12]\.")
    assert roles[ROUTER] == matching(model, "router")
    assert roles[BACKBONE] == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_a_method_can_change_roles_and_the_roles_of_factors():
    shared = tiny(specialists=2, roles={SPECIALIST: GENERALIST})
    assert shared.config.expert_roles == [GENERALIST] * 3
    swapped = tiny(roles={SPECIALIST: GENERALIST, GENERALIST: SPECIALIST})
    assert swapped.config.expert_roles == [SPECIALIST, GENERALIST]
    for e, role in enumerate(swapped.config.expert_roles):
        assert swapped.roles[f"blocks.0.moe.experts.{e}.up_proj.weight"] == role
    model = tiny(expert="lora", roles={GENERALIST: SPECIALIST, "lora_A": BACKBONE})
    for name in matching(model, "adapters"):
        assert model.roles[name] == (BACKBONE if name.endswith("lora_A") else SPECIALIST)


@pytest.mark.parametrize(
    "roles", [{"specialists": "generalist"}, {"specialist": "generalists"}, {"A": "backbone"}]
)
def test_a_typo_in_roles_is_refused(roles):
    with pytest.raises(ValueError, match="roles"):
        GPTConfig(**SHAPE, roles=roles)


def test_a_parameter_without_a_role_is_refused():
    class Forgetful(GPT):
        def find_roles(self):
            self.extra = nn.Linear(2, 2)
            return super().find_roles()

    with pytest.raises(AssertionError):
        Forgetful(GPTConfig(**SHAPE))


@pytest.mark.parametrize(
    "wrong", [dict(n_embd=9), dict(generalists=0, specialists=0), dict(dtype="bfloat16")]
)
def test_an_impossible_shape_is_refused(wrong):
    with pytest.raises(ValueError, match="n_embd|expert|frozen"):
        GPTConfig(**SHAPE | wrong)


# --- initial weights


def test_a_generator_decides_the_initial_weights_and_the_global_seed_is_left_alone():
    before = torch.get_rng_state()
    one, two, other = (GPT(GPTConfig(**SHAPE), seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.token_embedding.weight, other.token_embedding.weight)


@pytest.mark.parametrize("expert", ["mlp", "lora"])
def test_initial_weights_are_gpt2s_and_loras(expert):
    """Deviation 0.02, into the residual stream 0.02/√(2L); biases and B 0, norms 1; A ±1/√n_in."""
    model = GPT(GPTConfig(257, 64, 2, 4, 128, expert=expert), seeded(0))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == float("weight" in name)).all()
        elif parameter.ndim == 1 or name.endswith("lora_B"):
            assert not parameter.any()
        elif name.endswith("lora_A"):
            uniform = (3 * parameter.shape[1]) ** -0.5
            assert parameter.std().item() == pytest.approx(uniform, rel=0.1), name
        else:
            expected = 0.01 if name.endswith(("out_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


# --- logits and loss


@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_no_token_sees_a_later_one(shape):
    model = tiny(specialists=3, **shape)
    idx = torch.randint(11, (1, 6), generator=seeded(0))
    changed = idx.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 11
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_the_loss_is_the_cross_entropy_of_the_logits(shape, use_kernels):
    model = tiny(**shape, use_kernels=use_kernels)
    idx, targets = torch.randint(11, (2, 2, 6), generator=seeded(0))
    logits, nothing = model(idx)
    also_nothing, loss = model(idx, targets)
    assert nothing is also_nothing is None
    expected = -logits.softmax(-1).gather(2, targets[..., None]).log().mean()
    torch.testing.assert_close(loss, expected)


@torch.no_grad()
def test_rotary_positions_tell_how_far_tokens_are_apart_and_not_where_they_are():
    """A shifted text is computed the same; and the order of earlier tokens matters."""
    model = tiny(block_size=40, **LLAMA)
    idx = torch.randint(11, (1, 6), generator=seeded(0))
    hidden = []
    for start in (0, 30):
        x = model.token_embedding(idx)
        for block in model.blocks:
            x, _ = block(x, rope_cache(model.config, torch.arange(start, start + 6)))
        hidden.append(x)
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-5)  # angles are in float32
    shallow = tiny(**LLAMA | {"n_layer": 1})
    one = shallow.trunk(torch.tensor([[1, 2, 3]]))[0][0, -1]
    two = shallow.trunk(torch.tensor([[2, 1, 3]]))[0][0, -1]
    assert (one - two).abs().max() > 1e-3


# --- sampling


@torch.no_grad()
@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_tokens_behind_a_cache_are_computed_as_in_the_whole_text(shape, use_kernels):
    """One token or several at a time; and the text may not exceed block_size."""
    model = tiny(**shape, use_kernels=use_kernels)
    idx = torch.randint(11, (2, 6), generator=seeded(0))
    kv_cache = KVCache(model.config.n_layer)
    parts = [model.trunk(part, kv_cache=kv_cache)[0] for part in idx.split([2, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.trunk(idx)[0])
    assert kv_cache.length == 6
    with pytest.raises(AssertionError, match="more than block_size"):
        model.trunk(idx[:, :1], kv_cache=kv_cache)


@torch.no_grad()
@pytest.mark.parametrize("gates", [None, torch.tensor([[0.9, 0.1], [0.2, 0.8]])])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("block_size", "prompt"), [(6, 1), (6, 6), (6, 7), (5, 3), (5, 20)])
def test_a_token_sees_the_text_from_the_first_half_block_from_which_it_fits(
    block_size, prompt, cache, gates
):
    """Halves of a block are counted from the beginning of the text, and rounded up."""
    model = tiny(block_size=block_size)
    text = torch.randint(11, (2, prompt), generator=seeded(0))
    ours = generate(
        model, text, 30, temperature=0.8, generator=seeded(1), cache=cache, fixed_gates=gates
    )
    generator = seeded(1)
    half = math.ceil(block_size / 2)
    for length in range(prompt, prompt + 30):
        start = next(start for start in range(0, length, half) if length - start <= block_size)
        logits = model(text[:, start:], fixed_gates=gates)[0][:, -1].float()
        token = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)
        text = torch.cat([text, token], dim=1)
    assert torch.equal(ours, text)


def test_at_temperature_0_the_likeliest_token_is_sampled():
    model = tiny()
    idx = torch.randint(11, (1, 3), generator=seeded(0))
    likeliest = model(idx)[0][0, -1].argmax()
    assert generate(model, idx, 1, temperature=0)[0, -1] == likeliest


def test_only_the_top_k_and_only_the_vocabulary_are_sampled():
    model = tiny()
    idx = torch.randint(11, (1, 3), generator=seeded(0)).expand(100, -1)
    best = model(idx)[0][0, -1].topk(3).indices.tolist()
    for options, allowed in ((dict(top_k=3), best), (dict(vocabulary=4), range(4))):
        tokens = generate(model, idx, 1, temperature=100.0, generator=seeded(1), **options)[:, -1]
        assert set(tokens.tolist()) == set(allowed)
