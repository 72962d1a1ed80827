"""Speed and memory, as ratios taken in one run: the machine's noise falls on both sides alike.

    python -m lab.bench             the default model, from scratch: fifteen seconds
    python -m lab.bench gpt2        GPT-2's shape (124M, random weights) with low-rank experts: six minutes
    python -m lab.bench smollm2     SmolLM2-135M with low-rank experts, and with a LoRA of peft: four minutes
    python -m lab.bench sample      sampling with and without the cache, at three sizes: a minute

All take --device cuda. Rates and ratios are medians, with quartiles in brackets.
"""

import argparse
import itertools
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from bilevel import Level, Rhythm
from federated import Server, User, federated_round
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig, LoRAExperts, MLPExperts, MoE
from support.pretrained import gpt2 as pretrained
from support.pretrained import llama
from support.runs.command_line import run_command
from support.runs.settings import SCRATCH, Settings
from support.sampling import stream

USUAL = Settings()
LORA = dict(block_size=128, expert="lora")
SHAPES = {"default": dict(vocab_size=257, block_size=USUAL.block_size, **SCRATCH), "SmolLM2": LORA,
          "GPT-2": dict(vocab_size=50257, n_layer=12, n_head=12, n_embd=768, feed_forward="gelu-tanh", **LORA)}
DTYPES, COPIES = ("bfloat16", "float32"), "block copies"
REPEATS, STEPS = 30, 8  # the latter where a step takes seconds
MATRIX = 1024  # rows and columns of the matrices that are multiplied; on a GPU 8 times as many


def timed(repeats: int, *works: Callable[[], object]) -> Tensor:
    """The seconds of each work, all of them in turn: (works, repeats)."""
    marks = [time.perf_counter()]
    for work in works * (1 + repeats):
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return torch.tensor(marks, dtype=torch.double).diff().float().view(-1, len(works))[1:].t()  # the first warms up


def quartiles(values: Tensor) -> str:
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def step_operations(config: GPTConfig, B: int) -> int:
    """Operations that a training step needs, two per multiply-add: the forward pass, as much again for the gradients
    of activations and, where weights learn, for those of weights."""
    C, F, T, L, E = config.n_embd, config.n_hidden, config.block_size, config.n_layer, config.n_experts
    k, r, head = min(config.top_k, E), config.lora_rank, config.vocab_size * C
    qkv = (config.n_head + 2 * config.n_kv_head) * C // config.n_head  # channels
    M = 3 if config.feed_forward == "swiglu" else 2  # matrices of an expert
    always = C * (T + 1) + C * E  # attention's scores and mixing, over the tokens up to this one; the router
    if config.expert == "mlp":
        return 3 * 2 * B * T * (L * (C * qkv + C * C + k * M * C * F + always) + head)
    low_rank = r * (C + qkv) + r * (C + C) + k * M * r * (C + F)
    frozen, first = L * (C * qkv + C * C + M * C * F) + head, C * qkv  # below the first layer's qkv nothing learns
    return 2 * B * T * (2 * frozen - first + 3 * L * (low_rank + always))


class BlockCopies(MLPExperts):
    """Low-rank experts the naive way, separate ones: each is its own copy of the frozen block with its own changes."""

    def __init__(self, experts: LoRAExperts):
        nn.ModuleList.__init__(self, (deepcopy(experts.block) for _ in range(experts.E)))
        for e, block in enumerate(self):
            for matrix in (*block.into, block.down):
                matrix.changes = matrix.changes[e:e + 1]


def models_of(name: str, kind: str, specialists: list[int], device: str, **more) -> list[GPT]:
    """A model for each number of specialists, on one base, which is random or SmolLM2's. kind: a dtype, or COPIES, in
    float32. more: fields of GPTConfig."""
    shape = SHAPES[name] | {"dtype": "float32" if kind == COPIES else kind} | more
    start = pretrained.load("smollm2", shape["block_size"], dtype=kind) if name == "SmolLM2" else None
    shape = (start.config if start else {}) | shape
    base = start.tensors if start else {
        GPT.plain_name(name): p for name, p in GPT(GPTConfig(**shape)).having(BACKBONE).items()}
    models = [GPT(GPTConfig(**shape, specialists=S), pretrained=base).to(device) for S in specialists]
    for model in models if kind == COPIES else ():
        for block in model.blocks:
            block.moe.experts = BlockCopies(block.moe.experts)
        model.roles = model.find_roles()
    return models


