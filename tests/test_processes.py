"""Several processes end where one does, and a run is continued by another number of them."""

import json
import os
import subprocess
import sys

import pytest
import torch

import federated
import train
from support import processes
from support.errors import BadInput
from support.settings import parsed
from test_train import TINY, lines_of, state
from tiny import Stranger

FLAGS = [*TINY, *"--rounds 4 --drop-rate 0.2 --clip-update 0.05 --dp-noise 0.5".split()]


def poisoned(*arguments: str) -> int:
    """train.py, whose user bert answers with what can't be averaged."""
    answer = federated.User.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federated.User, "answer", lambda user: {
            name: tensor / (user.name != "bert") for name, tensor in answer(user).items()})
        return train.main([*arguments])


def close(one: object, two: object) -> bool:
    """Equal, numbers to 1e-5."""
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, two, rtol=0, atol=1e-5)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(close, one, two))
    return one == (pytest.approx(two, abs=1e-5, rel=1e-5) if isinstance(one, float) else two)


def end(folder) -> tuple:
    result, saved = json.loads((folder / "result.json").read_text()), state(folder)
    del result["seconds"]
    return saved["server"], [user["parameters"] for user in saved["users"]], result, lines_of(folder)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch can't connect processes")
def test_two_processes_end_where_one_does_and_one_continues_where_two_were(corpus, tmp_path):
    """With answers that are refused, clipped and lost, and with noise."""
    arguments = [*FLAGS, "--data", corpus]
    script = tmp_path / "run.py"
    script.write_text(f"import sys\nsys.path[:0] = {sys.path}\nfrom test_processes import poisoned\n"
                      "sys.exit(poisoned(*sys.argv[1:]))")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run([*command, *arguments, "--out", str(tmp_path / "two")], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    assert "mean" in ran.stdout
    assert poisoned(*arguments, "--out", str(tmp_path / "one")) == 0
    expected = end(tmp_path / "one")
    assert expected[2]["refused"] > 1
    assert close(end(tmp_path / "two"), expected)

    (tmp_path / "two" / "previous.pt").replace(tmp_path / "two" / "checkpoint.pt")  # as if it had been cut off
    (tmp_path / "two" / "result.json").unlink()
    assert poisoned("--resume", "--out", str(tmp_path / "two")) == 0
    assert close(end(tmp_path / "two"), expected)


def test_lists_are_dealt_out_and_come_together_again(monkeypatch):
    everyones, parts = list("abcde"), []
    monkeypatch.setattr(processes, "count", lambda: 2)
    for index in (0, 1):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        parts.append(processes.own(everyones))
    assert parts == [list("ace"), list("bd")]

    def all_gather(into, mine):
        into[:] = parts
    monkeypatch.setattr(processes.dist, "all_gather_object", all_gather)
    assert processes.gathered(parts[1]) == everyones


def test_an_average_over_processes_worked_by_hand_and_of_nothing(monkeypatch):
    """One user answers a = 1 with weight 3, and another process adds a = 5 with weight 1: (3 · 1 + 5) / 4 = 2. Nobody
    sends b. The numbers that meet: Σ w a, Σ w b, Σ w of those who have a, of those who have b, and how many answered.
    """
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([5.0, 0, 1, 0, 1])))
    server = processes.Together({"a": torch.zeros(1), "b": torch.full((1,), 7.0)})
    assert server.take({Stranger("anna", 3, {}): {"a": torch.ones(1)}}) == 2
    assert {name: tensor.tolist() for name, tensor in server.generalists.items()} == {"a": [2], "b": [7]}
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: None)
    assert processes.Together({}).take({}) == 0


@pytest.mark.parametrize("flags", ["--users 1", "--method pcl", "--method centralized"])
def test_what_several_processes_cant_play_is_one_line(flags, monkeypatch):
    settings = parsed(flags.split())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="`method` .* `users` .: not for 2 processes; take one"):
        processes.join(settings)
