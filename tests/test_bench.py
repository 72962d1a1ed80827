"""The bench: it counts what a step needs, and it runs."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from bilevel import Level, constant
from model import GENERALIST, GPT, SPECIALIST, GPTConfig


@pytest.mark.parametrize("specialists", [1, 4])
def test_operations_counted_are_those_that_a_step_does(specialists):
    """Against PyTorch's own counter, with windows of one token: it counts attention as if it weren't causal."""
    config = GPTConfig(257, 1, 2, 2, 64, specialists=specialists)
    model = GPT(config)
    batch = torch.randint(257, (2, 64, 1)).unbind()
    level = Level(model.having(GENERALIST, SPECIALIST), itertools.repeat(batch), 1e-3, 0.0, constant)
    with FlopCounterMode(display=False) as counter:
        level.step(model)
    assert bench.step_operations(config, 64, 1) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_bench_prints_its_three_ratios(monkeypatch, capsys):
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr("sys.argv", ["bench.py"])
    bench.main()
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("share of the matmul rate", "plain dense step", "top-2 / dense block"))
