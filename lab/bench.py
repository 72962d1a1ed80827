"""Speed and memory, as ratios taken in one run: the machine's noise falls on both sides alike.

    python -m lab.bench             the default model, from scratch: fifteen seconds
    python -m lab.bench kernels     what the hand-written gradients of support/kernels.py are worth: five minutes
    python -m lab.bench gpt2        GPT-2's shape (124M, random weights) with low-rank experts: six minutes
    python -m lab.bench sample      sampling with and without the cache, at both sizes: half a minute

All take --device cuda. Figures are medians, with quartiles in brackets.
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
from tqdm import tqdm

from bilevel import Level, Rhythm, constant
from federated import Server, User, federated_round
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig, LoRAExperts, MoE, Routing, precision
from support.settings import SCRATCH, Settings

DEFAULT = dict(vocab_size=257, block_size=Settings.block_size, **SCRATCH)
GPT2 = dict(vocab_size=50257, block_size=128, n_layer=12, n_head=12, n_embd=768, gelu="tanh", expert="lora")
REPEATS = 30
STEPS = 5  # of GPT-2, in each process


def timed(repeats: int, device: str, *works: Callable[[], object]) -> Tensor:
    """The seconds of each work, all of them in turn: (works, repeats)."""
    times = []
    for _ in tqdm(range(1 + repeats), leave=False, disable=None):
        for work in works:
            start = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return torch.tensor(times).view(-1, len(works))[1:].t()  # without the first, which warms up


def quartiles(values: Tensor) -> str:
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def peak_memory(device: str) -> float:
    """The most that this process has held, in GB: of a GPU's memory, or else of the machine's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def alone(work: Callable, *arguments):
    """The result of a work in a process of its own, so that its peak memory and its heap are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def matmuls(device: str) -> tuple[Callable[[], object], int]:
    """A work that only multiplies matrices, and its number of operations."""
    n, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: [a @ b for _ in range(10)], 10 * 2 * n ** 3


def step_operations(config: GPTConfig, B: int) -> int:
    """Operations that a training step needs, two per multiply-add: the forward pass, as much again for the gradients
    of activations and, where weights learn, for those of weights."""
    C, T, V, L, E = config.n_embd, config.block_size, config.vocab_size, config.n_layer, config.n_experts
    k, r = min(config.top_k, E), config.lora_rank
    attention = 2 * C * (T + 1) / 2  # scores and mixing, over the tokens up to this one
    if config.expert == "mlp":
        return round(3 * 2 * B * T * (L * (4 * C * C + attention + C * E + k * 8 * C * C) + V * C))
    low_rank = r * (C + 3 * C) + r * (C + C) + k * 2 * r * (C + 4 * C)
    frozen = L * 12 * C * C + V * C
    first = 3 * C * C  # the first layer's q, k and v: nothing below them learns
    return round(2 * B * T * (2 * frozen - first + 3 * L * (low_rank + attention + C * E)))


def level_of(model: nn.Module, parameters: dict[str, nn.Parameter], config: GPTConfig, B: int) -> Level:
    """A level of a model that learns from one batch of B windows, again and again."""
    device = next(model.parameters()).device
    batch = torch.randint(config.vocab_size, (2, B, config.block_size), device=device).unbind()
    return Level(parameters, itertools.repeat(batch), 1e-3, 0.1, constant)


def expert_step(model: GPT, B: int) -> Callable[[], Tensor]:
    return partial(level_of(model, model.having(GENERALIST, SPECIALIST), model.config, B).step, model)


def dense_step(config: GPTConfig, B: int, device: str) -> Callable[[], Tensor]:
    """A step of Hugging Face's GPT-2, its feed-forward block as wide as k experts. Raises ImportError."""
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt2 = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd, n_inner=config.top_k * 4 * config.n_embd, activation_function="gelu", resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, use_cache=False, bos_token_id=0, eos_token_id=0)).to(device)

    def model(idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        with precision(idx):
            return None, gpt2(idx, labels=targets).loss

    return partial(level_of(gpt2, dict(gpt2.named_parameters()), config, B).step, model)


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


# --- the benches -----------------------------------------------------------------------------------------------------

def bench_scratch(device: str) -> None:
    """The default step, as a share of the matmul rate and over a dense one; a mixture over a dense block."""
    config, B = GPTConfig(**DEFAULT), Settings.batch_size
    matmul, operations = matmuls(device)
    works = [matmul, expert_step(GPT(config).to(device), B)]
    try:
        works.append(dense_step(config, B, device))
    except ImportError:
        print("no plain dense step, which needs transformers: pip install -r requirements-dev.txt")
    product, step, *dense = timed(REPEATS, device, *works)
    print(f"matmul rate, GFLOP/s: {quartiles(operations / product / 1e9)}")
    print(f"training step, ms: {quartiles(1000 * step)}")
    print(f"training step, share of the matmul rate: {quartiles(step_operations(config, B) / operations * product / step)}")
    for plain in dense:
        print(f"training step / plain dense step: {quartiles(step / plain)}")

    C, hidden = config.n_embd, config.top_k * 4 * config.n_embd
    moe = MoE(replace(config, specialists=8)).to(device)
    block = nn.Sequential(nn.Linear(C, hidden), nn.GELU(), nn.Linear(hidden, C)).to(device)
    for tokens in (1024, 4096):
        x = torch.randn(1, tokens, C, device=device, requires_grad=True)
        mixture, dense = timed(
            REPEATS, device, lambda x=x: torch.autograd.grad(moe(x)[0], [x, *moe.parameters()], x.detach()),
            lambda x=x: torch.autograd.grad(block(x), [x, *block.parameters()], x.detach()))
        print(f"mixture of 9, top-2 / dense block of the same work, {tokens} tokens: {quartiles(mixture / dense)}")


def bench_kernels(device: str) -> None:
    """A step with plain forms over one with fast forms: above 1, the hand-written gradients save time."""
    for name, shape, B in (("default", DEFAULT | {"expert": "lora"}, Settings.batch_size),
                           ("GPT-2, two layers", GPT2 | {"n_layer": 2}, 2)):
        for experts in (2, 9):
            steps = []
            for mixture, head in ((False, False), (True, True), (True, False), (False, True)):
                model = GPT(GPTConfig(**shape, specialists=experts - 1, fast=mixture)).to(device)
                model.config = replace(model.config, fast=head)  # its layers were built with the other
                steps.append(expert_step(model, B))
            plain, *fast = timed(REPEATS, device, *steps)
            both, mixture, head = (quartiles(plain / one) for one in fast)
            print(f"{name}, {experts} experts, plain / fast: {both}; only mixture fast {mixture}; only head {head}")


def steps_of(copies: bool, config: GPTConfig, B: int, device: str) -> tuple[Tensor, Tensor, int, float]:
    """Of STEPS steps: tokens per second, and shares of the matmul rate; and the model's parameters and peak GB."""
    model = GPT(replace(config, fast=not copies)).to(device)
    if copies:
        for block in model.blocks:
            block.moe.experts = BlockCopies(block.moe.experts)
        model.roles = model.find_roles()
    matmul, operations = matmuls(device)
    product, step = timed(STEPS, device, matmul, expert_step(model, B))
    share = step_operations(config, B) / operations * product / step
    return B * config.block_size / step, share, sum(p.numel() for p in model.parameters()), peak_memory(device)


def federation(config: GPTConfig, specialists: list[int], B: int, device: str) -> tuple[int, list[int], float]:
    """A round in which every user takes one step on each level. Returns how many different parameters the users have,
    how many numbers they hold with Adam's moments after each user's turn, and the peak GB."""
    base = {GPT.plain_name(name): frozen for name, frozen in GPT(config).having(BACKBONE).items()}
    users, parameters, moments, held = [], {}, {}, []
    for name, S in enumerate(specialists):
        model = GPT(replace(config, specialists=S), pretrained=base).to(device)
        users.append(User(str(name), model, *(level_of(model, model.having(*roles), config, B)
                                              for roles in ((GENERALIST, SPECIALIST), (ROUTER,)))))
    server = Server(users[0].model.having(GENERALIST))
    for user in users:
        federated_round(server, [user], Rhythm(1, 1, 1))
        parameters |= {id(tensor): tensor.numel() for tensor in user.model.parameters()}
        moments |= {id(tensor): tensor.numel() for level in (user.lower, user.upper)
                    for state in level.optimizer.state.values() for name, tensor in state.items() if name != "step"}
        held.append(sum(parameters.values()) + sum(moments.values()))
    return sum(parameters.values()), held, peak_memory(device)


def bench_gpt2(device: str) -> None:
    """A step against block copies, each side in a process of its own, in turn; what users hold, and a further one."""
    config, B = GPTConfig(**GPT2), 64 if device.startswith("cuda") else 8
    for experts in (2, 9):
        sized, speeds = replace(config, specialists=experts - 1), []
        runs = [alone(steps_of, copies, sized, B, device) for copies in (False, True) * 2]
        for name, (first, second) in {"ours": runs[::2], "block copies": runs[1::2]}.items():
            speeds.append(torch.cat([first[0], second[0]]))
            print(f"{experts} experts, {name}: tokens/s {quartiles(speeds[-1])}, share of the matmul rate "
                  f"{quartiles(torch.cat([first[1], second[1]]))}, {first[2]:,} parameters, "
                  f"peak {max(first[3], second[3]):.2f} GB")
        print(f"{experts} experts, ours / block copies: {quartiles(speeds[0] / speeds[1])} times the tokens per second")
    parameters, _, peak = alone(federation, config, [1, 2, 4, 8], B, device)
    with torch.device("meta"):
        one = sum(parameter.numel() for parameter in GPT(config).having(BACKBONE).values())
    print(f"4 users of 1, 2, 4, 8 specialists: {parameters:,} parameters, {parameters / one:.3f} of one GPT-2; "
          f"peak {peak:.2f} GB")
    (_, _, few), (_, held, many) = (alone(federation, config, [1] * users, 1, device) for users in (4, 64))
    print(f"users of 1 specialist, batch 1: the 64th holds {held[63] - held[62]:,} numbers of its own, "
          f"{(held[63] - held[62]) * 4 / 1e6:.1f} MB; peak {few:.2f} GB with 4, {many:.2f} GB with 64, "
          f"{(many - few) * 1000 / 60:.1f} MB a user")


def bench_sample(device: str) -> None:
    """Tokens per second at the 5th and the 500th position, with and without the cache of keys and values."""
    for name, shape in (("default", DEFAULT), ("GPT-2", GPT2)):
        model, rates = GPT(GPTConfig(**shape | {"block_size": 512})).to(device), []
        for length, cache in ((5, True), (500, True), (500, False)):
            idx = torch.randint(model.config.vocab_size, (1, length), device=device)
            stream = model.stream(idx, 13, cache=cache)
            rates.append(1 / timed(12, device, partial(next, stream)).median().item())  # the first reads the text
        print(f"{name}: {rates[0]:.0f} tokens/s at position 5, {rates[1]:.0f} at 500; without the cache {rates[2]:.1f} "
              f"at 500: {rates[1] / rates[2]:.1f} times as many")


BENCHES = {"scratch": bench_scratch, "kernels": bench_kernels, "gpt2": bench_gpt2, "sample": bench_sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=BENCHES, default="scratch")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    print(torch.cuda.get_device_name(asked.device) if asked.device.startswith("cuda")
          else f"{torch.get_num_threads()} threads", "medians and quartiles", sep="; ")
    torch.manual_seed(0)
    BENCHES[asked.what](asked.device)


if __name__ == "__main__":
    main()
