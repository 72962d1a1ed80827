"""The bench: it counts what a step needs, its yardstick is right, and it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lab import bench
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig
from tiny import seeded, tiny

SHAPE = dict(vocab_size=257, n_layer=2, n_head=2, n_embd=64, gelu="tanh")


@pytest.mark.parametrize("expert", ["mlp", "lora"])
@pytest.mark.parametrize("specialists", [1, 4])
def test_operations_needed_are_nearly_those_that_a_step_does(specialists, expert):
    """Against PyTorch's own counter, with windows of one token: it counts attention as if it weren't causal. And at
    rank 1: what is done beyond the needs, for factors of experts that a token didn't choose, grows with the rank."""
    config = GPTConfig(**SHAPE, block_size=1, specialists=specialists, expert=expert, lora_rank=1)
    step = bench.expert_step(GPT(config), 64, "cpu")
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}  # it knows addmm only
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    assert bench.step_operations(config, 64) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("specialists", [1, 4])
def test_block_copies_compute_the_same_as_low_rank_experts_gradients_included(specialists, fast):
    moe = tiny(specialists=specialists, expert="lora", lora_rank=4, gelu="tanh", fast=fast).blocks[0].moe
    copies, x = bench.BlockCopies(moe.experts), torch.randn(12, 8, dtype=torch.float64, generator=seeded(1))
    learning = [x.requires_grad_(), moe.router.scores.weight, *moe.experts.changes.parameters()]
    ours, theirs = (experts(x, moe.router(x)) for experts in (moe.experts, copies))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(y.square().sum(), learning) for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_what_users_hold_grows_by_their_own_factors_and_moments_only():
    model = GPT(GPTConfig(**SHAPE, block_size=8, expert="lora"))
    own, backbone = (sum(p.numel() for p in model.having(*roles).values())
                     for roles in ((GENERALIST, SPECIALIST, ROUTER), (BACKBONE,)))
    parameters, held, _ = bench.federation(model.config, [1] * 5, 2, "cpu")
    assert (parameters, held) == (backbone + 5 * own, [backbone + 3 * own * n for n in range(1, 6)])


@pytest.mark.parametrize(("what", "lines"), [("scratch", 4), ("kernels", 4), ("gpt2", 12), ("sample", 2)])
def test_every_bench_prints_its_lines(what, lines, monkeypatch, capsys):
    """GPT-2 at a tiny size, in this process."""
    for name, value in dict(REPEATS=2, STEPS=2, MATRIX=64, GPT2=SHAPE | dict(block_size=8, expert="lora"),
                            alone=lambda work, *arguments: work(*arguments)).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr("sys.argv", ["bench", what])
    bench.main()
    assert len(capsys.readouterr().out.splitlines()) == 1 + lines
