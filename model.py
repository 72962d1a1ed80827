"""The network: a GPT-2 or a Llama in which every feed-forward block is a top-k mixture of experts.

Read it from top to bottom: the configuration, which says what separates the two, low-rank changes, attention, the
router, the two kinds of experts, the mixture, the block, the whole. Nothing here knows about users, rounds or levels;
the model only says which role each of its parameters has.

    python -m pytest tests/test_model.py

Shapes: B sequences of T tokens, C channels, H heads of D channels, K heads of keys and values, F channels inside a
feed-forward block, V vocabulary, L layers; N = B·T tokens in a row, E experts in a layer, k of them chosen for a token,
r the rank of their changes.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support import kernels

# What a parameter is for. Averaged? Trained, and on which text? Counted? Saved? All of it is read off the role.
BACKBONE, GENERALIST, SPECIALIST, ROUTER = ROLES = ("backbone", "generalist", "specialist", "router")


@dataclass
class GPTConfig:
    """Everything that shapes a model; the names are those of the command line. Raises ValueError."""

    vocab_size: int
    block_size: int = 64
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    # What separates a Llama from a GPT-2, which is the default:
    n_kv_head: int | None = None  # heads of keys and values, which n_head / n_kv_head queries share; None: n_head
    n_hidden: int | None = None  # F, channels inside a feed-forward block; None: 4 n_embd
    feed_forward: str = "gelu"  # "gelu"; "gelu-tanh", GPT-2's own approximation of it; "swiglu", Llama's
    norm: str = "layer"  # a key of NORMS
    norm_eps: float = 1e-5
    rotary_base: float | None = None  # None: learned positions
    rotary_factors: list[float] | None = None  # that slow each pair of channels down, for long texts; None: all 1
    bias: bool = True  # of linear maps
    tied: bool = True  # the tokens' embedding is also the head
    # The mixture:
    generalists: int = 1  # G, the first experts of every layer
    specialists: int = 1  # S, the others
    top_k: int = 2  # k; a model with fewer experts uses all it has
    routed: bool = True  # False: no router, every expert always has the weight 1/E
    expert: str = "mlp"  # a key of EXPERTS
    lora_rank: int = 8  # r, of "lora"
    roles: dict[str, str] = field(default_factory=dict)  # a method's changes: {"specialist": "generalist"}; the factors
    # of low-rank changes can have roles of their own: {"A": "backbone"}
    dtype: str = "float32"  # or "bfloat16", of what is frozen and of the work on it; what learns is in float32

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.dtype == "bfloat16" and self.expert != "lora":
            raise ValueError("dtype bfloat16 is of what is frozen: it needs expert lora")
        if self.n_experts < 1:
            raise ValueError("a layer needs an expert: generalists + specialists is 0")

    @property
    def n_experts(self) -> int:
        """E = G + S."""
        return self.generalists + self.specialists

    @property
    def kinds(self) -> list[str]:
        """The kind of each of a layer's experts, in order."""
        return [GENERALIST] * self.generalists + [SPECIALIST] * self.specialists

    @property
    def expert_roles(self) -> list[str]:
        """The role that each of them has with this method."""
        return [self.roles.get(kind, kind) for kind in self.kinds]

    @property
    def trunk_role(self) -> str:
        """The role of embeddings, norms and attention, which are frozen where experts are changes of a frozen block."""
        return BACKBONE if self.expert == "lora" else GENERALIST


def having_role(role: str, module: nn.Module) -> nn.Module:
    module.role = role
    return module


def table(rows: int, config: GPTConfig) -> nn.Embedding:
    """A learned vector for each of so many tokens or positions."""
    return having_role(config.trunk_role, nn.Embedding.from_pretrained(torch.empty(rows, config.n_embd), freeze=False))


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}  # x / √(mean of x² + ε); a LayerNorm takes the mean off x first


def norm(config: GPTConfig) -> nn.Module:
    return having_role(config.trunk_role, NORMS[config.norm](config.n_embd, config.norm_eps))


