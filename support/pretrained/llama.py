"""A Llama's weights from a .gguf file: SmolLM2, Llama 3 and their relatives.

Rows of queries and keys are in llama.cpp's order: the two channels of a pair that a rotary position
embedding rotates are neighbours, as in model.apply_rope.
"""

from support.pretrained.gguf_file import GGUFFile
from support.pretrained.gguf_tokenizer import build_tokenizer

ROPE_FACTORS = "rope_freqs.weight"


class LlamaFile(GGUFFile):
    """An opened .gguf file of a Llama. Raises BadInput.

    config: fields of model.GPTConfig
    sources: see `sources_of`
    tokenizer: its name for data.tokenizer
    encoding: the tokenizer itself
    """

    def __init__(self, name: str):
        super().__init__(name, flag="init_from")
        self.config = self.shape()
        self.sources = sources_of(self.config)
        self.encoding = build_tokenizer(self)
        self.tokenizer = name

    def number(self, key: str, kind: type = int) -> int | float:
        """A positive number of the metadata."""
        value = self.fields.get(f"llama.{key}")
        if type(value) is not kind or value <= 0:
            raise self.bad(f"llama.{key} is {value!r}")
        return value

    def shape(self) -> dict:
        """Fields of model.GPTConfig."""
        C = self.number("embedding_length")
        H = self.number("attention.head_count")
        K = self.number("attention.head_count_kv")
        if C % (2 * H) != 0:
            raise self.bad(f"{C} channels can't be split into {H} heads of pairs")
        if H % K != 0:
            raise self.bad(f"{H} query heads can't share {K} key/value heads")
        D = C // H
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
            if self.fields.get(f"llama.{key}", D) != D:
                raise self.bad(f"llama.{key} is {self.fields[f'llama.{key}']!r}, not {D}")
        for key, value in self.fields.items():
            if key.startswith("llama.rope.scal") and value != "none":
                raise self.bad(f"{key} is {value!r}: this scaling of positions is unknown")
        if "token_embd.weight" not in self.tensors:
            raise self.bad("token_embd.weight is missing")
        return {
            "vocab_size": len(self.tensors["token_embd.weight"].data),
            "block_size": self.number("context_length"),
            "n_layer": sum(name.endswith("attn_norm.weight") for name in self.tensors),
            "n_head": H,
            "n_embd": C,
            "n_kv_head": K,
            "n_hidden": self.number("feed_forward_length"),
            "feed_forward": "swiglu",
            "norm": "rms",
            "norm_eps": self.number("attention.layer_norm_rms_epsilon", float),
            "rotary_base": self.number("rope.freq_base", float),
            "rotary_factors": self.rotary_factors(D // 2),
            "bias": False,
            "tied": "output.weight" not in self.tensors,
        }

    def rotary_factors(self, n_pairs: int) -> list[float] | None:
        """Llama 3's divisors of the rotary frequencies, one for each pair of channels, if any."""
        if ROPE_FACTORS not in self.tensors:
            return None
        factors = self.read(ROPE_FACTORS)
        del self.tensors[ROPE_FACTORS]  # not a parameter of the model
        if factors.shape != (n_pairs,) or not (factors > 0).all():
            raise self.bad(f"{ROPE_FACTORS} doesn't hold {n_pairs} positive factors")
        return factors.tolist()


def sources_of(config: dict) -> dict[str, dict[str, tuple]]:
    """Our parameter's name -> {the file's name: shape}. Several tensors are stacked."""
    V, C, n_hidden = config["vocab_size"], config["n_embd"], config["n_hidden"]
    n_kv = config["n_kv_head"] * C // config["n_head"]  # channels of all key heads
    layer = {
        "attention_norm": {"attn_norm": (C,)},
        "attention.qkv_proj": {"attn_q": (C, C), "attn_k": (n_kv, C), "attn_v": (n_kv, C)},
        "attention.out_proj": {"attn_output": (C, C)},
        "moe_norm": {"ffn_norm": (C,)},
        "moe.gate_proj": {"ffn_gate": (n_hidden, C)},
        "moe.up_proj": {"ffn_up": (n_hidden, C)},
        "moe.down_proj": {"ffn_down": (C, n_hidden)},
    }
    sources = {
        "token_embedding.weight": {"token_embd.weight": (V, C)},
        "norm.weight": {"output_norm.weight": (C,)},
    }
    if not config["tied"]:
        sources["lm_head.weight"] = {"output.weight": (V, C)}
    for i in range(config["n_layer"]):
        for ours, shapes in layer.items():
            sources[f"blocks.{i}.{ours}.weight"] = {
                f"blk.{i}.{theirs}.weight": shape for theirs, shape in shapes.items()
            }
    return sources
