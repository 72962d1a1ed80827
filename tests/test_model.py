"""The network: the sparse mixture against a dense one, roles, causality, sampling."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from model import (
    BACKBONE,
    GENERALIST,
    GPT,
    ROLES,
    ROUTER,
    SPECIALIST,
    GPTConfig,
    MoE,
    Routing,
    dense_gates,
    rope_cache,
)
from support.sampling import generate
from tiny import LLAMA, SHAPE, Watched, as_in, seeded, tiny


def experts_of(moe: MoE) -> list:
    """Each expert as a function; where experts are low-rank changes, of a copy of the whole block, changed by s·BA."""
    if isinstance(moe.experts, torch.nn.ModuleList):
        return list(moe.experts)
    block = moe.experts.block

    def expert(e: int):
        def changed(matrix, x):
            low = matrix.adapters[e]
            return F.linear(x, matrix.weight + 16 / math.sqrt(len(low.lora_A)) * low.lora_B @ low.lora_A, matrix.bias)
        return lambda x: changed(block.down_proj, block.activation(*(changed(matrix, x) for matrix in block.input_projections)))
    return [expert(e) for e in range(moe.n_experts)]


def dense_mixture(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """The oracle: every expert on every token, with gates written out from their definition."""
    scores = x @ moe.router.linear.weight.T  # (B, T, E)
    threshold = scores.sort(descending=True).values[..., moe.router.top_k - 1, None]
    weights = scores.exp() * (scores >= threshold)
    gates = weights / weights.sum(-1, keepdim=True)
    return sum(gates[..., e, None] * expert(x) for e, expert in enumerate(experts_of(moe)))


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("feed_forward", ["gelu-tanh", "swiglu"])
@pytest.mark.parametrize("kind", [dict(expert="mlp"), dict(expert="lora", lora_rank=3)])
def test_the_mixture_equals_the_dense_one_in_output_and_all_gradients(kind, top_k, feed_forward):
    """Whose experts are whole blocks, one copy each."""
    moe = tiny(specialists=4, top_k=top_k, feed_forward=feed_forward, **kind).blocks[0].moe
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    sparse, dense = moe(x)[0], dense_mixture(moe, x)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-10)
    weight = torch.randn(sparse.shape, dtype=torch.float64, generator=seeded(2))
    inputs = [x, *(parameter for parameter in moe.parameters() if parameter.requires_grad)]
    for ours, oracle in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (sparse, dense)), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("expert", ["mlp", "lora"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_only_chosen_experts_compute_and_one_without_tokens_changes_and_learns_nothing(top_k, expert):
    """The experts together see each token k times."""
    moe = tiny(specialists=3, top_k=top_k, expert=expert).blocks[0].moe
    with torch.no_grad():
        moe.router.linear.weight[2] = -100.0  # for positive inputs: never chosen
    x = torch.rand(2, 5, 8, dtype=torch.float64, generator=seeded(1))
    with Watched() as watched:
        y, routing = moe(x)
    assert watched.rows == top_k * 2 * 5
    assert 2 not in routing.selected
    torch.testing.assert_close(y, dense_mixture(moe, x), rtol=0, atol=1e-10)
    y.sum().backward()
    own = "experts.2." if expert == "mlp" else "adapters.2."
    idle = [parameter for name, parameter in moe.named_parameters() if own in name]
    assert all(not parameter.grad.any() for parameter in idle)
    assert len(idle) == 4


def test_by_expert_and_dense_gates_of_their_docstrings():
    routing = Routing(torch.tensor([[0.7, 0.3], [0.6, 0.4]]), torch.tensor([[2, 0], [2, 1]]))
    token, gates, counts = by_expert(routing, 3)
    assert (token.tolist(), counts) == ([0, 1, 0, 1], [1, 1, 2])
    torch.testing.assert_close(gates, torch.tensor([[0.3], [0.4], [0.7], [0.6]]))
    torch.testing.assert_close(dense_gates(routing, 3)[0], torch.tensor([0.3, 0.0, 0.7]))


def test_gates_are_a_softmax_over_the_chosen_scores_worked_by_hand():
    router = tiny(specialists=2, top_k=2).blocks[0].moe.router
    with torch.no_grad():
        router.linear.weight.zero_()[:, 0] = torch.tensor([1.0, 3.0, 2.0])
    gates, chosen, _ = router(torch.eye(8, dtype=torch.float64)[:1])
    assert chosen.tolist() == [[1, 2]]
    assert gates[0].tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])


def test_without_a_router_experts_are_averaged_and_given_gates_stand_in_for_a_router_and_leave_nothing_behind():
    """The given gates are the same for every token, and each layer has its own."""
    moe, x = tiny(specialists=2, routed=False).blocks[0].moe, torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(moe(x)[0], sum(expert(x) for expert in moe.experts) / 3)
    moe, gates = tiny(specialists=2).blocks[0].moe, torch.tensor([0.2, 0.0, 0.8]).double()
    torch.testing.assert_close(moe(x, gates)[0], 0.2 * moe.experts[0](x) + 0.8 * moe.experts[2](x))
    model = tiny(specialists=2)
    attributes = [set(vars(module)) for module in model.modules()]
    _, routings = model.trunk(torch.randint(11, (2, 6)), torch.stack([gates, gates.flip(0)]))
    assert attributes == [set(vars(module)) for module in model.modules()]
    for routing, expected in zip(routings, (gates, gates.flip(0)), strict=True):
        assert torch.equal(dense_gates(routing, 3), expected.expand(12, 3))


@pytest.mark.parametrize("top_k", [2, 4])
def test_in_bfloat16_gates_are_float32_and_sum_to_1_and_are_close_to_the_exact_ones(top_k):
    idx = torch.randint(11, (8, 6), generator=seeded(0))
    (exact, _), (rounded, _) = (as_in(dtype, specialists=3, top_k=top_k).trunk(idx)[1]
                                for dtype in ("float32", "bfloat16"))
    assert rounded.gates.dtype == torch.float32
    assert (rounded.gates.sum(-1) - 1).abs().max() < 1e-6
    assert 0 < (rounded.gates - exact.gates).abs().max() < 0.03


def test_of_models_from_scratch_everything_is_generalist_but_later_experts_and_routers():
    model = tiny(generalists=2, specialists=2)
    by_role = {role: set(model.having(role)) for role in ROLES}
    assert by_role[SPECIALIST] == {name for name in model.roles if re.search("experts.[23]", name)}
    assert by_role[ROUTER] == {f"blocks.{layer}.moe.router.linear.weight" for layer in range(2)}
    assert by_role[BACKBONE] == set()


def test_of_low_rank_models_everything_is_backbone_but_changes_and_routers():
    """Attention's two changes are generalists, as are the first expert's. Only the backbone doesn't learn."""
    model = tiny(specialists=2, expert="lora")
    by_role = {role: set(model.having(role)) for role in ROLES}
    pairs = [f"blocks.{i}.attention.{part}.adapters.0" for i in range(2) for part in ("qkv", "out")]
    pairs += [f"blocks.{i}.moe.experts.block.{part}.adapters.0" for i in range(2) for part in ("up", "down")]
    assert by_role[GENERALIST] == {f"{pair}.{factor}" for pair in pairs for factor in "AB"}
    assert by_role[SPECIALIST] == {name for name in model.roles if re.search("adapters.[12]", name)}
    assert by_role[ROUTER] == {name for name in model.roles if ".router." in name}
    assert by_role[BACKBONE] == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_a_method_can_give_a_role_or_a_factor_another_role_and_nothing_may_be_without_one():
    assert tiny(specialists=2, roles={SPECIALIST: GENERALIST}).config.expert_roles == [GENERALIST] * 3
    swapped = tiny(roles={SPECIALIST: GENERALIST, GENERALIST: SPECIALIST})
    first, second = (swapped.roles[f"blocks.0.moe.experts.{e}.up.weight"] for e in (0, 1))
    assert [first, second] == swapped.config.expert_roles == [SPECIALIST, GENERALIST]
    model = tiny(expert="lora", roles={GENERALIST: SPECIALIST, "A": BACKBONE})
    assert all(model.roles[name] == (BACKBONE if name.endswith(".lora_A") else SPECIALIST)
               for name in model.roles if ".change" in name)

    class Forgetful(GPT):
        def find_roles(self):
            self.extra = torch.nn.Linear(2, 2)
            return super().find_roles()

    for kind, roles in ((Forgetful, {}), (GPT, {SPECIALIST: "nonsense"})):
        with pytest.raises(AssertionError):
            kind(GPTConfig(**SHAPE, roles=roles))


