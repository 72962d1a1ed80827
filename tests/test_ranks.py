"""Several processes end where one does, and a run goes on with another number of them."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import ranks
import train
from corpora import BadInput
from settings import parse_settings

FLAGS = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "8", "--users", "3", "--rounds", "4",
         "--local-steps", "2", "--router-every", "2", "--router-steps", "1", "--batch-size", "2", "--eval-every", "2",
         "--specialists", "0,1,3", "--drop-rate", "0.2"]


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
    result = json.loads((folder / "result.json").read_text())
    del result["seconds"]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return state["server"]["generalists"], [user["parameters"] for user in state["users"]], result, lines


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*command, train.__file__, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch can't connect processes")
def test_two_processes_end_where_one_does_and_one_goes_on_where_two_were(corpus, tmp_path):
    arguments = [*FLAGS, "--data", corpus]
    assert train.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    ran = launch(2, *arguments, "--out", str(tmp_path / "two"))
    assert ran.returncode == 0, ran.stderr
    assert "mean" in ran.stdout
    assert close(end(tmp_path / "two"), end(tmp_path / "one"))

    shutil.move(tmp_path / "two" / "previous.pt", tmp_path / "two" / "checkpoint.pt")  # as if it had been cut off
    (tmp_path / "two" / "result.json").unlink()
    assert train.main(["--resume", "--out", str(tmp_path / "two")]) == 0
    assert close(end(tmp_path / "two"), end(tmp_path / "one"))


def test_lists_are_dealt_out_and_come_together_again(monkeypatch):
    everyones = list("abcde")
    parts = []
    monkeypatch.setattr(ranks, "count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(ranks.own(everyones))
    assert parts == [list("ace"), list("bd")]

    def all_gather(into, mine):
        into[:] = parts
    monkeypatch.setattr(ranks.dist, "all_gather_object", all_gather)
    assert ranks.gathered(parts[1]) == everyones


def test_an_average_over_processes_worked_by_hand_and_of_nothing(monkeypatch):
    """Here one user answers 1 with weight 3, and another process adds 5 with weight 1: (3 · 1 + 5) / 4 = 2."""
    def all_reduce(flat):
        flat += torch.tensor([5.0, 1.0, 1.0]) if len(flat) == 3 else torch.tensor([1.0])
    monkeypatch.setattr(ranks.dist, "all_reduce", all_reduce)
    server = ranks.Together({"a": torch.zeros(1)})
    user = SimpleNamespace(name="u", shared={"a": torch.Size([1])}, weight=3)
    server.combine([(user, {"a": torch.ones(1)})])
    assert server.generalists["a"].tolist() == [2]
    assert server.version == 1
    ranks.Together({}).combine([])


@pytest.mark.parametrize("flags", ["--users 1", "--method pcl", "--method centralized"])
def test_what_several_processes_cant_play_is_one_line(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=r"--method .* --users .: not for 2 processes; take one"):
        parse_settings(flags.split())
