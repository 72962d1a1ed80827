"""The fast forms against the plain ones, and what they are fast for."""

import pytest
import torch
from torch.nn import functional as F

from model import BACKBONE, GPT, GPTConfig, LoRALinear
from support import kernels
from tiny import LLAMA, Watched, as_in, seeded, tiny

BATCH = torch.randint(11, (2, 3, 6), generator=seeded(0)).unbind()


def learned(model: GPT) -> dict[str, torch.Tensor]:
    """The gradients of everything that learns, after one backward pass."""
    model(*BATCH)[1].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 5), (1, 5), (1, 1)])
def test_attention_is_the_softmax_of_its_definition_in_output_and_all_gradients(T, S, H, K, dtype):
    """Where keys are shared, and where some tokens are past."""
    q, k, v = (torch.randn(2, heads, n, 8, dtype=torch.float64, generator=seeded(i)).to(dtype).requires_grad_()
               for i, (heads, n) in enumerate([(H, T), (K, S), (K, S)]))
    wide = [x.double().repeat_interleave(H // x.shape[1], 1) for x in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(2, 3) / 8 ** 0.5
    weights = scores.exp() * torch.ones(T, S).tril(S - T)
    oracle = weights / weights.sum(3, keepdim=True) @ wide[2]
    ours, up = kernels.attention(q, k, v), torch.randn(oracle.shape, dtype=torch.float64, generator=seeded(9))
    found = [ours, *torch.autograd.grad((ours * up).sum(), (q, k, v))]
    expected = [oracle, *torch.autograd.grad((oracle * up).sum(), (q, k, v))]
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() <= (1e-12 if dtype == torch.float64 else 0.01) * two.norm() + 1e-12


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("learning", [(True, True), (True, False), (False, True)])
def test_the_chunked_loss_equals_the_plain_one_whatever_learns_and_however_it_is_scaled(learning, rows, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", rows * 11)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, generator=seeded(n)) for n in (10, 11))
    hidden[0] *= 1000  # logits too large for exp
    hidden, weight = (tensor.requires_grad_(learns) for tensor, learns in zip((hidden, weight), learning, strict=True))
    targets = torch.randint(11, (10,), generator=seeded(0))
    chunked, plain = kernels.linear_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    ours, oracle = (torch.autograd.grad(3 * loss, inputs) for loss in (chunked, plain))
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(kernels.linear_cross_entropy(hidden, weight, targets), plain, rtol=1e-12, atol=1e-12)


def test_the_logits_of_all_positions_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 4 * 500)
    model = GPT(GPTConfig(500, 16, 1, 2, 8, expert="lora"))
    with Watched() as watched:
        model(*torch.randint(500, (2, 4, 16)))[1].backward()
    assert watched.largest <= 500 * 8  # that is the head's weight; all logits are 500 · 64


def test_the_frozen_block_is_applied_once_to_a_token_and_learns_nothing():
    """However many experts a token goes to."""
    model, rows = tiny(specialists=4, top_k=3, expert="lora", feed_forward="swiglu"), []
    for layer in model.blocks:
        block = layer.moe.experts.block
        for matrix in (block.up_proj, block.gate_proj, block.down_proj):
            matrix.frozen = lambda x, matrix=matrix: rows.append(len(x)) or LoRALinear.frozen(matrix, x)
    learned(model)
    assert rows == [3 * 6] * 6
    assert all((p.grad is None) == (model.roles[name] == BACKBONE) for name, p in model.named_parameters())


@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_bfloat16_changes_loss_and_gradients_by_rounding_only(shape):
    """Where all experts are chosen; else rounding can change the choice. What the optimizer gets is float32."""
    exact, rounded = (as_in(dtype, seed=1, spread=0.3, specialists=3, top_k=4, **shape)
                      for dtype in ("float32", "bfloat16"))
    loss, rough = exact(*BATCH)[1], rounded(*BATCH)[1]
    assert rough.dtype == torch.float32
    assert 0 < abs(rough - loss) < 0.02
    gradients = learned(exact)
    for name, gradient in learned(rounded).items():
        assert gradient.dtype == torch.float32
        assert (gradient - gradients[name]).norm() < 0.1 * gradients[name].norm(), name