class LowRank(nn.Module):
    """A low-rank change s·B A of a linear map, s = α/√r. B = 0 at the start: no change.

    LoRA (Hu et al. 2021, section 4.1) with the scale of rsLoRA (Kalajdzievski 2023), as in the paper.
    """

    ALPHA = 16  # α

    def __init__(self, n_in: int, n_out: int, rank: int, role: str):
        super().__init__()
        self.role = role
        self.A = nn.Parameter(torch.empty(rank, n_in))
        self.B = nn.Parameter(torch.empty(n_out, rank))

    @classmethod
    def scale_of(cls, rank: int) -> float:
        return cls.ALPHA / rank ** 0.5


class ChangedLinear(nn.Linear):
    """A frozen linear map W with E low-rank changes, a role for each: W x + Σ s·B_e A_e x."""

    def __init__(self, n_in: int, n_out: int, config: GPTConfig, roles: list[str]):
        super().__init__(n_in, n_out, config.bias)
        self.changes = nn.ModuleList(LowRank(n_in, n_out, config.lora_rank, role) for role in roles)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All changes' s·A (E·r, n_in), one below the other, and B (n_out, E·r), side by side, in the dtype of x."""
        A, B = torch.cat([change.A for change in self.changes]), torch.cat([change.B for change in self.changes], 1)
        scale = LowRank.scale_of(len(A) // len(self.changes))
        return (scale * A).to(x.dtype), B.to(x.dtype)

    def frozen(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        rows, (A, B) = x.flatten(0, -2), self.factors(x)  # (n, n_in)
        return torch.addmm(self.frozen(rows), F.linear(rows, A), B.t()).unflatten(0, x.shape[:-1])


def linear(n_in: int, n_out: int, config: GPTConfig, roles: list[str]) -> nn.Linear:
    """A linear map; where experts are low-rank changes, a frozen one with changes of these roles."""
    return ChangedLinear(n_in, n_out, config, roles) if config.expert == "lora" else nn.Linear(n_in, n_out, config.bias)


def turns(config: GPTConfig, positions: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, section 3.2): the complex number that turns pair i of a head's D channels at
    position t, by an angle of t · base^(-2i/D) / factor_i: (T,) -> (T, 1, D/2)."""
    D = config.n_embd // config.n_head
    i = torch.arange(D // 2, device=positions.device)
    factors = torch.tensor(config.rotary_factors or 1.0, device=positions.device)
    angles = positions[:, None, None] * (config.rotary_base ** (-2 * i / D) / factors)
    return torch.polar(torch.ones_like(angles), angles)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Every pair of neighbouring channels turned, in float32 at least: (B, T, heads, D) -> the same."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))  # (B, T, heads, D/2, 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)


Past = list[Tensor]  # a layer's keys and values of earlier tokens, (B, K, tokens, D) each; empty at the beginning


class Attention(nn.Module):
    """Causal self-attention with H heads of D channels, which share K heads of keys and values: (B, T, C) -> (B, T, C).
    The T tokens follow the past, which grows by them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.role = config.trunk_role
        self.H, self.K, C = config.n_head, config.n_kv_head, config.n_embd
        self.D = C // self.H
        self.qkv = linear(C, (self.H + 2 * self.K) * self.D, config, [GENERALIST])
        self.out = linear(C, C, config, [GENERALIST])

    def forward(self, x: Tensor, turn: Tensor | None = None, past: Past | None = None) -> Tensor:
        B, T, C = x.shape
        qk, v = self.qkv(x).unflatten(-1, (-1, self.D)).split((self.H + self.K, self.K), 2)
        q, k = (qk if turn is None else turned(qk, turn)).split((self.H, self.K), 2)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, D), (B, K, T, D), (B, K, T, D)
        if past:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, K, past + T, D)
        if past is not None:
            past[:] = [k, v]
        y = kernels.attention(q, k, v)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Expert(nn.Module):
    """One expert, a feed-forward block: (n, C) -> (n, F) -> (n, C).

    GPT-2's is down · gelu(up · x). Llama's, SwiGLU, is down · (silu(gate · x) ⊙ up · x) (Shazeer 2020).
    """

    def __init__(self, config: GPTConfig, role: str):
        super().__init__()
        self.role = role
        C, F, kinds = config.n_embd, config.n_hidden, config.kinds
        self.gelu = "tanh" if config.feed_forward == "gelu-tanh" else "none"
        self.gate = linear(C, F, config, kinds) if config.feed_forward == "swiglu" else None
        self.up, self.down = linear(C, F, config, kinds), linear(F, C, config, kinds)

    @property
    def into(self) -> list[nn.Linear]:
        return [self.up, self.gate] if self.gate else [self.up]

    def activated(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        return F.gelu(up, approximate=self.gelu) if gate is None else F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activated(*(linear(x) for linear in self.into)))


