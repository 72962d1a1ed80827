"""The bench: it counts what a step needs, its yardstick is right, and it runs."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lab import bench
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig
from support.pretrained.base import Base
from tiny import seeded, tiny

GPT2 = dict(vocab_size=257, n_layer=2, n_head=4, n_embd=64, feed_forward="gelu-tanh")
LLAMA = GPT2 | dict(n_kv_head=2, n_hidden=96, feed_forward="swiglu", norm="rms", rotary_base=1e4, bias=False,
                    tied=False)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """All sizes are tiny, and processes of their own are threads."""
    shapes = {name: shape | dict(block_size=8, expert="lora") for name, shape in (("GPT-2", GPT2), ("SmolLM2", LLAMA))}
    monkeypatch.setattr(bench, "SHAPES", bench.SHAPES | shapes)
    monkeypatch.setattr(bench.pretrained, "load", lambda *_, **__: Base("", "", {}, {}, None))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))
    for name, value in dict(REPEATS=2, STEPS=2, MATRIX=64).items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("name", ["GPT-2", "SmolLM2"])
@pytest.mark.parametrize("expert", ["mlp", "lora"])
@pytest.mark.parametrize("specialists", [1, 4])
def test_operations_needed_are_those_that_a_step_does(specialists, expert, name):
    """Against PyTorch's own counter, with windows of one token: it counts attention as if it weren't causal. And with
    block copies, which do nothing for an expert that a token didn't choose, but repeat what is frozen for each of k."""
    kind = bench.COPIES if expert == "lora" else "float32"
    [model] = bench.models_of(name, kind, [specialists], "cpu", block_size=1, expert=expert)
    step = bench.expert_step(model, 64, "cpu")
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}  # it knows addmm only
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    frozen = sum(matrix.weight.numel() for block in model.blocks for matrix in block.moe.experts[0].children())
    repeated = 2 * 2 * 64 * (model.config.top_k - 1) * frozen if expert == "lora" else 0  # forward and backward
    assert bench.step_operations(model.config, 64) + repeated == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("feed_forward", ["gelu-tanh", "swiglu"])
@pytest.mark.parametrize("specialists", [1, 4])
def test_block_copies_compute_the_same_as_low_rank_experts_gradients_included(specialists, feed_forward):
    moe = tiny(specialists=specialists, expert="lora", lora_rank=4, feed_forward=feed_forward).blocks[0].moe
    copies, x = bench.BlockCopies(moe.experts), torch.randn(12, 8, dtype=torch.float64, generator=seeded(1))
    changes = ([matrix.changes[e] for e in range(moe.experts.E) for matrix in moe.experts.block.children()],
               [matrix.changes[0] for block in copies for matrix in block.children()])
    results = []
    for experts, change in zip((moe.experts, copies), map(nn.ModuleList, changes), strict=True):
        y = experts(x.requires_grad_(), moe.router(x))
        learning = [x, moe.router.scores.weight, *change.parameters()]
        results.append((y, *torch.autograd.grad(y.square().sum(), learning)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_what_users_hold_grows_by_their_own_factors_and_moments_only():
    model = GPT(GPTConfig(**bench.SHAPES["GPT-2"]))
    own, backbone = (sum(p.numel() for p in model.having(*roles).values())
                     for roles in ((GENERALIST, SPECIALIST, ROUTER), (BACKBONE,)))
    one, parameters, added, _ = bench.federation("GPT-2", "float32", [1] * 5, 2, "cpu")
    assert (one, parameters, added) == (backbone, backbone + 5 * own, [backbone + 3 * own, *[3 * own] * 4])
    assert bench.federation("GPT-2", bench.COPIES, [1], 2, "cpu")[0] == backbone


class Theirs(nn.Linear):
    """As a model of transformers, to the bench."""

    def forward(self, input_ids, labels, use_cache):
        return SimpleNamespace(loss=super().forward(input_ids.float()).sum())


def absent(*_):
    raise ModuleNotFoundError(name="peft")


@pytest.mark.parametrize(("what", "theirs", "lines"), [
    ("scratch", lambda: Theirs(64, 1), 5), ("scratch", absent, 4), ("gpt2", None, 24),
    ("smollm2", lambda dtype: Theirs(8, 1), 17), ("smollm2", absent, 12), ("sample", None, 3)])
def test_every_bench_prints_its_lines(what, theirs, lines, monkeypatch, capsys):
    monkeypatch.setattr(bench, "dense_gpt2", theirs)
    monkeypatch.setattr(bench, "peft_of", theirs)
    monkeypatch.setattr("sys.argv", ["bench", what])
    assert bench.main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + lines
    assert any("needs peft" in line for line in printed) == (theirs is absent)
