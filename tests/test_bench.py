"""The bench: it counts what a step needs, and it runs."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from bilevel import Level, constant
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig, MoE

TINY = dict(vocab_size=257, n_layer=2, n_head=2, n_embd=64, gelu="tanh")


@pytest.mark.parametrize("expert", ["mlp", "lora"])
@pytest.mark.parametrize("specialists", [1, 4])
def test_operations_needed_are_nearly_those_that_a_step_does(specialists, expert):
    """Against PyTorch's own counter, with windows of one token: it counts attention as if it weren't causal. And at
    rank 1: what is done beyond the needs, for factors of experts that a token didn't choose, grows with the rank."""
    config = GPTConfig(**TINY, block_size=1, specialists=specialists, expert=expert, lora_rank=1)
    model = GPT(config)
    batch = torch.randint(257, (2, 64, 1)).unbind()
    level = Level(model.having(GENERALIST, SPECIALIST), itertools.repeat(batch), 1e-3, 0.0, constant)
    def in_place(_, a, b, **more):  # PyTorch's counter knows addmm, not addmm_
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        level.step(model)
    assert bench.step_operations(config, 64, 1) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("specialists", [1, 4])
def test_the_naive_mixture_computes_the_same_as_ours(specialists):
    config = GPTConfig(**TINY, block_size=8, specialists=specialists, expert="lora")
    ours, naive = MoE(config).double(), bench.NaiveMixture(64, 1 + specialists, 2).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.2)
        naive.router.weight.copy_(ours.router.scores.weight)
        for expert, change in zip(naive.experts, ours.experts.changes, strict=True):
            for part in ("up", "down"):
                theirs, block, factors = (getattr(one, part) for one in (expert, ours.experts.block, change))
                theirs.load_state_dict(block.state_dict() | factors.state_dict())
    x = torch.randn(2, 8, 64, dtype=torch.float64)
    torch.testing.assert_close(naive(x), ours(x)[0], rtol=1e-10, atol=1e-10)


def test_what_users_hold_grows_by_their_own_factors_and_moments_only():
    config = GPTConfig(**TINY, block_size=8, expert="lora")
    users = 5
    parameters, held, _ = bench.federation(config, [1] * users, 2, "cpu")
    own = sum(p.numel() for p in GPT(config).having(GENERALIST, SPECIALIST, ROUTER).values())
    backbone = sum(p.numel() for p in GPT(config).having(BACKBONE).values())
    assert parameters == backbone + users * own
    assert held == [backbone + 3 * own * n for n in range(1, users + 1)]


def test_the_gpt2_bench_prints_both_sides(monkeypatch, capsys):
    """At a tiny size, in this process."""
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "alone", lambda work, *arguments: work(*arguments))
    bench.bench_gpt2("cpu", TINY | dict(block_size=8, expert="lora"))
    printed = capsys.readouterr().out
    for line in ("2 experts, ours / naive", "9 experts, ours / naive", "of one GPT-2", "the 64th holds"):
        assert line in printed


def test_the_bench_from_scratch_prints_its_three_ratios(monkeypatch, capsys):
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr("sys.argv", ["bench.py"])
    bench.main()
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("share of the matmul rate", "plain dense step", "top-2 / dense block"))


def test_the_bench_of_sampling_prints_three_rates(capsys):
    bench.bench_sample("cpu", {"tiny": TINY | {"block_size": 32}}, length=24, tokens=2)
    assert "tiny: " in (printed := capsys.readouterr().out)
    assert all(part in printed for part in ("at position 5", "at 24", "without the cache"))
