"""A pretrained start: Hugging Face's GPT-2 is the oracle, experts change nothing at first, bad files are refused."""

import pickle

import pytest
import torch
from torch.nn import functional as F

import base
from model import BACKBONE, GPT, GPTConfig, gpt2_name

TINY = (11, 12, 2, 8)  # vocabulary, positions, layers, channels


def gpt2_tensors(V: int, T: int, L: int, C: int, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Random weights under GPT-2's names, large enough for every part to show."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * scale + name.endswith("ln_1.weight")
            for name, shape in base.shapes(V, T, L, C).items()}


@pytest.fixture
def file(tmp_path):
    torch.save(gpt2_tensors(*TINY), tmp_path / "tiny.bin")
    return tmp_path / "tiny.bin"


def naive_gpt2(tensors: dict[str, torch.Tensor], idx: torch.Tensor, L: int, H: int) -> torch.Tensor:
    """GPT-2 from its definition, one sequence (T,) -> logits (T, V)."""
    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x, name):
        return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    T = len(idx)
    x = tensors["wte.weight"][idx] + tensors["wpe.weight"][:T]
    for i in range(L):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        heads = []
        for q_h, k_h, v_h in zip(q.chunk(H, -1), k.chunk(H, -1), v.chunk(H, -1), strict=True):
            scores = (q_h @ k_h.T / q_h.shape[1] ** 0.5).masked_fill(torch.ones(T, T).triu(1) == 1, -torch.inf)
            heads.append(scores.softmax(-1) @ v_h)
        x = x + linear(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * u * (1 + ((2 / torch.pi) ** 0.5 * (u + 0.044715 * u ** 3)).tanh())
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ tensors["wte.weight"].T


EXPERTS = [dict(expert="lora"), dict(expert="lora", specialists=4, lora_rank=3), dict(expert="mlp", specialists=3),
           dict(expert="mlp", generalists=2, specialists=0, routed=False)]


@pytest.mark.parametrize("experts", EXPERTS)
def test_at_the_start_every_kind_of_model_is_the_base_to_rounding(experts, file):
    """Against a GPT-2 written out in this file, in float64."""
    model = GPT.from_pretrained(file, torch.Generator().manual_seed(1), n_head=2, **experts).double()
    tensors = {name: tensor.double() for name, tensor in torch.load(file, weights_only=True).items()}
    idx = torch.randint(11, (3, 12))
    expected = torch.stack([naive_gpt2(tensors, sequence, 2, 2) for sequence in idx])
    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("V", "T", "L", "C"), [(97, 40, 2, 128), (50257, 1024, 12, 768)])
def test_logits_are_hugging_faces_to_1e_4(V, T, L, C, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
    torch.manual_seed(0)
    oracle = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_layer=L, n_embd=C, n_head=C // 64)).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path / "pytorch_model.bin"  # with the prefix, and with the head
    torch.save(oracle.state_dict(), path)
    model = GPT.from_pretrained(path, expert="lora", block_size=32)
    path.unlink()  # half a gigabyte
    idx = torch.randint(V, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], oracle(idx).logits, rtol=0, atol=1e-4)


def test_a_prefix_or_safetensors_make_no_difference(file, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="optional; pip install safetensors")
    tensors = torch.load(file, weights_only=True)
    torch.save({f"transformer.{name}": tensor for name, tensor in tensors.items()} |
               {"transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12), "lm_head.weight": tensors["wte.weight"]},
               tmp_path / "prefixed.pt")
    safetensors.save_file(tensors, tmp_path / "tiny.safetensors")
    one, *others = (base.load(tmp_path / name, n_head=2) for name in ("tiny.bin", "prefixed.pt", "tiny.safetensors"))
    for other in others:
        assert one.config == other.config
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_fewer_positions_and_the_heads_are_as_asked(file):
    whole, part = (GPT.from_pretrained(file, n_head=4, block_size=size, expert="lora") for size in (12, 5))
    idx = torch.randint(11, (2, 5))
    torch.testing.assert_close(part(idx)[0], whole(idx)[0])
    assert len(part.positions.weight) == part.config.block_size == 5
    assert part.config.n_head == 4


def test_pack_and_load_are_inverse_and_carry_heads_gelu_and_tokenizer(file, tmp_path):
    """So that a base of our own is loaded without saying anything about it."""
    model = GPT.from_pretrained(file, n_head=4, gelu="none", specialists=0, routed=False)
    tensors = {gpt2_name(name): parameter for name, parameter in model.named_parameters()}
    torch.save(base.pack(tensors, 4, "none", "bytes"), tmp_path / "base.pt")
    loaded = base.load(tmp_path / "base.pt")
    assert loaded.tokenizer == "bytes"
    assert (loaded.config["n_head"], loaded.config["gelu"]) == (4, "none")
    idx = torch.randint(11, (2, 12))
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "base.pt", expert="lora")(idx)[0], model(idx)[0])
    with pytest.raises(ValueError, match="4 heads"):
        base.load(tmp_path / "base.pt", n_head=2)


