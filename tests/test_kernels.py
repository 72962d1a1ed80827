"""The fast forms against the plain ones, and what they save."""

import pytest
import torch
from torch.nn import functional as F

from lora import LoRALinear
from model import BACKBONE, GPT, GPTConfig, causal_attention
from support import kernels
from tiny import LLAMA, Watched, as_in, seeded, tiny

BATCH = torch.randint(11, (2, 3, 6), generator=seeded(0)).unbind()


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    """The gradients of all trained parameters after one backward pass."""
    _, loss = model(*BATCH)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention, with every head's own copy of its keys and values."""
    copies = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(copies, 1)
    v = v.repeat_interleave(copies, 1)
    T, S = q.shape[2], k.shape[2]
    weights = (q @ k.transpose(2, 3) / 8**0.5).exp() * torch.ones(T, S).tril(S - T)
    return weights / weights.sum(3, keepdim=True) @ v


@pytest.mark.parametrize("attention", [kernels.attention, causal_attention])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 5), (1, 5), (1, 1)])
def test_attention_is_its_definition_in_output_and_all_gradients(T, S, H, K, dtype, attention):
    """With shared keys, and with keys from a cache."""
    inputs = []
    for i, (heads, n) in enumerate([(H, T), (K, S), (K, S)]):
        x = torch.randn(2, heads, n, 8, dtype=torch.float64, generator=seeded(i))
        inputs.append(x.to(dtype).requires_grad_())
    ours = attention(*inputs)
    oracle = by_definition(*[x.double() for x in inputs])
    weight = torch.randn(oracle.shape, dtype=torch.float64, generator=seeded(9))
    our_gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    oracle_gradients = torch.autograd.grad((oracle * weight).sum(), inputs)
    tolerance = 1e-12 if dtype == torch.float64 else 0.01
    pairs = [(ours, oracle), *zip(our_gradients, oracle_gradients, strict=True)]
    for one, two in pairs:
        assert (one - two).norm() <= tolerance * two.norm() + 1e-12


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_the_chunked_loss_equals_the_plain_one_in_value_and_gradients(learns, rows, monkeypatch):
    """Whichever input learns, and with the factor that comes from above."""
    monkeypatch.setattr(kernels, "CHUNK", rows * 11)
    hidden = torch.randn(10, 8, dtype=torch.float64, generator=seeded(10))
    hidden[0] *= 1000  # logits too large for exp
    weight = torch.randn(11, 8, dtype=torch.float64, generator=seeded(11))
    hidden.requires_grad_(learns[0])
    weight.requires_grad_(learns[1])
    targets = torch.randint(11, (10,), generator=seeded(0))
    chunked = kernels.linear_cross_entropy(hidden, weight, targets)
    plain = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    ours = torch.autograd.grad(3 * chunked, inputs)
    oracle = torch.autograd.grad(3 * plain, inputs)
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    with torch.no_grad():
        without = kernels.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(without, plain, rtol=1e-12, atol=1e-12)


def test_the_logits_of_all_positions_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 4 * 500)
    model = GPT(GPTConfig(500, 16, 1, 2, 8, expert="lora"))
    with Watched() as watched:
        _, loss = model(*torch.randint(500, (2, 4, 16)))
        loss.backward()
    assert watched.largest <= 500 * 8  # that is the head's weight; all logits are 500 · 64


def test_the_mixtures_sorting_worked_by_hand():
    """Tokens 10 and 20, and expert e adds e: 0.7·12 + 0.3·10 and 0.6·22 + 0.4·21."""
    experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))
    with torch.no_grad():
        for e, expert in enumerate(experts):
            expert.weight.fill_(1)
            expert.bias.fill_(e)
    gates = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    selected = torch.tensor([[2, 0], [2, 1]])
    y = kernels.mixture(experts, torch.tensor([[10.0], [20.0]]), gates, selected)
    torch.testing.assert_close(y, torch.tensor([[11.4], [21.6]]))


def test_the_frozen_block_reads_a_token_once_however_many_experts_it_selects(monkeypatch):
    """Its input projections; its weights learn nothing."""
    rows = []
    frozen = LoRALinear.frozen

    def counted(self, x):
        rows.append(len(x))
        return frozen(self, x)

    monkeypatch.setattr(LoRALinear, "frozen", counted)
    model = tiny(specialists=4, top_k=3, expert="lora", feed_forward="swiglu")
    gradients(model)
    per_layer = 2 + 2  # attention's two projections, and the block's up_proj and gate_proj
    assert rows == [3 * 6] * per_layer * model.config.n_layer
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (model.roles[name] == BACKBONE)


@pytest.mark.parametrize("shape", [{}, LLAMA])
@pytest.mark.parametrize("expert", ["mlp", "lora"])
def test_a_model_has_the_same_loss_and_gradients_without_kernels(expert, shape):
    with_kernels = tiny(specialists=3, expert=expert, **shape)
    without = tiny(specialists=3, expert=expert, use_kernels=False, **shape)
    loss = without(*BATCH)[1]
    torch.testing.assert_close(with_kernels(*BATCH)[1], loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(with_kernels), gradients(without), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_in_bfloat16_a_model_differs_without_kernels_by_rounding_only(shape):
    """With all experts selected; else rounding can change the selection."""
    config = dict(seed=1, spread=0.3, specialists=3, top_k=4, **shape)
    with_kernels = as_in("bfloat16", **config)
    without = as_in("bfloat16", use_kernels=False, **config)
    assert abs(with_kernels(*BATCH)[1] - without(*BATCH)[1]) < 0.005
    expected = gradients(without)
    for name, gradient in gradients(with_kernels).items():
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_bfloat16_changes_loss_and_gradients_by_rounding_only(shape):
    """With all experts selected; else rounding can change the selection. Gradients are float32."""
    exact, rounded = (
        as_in(dtype, seed=1, spread=0.3, specialists=3, top_k=4, **shape)
        for dtype in ("float32", "bfloat16")
    )
    exact_loss = exact(*BATCH)[1]
    rounded_loss = rounded(*BATCH)[1]
    assert rounded_loss.dtype == torch.float32
    assert 0 < abs(rounded_loss - exact_loss) < 0.02
    expected = gradients(exact)
    for name, gradient in gradients(rounded).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm(), name
