"""LoRA: low-rank adapters of frozen linear maps, and experts that are such adapters.

    python -m pytest tests/test_model.py

On a pretrained model, an expert is a low-rank change of the model's feed-forward block. The block
is frozen, and all experts share it. `LoRAExperts` is their mixture.

Shapes: N tokens, C channels, E experts of rank r, k of them selected for a token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LORA_ALPHA = 16  # α


def lora_scale(rank: int) -> float:
    """s = α/√r, the scale of rsLoRA (Kalajdzievski 2023), as in the paper."""
    return LORA_ALPHA / rank**0.5


class LoRAAdapter(nn.Module):
    """A low-rank change s·BA of a linear map (Hu et al. 2021, section 4.1). B starts at 0."""

    def __init__(self, n_in: int, n_out: int, rank: int, role: str):
        super().__init__()
        self.role = role
        self.lora_A = nn.Parameter(torch.empty(rank, n_in))
        self.lora_B = nn.Parameter(torch.empty(n_out, rank))


class LoRALinear(nn.Linear):
    """A frozen linear map with an adapter for each given role: W x + b + Σ_e s·B_e A_e x."""

    def __init__(self, n_in: int, n_out: int, bias: bool, rank: int, adapter_roles: list[str]):
        super().__init__(n_in, n_out, bias)
        adapters = [LoRAAdapter(n_in, n_out, rank, role) for role in adapter_roles]
        self.adapters = nn.ModuleList(adapters)

    def stacked_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors of all adapters: s·A stacked to (E·r, n_in), B side by side (n_out, E·r)."""
        A = torch.cat([adapter.lora_A for adapter in self.adapters])
        B = torch.cat([adapter.lora_B for adapter in self.adapters], dim=1)
        rank = len(A) // len(self.adapters)
        return (lora_scale(rank) * A).to(dtype), B.to(dtype)

    def frozen(self, x: Tensor) -> Tensor:
        """W x + b, without the adapters."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (N, n_in)
        A, B = self.stacked_factors(x.dtype)
        low = F.linear(rows, A)  # (N, E·r)
        y = torch.addmm(self.frozen(rows), low, B.t())  # (N, n_out)
        return y.unflatten(0, x.shape[:-1])


class LoRAExperts(nn.Module):
    """E low-rank changes of one frozen feed-forward block, and their mixture: an optimization.

    Expert e is the block with the e-th adapters. Separate experts, as in `MLPExperts`, would apply
    the frozen matrices U (up) and D (down) once per selected expert. Here each is applied once per
    token, because U x is common to all experts and D is linear:

        h_e = gelu(U x + s·B_e A_e x)
        y = Σ gate_e · (D + s·B'_e A'_e) h_e = D Σ gate_e·h_e + Σ s·B'_e A'_e (gate_e·h_e)

    The factors of all experts are stacked, so that one matrix product serves all tokens; a mask
    keeps the ranks of a token's expert. tests/test_model.py compares this with separate experts, in
    test_the_mixture_equals_the_dense_one_in_output_and_all_gradients.
    """

    def __init__(self, block: nn.Module, n_experts: int):
        """block: a model.Expert whose linear maps are LoRALinear, with an adapter per expert."""
        super().__init__()
        self.block = block
        self.n_experts = n_experts

    def forward(self, x: Tensor, gates: Tensor, selected: Tensor) -> Tensor:
        """x (N, C), gates and selected (N, k) -> (N, C)."""
        projections = self.block.input_projections
        frozen = [projection.frozen(x) for projection in projections]  # U x, (N, n_hidden) each
        factors = [projection.stacked_factors(x.dtype) for projection in projections]
        inputs = []
        for Ux, (A, B) in zip(frozen, factors, strict=True):
            inputs.append((Ux, F.linear(x, A), B.t()))  # (N, n_hidden), (N, E·r), (E·r, n_hidden)

        down_proj = self.block.down_proj
        A, B = down_proj.stacked_factors(x.dtype)  # (E·r, n_hidden), (C, E·r)
        rank = len(A) // self.n_experts
        one_hot = F.one_hot(selected, self.n_experts).to(x.dtype)  # (N, k, E)
        masks = one_hot.repeat_interleave(rank, dim=2)  # (N, k, E·r), 1 at the ranks of the expert
        hidden = 0  # Σ gate_e·h_e
        low = 0  # Σ s·A'_e (gate_e·h_e), at the ranks of expert e
        for gate, mask in zip(gates.unbind(1), masks.unbind(1), strict=True):  # k times
            # The backward pass computes h again, which saves memory.
            h = checkpoint(
                self.gated_hidden, gate, mask, inputs, use_reentrant=False, preserve_rng_state=False
            )
            hidden = hidden + h  # (N, n_hidden)
            low = low + mask * F.linear(h, A)  # (N, E·r)
        if down_proj.bias is None:
            y = F.linear(hidden, down_proj.weight)  # (N, C)
        else:
            bias = gates.sum(1, keepdim=True) * down_proj.bias  # (N, C); gates need not sum to 1
            y = torch.addmm(bias, hidden, down_proj.weight.t())
        return torch.addmm(y, low, B.t())

    def gated_hidden(
        self, gate: Tensor, mask: Tensor, inputs: list[tuple[Tensor, Tensor, Tensor]]
    ) -> Tensor:
        """gate_e·h_e, for one expert e of each token: (N, n_hidden)."""
        projected = [torch.addmm(Ux, mask * Ax, B) for Ux, Ax, B in inputs]
        return gate[:, None] * self.block.activation(*projected)
