"""A pretrained start: Hugging Face's GPT-2 is the oracle, experts change nothing at first, bad files are refused."""

import hashlib
import pickle
import re
from pathlib import Path

import pytest
import torch

import data
from conftest import run, same, state, words
from lab import pretrain
from model import GPT
from support.pretrained import gpt2 as pretrained


def gpt2_tensors(V: int = 11, T: int = 12, L: int = 2, C: int = 8) -> dict[str, torch.Tensor]:
    """Random weights under GPT-2's names."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in pretrained.layout(V, T, L, C).values()}


@pytest.mark.parametrize("experts", [
    dict(expert="lora"), dict(expert="lora", specialists=4, lora_rank=3), dict(expert="mlp", specialists=3),
    dict(expert="mlp", generalists=2, specialists=0, routed=False)])
def test_at_the_start_every_kind_of_model_is_the_base_to_rounding(experts):
    """Against Hugging Face's GPT-2 with gpt2's number of layers, all its numbers large enough to show, in float64."""
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
    torch.manual_seed(0)
    oracle = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=997, n_positions=40, n_layer=12, n_embd=128, n_head=2)).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save(oracle.state_dict(), "pytorch_model.bin")  # with a prefix, and with the head
    model, idx = GPT.from_pretrained("pytorch_model.bin", block_size=32, **experts), torch.randint(997, (2, 32))
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len([*model.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(model.double()(idx)[0], oracle.double()(idx).logits, rtol=0, atol=1e-10)


def test_a_prefix_or_safetensors_make_no_difference():
    safetensors = pytest.importorskip("safetensors.torch", reason="optional; pip install safetensors")
    tensors = gpt2_tensors()
    torch.save(tensors, "tiny.bin")
    torch.save({f"transformer.{name}": tensor for name, tensor in tensors.items()} | {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12), "lm_head.weight": tensors["wte.weight"]}, "tiny.pt")
    safetensors.save_file(tensors, "tiny.safetensors")
    one, *others = (pretrained.load(name, n_head=2) for name in ("tiny.bin", "tiny.pt", "tiny.safetensors"))
    assert all(same([one.config, one.tensors], [other.config, other.tensors]) for other in others)


def test_pack_and_load_are_inverse_and_carry_heads_feed_forward_and_tokenizer():
    """So that nothing need be said about a base of our own, and nothing else can be, but how many positions to use."""
    torch.save(gpt2_tensors(), "tiny.bin")
    model = GPT.from_pretrained("tiny.bin", n_head=4, feed_forward="gelu", specialists=0, routed=False)
    tensors = {GPT.plain_name(name): parameter for name, parameter in model.named_parameters()}
    torch.save(pretrained.pack(tensors, 4, "gelu", "bytes"), "base.pt")
    loaded = pretrained.load("base.pt")
    assert (loaded.tokenizer, loaded.config["n_head"], loaded.config["feed_forward"]) == ("bytes", 4, "gelu")
    for T in (12, 5):
        again, idx = GPT.from_pretrained("base.pt", expert="lora", block_size=T), torch.randint(11, (2, T))
        assert len(again.positions.weight) == again.config.block_size == T
        torch.testing.assert_close(again(idx)[0], model(idx)[0])
    for wrong in ("n_layer", "vocab_size", "n_embd", "n_head"):
        with pytest.raises(ValueError, match=f"leave `{wrong}` out"):
            GPT.from_pretrained("base.pt", **{wrong: 1})


class Trap:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return open, ("sprung", "w")


def wrong_files():
    """Name, content and what is said of it."""
    tensors, config = gpt2_tensors(), {"n_head": 4, "feed_forward": "gelu"}
    yield "missing.safetensors", None, "no such file"
    yield "empty.bin", b"", "can't be read"
    yield "text.safetensors", b"import os", "can't be read|needs a library"
    yield "trap.bin", pickle.dumps({"wte.weight": Trap()}, 2), "can't be read"
    yield "trap.pt", {"wte.weight": Trap()}, "can't be read"
    yield "other.pt", {"layer.weight": torch.ones(2, 2)}, "holds no GPT-2"
    yield "part.pt", {name: t for name, t in tensors.items() if name != "h.1.ln_2.bias"}, "h.1.ln_2.bias"
    yield "more.pt", tensors | {"h.0.crossattention.weight": torch.ones(2)}, "h.0.crossattention.weight"
    yield "shape.pt", tensors | {"h.0.mlp.c_fc.weight": torch.ones(8, 31)}, "h.0.mlp.c_fc.weight"
    yield "untied.pt", tensors | {"lm_head.weight": torch.ones(11, 8)}, "lm_head.weight"
    yield "nan.pt", tensors | {"wte.weight": torch.full((11, 8), torch.nan)}, "wte.weight is missing, not finite"
    yield "three.pt", tensors | {"lm_head.weight": 3}, "holds no GPT-2"
    ours = {"model": tensors, "config": config, "tokenizer": "bytes"}
    for i, wrong in enumerate(({"n_head": 3}, {"n_head": "4"}, {"n_head": -4}, {"feed_forward": "foo"})):
        yield f"config{i}.pt", ours | {"config": config | wrong}, "config is no|can't be"
    yield "tokenizer.pt", ours | {"tokenizer": 5}, "config is no"
    yield "tiny.pt", tensors, "8 channels can't be heads of 64"
    for size in (1000, -2000, -10):
        yield f"cut{size}.pt", Path("tiny.pt").read_bytes()[:size], "can't be read"


def test_files_that_are_no_gpt2_are_refused_in_one_line_and_no_code_in_them_runs():
    for name, content, message in wrong_files():
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        elif content is not None:
            torch.save(content, name)
        with pytest.raises(ValueError, match=rf"\A`init_from` {name}: .*({message}).*; [a-z].*\Z"):
            pretrained.load(name)
    assert not Path("sprung").exists()


def test_names_are_downloaded_once_into_files_of_their_own(monkeypatch):
    """From an address on this disk."""
    monkeypatch.setattr(pretrained, "URL", f"file://{Path().resolve()}/{{}}.bin")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "cache")
    for i, name in enumerate(("gpt2", "gpt2-medium")):
        torch.save(gpt2_tensors(V=11 + i, C=64), f"{name}.bin")
    for _ in range(2):  # the second time without the source
        assert [pretrained.load(name).config["vocab_size"] for name in ("gpt2", "gpt2-medium")] == [11, 12]
        for path in Path().glob("*.bin"):
            path.unlink()
    with pytest.raises(ValueError, match="gpt2-xl: can't be downloaded .*; .*give a"):
        pretrained.load("gpt2-xl")
    next(Path("cache").rglob("*medium*.bin")).write_bytes(b"<html>")
    with pytest.raises(ValueError, match="medium.*delete it"):
        pretrained.load("gpt2-medium")


@pytest.fixture
def pretraining(monkeypatch):
    """Makes a base from made-up documents, of which every other one is like the users'. Gives the exit status."""
    letters = str.maketrans("0123456789", "abcdefghij")
    monkeypatch.setattr(data.sources, "pretraining_documents", lambda: (
        words(i, 2500).translate(letters if i % 2 else {}) for i in range(36)))
    flags = "--steps 60 --n-layer 2 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --lr 1e-2 --out base"
    return lambda more="": pretrain.main(f"{flags} {more}".split())


