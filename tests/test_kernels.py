"""The fast forms against the plain ones of the same model, and what they are fast for."""

import pytest
import torch
from torch.nn import functional as F

import model as model_module
from model import BACKBONE, GPT, GPTConfig
from support import kernels
from tiny import Watched, as_on_a_gpu, seeded, tiny

BATCH = torch.randint(11, (2, 3, 6), generator=seeded(0)).unbind()


def learned(model: GPT) -> dict[str, torch.Tensor]:
    """The gradients of everything that learns, after one backward pass."""
    model(*BATCH)[1].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("expert", [dict(expert="mlp"), dict(expert="lora", lora_rank=3),
                                    dict(expert="lora", lora_rank=4, gelu="tanh")])
@pytest.mark.parametrize(("specialists", "top_k"), [(0, 2), (1, 2), (4, 1), (4, 2), (4, 3), (4, 4), (4, 5)])
def test_fast_and_plain_are_the_same_in_hidden_states_loss_and_all_gradients(specialists, top_k, expert, monkeypatch):
    monkeypatch.setattr(kernels, "LOGITS", 5 * 11)  # so that the loss is made of several chunks
    fast, plain = (tiny(specialists=specialists, top_k=top_k, fast=fast, **expert) for fast in (True, False))
    torch.testing.assert_close(fast.trunk(BATCH[0])[0], plain.trunk(BATCH[0])[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast(*BATCH)[1], plain(*BATCH)[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learned(fast), learned(plain), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("learning", [(True, True), (True, False), (False, True)])
def test_the_chunked_loss_equals_the_plain_one_whatever_learns_and_however_it_is_scaled(learning, rows, monkeypatch):
    monkeypatch.setattr(kernels, "LOGITS", rows * 11)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, generator=seeded(n)) for n in (10, 11))
    hidden[0] *= 1000  # logits too large for exp
    hidden, weight = (tensor.requires_grad_(learns) for tensor, learns in zip((hidden, weight), learning, strict=True))
    targets = torch.randint(11, (10,), generator=seeded(0))
    chunked, plain = kernels.head_loss(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    ours, oracle = (torch.autograd.grad(3 * loss, inputs) for loss in (chunked, plain))
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(kernels.head_loss(hidden, weight, targets), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fast", [True, False])
def test_only_the_plain_form_holds_the_logits_of_all_positions(fast, monkeypatch):
    monkeypatch.setattr(kernels, "LOGITS", 4 * 500)
    model = GPT(GPTConfig(500, 16, 1, 2, 8, expert="lora", fast=fast))
    with Watched() as watched:
        model(*torch.randint(500, (2, 4, 16)))[1].backward()
    assert (watched.largest <= 500 * 8) == fast  # that is the head's weight; all logits are 500 · 64


@pytest.mark.parametrize("fast", [True, False])
def test_the_frozen_block_is_applied_once_to_a_token_and_learns_nothing(fast):
    """However many experts a token goes to."""
    model, rows = tiny(specialists=4, top_k=3, expert="lora", fast=fast), []
    for layer in model.blocks:
        for matrix in (layer.moe.experts.block.up, layer.moe.experts.block.down):
            matrix.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    learned(model)
    assert rows == [3 * 6] * 4
    assert all((p.grad is None) == (model.roles[name] == BACKBONE) for name, p in model.named_parameters())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("expert", ["mlp", "lora"])
def test_bfloat16_changes_loss_and_gradients_by_rounding_only(expert, fast, monkeypatch):
    """Where all experts are chosen; else rounding can change the choice. What the optimizer gets is float32."""
    exact, rounded = (tiny(spread=0.3, expert=expert, specialists=3, top_k=4, fast=fast).float() for _ in "ab")
    gradients, loss = learned(exact), exact(*BATCH)[1]
    monkeypatch.setattr(model_module, "precision", as_on_a_gpu)
    rough = rounded(*BATCH)[1]
    assert rough.dtype == torch.float32
    assert 0 < abs(rough - loss) < 0.02
    for name, gradient in learned(rounded).items():
        assert gradient.dtype == torch.float32
        assert (gradient - gradients[name]).norm() < 0.1 * gradients[name].norm(), name
