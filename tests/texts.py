"""Text for tests."""

import torch


def words(seed: int, size: int) -> str:
    """About `size` bytes of made-up words that differ from seed to seed."""
    numbers = torch.randint(10 ** 6, (size // 7,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"{number:06d}" for number in numbers)