class Routing(NamedTuple):
    """What a layer's router decided: for each token the k experts it goes to, and their weights, which sum to 1.

    Where k = E, the experts stand in their own order, generalists first.
    """

    gates: Tensor  # (N, k)
    chosen: Tensor  # (N, k), numbers of experts
    scores: Tensor | None = None  # (N, E), of all experts; None where there is no router


def to_all(gates: Tensor, scores: Tensor | None = None) -> Routing:
    """Every token goes to all experts, in order: gates (N, E)."""
    return Routing(gates, torch.arange(gates.shape[1], device=gates.device).expand_as(gates), scores)


class Router(nn.Module):
    """φ: one linear map that picks k experts for each token and weighs them: (N, C) -> Routing."""

    role = ROUTER

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.top_k = min(config.top_k, config.n_experts)
        self.scores = nn.Linear(config.n_embd, config.n_experts, bias=False)

    def forward(self, x: Tensor) -> Routing:
        scores = self.scores(x.to(self.scores.weight.dtype))  # (N, E)
        if self.top_k == scores.shape[1]:
            return to_all(scores.softmax(-1), scores)
        highest, chosen = scores.topk(self.top_k)  # (N, k) each
        return Routing(highest.softmax(-1), chosen, scores)  # a softmax over the chosen only


def by_expert(routing: Routing, E: int) -> tuple[Tensor, Tensor, list[int]]:
    """All token-expert pairs, expert by expert: each pair's token (N·k,) and gate (N·k, 1), and how many pairs each
    expert has.

    gates [[.7, .3], [.6, .4]], chosen [[2, 0], [2, 1]], E = 3
    -> tokens [0, 1, 0, 1], gates [.3, .4, .7, .6], counts [1, 1, 2]
    """
    chosen = routing.chosen.flatten()  # (N·k,), token by token
    order = chosen.argsort(stable=True)
    gates = routing.gates.flatten().index_select(0, order)[:, None]
    return order // routing.chosen.shape[1], gates, chosen.bincount(minlength=E).tolist()


def dense_gates(routing: Routing, E: int) -> Tensor:
    """The weight of every expert for every token, 0 where not chosen: (N, E).

    gates [[.7, .3]], chosen [[2, 0]], E = 3 -> [[.3, 0, .7]]
    """
    return routing.gates.new_zeros(len(routing.gates), E).scatter(1, routing.chosen, routing.gates)


