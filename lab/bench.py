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
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bilevel import Level, Rhythm, constant
from federated import Server, User, federated_round
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig, LoRAExperts, MoE, Routing, precision
from support.settings import SCRATCH, Settings

DEFAULT = dict(vocab_size=257, block_size=Settings.block_size, **SCRATCH)
GPT2 = dict(vocab_size=50257, block_size=128, n_layer=12, n_head=12, n_embd=768, gelu="tanh", expert="lora")
REPEATS = 30
STEPS = 5  # of GPT-2, in each process

Work = Callable[[], object]


# --- taking times ----------------------------------------------------------------------------------------------------

def seconds(work: Work, device: str) -> float:
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed(repeats: int, device: str, *works: Work) -> list[tuple[float, ...]]:
    """The seconds of each work, all of them in turn: works × (repeats,)."""
    for work in works:
        work()
    rows = [[seconds(work, device) for work in works] for _ in tqdm(range(repeats), leave=False, disable=None)]
    return list(zip(*rows, strict=True))


def quartiles(values: Iterable[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def ratio(ours: Iterable[float], theirs: Iterable[float]) -> str:
    return quartiles(a / b for a, b in zip(ours, theirs, strict=True))


def machine(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"


def peak_memory(device: str) -> float:
    """The most that this process has held, in GB: of a GPU's memory, or else of the machine's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def alone(work: Callable, *arguments):
    """The result of a work in a process of its own, so that its peak memory and its heap are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# --- what is timed ---------------------------------------------------------------------------------------------------

def matmuls(device: str) -> tuple[Work, int]:
    """A work that only multiplies matrices, and how many operations it takes."""
    n, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: [a @ b for _ in range(10)], 10 * 2 * n ** 3


def step_operations(config: GPTConfig, B: int) -> int:
    """Operations that a training step needs, two per multiply-add: the forward pass, as much again for the gradients
    of activations and, where weights learn, for those of weights."""
    C, T, V, L, E, r = (getattr(config, name) for name in (
        "n_embd", "block_size", "vocab_size", "n_layer", "n_experts", "lora_rank"))
    k = min(config.top_k, E)
    attention = 2 * C * (T + 1) / 2  # scores and mixing, over the tokens up to this one
    if config.expert == "mlp":
        return round(3 * 2 * B * T * (L * (4 * C * C + attention + C * E + k * 8 * C * C) + V * C))
    low_rank = r * (C + 3 * C) + r * (C + C) + k * 2 * r * (C + 4 * C)
    frozen = L * 12 * C * C + V * C
    first = 3 * C * C  # the first layer's q, k and v: nothing below them learns
    return round(2 * B * T * (2 * frozen - first + 3 * L * (low_rank + attention + C * E)))


def step_of(model: Callable[[Tensor, Tensor], tuple], parameters: dict[str, nn.Parameter], config: GPTConfig, B: int,
            device: str) -> Work:
    """A training step on a batch of B windows, which is always the same."""
    batch = torch.randint(config.vocab_size, (2, B, config.block_size), device=device).unbind()
    level = Level(parameters, itertools.repeat(batch), 1e-3, 0.1, constant)
    return lambda: level.step(model)


def expert_step(model: GPT, B: int, device: str) -> Work:
    return step_of(model, model.having(GENERALIST, SPECIALIST), model.config, B, device)


def dense_step(config: GPTConfig, B: int, device: str) -> list[Work]:
    """A step of Hugging Face's GPT-2 with a feed-forward block as wide as k experts, or nothing where it lacks."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        print("without the plain dense step, which needs transformers: pip install -r requirements-dev.txt")
        return []
    gpt2 = GPT2LMHeadModel(GPT2Config(
        config.vocab_size, config.block_size, config.n_embd, config.n_layer, config.n_head,
        n_inner=config.top_k * 4 * config.n_embd, activation_function="gelu", resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, use_cache=False, bos_token_id=0, eos_token_id=0)).to(device)

    def model(idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        with precision(idx):
            return None, F.cross_entropy(gpt2(idx).logits.flatten(0, 1), targets.flatten())

    return [step_of(model, dict(gpt2.named_parameters()), config, B, device)]


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


def with_block_copies(config: GPTConfig) -> GPT:
    """The same model in its plain forms, with a copy of the block for every expert."""
    model = GPT(replace(config, fast=False))
    for block in model.blocks:
        block.moe.experts = BlockCopies(block.moe.experts)
    model.roles = model.find_roles()
    return model


# --- the benches -----------------------------------------------------------------------------------------------------

def bench_scratch(device: str) -> None:
    """The default step, as a share of the matmul rate and against a dense one; the mixture against a dense block."""
    config, B = GPTConfig(**DEFAULT), Settings.batch_size
    C, T = config.n_embd, config.block_size
    matmul, operations = matmuls(device)
    needed = step_operations(config, B) / operations  # in works of only multiplying
    step, product, *dense = timed(REPEATS, device, expert_step(GPT(config).to(device), B, device), matmul,
                                  *dense_step(config, B, device))
    print(f"{machine(device)}; {config.n_layer} layers of {C}, batch {B} x {T}")
    print(f"matmul rate, GFLOP/s: {quartiles(operations / s / 1e9 for s in product)}")
    print(f"training step, ms: {quartiles(1000 * s for s in step)}")
    print(f"training step, share of the matmul rate: {ratio((needed * s for s in product), step)}")
    for plain in dense:
        print(f"training step / plain dense step: {ratio(step, plain)}")

    moe = MoE(replace(config, specialists=8)).to(device)
    block = nn.Sequential(nn.Linear(C, 8 * C), nn.GELU(), nn.Linear(8 * C, C)).to(device)
    for tokens in (1024, 4096):
        x = torch.randn(tokens // T, T, C, device=device, requires_grad=True)

        def there_and_back(y: Tensor, part: nn.Module, x: Tensor = x):
            torch.autograd.grad(y, [x, *part.parameters()], torch.ones_like(y))

        mixture, dense = timed(REPEATS, device, lambda x=x, work=there_and_back: work(moe(x)[0], moe),
                               lambda x=x, work=there_and_back: work(block(x), block))
        print(f"mixture of 9, top-2 / dense block of the same work, {tokens} tokens: {ratio(mixture, dense)}")


def bench_kernels(device: str) -> None:
    """A step with plain forms over one with fast forms: above 1, the hand-written gradients save time."""
    print(f"{machine(device)}; seconds of a step, plain forms / fast forms")
    for name, shape, B in (("default", DEFAULT | {"expert": "lora"}, Settings.batch_size),
                           ("GPT-2, two layers", GPT2 | {"n_layer": 2}, 2)):
        for experts in (2, 9):
            steps = []
            for mixture, head in ((False, False), (True, True), (True, False), (False, True)):
                model = GPT(GPTConfig(**shape, specialists=experts - 1, fast=mixture)).to(device)
                model.config = replace(model.config, fast=head)  # its layers were built with the other
                steps.append(expert_step(model, B, device))
            plain, *fast = timed(REPEATS, device, *steps)
            both, mixture, head = (ratio(plain, times) for times in fast)
            print(f"{name}, {experts} experts: {both}; only the mixture fast {mixture}; only the head {head}")


def steps_of(copies: bool, config: GPTConfig, B: int, device: str) -> tuple[list[float], list[float], int, float]:
    """Of STEPS steps: tokens per second and shares of the matmul rate; and the model's parameters and peak GB."""
    model = (with_block_copies if copies else GPT)(config).to(device)
    matmul, operations = matmuls(device)
    step, product = timed(STEPS, device, expert_step(model, B, device), matmul)
    needed = step_operations(config, B) / operations
    return ([B * config.block_size / s for s in step],
            [needed * m / s for s, m in zip(step, product, strict=True)],
            sum(parameter.numel() for parameter in model.parameters()), peak_memory(device))


def federation(config: GPTConfig, specialists: list[int], B: int, device: str) -> tuple[int, list[int], float]:
    """A round in which every user takes one step on each level. Returns how many different parameters the users have,
    how many numbers they hold with Adam's moments after each user's turn, and the peak GB."""
    base = {GPT.plain_name(name): frozen for name, frozen in GPT(config).having(BACKBONE).items()}
    batch = torch.randint(config.vocab_size, (2, B, config.block_size), device=device).unbind()
    users = []
    for name, S in enumerate(specialists):
        model = GPT(replace(config, specialists=S), pretrained=base).to(device)
        levels = [Level(model.having(*roles), itertools.repeat(batch), 1e-3, 0.0, constant)
                  for roles in ((GENERALIST, SPECIALIST), (ROUTER,))]
        users.append(User(str(name), model, *levels))
    server = Server(users[0].model.having(GENERALIST))
    parameters, moments, held = {}, {}, []
    for user in users:
        federated_round(server, [user], Rhythm(1, 1, 1))
        parameters |= {id(tensor): tensor.numel() for tensor in user.model.parameters()}
        moments |= {id(tensor): tensor.numel() for level in (user.lower, user.upper)
                    for state in level.optimizer.state.values() for name, tensor in state.items() if name != "step"}
        held.append(sum(parameters.values()) + sum(moments.values()))
    return sum(parameters.values()), held, peak_memory(device)


def bench_gpt2(device: str) -> None:
    """A step against block copies, each side in a process of its own, in turn; what users hold, and a further one."""
    config = GPTConfig(**GPT2)
    B = 64 if device.startswith("cuda") else 8
    with torch.device("meta"):
        one = sum(parameter.numel() for parameter in GPT(config).having(BACKBONE).values())
    print(f"{machine(device)}; {config.n_layer} layers of {config.n_embd}, {one:,} parameters, batch {B} x "
          f"{config.block_size}")
    for experts in (2, 9):
        sized, speeds = replace(config, specialists=experts - 1), []
        runs = [alone(steps_of, copies, sized, B, device) for copies in (False, True) * 2]
        for name, (first, second) in {"ours": runs[::2], "block copies": runs[1::2]}.items():
            speeds.append(first[0] + second[0])
            print(f"{experts} experts, {name}: tokens/s {quartiles(speeds[-1])}, share of the matmul rate "
                  f"{quartiles(first[1] + second[1])}, {first[2]:,} parameters, peak {max(first[3], second[3]):.2f} GB")
        print(f"{experts} experts, ours / block copies: {ratio(*speeds)} times the tokens per second")
    parameters, _, peak = alone(federation, config, [1, 2, 4, 8], B, device)
    print(f"4 users of 1, 2, 4, 8 specialists: {parameters:,} parameters, {parameters / one:.3f} of one GPT-2; "
          f"peak {peak:.2f} GB")
    (_, _, few), (_, held, many) = (alone(federation, config, [1] * users, 1, device) for users in (4, 64))
    print(f"users of 1 specialist, batch 1: the 64th holds {held[63] - held[62]:,} numbers of its own, "
          f"{(held[63] - held[62]) * 4 / 1e6:.1f} MB; peak {few:.2f} GB with 4, {many:.2f} GB with 64, "
          f"{(many - few) * 1000 / 60:.1f} MB a user")


def token_rate(model: GPT, length: int, cache: bool, device: str, tokens: int = 12) -> float:
    """Tokens per second of sampling after so many tokens, the median of a few."""
    stream = model.stream(torch.randint(model.config.vocab_size, (1, length), device=device), 1 + tokens, cache=cache)
    next(stream)  # reads the text
    return 1 / statistics.median(seconds(lambda: next(stream), device) for _ in range(tokens))


def bench_sample(device: str) -> None:
    """Tokens per second at the 5th and the 500th position, with and without the cache of keys and values."""
    print(machine(device))
    for name, shape in (("default", DEFAULT), ("GPT-2", GPT2)):
        model = GPT(GPTConfig(**shape | {"block_size": 512})).to(device)
        early, late, without = (token_rate(model, *how, device) for how in ((5, True), (500, True), (500, False)))
        print(f"{name}: {early:.0f} tokens/s at position 5, {late:.0f} at 500; without the cache {without:.1f} at 500: "
              f"{late / without:.1f} times as many")


BENCHES = {"scratch": bench_scratch, "kernels": bench_kernels, "gpt2": bench_gpt2, "sample": bench_sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=BENCHES, default="scratch")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.manual_seed(0)
    BENCHES[asked.what](asked.device)


if __name__ == "__main__":
    main()
