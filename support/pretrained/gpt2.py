"""GPT-2's weights: OpenAI's by name, or a file of tensors under Hugging Face's GPT-2 names.

The file was written by torch.save (.bin, .pt), or it is a .safetensors file. `pack` makes the
content of a .pt, which also holds the number of heads and the name of the tokenizer.
"""

from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from support.errors import BadInput, optional

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
PREFIX = "transformer."  # of every name in a saved GPT2LMHeadModel
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # in older files
REMEDY = "pass a file of tensors under Hugging Face's GPT-2 names"


def sources_of(V: int, T: int, L: int, C: int) -> dict[str, dict[str, tuple]]:
    """Our parameter's name -> {the file's name: shape}, matrices as in nn.Linear, (n_out, n_in).

    V tokens, T positions, L layers, C channels.
    """
    layer = {
        "attention_norm": ("ln_1", (C,)),
        "attention.qkv_proj": ("attn.c_attn", (3 * C, C)),
        "attention.out_proj": ("attn.c_proj", (C, C)),
        "moe_norm": ("ln_2", (C,)),
        "moe.up_proj": ("mlp.c_fc", (4 * C, C)),
        "moe.down_proj": ("mlp.c_proj", (C, 4 * C)),
    }
    modules = {"norm": ("ln_f", (C,))}
    for i in range(L):
        for ours, (theirs, shape) in layer.items():
            modules[f"blocks.{i}.{ours}"] = (f"h.{i}.{theirs}", shape)

    sources = {
        "token_embedding.weight": {"wte.weight": (V, C)},
        "position_embedding.weight": {"wpe.weight": (T, C)},
    }
    for ours, (theirs, shape) in modules.items():
        sources[f"{ours}.weight"] = {f"{theirs}.weight": shape}
        sources[f"{ours}.bias"] = {f"{theirs}.bias": shape[:1]}
    return sources


def transposed(name: str, tensor: Tensor) -> Tensor:
    """Transpose a layer's matrix, which is (n_in, n_out) in a file and (n_out, n_in) in nn.Linear.

    name: the file's. Other tensors are returned unchanged.
    """
    if name.startswith("h.") and tensor.ndim == 2:
        return tensor.t().contiguous()
    return tensor


def pack(model: nn.Module, tokenizer: str) -> dict:
    """The content of a file of a dense model.GPT, which `GPT2File` reads.

    tokenizer: its name for data.tokenizer
    """
    config = model.config
    sources = sources_of(config.vocab_size, config.block_size, config.n_layer, config.n_embd)
    tensors = {}
    for ours, parameter in model.named_parameters():
        (name,) = sources[model.plain_name(ours)]
        tensors[name] = transposed(name, parameter.detach()).cpu()
    return {
        "model": tensors,
        "config": {"n_head": config.n_head, "feed_forward": config.feed_forward},
        "tokenizer": tokenizer,
    }


class GPT2File:
    """A file of GPT-2's tensors, read into memory. Raises BadInput.

    name: one of NAMES, or a path
    config: fields of model.GPTConfig; n_head is None if the file doesn't have it
    sources: see `sources_of`
    tokenizer: its name for data.tokenizer, or None
    """

    encoding = None

    def __init__(self, name: str):
        if name in NAMES:
            self.path, content = download(name)
        else:
            self.path, content = read_file(Path(name))
        if not isinstance(content, dict):
            raise self.bad("it holds no names")

        tensors = content
        config = {}
        self.tokenizer = "gpt2" if name in NAMES else None
        if content.keys() == {"model", "config", "tokenizer"}:  # from `pack`
            tensors = content["model"]
            config = content["config"]
            self.tokenizer = content["tokenizer"]
        self.tensors = self.used(tensors)
        V, C = self.tensors["wte.weight"].shape
        T = len(self.tensors["wpe.weight"])
        L = sum(name.endswith("ln_1.weight") for name in self.tensors)
        self.sources = sources_of(V, T, L, C)
        self.config = {
            "vocab_size": V,
            "block_size": T,
            "n_layer": L,
            "n_head": config.get("n_head"),
            "n_embd": C,
            "feed_forward": config.get("feed_forward", "gelu-tanh"),
        }

    def bad(self, problem: str) -> BadInput:
        return BadInput(f"`init_from` {self.path}: not a GPT-2: {problem}; {REMEDY}")

    def used(self, tensors: dict) -> dict[str, Tensor]:
        """The tensors without prefix, masks and the head, which must equal the token embedding."""
        used = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise self.bad(f"{name} is not a tensor")
            if not name.endswith(CAUSAL_MASKS):
                used[name.removeprefix(PREFIX)] = tensor
        for name in ("wte.weight", "wpe.weight"):
            if name not in used or used[name].ndim != 2:
                raise self.bad(f"{name} is missing or not a matrix")
        head = used.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, used["wte.weight"]):
            raise self.bad("lm_head.weight differs from wte.weight")
        return used

    def read(self, name: str) -> Tensor:
        return transposed(name, self.tensors[name])


def download(name: str) -> tuple[Path, object]:
    """The path and content of one of NAMES, which is downloaded once. Raises BadInput."""
    file_name = f"{name}-pytorch_model.bin"  # all are called pytorch_model.bin at their source
    path = Path(torch.hub.get_dir(), "checkpoints", file_name)
    try:
        return path, torch.hub.load_state_dict_from_url(
            URL.format(name), map_location="cpu", file_name=file_name, weights_only=True
        )
    except (OSError, HTTPException) as error:
        raise BadInput(
            f"`init_from` {name}: can't be downloaded ({error}); connect to the network "
            "once, or pass a file"
        ) from None
    except Exception as error:  # a broken file can fail in any way
        raise BadInput(
            f"`init_from` {path}: can't be read ({type(error).__name__}); delete it to "
            "download it again"
        ) from None


def read_file(path: Path) -> tuple[Path, object]:
    """A file's path and content. Raises BadInput."""
    if not path.is_file():
        raise BadInput(
            f"`init_from` {path}: no such file; make one with python -m lab.pretrain, "
            f"or pass smollm2 or one of {', '.join(NAMES)}"
        )
    is_safetensors = path.suffix == ".safetensors"
    if is_safetensors:
        remedy = "pip install safetensors, or pass a .bin"
        safetensors = optional("safetensors.torch", f"`init_from` {path}", remedy)
    try:
        if is_safetensors:
            return path, safetensors.load_file(path)
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can fail in any way
        raise BadInput(
            f"`init_from` {path}: can't be read as tensors ({type(error).__name__}); {REMEDY}"
        ) from None
