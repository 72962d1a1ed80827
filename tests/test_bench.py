"""The bench: it counts the operations of a step, alternates what it times, and prints its lines."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lab import bench
from model import GPT, GPTConfig
from tiny import seeded, tiny


@pytest.mark.parametrize("specialists", [1, 4])
def test_the_operations_of_a_step_are_those_that_pytorch_counts(specialists):
    """With windows of one token, because PyTorch counts attention as if it weren't causal."""
    config = GPTConfig(vocab_size=257, block_size=1, n_embd=64, specialists=specialists)
    step = bench.expert_step(GPT(config, seeded(0)), batch_size=64)

    def addmm(total_shape, a_shape, b_shape, **options):
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        step()
    expected = pytest.approx(counter.get_total_flops(), rel=0.01)
    assert bench.step_operations(config, batch_size=64) == expected


def test_timed_works_alternate_and_run_once_before():
    calls = []
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = bench.timings(works, repeats=3)
    assert calls == ["a", "b"] * 4
    assert len(seconds["a"]) == len(seconds["b"]) == 3


def test_the_default_bench_prints_its_lines(monkeypatch, capsys):
    monkeypatch.setattr(bench, "MATRIX", 64)
    monkeypatch.setattr(bench, "DEFAULT", GPTConfig(vocab_size=257, n_layer=1, n_embd=8))
    assert bench.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "matmul rate, GFLOP/s",
        "step, ms",
        "step, share of the matmul rate",
    ]


def test_the_smollm2_bench_prints_rates_and_ratios(monkeypatch, capsys):
    def tiny_step(*_, **__):
        return bench.expert_step(tiny(expert="lora"), batch_size=2)

    monkeypatch.setattr(bench, "our_step", tiny_step)
    monkeypatch.setattr(bench, "peft_step", tiny_step)
    assert bench.main(["smollm2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("tokens/s" in line for line in lines) == 6
    assert sum("times the tokens per second" in line for line in lines) == 5
