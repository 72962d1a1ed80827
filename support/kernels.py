"""Three pieces of model.py in faster forms. A reader of the paper can skip this file.

    python -m pytest tests/test_kernels.py

Each has a plain twin in model.py, which GPTConfig(use_kernels=False) uses: `mixture` is
model.MLPExperts.forward, `attention` is model.causal_attention for bfloat16 on a CPU, and
`linear_cross_entropy` is the last line of model.GPT.loss.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 2**23  # logits that linear_cross_entropy holds at a time


def mixture(experts: nn.ModuleList, x: Tensor, gates: Tensor, selected: Tensor) -> Tensor:
    """Σ_{e selected} gate_e · expert_e(x): x (N, C), gates and selected (N, k) -> (N, C).

    It sorts the token-expert pairs by expert, so that it reads x and writes the sum only once.

    selected [[2, 0], [2, 1]] -> order [1, 3, 0, 2], tokens [0, 1, 0, 1], counts [1, 1, 2]
    """
    k = selected.shape[1]
    if k == len(experts):  # every expert reads all tokens, in order
        y = 0
        for gate, expert in zip(gates.unbind(1), experts, strict=True):  # E × (N,)
            y = y + gate[:, None] * expert(x)
        return y
    flat = selected.flatten()  # (N·k,)
    order = flat.argsort(stable=True)
    tokens = order // k  # (N·k,), expert by expert
    counts = flat.bincount(minlength=len(experts)).tolist()
    inputs = x.index_select(0, tokens).split(counts)  # E × (n_e, C)
    outputs = [expert(x_e) for expert, x_e in zip(experts, inputs, strict=True)]
    sorted_gates = gates.flatten().index_select(0, order)  # (N·k,)
    gated = sorted_gates[:, None] * torch.cat(outputs)  # (N·k, C)
    return torch.zeros_like(x).index_add(0, tokens, gated)


def has_attention_for(q: Tensor) -> bool:
    """Whether `attention` is faster than PyTorch's: four times as fast in bfloat16 on a CPU."""
    return q.dtype == torch.bfloat16 and not q.is_cuda


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v. Causal: the last of T queries attends to all S keys, the one
    before it to the first S − 1, and so on.

    q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B * K, H // K * T, D)  # the heads that share keys, one after the other
    k = k.reshape(B * K, S, D)
    v = v.reshape(B * K, S, D)
    # (T, S): 0 for keys that a query attends to, −inf for others
    bias = torch.full((T, S), -torch.inf, dtype=q.dtype).triu(S - T + 1)
    bias = bias.repeat(H // K, 1)  # (H/K·T, S)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=D**-0.5)  # (B·K, H/K·T, S)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the logits `hidden @ weight.T`.

    hidden (N, C), weight (V, C), targets (N,) -> scalar. It holds one chunk of the logits at a
    time, and has no second derivatives.
    """
    return LinearCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """The forward pass also computes the gradients, while it holds a chunk's logits:
    ∂loss/∂logits = (softmax(logits) − onehot(target)) / N."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, grad_enabled: bool) -> Tensor:
        hidden_learns = grad_enabled and ctx.needs_input_grad[0]
        weight_learns = grad_enabled and ctx.needs_input_grad[1]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight) if weight_learns else None

        rows = max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            h = hidden[chunk]  # (n, C)
            target = targets[chunk, None]  # (n, 1)
            logits = F.linear(h, weight).to(wide)  # (n, V), changed in place below
            logits -= logits.amax(1, keepdim=True)
            loss -= logits.gather(1, target).sum()
            exp = logits.exp_()
            Z = exp.sum(1, keepdim=True)  # (n, 1); softmax(logits) = exp / Z
            loss += Z.log().sum()
            if hidden_learns:
                d_hidden[chunk] = (exp.to(h.dtype) @ weight) / Z - weight[target[:, 0]]
            if weight_learns:
                d_weight.addmm_(exp.to(h.dtype).t(), (h / Z).to(h.dtype))
                d_weight.index_add_(0, target[:, 0], -h)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        scale = gradient / len(d_hidden)  # the mean's 1/N
        if d_weight is not None:
            d_weight = scale * d_weight
        return scale * d_hidden, d_weight, None, None
