"""The network: a GPT in which every feed-forward block is a top-k mixture of experts.

Read it from top to bottom: the configuration, low-rank changes, attention, the router, the two kinds of experts, the
mixture, the block, the whole. Nothing here knows about users, rounds or levels; the model only says which role each of
its parameters has.

    python -m pytest tests/test_model.py

Shapes: B sequences of T tokens, C channels, H heads, V vocabulary, L layers; N = B·T tokens in a row,
E experts in a layer, k of them chosen for a token, r the rank of their changes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    generalists: int = 1  # G, the first experts of every layer
    specialists: int = 1  # S, the others
    top_k: int = 2  # k; a model with fewer experts uses all it has
    routed: bool = True  # False: no router, every expert always has the weight 1/E
    expert: str = "mlp"  # a key of EXPERTS
    lora_rank: int = 8  # r, of "lora"
    gelu: str = "none"  # F.gelu's approximation; GPT-2's weights want "tanh"
    roles: dict[str, str] = field(default_factory=dict)  # a method's changes: {"specialist": "generalist"}; the factors
    # of low-rank changes can have roles of their own: {"A": "backbone"}
    fast: bool = True  # False: the plain forms of this file, without support/kernels.py

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
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


class LowRank(nn.Module):
    """A low-rank change of a linear map, α/√r · B A: (..., n_in) -> (..., n_out). B = 0 at the start: no change.

    LoRA (Hu et al. 2021, section 4.1) with the scale of rsLoRA (Kalajdzievski 2023), as in the paper.
    """

    ALPHA = 16  # α

    def __init__(self, n_in: int, n_out: int, rank: int, role: str):
        super().__init__()
        self.role = role
        self.scale = self.scale_of(rank)
        self.A = nn.Parameter(torch.empty(rank, n_in))
        self.B = nn.Parameter(torch.empty(n_out, rank))

    @classmethod
    def scale_of(cls, rank: int) -> float:
        return cls.ALPHA / rank ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale * F.linear(x, self.A), self.B)


class ChangedLinear(nn.Linear):
    """A frozen linear map with a low-rank change, which is a generalist."""

    def __init__(self, n_in: int, n_out: int, config: GPTConfig):
        super().__init__(n_in, n_out)
        self.change = LowRank(n_in, n_out, config.lora_rank, GENERALIST)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).add_(self.change(x))


Past = list[Tensor]  # a layer's keys and values of earlier tokens, (B, H, tokens, C/H) each; empty at the beginning


class Attention(nn.Module):
    """Causal self-attention with H heads: (B, T, C) -> (B, T, C). The T tokens follow the past, which grows by them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.role = config.trunk_role
        self.n_head = config.n_head
        C = config.n_embd
        if config.expert == "lora":
            self.qkv, self.out = ChangedLinear(C, 3 * C, config), ChangedLinear(C, C, config)
        else:
            self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        if past:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, H, past + T, C/H)
        if past is not None:
            past[:] = [k, v]
        S = k.shape[2]  # the last token sees all S, each token before it one less
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S)  # (B, H, T, C/H)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Expert(nn.Module):
    """One expert, a GPT's feed-forward block: (n, C) -> (n, C)."""

    def __init__(self, config: GPTConfig, role: str):
        super().__init__()
        self.role = role
        self.gelu = nn.GELU(config.gelu)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gelu(self.up(x)))  # (n, C) -> (n, 4C) -> (n, C)


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
        scores = self.scores(x)  # (N, E)
        if self.top_k == scores.shape[1]:
            return to_all(scores.softmax(-1), scores)
        highest, chosen = scores.topk(self.top_k)  # (N, k) each
        return Routing(highest.softmax(-1), chosen, scores)  # a softmax over the chosen only