def test_the_whole_path_offline(pretraining, corpus, capsys):
    """lab/pretrain.py, then train.py with low-rank experts: starts better than random, learns, sends only factors."""
    assert pretraining() == 0
    assert 2 < float(re.fullmatch("base/base.pt: (.*) bits per byte .*\n", capsys.readouterr().out)[1]) < 5
    result, saved = run("--init-from base/base.pt --lora-rank 2 --lr 1e-2", lora=True), state()
    V, T, L, C, attention, expert = 257, 8, 2, 16, 6 * 16 * 2, 10 * 16 * 2
    backbone = (V + T) * C + 2 * C + L * (12 * C * C + 13 * C)
    for user, own, specialists in zip(result["users"], saved["users"], (0, 1, 3), strict=True):
        assert user["parameters"] == {
            "backbone": backbone, "generalist": L * (attention + expert), "specialist": specialists * L * expert,
            "router": L * C * (1 + specialists)}
        assert user["test_ppl"] < user["test_ppl_start"] < 200
        assert sum(map(torch.numel, own["parameters"].values())) == sum(user["parameters"].values()) - backbone
    assert result["bytes_up"] == 3 * 3 * 4 * L * (attention + expert)
    sha256 = hashlib.sha256(Path("base/base.pt").read_bytes()).hexdigest()
    assert saved["base"] == {"name": "base/base.pt", "sha256": sha256, "tokenizer": "bytes"}


@pytest.mark.parametrize(("wrong", "message"), [
    ("--lr 1e9 --warmup 0", "--lr 1000000000.0: the loss has grown to .*; take a smaller one"),
    ("--n-embd 9", "--n-embd 9: not divisible"), ("--users 4", "--users 4: not known"), ("--device x", "--device x: "),
    ("--block-size 20000", "--block-size 20000: .*too few"), ("--out old/base.pt", "--out old/base.pt: "),
    ("--out old", "--out old: .*--overwrite")])
def test_a_base_that_cant_be_made_is_one_line_and_none_is_written(wrong, message, pretraining, capsys):
    Path("old").mkdir()
    Path("old/base.pt").write_text("a base")
    assert pretraining(wrong) == 2
    assert re.match(f"lab.pretrain: {message}", capsys.readouterr().err.splitlines()[-1])
    assert [path.read_text() for path in Path().rglob("*.*")] == ["a base"]
