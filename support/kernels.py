"""Two pieces of model.py in forms that save time and memory. A reader of the paper can skip them.

    python -m pytest tests/test_kernels.py

`attention` is attention's softmax, with a form of its own for bfloat16 on a CPU. `head_loss` is the cross-entropy of
the head's logits, which never holds the logits of all positions at once; it has no second derivatives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LOGITS = 2 ** 23  # that head_loss holds at a time, at most


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, in which the last of T queries sees all S keys, and each before it one less.

    q (B, H, T, D), k and v (B, K, S, D), each for H / K of the queries' heads -> (B, H, T, D). PyTorch's own form takes
    four times as long for bfloat16 on a CPU.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if q.is_cuda or q.dtype != torch.bfloat16:
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=H > K)
    bias = torch.full((T, S), -torch.inf, dtype=q.dtype).triu(S - T + 1)  # 0 where a key is seen
    q, k, v = q.reshape(B * K, -1, D), k.reshape(B * K, S, D), v.reshape(B * K, S, D)  # heads that share keys in a row
    scores = torch.baddbmm(bias.repeat(H // K, 1), q, k.transpose(1, 2), alpha=D ** -0.5)  # (B·K, H/K·T, S)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats of a head's logits: hidden (N, C), weight (V, C), targets (N,) -> ()."""
    return HeadLoss.apply(hidden, weight, targets, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """As head_loss. Where `learning`, the gradients are made along with the loss, while a chunk's logits are there:
    ∂loss/∂logits = (softmax(logits) − onehot(target)) / N. A frozen head gets none."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, learning: bool) -> Tensor:
        learns, head_learns = (learning and needed for needed in ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss, d_hidden = hidden.new_zeros((), dtype=wide), torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight) if head_learns else None
        rows = max(1, LOGITS // len(weight))
        for h, dh, target in zip(hidden.split(rows), d_hidden.split(rows), targets[:, None].split(rows), strict=True):
            logits = F.linear(h, weight).to(wide)  # (n, V), from here on in place
            logits -= logits.amax(1, keepdim=True)
            loss -= logits.gather(1, target).sum()
            Z = logits.exp_().sum(1, keepdim=True)  # (n, 1); softmax = exp(logits) / Z
            loss += Z.log().sum()
            if learns:
                dh += (logits.to(h.dtype) @ weight) / Z - weight[target[:, 0]]
            if head_learns:
                d_weight.addmm_(logits.to(h.dtype).t(), (h / Z).to(h.dtype)).index_add_(0, target[:, 0], -h)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        scale = gradient / len(d_hidden)  # the mean's 1/N
        return scale * d_hidden, None if d_weight is None else scale * d_weight, None, None
