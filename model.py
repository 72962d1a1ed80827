"""The network: a GPT in which every feed-forward block is a top-k mixture of experts.

Read it from top to bottom: the configuration, attention, one expert, the router, the mixture, the block, the
whole. Nothing here knows about users, rounds or levels; the model only says which role each parameter has.

    python -m pytest tests/test_model.py

Shapes: B sequences of T tokens, C channels, H heads, V vocabulary, L layers; N = B·T tokens in a row,
E experts in a layer, k of them chosen for a token.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What a parameter is for. Averaged? Trained, and on which text? Counted? Saved? All of it is read off the role.
BACKBONE, GENERALIST, SPECIALIST, ROUTER = ROLES = ("backbone", "generalist", "specialist", "router")


@dataclass
class GPTConfig:
    """All that shapes a model; the names are those of the command line."""

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
    roles: dict[str, str] = field(default_factory=dict)  # a method's changes, {"specialist": "generalist"}

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.generalists + self.specialists < 1:
            raise ValueError("a layer needs an expert: generalists + specialists is 0")

    @property
    def expert_roles(self) -> list[str]:
        """The role of each of a layer's E = G + S experts, in order."""
        natural = [GENERALIST] * self.generalists + [SPECIALIST] * self.specialists
        return [self.roles.get(role, role) for role in natural]


class Embedding(nn.Embedding):
    role = GENERALIST


class Norm(nn.LayerNorm):
    role = GENERALIST


class Attention(nn.Module):
    """Causal self-attention with H heads: (B, T, C) -> (B, T, C)."""

    role = GENERALIST

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, C/H)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Expert(nn.Module):
    """One expert, a GPT's feed-forward block: (n, C) -> (n, C)."""

    def __init__(self, config: GPTConfig, role: str):
        super().__init__()
        self.role = role
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # (n, C) -> (n, 4C) -> (n, C)


class Routing(NamedTuple):
    """What a layer's router decided: for each token the k experts it goes to, and their weights, which sum to 1.

    Where k = E, the experts stand in their own order, generalists first.
    """

    gates: Tensor  # (N, k)
    chosen: Tensor  # (N, k), numbers of experts


class Router(nn.Module):
    """φ: one linear map that picks k experts for each token and weighs them: (N, C) -> Routing."""

    role = ROUTER

    def __init__(self, config: GPTConfig):
        super().__init__()
        E = len(config.expert_roles)
        self.top_k = min(config.top_k, E)
        self.scores = nn.Linear(config.n_embd, E, bias=False)

    def forward(self, x: Tensor) -> Routing:
        scores = self.scores(x)  # (N, E)
        if self.top_k == scores.shape[1]:
            return Routing(scores.softmax(-1), everyone(scores))
        scores, chosen = scores.topk(self.top_k)  # (N, k) each
        return Routing(scores.softmax(-1), chosen)  # a softmax over the chosen only


