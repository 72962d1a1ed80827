"""Several processes end where one does, and a run is continued by another number of them."""

import json
import os
import subprocess
import sys

import pytest
import torch

import train
from federated import User
from support import processes
from support.settings import parsed
from test_train import TINY, lines_of, state
from tiny import Stranger


def poisoned(*arguments: str) -> int:
    """train.py, with a user bert whose answers aren't finite."""
    answer = User.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(User, "answer", lambda user: {
            name: tensor / (user.name != "bert") for name, tensor in answer(user).items()})
        return train.main([*arguments])


def end(folder) -> list:
    result, saved = json.loads((folder / "result.json").read_text()), state(folder)
    return [saved["server"], [user["parameters"] for user in saved["users"]], result | {"seconds": 0}, lines_of(folder)]


def check_close(one: object, two: object) -> None:
    """Numbers to 1e-5, everything else equal."""
    if isinstance(one, dict | list | tuple):
        assert len(one) == len(two)
        for key in one if isinstance(one, dict) else range(len(one)):
            check_close(one[key], two[key])
    elif isinstance(one, float | torch.Tensor):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    else:
        assert one == two


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch can't connect processes")
def test_two_processes_end_where_one_does_and_one_continues_where_two_were(corpus, tmp_path):
    """With answers that are refused, clipped or lost, and with noise."""
    command = [*TINY, *"--rounds 4 --drop-rate 0.2 --clip-update 0.05 --dp-noise 0.5 --data".split(), corpus]
    script, two = tmp_path / "run.py", tmp_path / "two"
    script.write_text(f"import sys\nsys.path[:0] = {sys.path}\nfrom test_processes import poisoned\n"
                      "sys.exit(poisoned(*sys.argv[1:]))")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run([*torchrun, *command, "--out", str(two)], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    assert "mean" in ran.stdout
    assert poisoned(*command, "--out", str(tmp_path / "one")) == 0
    expected = end(tmp_path / "one")
    assert expected[2]["refused"] > 1
    check_close(end(two), expected)

    (two / "previous.pt").replace(two / "checkpoint.pt")  # as if it had been cut off
    (two / "result.json").unlink()
    assert poisoned("--resume", "--out", str(two)) == 0
    check_close(end(two), expected)


def test_lists_are_dealt_out_and_come_together_again(monkeypatch):
    everyones, parts = list("abcde"), []
    monkeypatch.setattr(processes, "count", lambda: 2)
    for index in (0, 1):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        parts.append(processes.own(everyones))
    assert parts == [list("ace"), list("bd")]
    monkeypatch.setattr(processes.dist, "all_gather_object", lambda into, mine: into.__setitem__(slice(None), parts))
    assert processes.gathered(parts[1]) == everyones


def test_an_average_over_processes_worked_by_hand_and_of_nothing(monkeypatch):
    """One user answers a = 1 with weight 3, and another process adds a = 5 with weight 1: (3 · 1 + 5) / 4 = 2. Nobody
    sends b, which stays. What meets: Σ w a, Σ w b, Σ w of those who have a, of those who have b, number of answers."""
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([5.0, 0, 1, 0, 1])))
    server = processes.Together({"a": torch.zeros(1), "b": torch.full((1,), 7.0)})
    assert server.take({Stranger("anna", 3, {}): {"a": torch.ones(1)}}) == 2
    assert {name: tensor.tolist() for name, tensor in server.generalists.items()} == {"a": [2], "b": [7]}
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: None)
    assert processes.Together({}).take({}) == 0


@pytest.mark.parametrize("flags", ["--users 1", "--method pcl", "--method centralized"])
def test_what_several_processes_cant_play_is_one_line(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^`method` .* `users` .: .* 2 processes; take one, or .*$"):
        processes.join(parsed(flags.split()))
