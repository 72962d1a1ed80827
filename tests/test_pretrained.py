"""GPT-2's weights and lab/pretrain.py. Hugging Face's GPT-2 is the oracle."""

import hashlib
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import data
from conftest import run, state, words
from lab import pretrain
from model import GPT
from support.pretrained import gpt2
from support.pretrained.base import load


def gpt2_tensors(V: int = 11, T: int = 12, L: int = 2, C: int = 8) -> dict[str, Tensor]:
    """Random weights under GPT-2's names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for shapes in gpt2.sources_of(V, T, L, C).values():
        for name, shape in shapes.items():
            tensors[name] = gpt2.transposed(name, torch.randn(shape, generator=generator))
    return tensors


@pytest.mark.parametrize(
    "fields",
    [
        dict(expert="lora"),
        dict(expert="lora", specialists=4, lora_rank=3),
        dict(expert="mlp", specialists=3),
        dict(expert="mlp", generalists=2, specialists=0, routed=False),
    ],
)
def test_at_the_start_every_kind_of_model_equals_hugging_faces_gpt2(fields):
    """With GPT-2's number of layers, in float64, and weights large enough for all parts to show."""
    reason = "the oracle; pip install -r requirements-dev.txt"
    transformers = pytest.importorskip("transformers", reason=reason)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=997, n_positions=40, n_layer=12, n_embd=128, n_head=2
    )
    oracle = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save(oracle.state_dict(), "pytorch_model.bin")  # with a prefix, and with the head

    model = GPT.from_pretrained("pytorch_model.bin", block_size=32, **fields)
    idx = torch.randint(997, (2, 32))
    with torch.no_grad():
        logits, _ = model.double()(idx)
        torch.testing.assert_close(logits, oracle.double()(idx).logits, rtol=0, atol=1e-10)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(addresses) == len(list(model.parameters()))  # experts are copies


def test_a_prefix_or_safetensors_make_no_difference():
    reason = "optional; pip install safetensors"
    safetensors = pytest.importorskip("safetensors.torch", reason=reason)
    tensors = gpt2_tensors()
    torch.save(tensors, "tiny.bin")
    safetensors.save_file(tensors, "tiny.safetensors")
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    prefixed["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    prefixed["lm_head.weight"] = tensors["wte.weight"]
    torch.save(prefixed, "tiny.pt")
    expected = load("tiny.bin", n_head=2)
    for name in ("tiny.pt", "tiny.safetensors"):
        base = load(name, n_head=2)
        assert base.config == expected.config
        assert base.tensors.keys() == expected.tensors.keys()
        for key, tensor in base.tensors.items():
            assert torch.equal(tensor, expected.tensors[key])


def write_packed(**changes) -> dict:
    """Writes base.pt, as `pack` does, with other values for some of its keys."""
    config = {"n_head": 4, "feed_forward": "gelu"}
    packed = {"model": gpt2_tensors(), "config": config, "tokenizer": "bytes"}
    torch.save(packed | changes, "base.pt")
    return packed


def test_load_and_pack_are_inverse():
    packed = write_packed()
    base = load("base.pt")
    assert base.tokenizer == "bytes"
    assert base.config["n_head"] == 4
    assert base.config["feed_forward"] == "gelu"
    model = GPT.from_pretrained("base.pt", specialists=0, routed=False)
    again = gpt2.pack(model, "bytes")
    assert again.keys() == packed.keys()
    assert again["config"] == packed["config"]
    for name, tensor in packed["model"].items():
        torch.testing.assert_close(again["model"][name], tensor, rtol=0, atol=0)


def test_a_model_may_use_the_first_positions_only():
    write_packed()
    whole = GPT.from_pretrained("base.pt", specialists=0, routed=False)
    short = GPT.from_pretrained("base.pt", specialists=0, routed=False, block_size=5)
    assert len(short.position_embedding.weight) == short.config.block_size == 5
    idx = torch.randint(11, (2, 5))
    torch.testing.assert_close(short(idx)[0], whole(idx)[0])


@pytest.mark.parametrize("field", ["n_layer", "vocab_size", "n_embd", "n_head", "feed_forward"])
def test_fields_that_the_file_decides_must_agree_with_it(field):
    write_packed()
    message = f"`init_from` base.pt: has {field} .*; leave `{field}` out"
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained("base.pt", **{field: 1})


def refused(problem: str, name: str = "base.pt") -> None:
    with pytest.raises(ValueError, match=rf"\A`init_from` {name}: .*{problem}.*; [a-z].*\Z"):
        load(name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"h.1.ln_2.bias": None}, "h.1.ln_2.bias is not a tensor"),
        ({"h.0.crossattention.weight": torch.ones(2)}, "h.0.crossattention.weight' is unexpected"),
        ({"h.0.mlp.c_fc.weight": torch.ones(8, 31)}, r"has the shape \[31, 8\], not \[32, 8\]"),
        ({"h.2.ln_1.weight": torch.ones(8)}, "h.2.ln_1.bias is missing"),
        ({"lm_head.weight": torch.ones(11, 8)}, "lm_head.weight differs"),
        ({"wte.weight": torch.full((11, 8), torch.nan)}, "wte.weight holds numbers that"),
        ({"wte.weight": torch.ones(8)}, "wte.weight is missing or not a matrix"),
    ],
)
def test_wrong_tensors_are_refused(changes, problem):
    write_packed(model=gpt2_tensors() | changes)
    refused(problem)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"n_head": 3}, "8 channels can't be split into 3 heads"),
        ({"n_head": -4}, "8 channels can't be split into -4 heads"),
        ({}, "8 channels can't be split into 0 heads"),
    ],
)
def test_wrong_heads_are_refused(config, problem):
    write_packed(config=config)
    refused(problem)


