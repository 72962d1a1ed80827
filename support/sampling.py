"""Text from a model, token by token, with a cache of keys and values.

import torch, data
from model import GPT
from support.sampling import generate
tokenizer = data.tokenizer("smollm2")
prompt = torch.tensor([tokenizer.encode("The sea is")])
print(tokenizer.decode(generate(GPT.from_pretrained("smollm2"), prompt, 20)[0].tolist()))
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import GPT


class LayerCache:
    """The keys and values of the tokens that one layer has read: (B, K, S, D) each."""

    def __init__(self):
        self.keys = None
        self.values = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens. Returns all keys and values so far."""
        if self.keys is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        self.keys = keys
        self.values = values
        return keys, values


class KVCache:
    """The keys and values of all layers, so that a new token needs no second pass over the text."""

    def __init__(self, n_layer: int):
        self.layers = [LayerCache() for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        keys = self.layers[0].keys
        return 0 if keys is None else keys.shape[2]


def generate(model: GPT, idx: Tensor, n: int, **options) -> Tensor:
    """Add n sampled tokens to idx: (B, T) -> (B, T + n). options: as in `stream`."""
    return torch.cat([idx, *stream(model, idx, n, **options)], dim=1)


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    n: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    cache: bool = True,
    vocabulary: int | None = None,
    fixed_gates: Tensor | None = None,
) -> Iterator[Tensor]:
    """Sample n tokens that follow idx (B, T), and yield each, (B, 1).

    temperature: 0 picks the most likely token. top_k: sample from the k most likely tokens.
    vocabulary: the tokenizer's number of tokens, if the model has more. fixed_gates: as in GPT.

    If the text is longer than block_size, the window moves forward by half a block, and the cache
    is computed again.
    """
    block_size = model.config.block_size
    half = (block_size + 1) // 2
    start = 0  # the start of the window
    kv_cache = KVCache(model.config.n_layer)
    unread = idx  # (B, t), tokens that aren't in the cache
    for _ in range(n):
        if idx.shape[1] - start > block_size or not cache:
            while idx.shape[1] - start > block_size:
                start += half
            kv_cache = KVCache(model.config.n_layer)
            unread = idx[:, start:]
        hidden, _ = model.trunk(unread, fixed_gates, kv_cache)
        logits = model.logits(hidden[:, -1])[:, :vocabulary].float()  # (B, V)
        unread = sample(logits, temperature, top_k, generator)
        idx = torch.cat((idx, unread), dim=1)
        yield unread


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of logits: (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits - logits.amax(1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
