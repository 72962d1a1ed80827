"""Models here are tiny: one thread is faster than two that wait for each other."""

import json
from pathlib import Path

import pytest
import torch

import train
from model import GPT, GPTConfig
from support.pretrained.gpt2 import pack
from support.runs.command_line import parsed

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    """Each test has a working directory of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus(tmp_path):
    """A folder `text` of three users, one of whom has twice as much text."""
    for i, name in enumerate(("anna", "bert", "cleo")):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{name}.txt").write_text(words(i, 3000 * (1 + i // 2)))
    return str(tmp_path / "text")


@pytest.fixture(scope="session")
def tiny_base():
    """A base to torch.save: 1 layer, 16 channels, windows of 8 bytes, random weights."""
    config = GPTConfig(257, 8, 1, 2, 16, specialists=0, routed=False)
    model = GPT(config, torch.Generator().manual_seed(0))
    return pack(model, "bytes")


# --- text, and commands at a tiny size


def words(seed: int, size: int) -> str:
    """About `size` bytes of made-up words that differ from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(10**6, (size // 7,), generator=generator).tolist()
    return " ".join(f"{number:06d}" for number in numbers)


SHAPE = "--n-layer 1 --n-head 2 --n-embd 8"
SCHEDULE = (
    "--users 3 --specialists 0,1,3 --block-size 8 --batch-size 2 --rounds 3 --local-steps 2 "
    "--router-every 2 --router-steps 1 --warmup 1 --eval-every 2 --save-every 2"
)
TINY = f"{SHAPE} {SCHEDULE}".split()
NAMES = ("anna", "bert", "cleo")


@pytest.fixture
def no_report(monkeypatch):
    """Runs don't write page.html, which takes as long as a tiny run."""
    monkeypatch.setattr(train.Run, "write_page", lambda run: None)


@pytest.fixture
def text_and_base(corpus, tiny_base):
    """A folder `text` and a tiny base `base.pt`, where a test stands."""
    torch.save(tiny_base, "base.pt")


def command(more: str = "", out: str = "run", lora: bool = False) -> list[str]:
    """The flags of a tiny run, from scratch or with LoRA experts. Later flags win."""
    start = "--init-from base.pt --expert lora" if lora else SHAPE
    return f"{start} {SCHEDULE} --data text --out {out} {more}".split()


def run(more: str = "", out: str = "run", lora: bool = False) -> dict:
    """Run train.py. Returns its result.json."""
    assert train.main(command(more, out, lora)) == 0
    return json.loads(Path(out, "result.json").read_text())


def begun(*how, **more) -> train.Run:
    """A run that is ready to be played."""
    return train.Run(parsed(command(*how, **more)))


def refusal(capsys, arguments: list[str], main=train.main) -> str:
    """The one line with which a command refuses."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def state(out: str = "run") -> dict:
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def same(one: object, two: object) -> bool:
    """Bit for bit."""
    return json.dumps(one, default=torch.Tensor.tolist) == json.dumps(
        two, default=torch.Tensor.tolist
    )