def by_expert(routing: Routing, E: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """All token-expert pairs, expert by expert: each pair's token (N·k,), expert (N·k,) and gate (N·k, 1), and how many
    pairs each expert has.

    gates [[.7, .3], [.6, .4]], chosen [[2, 0], [2, 1]], E = 3
    -> tokens [0, 1, 0, 1], experts [0, 1, 2, 2], gates [.3, .4, .7, .6], counts [1, 1, 2]
    """
    chosen = routing.chosen.flatten()  # (N·k,), token by token
    order = chosen.argsort(stable=True)
    gates = routing.gates.flatten().index_select(0, order)[:, None]
    return order // routing.chosen.shape[1], chosen[order], gates, chosen.bincount(minlength=E).tolist()


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
        token, _, gates, counts = by_expert(routing, len(self))
        inputs = x.index_select(0, token).split(counts)  # E × (n_e, C)
        outputs = torch.cat([expert(x_e) for expert, x_e in zip(self, inputs, strict=True)])  # (N·k, C)
        return torch.zeros_like(x).index_add(0, token, gates * outputs)


class LoRAExpert(nn.Module):
    """One expert: low-rank changes of both matrices of a feed-forward block."""

    def __init__(self, config: GPTConfig, role: str):
        super().__init__()
        C, r = config.n_embd, config.lora_rank
        self.up, self.down = LowRank(C, 4 * C, r, role), LowRank(4 * C, C, r, role)


class LoRAExperts(nn.Module):
    """E low-rank changes of one frozen feed-forward block U, D, and their mixture: (N, C) -> (N, C).

        expert_e(x) = (D + s·B'_e A'_e) h_e,    h_e = gelu((U + s·B_e A_e) x),    s = α/√r
        y = Σ gate_e · expert_e(x) = D Σ gate_e·h_e + Σ s·B'_e A'_e (gate_e·h_e),    over the chosen e

    The frozen U and D are applied once to a token, however many experts it goes to.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.fast = config.fast
        self.block = Expert(config, BACKBONE)
        self.changes = nn.ModuleList(LoRAExpert(config, kind) for kind in config.kinds)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        E = len(self.changes)
        if self.fast:  # the same, by chosen experts only
            return kernels.low_rank_mixture(x, self.block, self.changes, *by_expert(routing, E))
        gates = dense_gates(routing, E)[:, :, None].unbind(1)  # E × (N, 1)
        up = self.block.up(x)  # U x: (N, 4C)
        hidden = [gate * self.block.gelu(up + change.up(x)) for gate, change in zip(gates, self.changes, strict=True)]
        low = [change.down(h) for change, h in zip(self.changes, hidden, strict=True)]
        return self.block.down(sum(hidden)) + sum(low)


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
        routing = self.router(tokens) if weights is None else to_all(weights.to(x).expand(len(tokens), -1))
        return self.experts(tokens, routing).view_as(x), routing


class Block(nn.Module):
    """A transformer layer, norms first."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = having_role(config.trunk_role, nn.LayerNorm(config.n_embd))
        self.attention = Attention(config)
        self.moe_norm = having_role(config.trunk_role, nn.LayerNorm(config.n_embd))
        self.moe = MoE(config)

    def forward(self, x: Tensor, weights: Tensor | None = None, past: Past | None = None) -> tuple[Tensor, Routing]:
        x = x + self.attention(self.attention_norm(x), past)
        y, routing = self.moe(self.moe_norm(x), weights)
        return x + y, routing


def precision(x: Tensor) -> torch.autocast:
    """bfloat16 for matrix products on a GPU; on a CPU everything stays as it is."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


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
            C, role = config.n_embd, config.trunk_role
            self.tokens, self.positions = (  # the tokens' embedding is also the head: tied
                having_role(role, nn.Embedding.from_pretrained(torch.empty(n, C), freeze=False))
                for n in (config.vocab_size, config.block_size))
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.norm = having_role(role, nn.LayerNorm(C))
        self.roles = self.find_roles()
        self.initialize(generator, pretrained or {})

    @classmethod
    def from_pretrained(cls, name_or_file: str | Path, generator: torch.Generator | None = None,
                        **overrides) -> "GPT":
        """A model that starts as a pretrained one: gpt2, gpt2-medium, gpt2-large, gpt2-xl or a file.

        overrides: fields of GPTConfig, such as expert="lora". The first logits are the base's, whatever the experts.
        Raises ValueError, one line, where there is no such model.
        """
        from support import pretrained
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
        numbers, self.borrowed = {}, set()  # names of the base's own tensors
        for name, parameter in self.named_parameters():
            frozen, source = self.roles[name] == BACKBONE, self.plain_name(name)
            if source not in pretrained:
                numbers[name] = self.fresh(name, parameter.shape, generator)
            elif frozen:
                numbers[name] = pretrained[source]
                self.borrowed.add(name)
            else:
                numbers[name] = pretrained[source].detach().clone()
            parameter.requires_grad_(not frozen)
        self.load_state_dict(numbers, assign=True)

    def fresh(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        """GPT-2's start: weights N(0, 0.02), those that write into the residual stream divided by √(2L), biases 0,
        norms 1; and the B of low-rank changes 0."""
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")))
        if name.endswith(".B"):
            return torch.zeros(shape)
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
        x = self.tokens(idx) + self.positions.weight[before:end]  # (B, T, C)
        routings, none = [], [None] * len(self.blocks)
        with precision(x):
            for block, weights, past in zip(self.blocks, none if gates is None else gates, pasts or none, strict=True):
                x, routing = block(x, weights, past)
                routings.append(routing)
        return self.norm(x), routings

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.tokens.weight)  # (..., C) -> (..., V)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T), given hidden states (B, T, C)."""
        hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        with precision(hidden):
            if self.config.fast:  # the same, without all logits at once
                return kernels.head_loss(hidden, self.tokens.weight, targets)
            return F.cross_entropy(self.logits(hidden), targets)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                gates: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        hidden, _ = self.trunk(idx, gates)
        if targets is None:
            return self.logits(hidden), None
        return None, self.loss(hidden, targets)

    def generate(self, idx: Tensor, n: int, **how) -> Tensor:
        """idx and n sampled tokens after it, as `stream` makes them: (B, T) -> (B, T + n)."""
        return torch.cat([idx, *self.stream(idx, n, **how)], 1)

    @torch.no_grad()
    def stream(self, idx: Tensor, n: int, temperature: float = 1.0, top_k: int | None = None,
               generator: torch.Generator | None = None, cache: bool = True, vocabulary: int | None = None,
               gates: Tensor | None = None) -> Iterator[Tensor]:
        """Sample n tokens after idx (B, T), (B, 1) each. Temperature 0 takes the likeliest token. vocabulary: how many
        tokens there are, where a tokenizer has fewer than the model.

        What a token sees begins where the text begins, until that is more than block_size away; then the beginning
        moves on by half of that. In between, keys and values are kept (or, without the cache, computed anew).
        """
        half, start, pasts = (self.config.block_size + 1) // 2, 0, [[] for _ in self.blocks]
        unread = idx  # (B, t)
        for _ in range(n):
            if idx.shape[1] - start > self.config.block_size or not cache:
                start = max(0, -(-(idx.shape[1] - self.config.block_size) // half) * half)
                unread, pasts = idx[:, start:], [[] for _ in self.blocks]
            hidden, _ = self.trunk(unread, gates, pasts)
            logits = self.logits(hidden[:, -1])[:, :vocabulary].float()  # (B, V)
            logits -= logits.amax(1, keepdim=True)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature == 0:
                unread = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                unread = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, unread), 1)
            yield unread
