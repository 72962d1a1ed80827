"""Text from a model, token by token.

    python -c "import torch, data; from model import GPT; from support.sampling import generate; \\
               words = data.tokenizer('smollm2'); text = torch.tensor([words.encode('The sea is')]); \\
               print(words.decode(generate(GPT.from_pretrained('smollm2'), text, 20)[0].tolist()))"
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import GPT


def generate(model: GPT, idx: Tensor, n: int, **how) -> Tensor:
    """idx and n sampled tokens after it, as `stream` makes them: (B, T) -> (B, T + n)."""
    return torch.cat([idx, *stream(model, idx, n, **how)], 1)


@torch.no_grad()
def stream(model: GPT, idx: Tensor, n: int, temperature: float = 1.0, top_k: int | None = None,
           generator: torch.Generator | None = None, cache: bool = True, vocabulary: int | None = None,
           gates: Tensor | None = None) -> Iterator[Tensor]:
    """Sample n tokens after idx (B, T), (B, 1) each. Temperature 0 takes the likeliest token. vocabulary: how many
    tokens there are, where a tokenizer has fewer than the model. gates: as in GPT.

    What a token sees begins where the text begins, until that is more than block_size away; then the beginning
    moves on by half of that. In between, keys and values are kept (or, without the cache, computed anew).
    """
    block_size = model.config.block_size
    half, start, pasts = (block_size + 1) // 2, 0, [[] for _ in model.blocks]
    unread = idx  # (B, t)
    for _ in range(n):
        if idx.shape[1] - start > block_size or not cache:
            start = max(0, -(-(idx.shape[1] - block_size) // half) * half)
            unread, pasts = idx[:, start:], [[] for _ in model.blocks]
        hidden, _ = model.trunk(unread, gates, pasts)
        logits = model.logits(hidden[:, -1])[:, :vocabulary].float()  # (B, V)
        logits -= logits.amax(1, keepdim=True)
        if top_k is not None:
            kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if temperature == 0:
            unread = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:
            unread = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)  # (B, 1)
        idx = torch.cat((idx, unread), 1)
        yield unread
