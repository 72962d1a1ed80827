"""The network: a GPT-2 or a Llama in which every feed-forward block is a top-k mixture of experts.

Read it from top to bottom: configuration, attention, experts, router, mixture, block, GPT. Nothing
here knows about users, rounds or levels. The model only says which role each parameter has.

    python -m pytest tests/test_model.py

Shapes in trailing comments:
    B sequences of T tokens, N = B·T tokens in all; C channels; H query heads and K key/value heads
    of D channels; L layers; E experts in a layer, k of them selected for a token; r LoRA rank;
    V vocabulary size
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora import LoRAExperts, LoRALinear
from support import kernels

# A parameter's role decides whether it is averaged, which text trains it, and whether it is saved.
BACKBONE = "backbone"  # frozen, usually pretrained
GENERALIST = "generalist"  # θ^G: trained on training text, averaged over the users
SPECIALIST = "specialist"  # θ_i^S: trained on training text, stays with its user
ROUTER = "router"  # φ_i: trained on validation text, stays with its user
ROLES = (BACKBONE, GENERALIST, SPECIALIST, ROUTER)


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError."""

    vocab_size: int
    block_size: int = 64
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    # The defaults make a GPT-2, other values of these fields a Llama:
    n_kv_head: int | None = None  # key/value heads, which query heads share (None: n_head)
    n_hidden: int | None = None  # channels inside a feed-forward block; None: 4 n_embd
    feed_forward: str = "gelu"  # "gelu"; "gelu-tanh", GPT-2's approximation; "swiglu", Llama's
    norm: str = "layer"  # or "rms", Llama's
    norm_eps: float = 1e-5
    rotary_base: float | None = None  # None: learned positions
    rotary_factors: list[float] | None = None  # divisors of the D/2 rotary frequencies; None: 1
    bias: bool = True  # linear maps have a bias
    tied: bool = True  # the token embedding is also the language-model head
    # The mixture of experts:
    generalists: int = 1  # G, the first experts of every layer
    specialists: int = 1  # S, the other experts
    top_k: int = 2  # k; a model with fewer experts uses all of its experts
    routed: bool = True  # False: no router; every expert has the weight 1/E
    by_kind: bool = False  # the router weighs generalists against specialists, not each expert
    expert: str = "mlp"  # or "lora": adapters of one frozen feed-forward block (lora.py)
    lora_rank: int = 8  # r, with "lora"
    roles: dict[str, str] = field(default_factory=dict)  # a method's changes, such as
    # {"specialist": "generalist"}, or {"lora_A": "backbone"} for one factor of every adapter
    dtype: str = "float32"  # of frozen weights: float32 or bfloat16; trained weights are float32
    use_kernels: bool = True  # use support/kernels.py where it is faster than the code in this file

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = 4 * self.n_embd
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.dtype == "bfloat16" and self.expert != "lora":
            raise ValueError("dtype bfloat16 applies to frozen weights: it needs expert lora")
        if self.n_experts < 1:
            raise ValueError("generalists + specialists is 0; a layer needs an expert")
        if self.by_kind and self.generalists * self.specialists == 0:
            raise ValueError("by_kind needs at least one generalist and one specialist")
        for name, role in self.roles.items():
            if name not in (*ROLES, "lora_A", "lora_B"):
                raise ValueError(f"roles: {name} is neither a role nor a LoRA factor")
            if role not in ROLES:
                raise ValueError(f"roles: {role} is not one of {', '.join(ROLES)}")

    @property
    def n_experts(self) -> int:
        """E = G + S, the number of experts in a layer."""
        return self.generalists + self.specialists

    @property
    def expert_kinds(self) -> list[str]:
        """The kind of each expert of a layer, generalists first, as in the paper."""
        return [GENERALIST] * self.generalists + [SPECIALIST] * self.specialists

    @property
    def expert_roles(self) -> list[str]:
        """The role of each expert of a layer, after the method's changes."""
        return [self.roles.get(kind, kind) for kind in self.expert_kinds]

    @property
    def trunk_role(self) -> str:
        """The role of embeddings, norms and attention: frozen if the experts are LoRA adapters."""
        return BACKBONE if self.expert == "lora" else GENERALIST