class Uniform(nn.Module):
    """In the place of a router: every token goes to all experts, with equal weights. No parameters."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.experts = len(config.expert_roles)

    def forward(self, x: Tensor) -> Routing:
        gates = x.new_full((len(x), self.experts), 1 / self.experts)  # (N, E)
        return Routing(gates, everyone(gates))


def everyone(gates: Tensor) -> Tensor:
    """All experts, in order, for every token: (N, E)."""
    return torch.arange(gates.shape[1], device=gates.device).expand_as(gates)


class MLPExperts(nn.ModuleList):
    """E separate feed-forward blocks and their mixture y = Σ_{e chosen} gate_e · expert_e(x): (N, C) -> (N, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__(Expert(config, role) for role in config.expert_roles)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        E, k = len(self), routing.chosen.shape[1]
        if k == E:  # everyone works for every token: nothing to dispatch
            return sum(gate[:, None] * expert(x) for gate, expert in zip(routing.gates.unbind(1), self, strict=True))
        order = routing.chosen.flatten().argsort(stable=True)  # (N·k,) token-expert pairs, expert by expert
        counts = routing.chosen.flatten().bincount(minlength=E).tolist()  # pairs of each expert; may be 0
        token = order // k  # (N·k,) the token of each pair
        inputs = x.index_select(0, token).split(counts)  # E × (n_e, C)
        outputs = torch.cat([expert(x_e) for expert, x_e in zip(self, inputs, strict=True)])  # (N·k, C)
        gates = routing.gates.flatten().index_select(0, order)  # (N·k,)
        return torch.zeros_like(x).index_add(0, token, gates[:, None] * outputs)


def dense_gates(routing: Routing, E: int) -> Tensor:
    """The weight of every expert for every token, 0 where not chosen: (N, E).

    gates [[.7, .3]], chosen [[2, 0]], E = 3 -> [[.3, 0, .7]]
    """
    return routing.gates.new_zeros(len(routing.gates), E).scatter(1, routing.chosen, routing.gates)


EXPERTS = {"mlp": MLPExperts}  # kinds of experts: a module (x, routing) -> y


class MoE(nn.Module):
    """The mixture in the place of the feed-forward block: (B, T, C) -> (B, T, C), and how it routed."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.router = Router(config) if config.routed else Uniform(config)
        self.experts = EXPERTS[config.expert](config)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, 1)  # (N, C)
        routing = self.router(tokens)
        return self.experts(tokens, routing).view_as(x), routing


class Block(nn.Module):
    """A transformer layer, norms first."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = Norm(config.n_embd)
        self.attention = Attention(config)
        self.moe_norm = Norm(config.n_embd)
        self.moe = MoE(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        x = x + self.attention(self.attention_norm(x))
        y, routing = self.moe(self.moe_norm(x))
        return x + y, routing


class GPT(nn.Module):
    """The language model of one user.

    model(idx) -> (logits (B, T, V), None); model(idx, targets) -> (None, mean cross-entropy in nats).
    idx and targets: (B, T) token numbers, T at most `block_size`. `generator` draws the initial weights.
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.tokens = Embedding(config.vocab_size, config.n_embd)  # also the head: tied
        self.positions = Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config.n_embd)
        self.initialize(generator)
        self.roles = self.find_roles()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """GPT-2's start: weights N(0, 0.02), those that write into the residual stream divided by √(2L), biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * self.config.n_layer) ** 0.5 if writes else 0.02
                parameter.normal_(0, std, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()

    def find_roles(self) -> dict[str, str]:
        """Every parameter's name -> its one role: that of the innermost part around it, and there must be one."""
        roles = {}
        for prefix, module in self.named_modules():  # outer parts come before inner ones
            if hasattr(module, "role"):
                inside = (name for name, _ in module.named_parameters(prefix))
                roles.update(dict.fromkeys(inside, self.config.roles.get(module.role, module.role)))
        assert roles.keys() == dict(self.named_parameters()).keys()
        assert set(roles.values()) <= set(ROLES)
        return roles

    def having(self, *roles: str) -> dict[str, nn.Parameter]:
        """The parameters that have one of these roles, by name."""
        return {name: p for name, p in self.named_parameters() if self.roles[name] in roles}

    def trunk(self, idx: Tensor) -> tuple[Tensor, list[Routing]]:
        """All but the head: (B, T) -> hidden states (B, T, C), and each layer's routing of the N tokens."""
        T = idx.shape[1]
        assert self.config.block_size >= T, f"{T} tokens are more than block_size {self.config.block_size}"
        x = self.tokens(idx) + self.positions.weight[:T]  # (B, T, C)
        routings = []
        for block in self.blocks:
            x, routing = block(x)
            routings.append(routing)
        return self.norm(x), routings

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.tokens.weight)  # (..., C) -> (..., V)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T), given hidden states (B, T, C)."""
        return F.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        hidden, _ = self.trunk(idx)
        if targets is None:
            return self.logits(hidden), None
        return None, self.loss(hidden, targets)

    @torch.no_grad()
    def generate(self, idx: Tensor, n: int, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """Append n sampled tokens to idx: (B, T) -> (B, T + n). Temperature 0 takes the likeliest token."""
        for _ in range(n):
            hidden, _ = self.trunk(idx[:, -self.config.block_size:])
            logits = self.logits(hidden[:, -1])  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, new), 1)
        return idx