@pytest.mark.parametrize("wrong", [dict(n_embd=9), dict(generalists=0, specialists=0), dict(dtype="bfloat16")])
def test_an_impossible_shape_is_refused(wrong):
    with pytest.raises(ValueError, match="n_embd|expert|frozen"):
        GPTConfig(**SHAPE | wrong)


def test_a_generator_decides_the_initial_weights_and_the_global_seed_is_left_alone():
    before = torch.get_rng_state()
    one, two, other = (GPT(GPTConfig(**SHAPE), seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.token_embedding.weight, other.token_embedding.weight)


@pytest.mark.parametrize("expert", ["mlp", "lora"])
def test_the_start_is_gpt2s(expert):
    """Weights of deviation 0.02, those into the residual stream 0.02/√(2L); biases and B 0, norms 1; A is LoRA's."""
    model = GPT(GPTConfig(257, 64, 2, 4, 128, expert=expert), seeded(0))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == float("weight" in name)).all()
        elif parameter.ndim == 1 or name.endswith(".lora_B"):
            assert not parameter.any()
        else:
            expected = 0.01 if name.endswith(("out_proj.weight", "down_proj.weight")) else 0.02
            if name.endswith(".lora_A"):  # uniform within ±1/√n_in
                expected = (3 * parameter.shape[1]) ** -0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_no_token_sees_a_later_one(shape):
    model, idx = tiny(specialists=3, **shape), torch.randint(11, (1, 6), generator=seeded(0))
    changed = idx.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 11
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_the_loss_is_the_cross_entropy_of_the_logits(shape):
    model, (idx, targets) = tiny(**shape), torch.randint(11, (2, 2, 6), generator=seeded(0))
    (logits, nothing), (also_nothing, loss) = model(idx), model(idx, targets)
    assert nothing is also_nothing is None
    torch.testing.assert_close(loss, -logits.softmax(-1).gather(2, targets[..., None]).log().mean())


