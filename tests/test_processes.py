"""Several processes end where one does, and another number of them can resume a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import command, state
from federated import User
from support.errors import BadInput
from support.runs import folder, processes
from support.runs.checkpoint import save_checkpoint
from support.runs.command_line import parsed
from support.runs.settings import Settings
from tiny import Stranger


def poisoned(arguments: list[str]) -> int:
    """train.py with a user bert whose uploads aren't finite. It keeps the checkpoint of round 2."""
    upload = User.upload

    def poisoned_upload(user: User) -> dict:
        message = upload(user)
        if user.name == "bert":
            message = {name: tensor / 0 for name, tensor in message.items()}
        return message

    def save(path: Path, state: dict) -> None:
        save_checkpoint(path, state)
        if state["round"] == 2:
            shutil.copy(path / "checkpoint.pt", path / "round2.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(User, "upload", poisoned_upload)
        patch.setattr(folder, "save_checkpoint", save)
        return train.main(arguments)


def numbers(entry: dict) -> dict:
    """The numbers of a JSON object, without seconds."""
    kept = {}
    for name, value in entry.items():
        if name != "seconds" and not isinstance(value, str | None):
            kept[name] = value
    return kept


def end(out: str) -> list:
    """All numbers and tensors that a run leaves."""
    texts = [Path(out, "result.json").read_text()]
    texts += Path(out, "metrics.jsonl").read_text().splitlines()
    saved = state(out)
    users = [user["parameters"] for user in saved["users"]]
    return [
        [json.loads(text, object_hook=numbers) for text in texts],
        saved["server"]["generalists"],
        saved["server"]["generator"],
        users,
    ]


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of PyTorch can't connect processes"
)
def test_two_processes_end_where_one_does_and_one_resumes_the_run_of_two(corpus):
    """With uploads that are refused, clipped or missing, and with noise."""
    flags = "--rounds 4 --drop-rate 0.2 --clip-update 0.05 --dp-noise 0.5 --save-every 2"
    Path("run.py").write_text(
        f"import sys\nsys.path[:0] = {sys.path}\nfrom test_processes import poisoned\n"
        "sys.exit(poisoned(sys.argv[1:]))"
    )
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 run.py"
    done = subprocess.run(
        [*torchrun.split(), *command(flags, "two")],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert poisoned(command(flags, "one")) == 0
    assert end("one")[0][0]["refused"] > 1
    torch.testing.assert_close(end("two"), end("one"), rtol=1e-5, atol=1e-5)
    Path("two/round2.pt").replace("two/checkpoint.pt")  # as if it had been cut off there
    Path("two/result.json").unlink()
    assert poisoned("--resume --out two".split()) == 0
    torch.testing.assert_close(end("two"), end("one"), rtol=1e-5, atol=1e-5)


def test_every_process_knows_the_folder_of_the_first_one(monkeypatch):
    """Ctrl-C prints it in each of them."""
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes, "gather", lambda entries: [Path("run"), *entries])
    assert processes.SharedFolder(Settings(), {}).path == Path("run")


def test_an_average_over_processes_worked_by_hand(monkeypatch):
    """A user here sends a = 1 with weight 3, one elsewhere a = 5 with weight 1: (3 + 5)/4 = 2.

    No user sends b, which stays.
    """
    elsewhere = iter([5.0, 1.0, 0.0, 0.0])  # Σ w a, Σ w of a, Σ w b, Σ w of b
    monkeypatch.setattr(processes.dist, "all_reduce", lambda x: x.add_(next(elsewhere)))
    monkeypatch.setattr(processes, "total", lambda number: number + 1)
    server = processes.SummingServer({"a": torch.zeros(1), "b": torch.full((1,), 7.0)})
    anna = Stranger("anna", 3, {})
    assert server.aggregate({anna: {"a": torch.ones(1)}}) == 2
    assert server.generalists["a"].item() == 2
    assert server.generalists["b"].item() == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method pcl", "`method` pcl: has a server that needs more than sums"),
        ("--method centralized", "`method` centralized: trains a single model"),
        ("--users 1", "`users` 1: too few for 2 processes; "),
    ],
)
def test_a_run_that_needs_one_process_is_refused_in_several(flags, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BadInput, match=message):
        processes.join(parsed(flags.split()))
