"""Several processes end where one does, and a run is continued by another number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import command, state
from federated import User
from support.errors import BadInput
from support.runs import processes
from support.runs.command_line import parsed
from tiny import Stranger


def poisoned(arguments: list[str]) -> int:
    """train.py, with a user bert whose answers aren't finite."""
    answer = User.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(User, "answer", lambda user: {
            name: tensor / (user.name != "bert") for name, tensor in answer(user).items()})
        return train.main(arguments)


def end(out: str) -> list:
    """All numbers and tensors that a run leaves, but for its seconds."""
    def numbers(entry: dict) -> dict:
        return {name: value for name, value in entry.items() if name != "seconds" and not isinstance(value, str | None)}
    texts = [Path(out, "result.json").read_text(), *Path(out, "metrics.jsonl").read_text().splitlines()]
    saved = state(out)
    return [[json.loads(text, object_hook=numbers) for text in texts], saved["server"]["generalists"],
            saved["server"]["generator"], [user["parameters"] for user in saved["users"]]]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch can't connect processes")
def test_two_processes_end_where_one_does_and_one_continues_where_two_were(corpus):
    """With answers that are refused, clipped or lost, and with noise."""
    flags = "--rounds 4 --drop-rate 0.2 --clip-update 0.05 --dp-noise 0.5"
    Path("run.py").write_text(f"import sys\nsys.path[:0] = {sys.path}\nfrom test_processes import poisoned\n"
                              "sys.exit(poisoned(sys.argv[1:]))")
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 run.py".split()
    ran = subprocess.run([*torchrun, *command(flags, "two")], env=os.environ | {"OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert poisoned(command(flags, "one")) == 0
    assert end("one")[0][0]["refused"] > 1
    torch.testing.assert_close(end("two"), end("one"), rtol=1e-5, atol=1e-5)
    Path("two/previous.pt").replace("two/checkpoint.pt")  # as if it had been cut off
    Path("two/result.json").unlink()
    assert poisoned("--resume --out two".split()) == 0
    torch.testing.assert_close(end("two"), end("one"), rtol=1e-5, atol=1e-5)


def test_an_average_over_processes_worked_by_hand_and_of_nothing(monkeypatch):
    """One user answers a = 1 with weight 3, and another process adds a = 5 with weight 1: (3 · 1 + 5) / 4 = 2. Nobody
    sends b, which stays. What meets: Σ w a, Σ w b, Σ w of those who have a, of those who have b, number of answers."""
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([5.0, 0, 1, 0, 1])))
    server = processes.Together({"a": torch.zeros(1), "b": torch.full((1,), 7.0)})
    assert server.take({Stranger("anna", 3, {}): {"a": torch.ones(1)}}) == 2
    assert {name: tensor.tolist() for name, tensor in server.generalists.items()} == {"a": [2], "b": [7]}
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: None)
    assert processes.Together({}).take({}) == 0


@pytest.mark.parametrize(("flags", "why"), [
    ("--method pcl", "`method` pcl: has a server of its own"),
    ("--method centralized", "`method` centralized: one model"),
    ("--users 1", "`users` 1: too few for 2 processes; ")])
def test_what_several_processes_cant_play_is_refused_with_the_reason(flags, why, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BadInput, match=why):
        processes.join(parsed(flags.split()))