class MLPExperts(nn.ModuleList):
    """E separate feed-forward blocks and their mixture y = Σ_{e chosen} gate_e · expert_e(x): (N, C) -> (N, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__(Expert(config, kind) for kind in config.kinds)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if routing.chosen.shape[1] == len(self):  # everyone works for every token: nothing to dispatch
            return sum(gate[:, None] * expert(x) for gate, expert in zip(routing.gates.unbind(1), self, strict=True))
        token, gates, counts = by_expert(routing, len(self))
        inputs = x.index_select(0, token).split(counts)  # E × (n_e, C)
        outputs = torch.cat([expert(x_e) for expert, x_e in zip(self, inputs, strict=True)])  # (N·k, C)
        return torch.zeros_like(x).index_add(0, token, gates * outputs)


class LoRAExperts(nn.Module):
    """E low-rank changes of one frozen feed-forward block U, D, and their mixture: (N, C) -> (N, C).

        expert_e(x) = (D + s·B'_e A'_e) h_e,    h_e = gelu((U + s·B_e A_e) x),    s = α/√r
        y = Σ gate_e · expert_e(x) = D Σ gate_e·h_e + s·B' Σ [e]·A' (gate_e·h_e),    over the chosen e

    The frozen U and D (and Llama's gate, which is changed like U) are applied once to a token, however many experts it
    goes to. A and B hold all experts' factors, and [e] is 1 at the ranks of expert e, 0 elsewhere: a little more work
    than with A_e and B_e alone, but all tokens can do it at once.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.block = Expert(config, BACKBONE)
        self.E = config.n_experts

    def hidden(self, gate: Tensor, e: Tensor, into: list[tuple[Tensor, ...]]) -> Tensor:
        """gate_e·h_e of every token's e: (N, F). The backward pass makes it anew, because its parts are large."""
        return gate[:, None] * self.block.activated(*(torch.addmm(Ux, e * z, B) for Ux, z, B in into))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        block, hidden, low = self.block, 0, 0
        into = [(matrix.frozen(x), *matrix.factors(x)) for matrix in block.into]
        into = [(Ux, F.linear(x, A), B.t()) for Ux, A, B in into]  # (N, F), (N, E·r), (E·r, F)
        A, B = block.down.factors(x)  # (E·r, F), (C, E·r)
        own = F.one_hot(routing.chosen, self.E).to(x.dtype).repeat_interleave(len(A) // self.E, 2)  # (N, k, E·r)
        for gate, e in zip(routing.gates.unbind(1), own.unbind(1), strict=True):  # the k experts of each token
            h = checkpoint(self.hidden, gate, e, into, use_reentrant=False, preserve_rng_state=False)  # (N, F)
            hidden, low = hidden + h, low + e * F.linear(h, A)  # (N, F), (N, E·r)
        return torch.addmm(block.down.frozen(hidden), low, B.t())


EXPERTS = {"mlp": MLPExperts, "lora": LoRAExperts}  # kinds of experts: a module (x, routing) -> y


class MoE(nn.Module):
    """The mixture in place of the feed-forward block: (B, T, C) -> (B, T, C), and how it routed.

    weights (E,): gates that stand in for the router's, the same for every token.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.router = Router(config) if config.routed else None
        self.experts = EXPERTS[config.expert](config)
        self.n_experts = config.n_experts

    def forward(self, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, 1)  # (N, C)
        if weights is None and self.router is None:
            weights = torch.full((self.n_experts,), 1 / self.n_experts)
        routing = self.router(tokens) if weights is None else to_all(weights.to(x.device).expand(len(tokens), -1))
        return self.experts(tokens, routing._replace(gates=routing.gates.to(x.dtype))).view_as(x), routing


class Block(nn.Module):
    """A transformer layer, norms first."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.moe_norm = norm(config)
        self.moe = MoE(config)

    def forward(self, x: Tensor, weights: Tensor | None = None, turn: Tensor | None = None,
                past: Past | None = None) -> tuple[Tensor, Routing]:
        x = x + self.attention(self.attention_norm(x), turn, past)
        y, routing = self.moe(self.moe_norm(x), weights)
        return x + y, routing


class GPT(nn.Module):
    """The language model of one user.

    model(idx) -> (logits (B, T, V), None); model(idx, targets) -> (None, mean cross-entropy in nats).
    idx and targets: (B, T) token numbers, T at most `block_size`. gates: weights (L, E) that stand in for the routers'.

    pretrained: tensors by the names they have in a GPT without a mixture (`plain_name`). Frozen ones are taken as they
    are, so that models on the same base hold them once; the others are copied. generator: draws what isn't pretrained.
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None,
                 pretrained: dict[str, Tensor] | None = None):
        super().__init__()
        self.config = config
        with torch.device("meta"):  # shapes only; `initialize` brings the numbers
            self.tokens = table(config.vocab_size, config)
            self.positions = None if config.rotary_base else table(config.block_size, config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.norm = norm(config)
            self.head = None if config.tied else table(config.vocab_size, config)
        self.roles = self.find_roles()
        self.initialize(generator, pretrained or {})

    @classmethod
    def from_pretrained(cls, name_or_file: str | Path, generator: torch.Generator | None = None, **overrides) -> "GPT":
        """A model that starts as a pretrained one: smollm2, gpt2, gpt2-medium, gpt2-large, gpt2-xl or a file.

        overrides: fields of GPTConfig, such as expert="lora". The first logits are the base's, whatever the experts.
        Raises ValueError, one line, where there is no such model.
        """
        from support.pretrained import gpt2 as pretrained
        start = pretrained.load(name_or_file, **overrides)
        return cls(GPTConfig(**start.config | overrides), generator, start.tensors)

    @staticmethod
    def plain_name(name: str) -> str:
        """A parameter's name in a GPT without a mixture, whose one feed-forward block all experts start from.

        plain_name("blocks.3.moe.experts.0.up.bias") -> "blocks.3.moe.up.bias"
        """
        return re.sub(r"\.experts\.\w+", "", name)

    def initialize(self, generator: torch.Generator | None, pretrained: dict[str, Tensor]) -> None:
        """Every parameter's first numbers: the pretrained ones, else `fresh` ones."""
        numbers, dtype = {}, getattr(torch, self.config.dtype)
        self.borrowed = set()  # names of the base's own tensors
        for name, parameter in self.named_parameters():
            frozen, source = self.roles[name] == BACKBONE, self.plain_name(name)
            if source not in pretrained:
                numbers[name] = self.fresh(name, parameter.shape, generator).to(dtype if frozen else torch.float32)
            elif frozen:
                numbers[name] = pretrained[source].to(dtype)
                self.borrowed.add(name)
            else:
                numbers[name] = pretrained[source].detach().to(torch.float32, copy=True)
            parameter.requires_grad_(not frozen)
        self.load_state_dict(numbers, assign=True)

    def fresh(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        """GPT-2's start: weights N(0, 0.02), those that write into the residual stream divided by √(2L), biases 0,
        norms 1. Of low-rank changes, A is uniform within ±1/√n_in, and B is 0."""
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")))
        if name.endswith(".B"):
            return torch.zeros(shape)
        if name.endswith(".A"):
            return torch.empty(shape).uniform_(-1, 1, generator=generator) / shape[1] ** 0.5
        writes = name.endswith(("out.weight", "down.weight"))
        return torch.empty(shape).normal_(0, 0.02 / (2 * self.config.n_layer) ** 0.5 if writes else 0.02,
                                          generator=generator)

    def find_roles(self) -> dict[str, str]:
        """Every parameter's name -> its one role: that of the innermost part around it, and there must be one."""
        roles, changes = {}, self.config.roles
        for prefix, module in self.named_modules():  # outer parts come before inner ones
            if hasattr(module, "role"):
                for name, _ in module.named_parameters(prefix):
                    factor = name.rpartition(".")[2]  # "A", "B" or another parameter's own name
                    roles[name] = changes.get(factor, changes.get(module.role, module.role))
        assert roles.keys() == dict(self.named_parameters()).keys()
        assert set(roles.values()) <= set(ROLES)
        return roles

    def having(self, *roles: str) -> dict[str, nn.Parameter]:
        """The parameters that have one of these roles, by name."""
        return {name: p for name, p in self.named_parameters() if self.roles[name] in roles}

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that aren't a base's own, by name."""
        return {name: p for name, p in self.named_parameters() if name not in self.borrowed}

    def trunk(self, idx: Tensor, gates: Tensor | None = None,
              pasts: list[Past] | None = None) -> tuple[Tensor, list[Routing]]:
        """All but the head: (B, T) -> hidden states (B, T, C), and each layer's routing of the N tokens.

        pasts: of each layer; the tokens of idx follow what is in them.
        """
        before = pasts[0][0].shape[2] if pasts and pasts[0] else 0
        end = before + idx.shape[1]
        assert self.config.block_size >= end, f"{end} tokens are more than block_size {self.config.block_size}"
        x, turn = self.tokens(idx), None  # (B, T, C)
        if self.positions:
            x = x + self.positions.weight[before:end]
        else:
            turn = turns(self.config, torch.arange(before, end, device=idx.device))
        routings, none = [], [None] * len(self.blocks)
        for block, weights, past in zip(self.blocks, none if gates is None else gates, pasts or none, strict=True):
            x, routing = block(x, weights, turn, past)
            routings.append(routing)
        return self.norm(x), routings

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, (self.head or self.tokens).weight)  # (..., C) -> (..., V)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T), given hidden states (B, T, C)."""
        return kernels.head_loss(hidden.flatten(0, 1), (self.head or self.tokens).weight, targets.flatten())

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                gates: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        hidden, _ = self.trunk(idx, gates)
        if targets is None:
            return self.logits(hidden), None
        return None, self.loss(hidden, targets)