def with_role(role: str, module: nn.Module) -> nn.Module:
    """Give a module, and so its parameters, a role."""
    module.role = role
    return module


def embedding(rows: int, config: GPTConfig) -> nn.Embedding:
    """A learned vector per token or position."""
    empty = torch.empty(rows, config.n_embd)
    return with_role(config.trunk_role, nn.Embedding.from_pretrained(empty, freeze=False))


def norm(config: GPTConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return with_role(config.trunk_role, kind(config.n_embd, config.norm_eps))


def linear(n_in: int, n_out: int, config: GPTConfig, adapter_roles: list[str]) -> nn.Linear:
    """A linear map; with LoRA experts, a frozen one with an adapter for each of these roles."""
    if config.expert == "lora":
        return LoRALinear(n_in, n_out, config.bias, config.lora_rank, adapter_roles)
    return nn.Linear(n_in, n_out, config.bias)


# --- attention ---


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_cache(config: GPTConfig, positions: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, section 3.2): (T,) -> (T, 1, D/2) complex numbers.

    At position t, channel pair i of a head is rotated by the angle t · base^(-2i/D) / factor_i.
    """
    D = config.n_embd // config.n_head
    i = torch.arange(D // 2, device=positions.device)
    factors = torch.tensor(config.rotary_factors or 1.0, device=positions.device)
    frequencies = config.rotary_base ** (-2 * i / D) / factors  # (D/2,)
    angles = positions[:, None, None] * frequencies  # (T, 1, D/2)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate every pair of neighbouring channels: (B, T, heads, D) -> the same shape."""
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))  # (B, T, heads, D/2, 2)
    rotated = torch.view_as_complex(pairs) * rope  # (B, T, heads, D/2)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, causal: the last query attends to all S keys, the one before to S − 1.

    q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D). With a cache, T is less than S.
    """
    T, S = q.shape[2], k.shape[2]
    keys_shared = q.shape[1] > k.shape[1]
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=keys_shared)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # (T, S)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=keys_shared)


class Attention(nn.Module):
    """Causal self-attention; H query heads share K key/value heads: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.role = config.trunk_role
        self.use_kernels = config.use_kernels
        self.H = config.n_head
        self.K = config.n_kv_head
        self.D = config.n_embd // config.n_head
        n_qkv = (self.H + 2 * self.K) * self.D
        self.qkv_proj = linear(config.n_embd, n_qkv, config, [GENERALIST])
        self.out_proj = linear(config.n_embd, config.n_embd, config, [GENERALIST])

    def forward(self, x: Tensor, rope: Tensor | None = None, kv_cache=None) -> Tensor:
        """kv_cache: keys and values of earlier tokens in this layer (support/sampling.py)."""
        B, T, C = x.shape
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.D))  # (B, T, H + 2K, D)
        q, k, v = qkv.split((self.H, self.K, self.K), dim=2)
        if rope is not None:
            q = apply_rope(q, rope)
            k = apply_rope(k, rope)
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.transpose(1, 2)  # (B, K, T, D)
        v = v.transpose(1, 2)  # (B, K, T, D)
        if kv_cache is not None:
            k, v = kv_cache.append(k, v)  # (B, K, S, D), S tokens so far
        if self.use_kernels and kernels.has_attention_for(q):
            y = kernels.attention(q, k, v)  # the same numbers, faster
        else:
            y = causal_attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.out_proj(y)


# --- the mixture of experts ---