def level_of(parameters: dict[str, nn.Parameter], config: GPTConfig, B: int, device: str) -> Level:
    """A level that learns from the same B windows in every step."""
    batch = torch.randint(config.vocab_size, (2, B, config.block_size), device=device).unbind()
    return Level(parameters, itertools.repeat(batch), 1e-3)


def expert_step(model: GPT, B: int, device: str) -> Callable[[], Tensor]:
    return partial(level_of(model.having(GENERALIST, SPECIALIST), model.config, B, device).step, model)


def race(name: str, kinds: tuple, specialists: list[int], others: dict, repeats: int, B: int, device: str) -> None:
    """Training steps that take turns; others build models of transformers. Prints tokens per second, of ours also the
    share of the rate at which matrices of their dtype are multiplied, and ratios of steps that differ in one thing."""
    models = {f"{1 + S} experts, {kind}": model for kind in kinds
              for S, model in zip(specialists, models_of(name, kind, specialists, device), strict=True)}
    steps, products = {what: expert_step(model, B, device) for what, model in models.items()}, {}
    n, config = MATRIX * (8 if device.startswith("cuda") else 1), next(iter(models.values())).config
    for what, build in others.items():
        try:
            other = build().to(device)
            learning = {name: p for name, p in other.named_parameters() if p.requires_grad}
            steps[what] = partial(level_of(learning, config, B, device).step, lambda idx, targets, other=other: (
                None, other(input_ids=idx, labels=targets, use_cache=False).loss))
        except ImportError as error:
            print(f"{what}: needs {error.name}")
    for dtype in {model.config.dtype for model in models.values()}:
        a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
        products[dtype] = lambda a=a, b=b: [a @ b for _ in range(10)]
    seconds = dict(zip((*steps, *products), timed(repeats, *steps.values(), *products.values()), strict=True))
    ideal = {what: step_operations(model.config, B) / (10 * 2 * n ** 3) * seconds[model.config.dtype]
             for what, model in models.items()}
    for what in steps:
        share = f", share of the matmul rate {quartiles(ideal[what] / seconds[what])}" if what in ideal else ""
        print(f"{what}: tokens/s {quartiles(B * config.block_size / seconds[what])}{share}")
    for one, other in itertools.combinations(steps, 2):
        if set(one.split(", ")) & set(other.split(", ")):
            print(f"{one} / {other}: {quartiles(seconds[other] / seconds[one])} times the tokens per second")


def dense_gpt2() -> nn.Module:
    """A GPT of the default shape that does the work of two experts without a mixture."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=257, n_positions=SHAPES["default"]["block_size"], n_inner=2 * 4 * SCRATCH["n_embd"],
        activation_function="gelu", bos_token_id=0, eos_token_id=0, **SCRATCH)).eval()  # without dropout


def peft_of(dtype: str) -> nn.Module:
    """What one would take instead: SmolLM2 with a single low-rank change of every matrix."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GgufConfig
    path = llama.File("smollm2", "init_from").path
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype),
                                                 quantization_config=GgufConfig(dequantize=True))
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).train()


def bench_scratch(device: str) -> None:
    """The default step, as a share of the matmul rate and over a dense one; a mixture over a dense block."""
    race("default", ("float32",), [1], {"dense, float32": dense_gpt2}, REPEATS, USUAL.batch_size, device)
    moe, C = MoE(GPTConfig(**SHAPES["default"], specialists=8)).to(device), SCRATCH["n_embd"]
    block = nn.Sequential(nn.Linear(C, 8 * C), nn.GELU(), nn.Linear(8 * C, C)).to(device)
    for N in (1024, 4096):
        x = torch.randn(1, N, C, device=device, requires_grad=True)
        ours, theirs = timed(
            REPEATS, lambda x=x: torch.autograd.grad(moe(x)[0], [x, *moe.parameters()], x.detach()),
            lambda x=x: torch.autograd.grad(block(x), [x, *block.parameters()], x.detach()))
        print(f"mixture of 9, top-2 / dense block of the same work, {N} tokens: {quartiles(ours / theirs)}")


