"""Speed and memory, as ratios taken in one run: the machine's noise falls on both sides alike.

    python -m lab.bench             the default model, from scratch: fifteen seconds
    python -m lab.bench kernels     what the hand-written gradients of support/kernels.py are worth: five minutes
    python -m lab.bench gpt2        GPT-2's shape (124M, random weights) with low-rank experts: six minutes
    python -m lab.bench sample      sampling with and without the cache, at both sizes: half a minute

All take --device cuda. Rates and ratios are medians, with quartiles in brackets.
"""

import argparse
import itertools
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel import Level, Rhythm
from federated import Server, User, federated_round
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig, LoRAExperts, MoE, Routing, precision
from support.settings import SCRATCH, Settings

DEFAULT, BATCH = dict(vocab_size=257, block_size=Settings.block_size, **SCRATCH), Settings.batch_size
GPT2 = dict(vocab_size=50257, block_size=128, n_layer=12, n_head=12, n_embd=768, gelu="tanh", expert="lora")
REPEATS, STEPS = 30, 5  # the latter of GPT-2, in each process
MATRIX = 1024  # rows and columns of the matrices that are multiplied; on a GPU 8 times as many


def timed(repeats: int, *works: Callable[[], object]) -> Tensor:
    """The seconds of each work, all of them in turn: (works, repeats)."""
    times = []
    for work in works * (1 + repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return torch.tensor(times).view(-1, len(works))[1:].t()  # the first of each warms up


def quartiles(values: Tensor) -> str:
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def peak() -> float:
    """The most that this process has held, in GB: of a GPU's memory if it uses one, otherwise of the machine's."""
    return (torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def alone(work: Callable, *arguments):
    """The result of a work in a process of its own, so that its peak memory and its heap are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def step_operations(config: GPTConfig, B: int) -> int:
    """Operations that a training step needs, two per multiply-add: the forward pass, as much again for the gradients
    of activations and, where weights learn, for those of weights."""
    C, T, V, L, E = config.n_embd, config.block_size, config.vocab_size, config.n_layer, config.n_experts
    k, r = min(config.top_k, E), config.lora_rank
    always = C * (T + 1) + C * E  # attention's scores and mixing, over the tokens up to this one; the router
    if config.expert == "mlp":
        return 3 * 2 * B * T * (L * (4 * C * C + k * 8 * C * C + always) + V * C)
    low_rank = r * (C + 3 * C) + r * (C + C) + k * 2 * r * (C + 4 * C)
    frozen = L * 12 * C * C + V * C
    first = 3 * C * C  # the first layer's q, k and v: nothing below them learns
    return 2 * B * T * (2 * frozen - first + 3 * L * (low_rank + always))


def level_of(parameters: dict[str, nn.Parameter], config: GPTConfig, B: int, device: str) -> Level:
    """A level that learns from the same B windows in every step."""
    batch = torch.randint(config.vocab_size, (2, B, config.block_size), device=device).unbind()
    return Level(parameters, itertools.repeat(batch), 1e-3)


def expert_step(model: GPT, B: int, device: str) -> Callable[[], Tensor]:
    return partial(level_of(model.having(GENERALIST, SPECIALIST), model.config, B, device).step, model)


class BlockCopies(nn.Module):
    """Low-rank experts the naive way: each is its own copy of the frozen block with its own changes, and they work one
    after the other, each on the tokens that chose it: (N, C) -> (N, C), as LoRAExperts."""

    def __init__(self, experts: LoRAExperts):
        super().__init__()
        self.changes = experts.changes
        self.blocks = nn.ModuleList(deepcopy(experts.block) for _ in self.changes)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        y = torch.zeros_like(x)
        for e, (block, change) in enumerate(zip(self.blocks, self.changes, strict=True)):
            token, place = torch.where(routing.chosen == e)  # (n_e,) each
            x_e = x[token]  # (n_e, C)
            h = block.gelu(block.up(x_e) + change.up(x_e))  # (n_e, 4C)
            y[token] += routing.gates[token, place, None] * (block.down(h) + change.down(h))
        return y


def steps_of(copies: bool, config: GPTConfig, repeats: int, B: int, device: str) -> tuple[Tensor, str]:
    """Of training steps: tokens per second, and shares of the rate at which the machine multiplies matrices,
    (2, repeats); and how large all was. copies: with BlockCopies, and all else in its plain form."""
    model = GPT(replace(config, fast=not copies)).to(device)
    for block in model.blocks if copies else ():
        block.moe.experts = BlockCopies(block.moe.experts)
    model.roles = model.find_roles()
    n, dtype = (8 * MATRIX, torch.bfloat16) if device.startswith("cuda") else (MATRIX, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    step, product = timed(repeats, expert_step(model, B, device), lambda: [a @ b for _ in range(10)])
    share = step_operations(config, B) / step / (10 * 2 * n ** 3 / product)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, peak {peak():.2f} GB"
    return torch.stack([B * config.block_size / step, share]), size


def bench_scratch(device: str) -> None:
    """The default step, as a share of the matmul rate and over a dense one; a mixture over a dense block."""
    config = GPTConfig(**DEFAULT)
    C, hidden = config.n_embd, config.top_k * 4 * config.n_embd
    (tokens, share), _ = steps_of(False, config, REPEATS, BATCH, device)
    print(f"training step: tokens/s {quartiles(tokens)}, share of matmul rate {quartiles(share)}")
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
        dense = GPT2LMHeadModel(GPT2Config(
            vocab_size=257, n_positions=config.block_size, n_inner=hidden, activation_function="gelu",
            bos_token_id=0, eos_token_id=0, **SCRATCH)).to(device).eval()  # without dropout

        def model(idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
            with precision(idx):
                return None, F.cross_entropy(dense(idx, use_cache=False).logits.flatten(0, 1), targets.flatten())

        ours, theirs = timed(REPEATS, expert_step(GPT(config).to(device), BATCH, device), partial(
            level_of(dict(dense.named_parameters()), config, BATCH, device).step, model))
        print(f"training step / plain dense step: {quartiles(ours / theirs)}")
    except ImportError:
        print("training step / plain dense step: needs transformers; pip install -r requirements-dev.txt")
    moe = MoE(replace(config, specialists=8)).to(device)
    block = nn.Sequential(nn.Linear(C, hidden), nn.GELU(), nn.Linear(hidden, C)).to(device)
    for N in (1024, 4096):
        x = torch.randn(1, N, C, device=device, requires_grad=True)
        ours, theirs = timed(
            REPEATS, lambda x=x: torch.autograd.grad(moe(x)[0], [x, *moe.parameters()], x.detach()),
            lambda x=x: torch.autograd.grad(block(x), [x, *block.parameters()], x.detach()))
        print(f"mixture of 9, top-2 / dense block of the same work, {N} tokens: {quartiles(ours / theirs)}")


def bench_kernels(device: str) -> None:
    """A step with plain forms over one with fast forms: above 1, support/kernels.py saves time. In the plain mixture
    every expert works for every token: with 9 experts, most of what is saved is that, not hand-written gradients."""
    for name, shape, B in (("default", DEFAULT | {"expert": "lora"}, BATCH), ("GPT-2", GPT2 | {"n_layer": 2}, 2)):
        for experts in (2, 9):
            steps = []
            for mixture, head in ((False, False), (True, True), (True, False), (False, True)):
                model = GPT(GPTConfig(**shape, specialists=experts - 1, fast=mixture)).to(device)
                model.config = replace(model.config, fast=head)  # its layers were built with the other
                steps.append(expert_step(model, B, device))
            plain, *fast = timed(REPEATS, *steps)
            both, mixture, head = (quartiles(plain / one) for one in fast)
            print(f"{name}, {experts} experts, plain / fast: {both}; only mixture fast {mixture}; only head {head}")


def federation(config: GPTConfig, specialists: list[int], B: int, device: str) -> tuple[int, list[int], float]:
    """A round in which every user takes one step on each level. Returns how many different parameters the users have,
    how many numbers they hold with Adam's moments after each user's turn, and the peak GB."""
    base = {GPT.plain_name(name): frozen for name, frozen in GPT(config).having(BACKBONE).items()}
    models = [GPT(replace(config, specialists=S), pretrained=base).to(device) for S in specialists]
    users = [User("", model, *(level_of(model.having(*roles), config, B, device)
                               for roles in ((GENERALIST, SPECIALIST), (ROUTER,)))) for model in models]
    server, numbers, held = Server(models[0].having(GENERALIST)), {}, []
    for user in users:
        federated_round(server, [user], Rhythm(1, 1, 1))
        states = [*user.lower.optimizer.state.values(), *user.upper.optimizer.state.values()]
        tensors = [*user.model.parameters(), *(tensor for state in states for tensor in state.values())]
        numbers |= {id(tensor): tensor.numel() for tensor in tensors if tensor.ndim}  # all but Adam's counts of steps
        held.append(sum(numbers.values()))
    return sum({id(p): p.numel() for model in models for p in model.parameters()}.values()), held, peak()


def bench_gpt2(device: str) -> None:
    """A step against block copies, each side in a process of its own, in turn; what users hold, and a further one."""
    config, B = GPTConfig(**GPT2), 64 if device.startswith("cuda") else 8
    for E in (2, 9):
        sized, speeds = replace(config, specialists=E - 1), {"ours": [], "block copies": []}
        for name in (*speeds, *speeds):
            (tokens, share), size = alone(steps_of, name == "block copies", sized, STEPS, B, device)
            print(f"{E} experts, {name}: tokens/s {quartiles(tokens)}, share of matmul rate {quartiles(share)}; {size}")
            speeds[name].append(tokens)
        ours, copies = map(torch.cat, speeds.values())
        print(f"{E} experts, ours / block copies: {quartiles(ours / copies)} times the tokens per second")
    with torch.device("meta"):  # a new process counts what this one holds as its own peak, too
        one = sum(frozen.numel() for frozen in GPT(config).having(BACKBONE).values())
    parameters, _, most = alone(federation, config, [1, 2, 4, 8], B, device)
    print(f"users of 1, 2, 4 and 8 specialists: {parameters:,} parameters, {parameters / one:.3f} of one GPT-2; "
          f"peak {most:.2f} GB")
    (_, _, few), (_, held, many) = (alone(federation, config, [1] * users, 1, device) for users in (4, 64))
    own = held[63] - held[62]
    print(f"users of 1 specialist, batch 1: the 64th holds {own:,} numbers of its own, {own * 4 / 1e6:.1f} MB; "
          f"peak {few:.2f} GB with 4, {many:.2f} GB with 64, {(many - few) * 1000 / 60:.1f} MB a user")


def bench_sample(device: str) -> None:
    """Tokens per second after 500 tokens, with the cache of keys and values and without."""
    text = torch.zeros(1, 500, dtype=torch.long, device=device)
    for name, shape in (("default", DEFAULT), ("GPT-2", GPT2)):
        model = GPT(GPTConfig(**shape | {"block_size": 512})).to(device)
        cached, anew = timed(12, *(partial(next, model.stream(text, 13, cache=cache)) for cache in (True, False)))
        print(f"{name}: tokens/s {quartiles(1 / cached)}; without the cache {quartiles(1 / anew)}; "
              f"{quartiles(anew / cached)} times as many")


def main() -> None:
    benches = {"scratch": bench_scratch, "kernels": bench_kernels, "gpt2": bench_gpt2, "sample": bench_sample}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=benches, default="scratch")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    print(f"{asked.device}, {torch.get_num_threads()} threads")
    torch.manual_seed(0)
    benches[asked.what](asked.device)


if __name__ == "__main__":
    main()