@torch.no_grad()
def test_rotary_positions_tell_how_far_tokens_are_apart_and_not_where():
    """Moved along, a text is computed the same; and of three tokens, the order of the first two matters."""
    model, idx = tiny(block_size=40, **LLAMA), torch.randint(11, (1, 6), generator=seeded(0))
    hidden = []
    for before in (0, 30):
        x = model.token_embedding(idx)
        for block in model.blocks:
            x, _ = block(x, rope=rope_cache(model.config, torch.arange(before, before + 6)))
        hidden.append(x)
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-5)  # angles are in float32
    two = [tiny(**LLAMA | {"n_layer": 1}).trunk(torch.tensor([order]))[0][0, -1] for order in ([1, 2, 3], [2, 1, 3])]
    assert (two[0] - two[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_tokens_behind_a_past_one_or_several_are_computed_as_in_the_whole_text(shape):
    model, idx = tiny(**shape), torch.randint(11, (2, 6), generator=seeded(0))
    pasts = [[] for _ in model.blocks]
    parts = [model.trunk(part, pasts=pasts)[0] for part in idx.split([2, 3, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.trunk(idx)[0])
    with pytest.raises(AssertionError, match="more than block_size"):
        model.trunk(idx[:, :1], pasts=pasts)


@torch.no_grad()
@pytest.mark.parametrize("gates", [None, torch.tensor([[0.9, 0.1], [0.2, 0.8]])])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("window", "prompt"), [(6, 1), (6, 6), (6, 7), (5, 3), (5, 20)])
def test_a_token_sees_the_text_from_the_first_half_window_on_from_which_it_fits(window, prompt, cache, gates):
    """Independently: halves of a window are counted from the text's beginning, and rounded up."""
    model, text = tiny(block_size=window), torch.randint(11, (2, prompt), generator=seeded(0))
    ours = generate(model, text, 30, temperature=0.8, generator=seeded(1), cache=cache, fixed_gates=gates)
    generator, half = seeded(1), math.ceil(window / 2)
    for length in range(prompt, prompt + 30):
        start = next(start for start in range(0, length, half) if length - start <= window)
        probabilities = (model(text[:, start:], fixed_gates=gates)[0][:, -1].float() / 0.8).softmax(-1)
        text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator)], 1)
    assert torch.equal(ours, text)


def test_only_the_top_k_are_sampled_and_only_of_the_vocabulary_and_at_temperature_0_the_best():
    model, idx = tiny(), torch.randint(11, (1, 3), generator=seeded(0)).expand(100, -1)
    scores = model(idx)[0][0, -1]
    assert (generate(model, idx, 1, temperature=0)[:, -1] == scores.argmax()).all()
    for how, allowed in ((dict(top_k=3), scores.topk(3).indices.tolist()), (dict(vocabulary=4), range(4))):
        sampled = generate(model, idx, 1, temperature=100.0, generator=seeded(1), **how)[:, -1]
        assert set(sampled.tolist()) == set(allowed)