class Trap:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return open, ("sprung", "w")


def test_unreadable_files_are_refused_and_no_code_in_them_runs():
    refused("no such file", "missing.safetensors")
    Path("empty.bin").touch()
    refused("can't be read", "empty.bin")
    Path("text.safetensors").write_text("import os")
    refused("can't be read|needs a package", "text.safetensors")
    write_packed()
    Path("cut.pt").write_bytes(Path("base.pt").read_bytes()[:-2000])
    refused("can't be read", "cut.pt")
    torch.save([torch.ones(2)], "list.pt")
    refused("not a GPT-2", "list.pt")
    Path("trap.bin").write_bytes(pickle.dumps({"wte.weight": Trap()}, 2))
    refused("can't be read", "trap.bin")
    torch.save({"wte.weight": Trap()}, "trap.pt")
    refused("can't be read", "trap.pt")
    assert not Path("sprung").exists()


def test_names_are_downloaded_once_into_files_of_their_own(monkeypatch):
    """From an address on this disk."""
    monkeypatch.setattr(gpt2, "URL", f"file://{Path().resolve()}/{{}}.bin")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "cache")
    torch.save(gpt2_tensors(V=11, C=64), "gpt2.bin")
    torch.save(gpt2_tensors(V=12, C=64), "gpt2-medium.bin")
    for _ in range(2):  # the second time without the source
        assert load("gpt2").config["vocab_size"] == 11
        assert load("gpt2-medium").config["vocab_size"] == 12
        Path("gpt2.bin").unlink(missing_ok=True)
        Path("gpt2-medium.bin").unlink(missing_ok=True)
    refused("can't be downloaded", "gpt2-xl")
    cached = Path("cache/checkpoints/gpt2-medium-pytorch_model.bin")
    cached.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=f"{cached}: can't be read .*; delete it"):
        load("gpt2-medium")


# --- lab/pretrain.py


@pytest.fixture
def pretraining(monkeypatch):
    """Pretrains a base on made-up text, half of it like the users'. Returns the exit status."""
    letters = str.maketrans("0123456789", "abcdefghij")
    documents = []
    for i in range(36):
        text = words(i, 2500)
        documents.append(text.translate(letters) if i % 2 else text)
    monkeypatch.setattr(data.sources, "pretraining_documents", lambda: iter(documents))

    def command(more: str = "") -> int:
        flags = (
            "--steps 60 --n-layer 2 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 "
            "--lr 1e-2 --out base"
        )
        return pretrain.main(f"{flags} {more}".split())

    return command


def test_a_run_on_a_pretrained_base_learns_and_uploads_only_factors(pretraining, corpus, capsys):
    assert pretraining() == 0
    printed = re.fullmatch("base/base.pt: (.*) bits per byte .*\n", capsys.readouterr().out)
    assert 2 < float(printed[1]) < 5

    result = run("--init-from base/base.pt --lora-rank 2 --lr 1e-2", lora=True)
    saved = state()
    V, T, L, C, r = 257, 8, 2, 16, 2
    attention = (C + 3 * C) * r + (C + C) * r  # factors of qkv_proj and out_proj
    expert = 2 * (C + 4 * C) * r  # factors of up_proj and down_proj
    backbone = (V + T) * C + 2 * C + L * (12 * C * C + 13 * C)
    for user, kept, S in zip(result["users"], saved["users"], (0, 1, 3), strict=True):
        assert user["parameters"] == {
            "backbone": backbone,
            "generalist": L * (attention + expert),
            "specialist": S * L * expert,
            "router": L * C * (1 + S),
        }
        assert user["test_ppl"] < user["test_ppl_start"] < 200
        n_saved = sum(tensor.numel() for tensor in kept["parameters"].values())
        assert n_saved == sum(user["parameters"].values()) - backbone
    users, rounds, bytes_per_number = 3, 3, 4
    assert result["bytes_up"] == users * rounds * bytes_per_number * L * (attention + expert)
    sha256 = hashlib.sha256(Path("base/base.pt").read_bytes()).hexdigest()
    assert saved["base"] == {"name": "base/base.pt", "sha256": sha256, "tokenizer": "bytes"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 1e9 --warmup 0", "--lr 1000000000.0: the loss grew to .*; pass a smaller value"),
        ("--n-embd 9", "--n-embd 9: not divisible"),
        ("--users 4", "--users 4: "),
        ("--device x", "--device x: "),
        ("--block-size 20000", "--block-size 20000: .*too few"),
        ("--out old/base.pt", "--out old/base.pt: "),
        ("--out old", "--out old: .*--overwrite"),
    ],
)
def test_pretraining_that_fails_is_one_line_and_writes_nothing(flags, message, pretraining, capsys):
    Path("old").mkdir()
    Path("old/base.pt").write_text("a base")
    assert pretraining(flags) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"lab.pretrain: {message}", last_line)
    assert list(Path().rglob("*.*")) == [Path("old/base.pt")]
    assert Path("old/base.pt").read_text() == "a base"
