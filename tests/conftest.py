"""Models here are tiny: one thread is faster than two that wait for each other."""

import pytest
import torch

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
