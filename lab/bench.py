"""Speed and memory, as ratios taken in one run: the machine's noise falls on both sides alike.

    python bench.py                 the default model, from scratch: ten seconds
    python bench.py gpt2            GPT-2's shape (124M, random weights) with low-rank experts: six minutes
    python bench.py gpt2 --device cuda
    python bench.py sample          sampling, at both sizes: half a minute

From scratch:
1. The default model's training step, as a share of the rate at which this machine multiplies matrices.
2. The mixture with 9 experts and top-2, against a dense block of the same work per token.
3. The default step, against a plain dense GPT's of the same active size.

GPT-2:
4. The training step with 2 and with 9 experts, against a naive one in which every expert has its own copy of the
   block, each in a process of its own, in turn.
5. What four users with 1, 2, 4 and 8 specialists hold, and their peak memory while they learn.
6. What the 64th user adds.

Sampling:
7. Tokens per second at the 5th and the 500th position, with and without the cache of keys and values.
"""

import argparse
import itertools
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import base
from bilevel import Alternation, Level, constant
from federated import Server, User, federated_round
from model import GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig, MoE
from settings import SCRATCH, Settings

REPEATS = 30
GPT2 = dict(vocab_size=50257, block_size=128, n_layer=12, n_head=12, n_embd=768, gelu="tanh", expert="lora")
STEPS = 5  # of each model in each process


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pairs(device: str, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each work, REPEATS times in turn: (REPEATS, works)."""
    for work in works * 3:
        work()
    return [[seconds(work, device) for work in works] for _ in tqdm(range(REPEATS), leave=False, disable=None)]


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


# --- the naive references: nanoGPT's model and step, and the same with mixtures of whole blocks -----------------------

class DenseBlock(nn.Module):
    """A feed-forward block with as many hidden channels as k experts have together."""

    def __init__(self, C: int, k: int):
        super().__init__()
        self.up, self.down = nn.Linear(C, k * 4 * C), nn.Linear(k * 4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class LoRALinear(nn.Linear):
    def __init__(self, n_in: int, n_out: int, rank: int = 8):
        super().__init__(n_in, n_out)
        self.A, self.B = nn.Parameter(torch.randn(rank, n_in) * 0.02), nn.Parameter(torch.zeros(n_out, rank))
        self.scale = 16 / rank ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * (x @ self.A.t() @ self.B.t())


class LoRABlock(nn.Module):
    """An expert with its own copy of the frozen block."""

    def __init__(self, C: int):
        super().__init__()
        self.up, self.down = LoRALinear(C, 4 * C), LoRALinear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class NaiveMixture(nn.Module):
    """E such experts, one after the other, each on the tokens that chose it."""

    def __init__(self, C: int, E: int, k: int):
        super().__init__()
        self.router, self.k = nn.Linear(C, E, bias=False), k
        self.experts = nn.ModuleList(LoRABlock(C) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores, chosen = self.router(tokens).topk(self.k)
        gates, y = scores.softmax(-1), torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(chosen == e)
            y[token] += gates[token, place, None] * expert(tokens[token])
        return y.view_as(x)


class PlainLayer(nn.Module):
    def __init__(self, C: int, H: int, linear: type[nn.Linear], feed_forward: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.H = nn.LayerNorm(C), nn.LayerNorm(C), H
        self.qkv, self.out, self.feed_forward = linear(C, 3 * C), linear(C, C), feed_forward

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.H, C // self.H).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.feed_forward(self.norm2(x))


class PlainGPT(nn.Module):
    def __init__(self, V: int, T: int, L: int, H: int, C: int, linear: type[nn.Linear],
                 feed_forward: Callable[[], nn.Module]):
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(V, C), nn.Embedding(T, C), nn.LayerNorm(C)
        self.layers = nn.ModuleList(PlainLayer(C, H, linear, feed_forward()) for _ in range(L))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def naive_gpt(config: GPTConfig) -> PlainGPT:
    """The model of `config`, the plain way: only factors and routers learn."""
    E = len(config.expert_roles)
    model = PlainGPT(config.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd, LoRALinear,
                     lambda: NaiveMixture(config.n_embd, E, config.top_k))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".A", ".B", "router.weight")))
    return model


def plain_step(model: PlainGPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=batch[0].is_cuda):
        loss = model(*batch)
    loss.backward()
    optimizer.step()


# --- what a step needs -----------------------------------------------------------------------------------------------

def step_operations(config: GPTConfig, B: int, T: int) -> int:
    """Operations that a training step needs, two per multiply-add: the forward pass, as much again for the gradients
    of activations and, where weights learn, for those of weights."""
    C, V, L, E, r = config.n_embd, config.vocab_size, config.n_layer, len(config.expert_roles), config.lora_rank
    k = min(config.top_k, E)
    attention = 2 * C * (T + 1) / 2  # scores and mixing, over the tokens up to this one
    if config.expert == "mlp":
        return round(3 * 2 * B * T * (L * (4 * C * C + attention + C * E + k * 8 * C * C) + V * C))
    low_rank = r * (C + 3 * C) + r * (C + C) + k * 2 * r * (C + 4 * C)
    frozen = L * 12 * C * C + V * C
    first = 3 * C * C  # the first layer's q, k and v: nothing below them learns
    return round(2 * B * T * (2 * frozen - first + 3 * L * (low_rank + attention + C * E)))


# --- from scratch ----------------------------------------------------------------------------------------------------

def bench_scratch(device: str) -> None:
    default = Settings()
    B, T = default.batch_size, default.block_size
    config = GPTConfig(257, T, **SCRATCH)
    batch = torch.randint(257, (2, B, T), device=device).unbind()

    model = GPT(config).to(device)
    level = Level(model.having(GENERALIST, SPECIALIST), itertools.repeat(batch), 1e-3, 0.1, constant)
    a, b = torch.randn(2, 1024, 1024, device=device)
    dense = PlainGPT(257, T, config.n_layer, config.n_head, config.n_embd, nn.Linear,
                     lambda: DenseBlock(config.n_embd, config.top_k)).to(device)
    optimizer = torch.optim.AdamW(dense.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1,
                                  fused=device.startswith("cuda"))  # as in nanoGPT
    times = pairs(device, lambda: level.step(model), lambda: [a @ b for _ in range(10)],
                  lambda: plain_step(dense, optimizer, batch))
    rates = [step_operations(config, B, T) / step / (10 * 2 * 1024 ** 3 / matmul) for step, matmul, _ in times]
    print(f"{machine(device)}; {config.n_layer} layers of {config.n_embd}, batch {B} x {T}; medians and quartiles")
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


# --- GPT-2 -----------------------------------------------------------------------------------------------------------

def machine(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"


def alone(work: Callable, *arguments):
    """The result of a work in a process of its own, so that its peak memory and its heap are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def random_base(config: GPTConfig) -> dict[str, nn.Parameter]:
    """Random weights under GPT-2's names."""
    shapes = base.shapes(config.vocab_size, config.block_size, config.n_layer, config.n_embd)
    return {name: nn.Parameter(base.turn(name, torch.randn(shape) * 0.02), False) for name, shape in shapes.items()}


def peak_memory(device: str) -> float:
    """The most that this process has held, in GB: on a GPU of its memory, else of the machine's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def steps_of(naive: bool, config: GPTConfig, B: int, device: str) -> tuple[list[float], list[float], int, float]:
    """Of STEPS training steps: tokens per second, shares of the matmul rate; numbers in the model, peak GB."""
    T = config.block_size
    batch = torch.randint(config.vocab_size, (2, B, T), device=device).unbind()
    if naive:
        model = naive_gpt(config).to(device)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, 1e-3, (0.9, 0.95), fused=True)
    else:
        model = GPT(config, pretrained=random_base(config)).to(device)
        level = Level(model.having(GENERALIST, SPECIALIST), itertools.repeat(batch), 1e-3, 0.0, constant)
    n, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)

    def step():
        return plain_step(model, optimizer, batch) if naive else level.step(model)

    step()
    times = [(seconds(step, device), seconds(lambda: [a @ b for _ in range(20)], device)) for _ in range(STEPS)]
    needed, matmul = step_operations(config, B, T), 20 * 2 * n ** 3
    return ([B * T / step for step, _ in times], [needed / step / (matmul / product) for step, product in times],
            sum(parameter.numel() for parameter in model.parameters()), peak_memory(device))


def federation(config: GPTConfig, specialists: list[int], B: int, device: str) -> tuple[int, list[int], float]:
    """A round in which every user takes one step on each level. Returns how many different parameters the users have,
    how many numbers they hold with Adam's moments after each user's turn, and the peak GB."""
    start, numbers, held = random_base(config), {}, []
    batch = torch.randint(config.vocab_size, (2, B, config.block_size), device=device).unbind()
    users = []
    for name, S in enumerate(specialists):
        model = GPT(replace(config, specialists=S), pretrained=start).to(device)
        levels = [Level(model.having(*roles), itertools.repeat(batch), 1e-3, 0.0, constant)
                  for roles in ((GENERALIST, SPECIALIST), (ROUTER,))]
        users.append(User(str(name), model, *levels))
    server = Server(users[0].model.having(GENERALIST))
    for user, _ in federated_round(server, users, Alternation(1, 1, 1)):
        moments = [moment for level in (user.lower, user.upper) for state in level.optimizer.state.values()
                   for name, moment in state.items() if name != "step"]
        numbers |= {id(tensor): tensor.numel() for tensor in (*user.model.parameters(), *moments)}
        held.append(sum(numbers.values()))
    parameters = {id(p): p.numel() for user in users for p in user.model.parameters()}
    return sum(parameters.values()), held, peak_memory(device)


def bench_gpt2(device: str, shape: dict) -> None:
    config = GPTConfig(**shape)
    B, T = 64 if device.startswith("cuda") else 8, config.block_size
    one = sum(tensor.numel() for tensor in random_base(config).values())
    print(f"{machine(device)}; {config.n_layer} layers of {config.n_embd}, {one:,} parameters, batch {B} x {T}")
    for experts in (2, 9):
        sized = replace(config, specialists=experts - 1)
        sides = {False: [], True: []}
        for naive in (False, True) * 2:
            sides[naive].append(alone(steps_of, naive, sized, B, device))
        speeds = {}
        for naive, runs in sides.items():
            tokens, shares = ([value for run in runs for value in run[i]] for i in (0, 1))
            speeds[naive] = statistics.median(tokens)
            print(f"{experts} experts, {'naive' if naive else 'ours '}: tokens/s {quartiles(tokens)}, share of the "
                  f"matmul rate {quartiles(shares)}, {runs[0][2]:,} parameters, peak {max(r[3] for r in runs):.2f} GB")
        print(f"{experts} experts, ours / naive: {speeds[False] / speeds[True]:.2f} times the tokens per second")
    parameters, _, peak = alone(federation, config, [1, 2, 4, 8], B, device)
    print(f"4 users with 1, 2, 4, 8 specialists: {parameters:,} parameters, {parameters / one:.3f} of one GPT-2; "
          f"peak {peak:.2f} GB")
    _, _, few = alone(federation, config, [1] * 4, 1, device)
    _, held, many = alone(federation, config, [1] * 64, 1, device)
    print(f"users of 1 specialist: the 64th holds {held[63] - held[62]:,} numbers of its own, "
          f"{(held[63] - held[62]) * 4 / 1e6:.1f} MB; peak at batch 1: {few:.2f} GB with 4, {many:.2f} GB with 64, "
          f"{(many - few) * 1000 / 60:.1f} MB a user")


def token_rate(model: GPT, length: int, cache: bool, tokens: int, device: str) -> float:
    """Tokens per second of sampling behind so many tokens, the median of `tokens` of them."""
    stream = model.stream(torch.randint(model.config.vocab_size, (1, length), device=device), 1 + tokens, cache=cache)
    next(stream)  # reads the text
    return 1 / statistics.median(seconds(lambda: next(stream), device) for _ in range(tokens))


def bench_sample(device: str, shapes: dict[str, dict], length: int = 500, tokens: int = 12) -> None:
    print(machine(device))
    for name, shape in shapes.items():
        config = GPTConfig(**shape)
        model = GPT(config, pretrained=random_base(config) if config.expert == "lora" else None).to(device)
        early, late, without = (token_rate(model, *how, tokens, device)
                                for how in ((5, True), (length, True), (length, False)))
        print(f"{name}: {early:.0f} tokens/s at position 5, {late:.0f} at {length}; without the cache {without:.1f} at "
              f"{length}: {late / without:.1f} times as many")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("scratch", "gpt2", "sample"), default="scratch")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.manual_seed(0)
    if asked.what == "gpt2":
        bench_gpt2(asked.device, GPT2)
    elif asked.what == "sample":
        bench_sample(asked.device, {"the default model": {"vocab_size": 257, "block_size": 512, **SCRATCH},
                                    "GPT-2's shape": GPT2 | {"block_size": 512}})
    else:
        bench_scratch(asked.device)


if __name__ == "__main__":
    main()
