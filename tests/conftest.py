"""Models here are tiny: one thread is faster than two that wait for each other."""

import pytest
import torch

from model import GPT, GPTConfig
from support import pretrained
from texts import words

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    """What a test writes where it stands, such as out/cache, is its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus(tmp_path):
    """A folder of three users, of whom one has twice as much text."""
    for i, name in enumerate(("anna", "bert", "cleo")):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{name}.txt").write_text(words(i, 3000 * (1 + i // 2)))
    return str(tmp_path / "text")


@pytest.fixture(scope="session")
def tiny_base():
    """What to torch.save as a base of 1 layer of 16 channels and windows of 8 bytes, with random weights."""
    config = GPTConfig(257, 8, 1, 2, 16, specialists=0, routed=False)
    model = GPT(config, torch.Generator().manual_seed(0))
    tensors = {GPT.plain_name(name): parameter for name, parameter in model.named_parameters()}
    return pretrained.pack(tensors, config.n_head, config.feed_forward, "bytes")
