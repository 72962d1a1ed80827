"""The fast forms of two plain ones in model.py, with gradients written by hand. A reader of the paper can skip them.

    python -m pytest tests/test_kernels.py

`low_rank_mixture` is LoRAExperts' sum over experts: it sorts tokens by expert, so that only chosen experts compute.
`head_loss` is the cross-entropy of the head's logits: it never holds the logits of all positions at once. Both keep few
large tensors for the backward pass and make the rest anew, which is where the time goes on a CPU. Neither has second
derivatives.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOGITS = 2 ** 23  # that head_loss holds at a time, at most


def low_rank_mixture(x: Tensor, block: nn.Module, changes: nn.ModuleList, token: Tensor, expert: Tensor, gates: Tensor,
                     counts: list[int]) -> Tensor:
    """Σ gate_e · expert_e(x) over a token's experts e, low-rank changes of one frozen block: (N, C) -> (N, C).

    token, expert (N·k,), gates (N·k, 1) and counts are those of model.by_expert.
    """
    ups, downs = [change.up for change in changes], [change.down for change in changes]
    N, E, r, s = len(x), len(ups), len(ups[0].A), ups[0].scale
    own = token * E + expert  # (N·k,) the row of each pair among those of all N·E
    z = F.linear(x, torch.cat([up.A for up in ups])).view(N * E, r).index_select(0, own)  # (N·k, r)
    hidden, z = ChangedHidden.apply(  # (N, 4C), (N·k, r)
        block.up(x), s * z, gates, token, counts, block.gelu.approximate,
        torch.stack([up.B for up in ups]), torch.stack([down.A for down in downs]))
    z = z.new_zeros(N * E, r).index_add(0, own, s * z).view(N, E * r)
    return block.down(hidden) + F.linear(z, torch.cat([down.B for down in downs], 1))


class ChangedHidden(torch.autograd.Function):
    """Σ gate_e·h_e and A_e (gate_e·h_e) of the hidden activations h_e = gelu(up + B_e z_e), over a token's experts e.

    up (N, 4C), z (N·k, r), gates (N·k, 1), token (N·k,), B (E, 4C, r), A (E, r, 4C) -> (N, 4C), (N·k, r). Autograd
    would make and keep several tensors of N·k·4C numbers here; no h_e is kept, but made anew, an expert at a time.
    """

    @staticmethod
    def forward(ctx, up, z, gates, token, counts, gelu, B, A):
        z, gates, B, A = (tensor.to(up.dtype) for tensor in (z, gates, B, A))
        hidden, low = torch.zeros_like(up), torch.empty_like(z)
        pairs = [slice(end - n, end) for n, end in zip(counts, accumulate(counts), strict=True)]  # of each expert
        for e, own in enumerate(pairs):
            u = up.index_select(0, token[own]).addmm_(z[own], B[e].t())  # (n_e, 4C)
            h = F.gelu(u, approximate=gelu).mul_(gates[own])
            hidden.index_add_(0, token[own], h)
            low[own] = h @ A[e].t()
        ctx.save_for_backward(up, z, gates, token, B, A)
        ctx.pairs, ctx.gelu = pairs, gelu
        return hidden, low

    @staticmethod
    def backward(ctx, d_hidden, d_low):
        up, z, gates, token, B, A = ctx.saved_tensors
        d_up, d_z, d_gates, d_B, d_A = map(torch.zeros_like, (up, z, gates, B, A))
        for e, own in enumerate(ctx.pairs):
            u = up.index_select(0, token[own]).addmm_(z[own], B[e].t())
            h = F.gelu(u, approximate=ctx.gelu)
            d_h = d_hidden.index_select(0, token[own]).addmm_(d_low[own], A[e])  # (n_e, 4C), of gate·h
            d_gates[own] = (d_h * h).sum(1, keepdim=True)
            d_A[e] = (gates[own] * d_low[own]).t() @ h
            d_u = torch.ops.aten.gelu_backward(d_h.mul_(gates[own]), u, approximate=ctx.gelu)
            d_up.index_add_(0, token[own], d_u)
            d_z[own] = d_u @ B[e]
            d_B[e] = (z[own].t() @ d_u).t()
        return d_up, d_z, d_gates, None, None, None, d_B, d_A


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats of a head's logits: hidden (N, C), weight (V, C), targets (N,) -> ()."""
    return HeadLoss.apply(hidden, weight, targets, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """As head_loss. Where `learning`, the gradients are made along with the loss, while a chunk's logits are there:
    ∂loss/∂logits = (softmax(logits) − onehot(target)) / N. A frozen head gets none."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, learning: bool) -> Tensor:
        learns, head_learns = (learning and needed for needed in ctx.needs_input_grad[:2])
        loss, d_hidden = hidden.new_zeros(()), torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight) if head_learns else None
        rows = max(1, LOGITS // len(weight))
        for h, dh, target in zip(hidden.split(rows), d_hidden.split(rows), targets[:, None].split(rows), strict=True):
            logits = F.linear(h, weight).to(h.dtype)  # (n, V), from here on in place
            logits -= logits.amax(1, keepdim=True)
            loss -= logits.gather(1, target).sum()
            Z = logits.exp_().sum(1, keepdim=True)  # (n, 1); softmax = exp(logits) / Z
            loss += Z.log().sum()
            if learns:
                dh += (logits @ weight) / Z - weight[target[:, 0]]
            if head_learns:
                d_weight.addmm_(logits.t(), h / Z).index_add_(0, target[:, 0], -h)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        scale = gradient / len(d_hidden)  # the mean's 1/N
        return scale * d_hidden, None if d_weight is None else scale * d_weight, None, None