@pytest.mark.parametrize("wrong", [dict(n_layer=1), dict(n_layer=3), dict(vocab_size=12), dict(n_embd=16)])
def test_what_the_file_decides_cant_be_overridden(wrong, file):
    with pytest.raises(ValueError, match="leave it out"):
        GPT.from_pretrained(file, n_head=2, **wrong)


def test_models_on_one_base_hold_its_frozen_tensors_once(file):
    start = base.load(file, n_head=2)
    models = [GPT(GPTConfig(**start.config, expert="lora", specialists=S), pretrained=start.tensors) for S in (1, 3)]
    one, two = (model.having(BACKBONE) for model in models)
    shared = {id(tensor) for tensor in start.tensors.values()}
    assert {id(p) for p in one.values()} == {id(p) for p in two.values()} == shared
    upcycled = GPT(GPTConfig(**start.config), pretrained=start.tensors)
    assert not {id(p) for p in upcycled.parameters()} & shared
    assert not {p.data_ptr() for p in upcycled.parameters()} & {p.data_ptr() for p in start.tensors.values()}


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def wrong_files(tmp_path):
    tensors = gpt2_tensors(*TINY)
    yield "missing.bin", None, "no such file"
    yield "missing.safetensors", None, "no such file"
    yield "folder.bin", "folder", "no such file"
    yield "empty.bin", b"", "can't be read"
    yield "text.bin", b"import os", "can't be read"
    yield "trap.bin", pickle.dumps({"wte.weight": Trap(tmp_path / "sprung")}), "can't be read"
    yield "trap.pt", {"wte.weight": Trap(tmp_path / "sprung")}, "can't be read"
    yield "list.pt", [1, 2], "holds no GPT-2"
    yield "number.pt", {"wte.weight": 1, "wpe.weight": 2}, "holds no GPT-2"
    yield "other.pt", {"layer.weight": torch.ones(2, 2)}, "holds no GPT-2"
    yield "part.pt", {name: t for name, t in tensors.items() if name != "h.1.ln_2.bias"}, "h.1.ln_2.bias"
    yield "more.pt", tensors | {"h.0.crossattention.weight": torch.ones(2)}, "h.0.crossattention.weight"
    yield "shape.pt", tensors | {"h.0.mlp.c_fc.weight": torch.ones(8, 31)}, "h.0.mlp.c_fc.weight"
    yield "untied.pt", tensors | {"lm_head.weight": torch.ones(11, 8)}, "lm_head.weight"
    yield "ours.pt", {"model": tensors, "config": {"n_head": 3, "gelu": "none"}, "tokenizer": "bytes"}, "heads"
    yield "nan.pt", tensors | {"wte.weight": torch.full((11, 8), torch.nan)}, "wte.weight is missing, not finite"
    yield "three.pt", tensors | {"lm_head.weight": 3}, "holds no GPT-2"
    for i, wrong in enumerate(({"n_head": "4"}, {"n_head": -4}, {"gelu": "foo"})):
        config = {"n_head": 4, "gelu": "none"} | wrong
        yield f"config{i}.pt", {"model": tensors, "config": config, "tokenizer": "bytes"}, "config is no|can't be"
    yield "tokenizer.pt", {"model": tensors, "config": {"n_head": 4, "gelu": "none"}, "tokenizer": 5}, "config is no"
    yield "tiny.pt", tensors, "n_head"  # 8 channels are no heads of 64


def test_files_that_are_no_gpt2_are_refused_in_one_line_and_no_code_in_them_runs(tmp_path):
    for name, content, message in wrong_files(tmp_path):
        path = tmp_path / name
        if content == "folder":
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message) as error:
            base.load(path)
        assert len(str(error.value).splitlines()) == 1
        assert name in str(error.value)
        assert ";" in str(error.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_cut_off_file_is_refused(share, file):
    whole = file.read_bytes()
    file.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(ValueError, match="can't be read"):
        base.load(file)


def test_names_are_downloaded_once_into_files_of_their_own(tmp_path, monkeypatch):
    """From an address on this disk."""
    for i, name in enumerate(("gpt2", "gpt2-medium")):
        torch.save(gpt2_tensors(11 + i, 12, 2, 64), tmp_path / f"{name}.bin")
    monkeypatch.setattr(base, "URL", f"file://{tmp_path}/{{}}.bin")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    for _ in range(2):  # the second time without the source
        assert [base.load(name).config["vocab_size"] for name in ("gpt2", "gpt2-medium")] == [11, 12]
        for path in tmp_path.glob("*.bin"):
            path.unlink()
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 2
    with pytest.raises(ValueError, match="gpt2-xl: can't be downloaded .*; connect once, or give a file"):
        base.load("gpt2-xl")
    broken = next((tmp_path / "cache").rglob("*medium*.bin"))
    broken.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="medium.*delete it"):
        base.load("gpt2-medium")


def test_the_loss_on_gpt2s_tensors_is_the_naive_ones(file):
    model = GPT.from_pretrained(file, n_head=2, expert="lora")
    idx, targets = torch.randint(11, (2, 1, 12))
    expected = F.cross_entropy(naive_gpt2(torch.load(file, weights_only=True), idx[0], 2, 2), targets[0])
    torch.testing.assert_close(model(idx, targets)[1], expected)