def federation(name: str, kind: str, specialists: list[int], B: int, device: str) -> tuple[int, int, list[int], float]:
    """A round in which every user takes one step on each level. Returns how many parameters one base has, how many
    different ones the users have, how many numbers each of them adds, Adam's moments included, and this process's peak
    in GB: of a GPU's memory if it uses one, otherwise of the machine's."""
    models = models_of(name, kind, specialists, device)
    users = [User("", model, *(level_of(model.having(*roles), model.config, B, device)
                               for roles in ((GENERALIST, SPECIALIST), (ROUTER,)))) for model in models]
    server, numbers, added = Server(models[0].having(GENERALIST)), {}, []
    for user in users:
        federated_round(server, [user], Rhythm(1, 1, 1))
        states = [*user.lower.optimizer.state.values(), *user.upper.optimizer.state.values()]
        tensors = [*user.model.parameters(), *(tensor for state in states for tensor in state.values())]
        numbers |= {id(tensor): tensor.numel() for tensor in tensors if tensor.ndim}  # all but Adam's counts of steps
        added.append(sum(numbers.values()) - sum(added))
    one = sum({GPT.plain_name(name): p.numel() for name, p in models[0].having(BACKBONE).items()}.values())
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return one, sum({id(p): p.numel() for model in models for p in model.parameters()}.values()), added, peak / 1e9


def show_users(name: str, kind: str, specialists: list[int], B: int, device: str) -> None:
    """Prints what they hold. Before this process holds much: a new one counts that as its own peak, too."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        one, parameters, added, peak = pool.submit(federation, name, kind, specialists, B, device).result()
    print(f"{kind}, {len(added)} of {sorted(set(specialists))} specialists, batch {B}: {parameters:,} parameters, "
          f"{parameters / one:.3f} of one {name}; peak {peak:.3f} GB; the last adds {added[-1]:,} numbers")


def bench_gpt2(device: str) -> None:
    """What users hold, with block copies, too; a step in both dtypes, with block copies, and with 2 and 9 experts."""
    B, kinds = 64 if device.startswith("cuda") else 8, (*DTYPES, COPIES)
    for kind, specialists in (*itertools.product(kinds, ([1], [8])), ("bfloat16", [1, 2, 4, 8])):
        show_users("GPT-2", kind, specialists, B, device)
    for users in (4, 64):
        show_users("GPT-2", "bfloat16", [1] * users, 1, device)
    race("GPT-2", kinds, [1, 8], {}, STEPS, B, device)


def bench_smollm2(device: str) -> None:
    """What users hold; a step in both dtypes, with 2 and 9 experts, and with peft."""
    for B in (2, 4):
        show_users("SmolLM2", "bfloat16", [1, 2, 4, 8], B, device)
    race("SmolLM2", DTYPES, [1, 8], {f"peft, {dtype}": partial(peft_of, dtype) for dtype in DTYPES}, STEPS, 4, device)


def bench_sample(device: str) -> None:
    """Tokens per second after 500 tokens, with the cache of keys and values and without."""
    text = torch.zeros(1, 500, dtype=torch.long, device=device)
    for name, dtype in (("default", "float32"), ("GPT-2", "float32"), ("SmolLM2", "bfloat16")):
        [model] = models_of(name, dtype, [1], device, block_size=512)
        cached, anew = timed(12, *(partial(next, stream(model, text, 13, cache=cache)) for cache in (True, False)))
        print(f"{name}, {dtype}: tokens/s {quartiles(1 / cached)}; without the cache {quartiles(1 / anew)}; "
              f"{quartiles(anew / cached)} times as many")


def main() -> int:
    benches = {"scratch": bench_scratch, "gpt2": bench_gpt2, "smollm2": bench_smollm2, "sample": bench_sample}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=benches, default="scratch")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    print(f"{asked.device}, {torch.get_num_threads()} threads")
    torch.manual_seed(0)
    return run_command("lab.bench", lambda: benches[asked.what](asked.device), "nothing was written")


if __name__ == "__main__":
    raise SystemExit(main())
