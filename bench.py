"""Speed, as ratios taken in one run: the machine's noise falls on both sides alike.

    python bench.py
    python bench.py --device cuda

1. The default model's training step, as a share of the rate at which this machine multiplies matrices.
2. The mixture with 9 experts and top-2, against a dense block of the same work per token.
3. The default step, against a plain dense GPT's of the same active size.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bilevel import Level, constant
from model import GENERALIST, GPT, SPECIALIST, GPTConfig, MoE
from settings import Settings

REPEATS = 30


def pairs(device: str, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each work, REPEATS times in turn: (REPEATS, works)."""
    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for work in works * 3:
        work()
    return [[seconds(work) for work in works] for _ in tqdm(range(REPEATS), leave=False, disable=None)]


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


# --- the naive reference: nanoGPT's dense model and step -------------------------------------------------------------

class DenseBlock(nn.Module):
    """A feed-forward block with as many hidden channels as k experts have together."""

    def __init__(self, C: int, k: int):
        super().__init__()
        self.up, self.down = nn.Linear(C, k * 4 * C), nn.Linear(k * 4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class DenseLayer(nn.Module):
    def __init__(self, C: int, H: int, k: int):
        super().__init__()
        self.norm1, self.norm2, self.H = nn.LayerNorm(C), nn.LayerNorm(C), H
        self.qkv, self.out, self.feed_forward = nn.Linear(C, 3 * C), nn.Linear(C, C), DenseBlock(C, k)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.H, C // self.H).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.feed_forward(self.norm2(x))


class DenseGPT(nn.Module):
    def __init__(self, V: int, T: int, L: int, H: int, C: int, k: int):
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(V, C), nn.Embedding(T, C), nn.LayerNorm(C)
        self.layers = nn.ModuleList(DenseLayer(C, H, k) for _ in range(L))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def dense_step(model: DenseGPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    model(*batch).backward()
    optimizer.step()


# --- the measurements ------------------------------------------------------------------------------------------------

def step_operations(config: GPTConfig, B: int, T: int) -> int:
    """Operations that a training step needs, two per multiply-add: the forward pass, and as much again for the
    gradients of activations and for those of weights."""
    C, E = config.n_embd, config.generalists + config.specialists
    k = min(config.top_k, E)
    attention = 4 * C * C + 2 * C * (T + 1) / 2  # projections; scores and mixing, over the tokens up to this one
    layer = attention + C * E + k * 8 * C * C
    return round(3 * 2 * B * T * (config.n_layer * layer + config.vocab_size * C))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    default = Settings()
    B, T = default.batch_size, default.block_size
    config = GPTConfig(257, T, default.n_layer, default.n_head, default.n_embd, default.generalists,
                       default.specialists[0], default.top_k)
    batch = torch.randint(257, (2, B, T), device=device).unbind()

    model = GPT(config).to(device)
    level = Level(model.having(GENERALIST, SPECIALIST), itertools.repeat(batch), 1e-3, 0.1, constant)
    a, b = torch.randn(2, 1024, 1024, device=device)
    dense = DenseGPT(257, T, config.n_layer, config.n_head, config.n_embd, config.top_k).to(device)
    optimizer = torch.optim.AdamW(dense.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1,
                                  fused=device.startswith("cuda"))  # as in nanoGPT
    times = pairs(device, lambda: level.step(model), lambda: [a @ b for _ in range(10)],
                  lambda: dense_step(dense, optimizer, batch))
    rates = [step_operations(config, B, T) / step / (10 * 2 * 1024 ** 3 / matmul) for step, matmul, _ in times]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"{name}; {config.n_layer} layers of {config.n_embd}, batch {B} x {T}; medians and quartiles")
    print(f"matmul rate, GFLOP/s:                      {quartiles([20 * 1024 ** 3 / m / 1e9 for _, m, _ in times])}")
    print(f"training step, ms:                         {quartiles([1000 * step for step, _, _ in times])}")
    print(f"training step, share of the matmul rate:   {quartiles(rates)}")
    print(f"training step / plain dense step:          {quartiles([step / plain for step, _, plain in times])}")

    moe = MoE(replace(config, specialists=8)).to(device)
    block = DenseBlock(config.n_embd, 2).to(device)
    for tokens in (1024, 4096):
        x = torch.randn(tokens // T, T, config.n_embd, device=device, requires_grad=True)
        gradient = torch.randn_like(x)

        def sparse_work(x=x, gradient=gradient):
            torch.autograd.grad(moe(x)[0], [x, *moe.parameters()], gradient)

        def dense_work(x=x, gradient=gradient):
            torch.autograd.grad(block(x), [x, *block.parameters()], gradient)

        times = pairs(device, sparse_work, dense_work)
        print(f"mixture of 9, top-2 / dense block, {tokens} tokens: {quartiles([s / d for s, d in times])}")


if __name__ == "__main__":
    main()