class Expert(nn.Module):
    """A feed-forward block: (n, C) -> (n, n_hidden) -> (n, C).

    GPT-2's is down(gelu(up(x))). Llama's, SwiGLU, is down(silu(gate(x)) ⊙ up(x)) (Shazeer 2020).
    """

    def __init__(self, config: GPTConfig, role: str):
        super().__init__()
        self.role = role
        self.approximate = "tanh" if config.feed_forward == "gelu-tanh" else "none"
        C, n_hidden = config.n_embd, config.n_hidden
        kinds = config.expert_kinds
        self.gate_proj = None
        if config.feed_forward == "swiglu":
            self.gate_proj = linear(C, n_hidden, config, kinds)
        self.up_proj = linear(C, n_hidden, config, kinds)
        self.down_proj = linear(n_hidden, C, config, kinds)

    @property
    def input_projections(self) -> list[nn.Linear]:
        """The linear maps that read x; `activation` takes their outputs in this order."""
        if self.gate_proj is None:
            return [self.up_proj]
        return [self.up_proj, self.gate_proj]

    def activation(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return F.gelu(up, approximate=self.approximate)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        projected = [projection(x) for projection in self.input_projections]
        return self.down_proj(self.activation(*projected))


class Routing(NamedTuple):
    """The selected experts of each token, and their gates. If k = E, experts are in order."""

    gates: Tensor  # (N, k)
    selected: Tensor  # (N, k), indices of experts
    logits: Tensor | None = None  # (N, E) or, by kind, (N, 2); None without a router


def to_all(gates: Tensor, logits: Tensor | None = None) -> Routing:
    """The routing of tokens that all use all experts: gates (N, E)."""
    selected = torch.arange(gates.shape[1], device=gates.device).expand_as(gates)
    return Routing(gates, selected, logits)


class Router(nn.Module):
    """φ: a linear map that selects and weighs k experts for each token: (N, C) -> Routing."""

    role = ROUTER

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.top_k = min(config.top_k, config.n_experts)
        self.kind_sizes = (config.generalists, config.specialists) if config.by_kind else None
        n_scores = 2 if config.by_kind else config.n_experts
        self.linear = nn.Linear(config.n_embd, n_scores, bias=False)

    def forward(self, x: Tensor) -> Routing:
        logits = self.linear(x.to(self.linear.weight.dtype))  # (N, E), or by kind (N, 2)
        if self.kind_sizes is not None:  # the experts of a kind share its weight evenly
            sizes = torch.tensor(self.kind_sizes, device=x.device)  # (2,)
            gates = (logits.softmax(-1) / sizes).repeat_interleave(sizes, dim=1)  # (N, E)
            return to_all(gates, logits)
        if self.top_k == logits.shape[1]:
            return to_all(logits.softmax(-1), logits)
        highest, selected = logits.topk(self.top_k)  # (N, k) each
        gates = highest.softmax(-1)
        if self.top_k == 1:  # a softmax over one is 1, which has no gradient
            gates = logits.softmax(-1).gather(1, selected)
        return Routing(gates, selected, logits)


class MLPExperts(nn.ModuleList):
    """E separate feed-forward blocks, and their mixture y = Σ_{e selected} gate_e · expert_e(x)."""

    def __init__(self, config: GPTConfig):
        super().__init__(Expert(config, kind) for kind in config.expert_kinds)
        self.use_kernels = config.use_kernels

    def forward(self, x: Tensor, gates: Tensor, selected: Tensor) -> Tensor:
        """x (N, C), gates and selected (N, k) -> (N, C)."""
        if self.use_kernels:
            return kernels.mixture(self, x, gates, selected)  # the same numbers, faster
        y = torch.zeros_like(x)
        for e, expert in enumerate(self):
            token, slot = torch.where(selected == e)  # the tokens that selected expert e, (n,) each
            output = expert(x[token])  # (n, C)
            y.index_add_(0, token, gates[token, slot, None] * output)
        return y


class MoE(nn.Module):
    """A router and its experts, in place of a feed-forward block: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.router = Router(config) if config.routed else None
        if config.expert == "lora":
            self.experts = LoRAExperts(Expert(config, BACKBONE), config.n_experts)
        else:
            self.experts = MLPExperts(config)
        self.n_experts = config.n_experts

    def forward(self, x: Tensor, fixed_gates: Tensor | None = None) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, 1)  # (N, C)
        routing = self.route(tokens, fixed_gates)
        y = self.experts(tokens, routing.gates.to(x.dtype), routing.selected)
        return y.view_as(x), routing

    def route(self, tokens: Tensor, fixed_gates: Tensor | None) -> Routing:
        """fixed_gates (E,): gates for every token, which replace the router's."""
        if fixed_gates is None and self.router is not None:
            return self.router(tokens)
        if fixed_gates is None:
            fixed_gates = torch.full((self.n_experts,), 1 / self.n_experts)
        selected = fixed_gates.nonzero().flatten()  # (k,): experts with gate 0 are skipped
        gates = fixed_gates[selected].to(tokens.device).expand(len(tokens), -1)  # (N, k)
        return Routing(gates, selected.to(tokens.device).expand_as(gates))


class Block(nn.Module):
    """A transformer layer, with a norm before each part."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm, self.attention = norm(config), Attention(config)
        self.moe_norm, self.moe = norm(config), MoE(config)

    def forward(self, x, rope=None, fixed_gates=None, kv_cache=None) -> tuple[Tensor, Routing]:
        x = x + self.attention(self.attention_norm(x), rope, kv_cache)
        y, routing = self.moe(self.moe_norm(x), fixed_gates)
        return x + y, routing


class GPT(nn.Module):
    """The language model of one user.

    model(idx) -> (logits (B, T, V), None)
    model(idx, targets) -> (None, mean cross-entropy in nats)

    idx, targets: (B, T) token numbers, with T at most `block_size`.
    generator: draws the initial weights that aren't pretrained.
    pretrained: name -> tensor, by the names in a GPT without a mixture (`plain_name`). Frozen
        parameters share the tensors' memory, so that all models of a base share one copy of it.
    """

    def __init__(
        self, config: GPTConfig, generator: torch.Generator | None = None, pretrained=None
    ):
        super().__init__()
        self.config = config
        with torch.device("meta"):  # shapes only; `initialize` sets the values
            self.token_embedding = embedding(config.vocab_size, config)
            self.position_embedding = None
            if config.rotary_base is None:
                self.position_embedding = embedding(config.block_size, config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.norm = norm(config)
            self.lm_head = None if config.tied else embedding(config.vocab_size, config)
        self.roles = self.find_roles()  # name -> role
        self.borrowed = set()  # names of parameters that are the base's own tensors
        self.initialize(generator, pretrained or {})

    @classmethod
    def from_pretrained(
        cls, name_or_file: str | Path, generator: torch.Generator | None = None, **overrides
    ) -> "GPT":
        """Load smollm2, gpt2, gpt2-medium, gpt2-large, gpt2-xl or a file.

        overrides: fields of GPTConfig, such as expert="lora". The first logits are the base's.
        Raises ValueError, one line.
        """
        from support.pretrained.base import load

        start = load(name_or_file, **overrides)
        return cls(GPTConfig(**start.config | overrides), generator, start.tensors)

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @staticmethod
    def plain_name(name: str) -> str:
        """A parameter's name in a GPT without a mixture; all experts start as its one block.

        plain_name("blocks.3.moe.experts.0.up_proj.bias") -> "blocks.3.moe.up_proj.bias"
        """
        return re.sub(r"\.experts\.\w+", "", name)

    def initialize(self, generator: torch.Generator | None, pretrained: dict[str, Tensor]) -> None:
        """Set every parameter to its pretrained tensor, if there is one, or to `initial_value`."""
        values = {}
        for name, parameter in self.named_parameters():
            frozen = self.roles[name] == BACKBONE
            dtype = getattr(torch, self.config.dtype) if frozen else torch.float32
            source = pretrained.get(self.plain_name(name))
            if source is None:
                values[name] = self.initial_value(name, parameter.shape, generator).to(dtype)
            elif frozen:
                values[name] = source.to(dtype)
                self.borrowed.add(name)
            else:
                values[name] = source.detach().to(dtype, copy=True)
            parameter.requires_grad_(not frozen)
        self.load_state_dict(values, assign=True)

    def initial_value(
        self, name: str, shape: torch.Size, generator: torch.Generator | None
    ) -> Tensor:
        """GPT-2's: weights N(0, 0.02²), biases 0, norms 1. LoRA's: A uniform in ±1/√n_in, B 0."""
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if name.endswith("lora_B"):
            return torch.zeros(shape)
        if name.endswith("lora_A"):
            return torch.empty(shape).uniform_(-1, 1, generator=generator) / shape[1] ** 0.5
        std = 0.02
        if name.endswith(("out_proj.weight", "down_proj.weight")):  # into the residual stream
            std /= (2 * self.config.n_layer) ** 0.5
        return torch.empty(shape).normal_(0, std, generator=generator)

    def find_roles(self) -> dict[str, str]:
        """Every parameter's name -> its role: the innermost module's, after the method's edits."""
        changes = self.config.roles
        roles = {}
        for prefix, module in self.named_modules():  # outer modules come before inner ones
            if hasattr(module, "role"):
                for name, _ in module.named_parameters(prefix):
                    factor = name.rpartition(".")[2]  # "lora_A", "lora_B" or another last part
                    roles[name] = changes.get(factor, changes.get(module.role, module.role))
        assert roles.keys() == dict(self.named_parameters()).keys()
        assert set(roles.values()) <= set(ROLES)
        return roles

    def having(self, *roles: str) -> dict[str, nn.Parameter]:
        """The parameters that have one of these roles, by name."""
        return {name: p for name, p in self.named_parameters() if self.roles[name] in roles}

    def parameters_to_save(self) -> dict[str, nn.Parameter]:
        """The parameters that aren't the base's, by name."""
        return {name: p for name, p in self.named_parameters() if name not in self.borrowed}

    def trunk(self, idx, fixed_gates=None, kv_cache=None) -> tuple[Tensor, list[Routing]]:
        """Everything below the head: (B, T) -> hidden states (B, T, C) and each layer's routing.

        fixed_gates (L, E): gates for every token, which replace the routers'.
        kv_cache: a support.sampling.KVCache. The tokens of idx follow those in it and are added.
        """
        start = 0 if kv_cache is None else kv_cache.length
        end = start + idx.shape[1]
        block_size = self.config.block_size
        assert end <= block_size, f"{end} tokens are more than block_size {block_size}"

        x = self.token_embedding(idx)  # (B, T, C)
        rope = None
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[start:end]
        else:
            rope = rope_cache(self.config, torch.arange(start, end, device=idx.device))

        routings = []
        for i, block in enumerate(self.blocks):
            layer_gates = None if fixed_gates is None else fixed_gates[i]
            layer_cache = None if kv_cache is None else kv_cache.layers[i]
            x, routing = block(x, rope, layer_gates, layer_cache)
            routings.append(routing)
        return self.norm(x), routings

    @property
    def head_weight(self) -> Tensor:
        """The weight of the language-model head, (V, C)."""
        return self.token_embedding.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head_weight)  # (..., C) -> (..., V)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats: hidden states (B, T, C), targets (B, T) -> scalar."""
        hidden = hidden.flatten(0, 1)  # (N, C)
        targets = targets.flatten()  # (N,)
        if self.config.use_kernels:  # the same loss, without holding all logits at once
            return kernels.linear_cross_entropy(hidden, self.head_weight, targets)
        return F.cross_entropy(at_least_float32(self.logits(hidden)), targets)

    def forward(self, idx, targets=None, fixed_gates=None) -> tuple[Tensor | None, Tensor | None]:
        hidden, _ = self.trunk(idx, fixed_gates)
        if targets is None:
            return self.logits(hidden), None
        return None, self.loss(hidden, targets)
