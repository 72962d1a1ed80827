"""A run that is cut off is resumed, and ends bit for bit where it would have ended."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from bilevel import Level
from conftest import command, refusal, same, state
from federated import Server, User
from methods import METHODS, Method
from support.runs import checkpoint, folder

pytestmark = pytest.mark.usefixtures("text_and_base", "no_report")

RUN = "--specialists 1 --rounds 5 --router-every 3 --lr 1e-2"  # saves after rounds 2, 4 and 5
RESUME = "--resume --out cut".split()


class Killed(BaseException):
    """As if by kill -9: no code catches it."""


def cut(arguments: list[str], owner: object, name: str, call: int) -> None:
    """Start or resume a run, and kill it at the given call of `owner.name`."""
    function = getattr(owner, name)
    calls = []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            train.main(arguments)


def end(out: str) -> list:
    """All that a run leaves, but for times and its folder's name."""
    saved = state(out)
    saved["settings"] |= {"out": "", "resume": False}
    result = json.loads(Path(out, "result.json").read_text())
    metrics = Path(out, "metrics.jsonl").read_text()
    return [saved | {"seconds": 0}, result | {"seconds": 0}, metrics]


@functools.cache
def whole(flags: str, lora: bool = False) -> list:
    """The end of a run that isn't cut off."""
    assert train.main(command(flags, "whole", lora)) == 0
    return end("whole")


def resumed() -> list:
    assert train.main(RESUME) == 0
    return end("cut")


PARTIAL = "--participation 0.7 --drop-rate 0.3 --specialists 0,1,3"


@pytest.mark.parametrize(
    ("flags", "lora", "moment"),
    [
        ("--method comigs-leaky", False, (User, "local_update", 11)),  # within the fourth round
        ("--method centralized", False, (User, "local_update", 4)),
        ("--method pcl", True, (User, "local_update", 11)),
        ("--method hetlora --lr 0.1 --lora-rank 8,7,6", True, (User, "local_update", 14)),
        ("--method fdlora", True, (folder.Folder, "finish", 1)),  # before result.json
        (PARTIAL, False, (Server, "aggregate", 3)),
        (PARTIAL, False, (torch, "save", 2)),  # while a checkpoint is written
    ],
)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(flags, lora, moment):
    """For methods with a state of their own, at different moments."""
    cut(command(f"{RUN} {flags}", "cut", lora), *moment)
    if "hetlora" in flags:  # a user has pruned itself
        name = "blocks.0.attention.qkv_proj.adapters.0.lora_A"
        assert [len(user["parameters"][name]) for user in state("cut")["users"]] != [8, 7, 6]
    assert same(resumed(), whole(f"{RUN} {flags}", lora))


def test_noise_and_refused_uploads_continue_too(monkeypatch, capsys):
    upload = User.upload

    def poisoned(user):
        message = upload(user)
        if user.name == "bert":
            message = {name: tensor / 0 for name, tensor in message.items()}
        return message

    monkeypatch.setattr(User, "upload", poisoned)
    flags = f"{RUN} --clip-update 0.05 --dp-noise 0.5"
    assert whole(flags)[1]["refused"] == 5
    assert "round 3: the upload of user bert was refused: " in capsys.readouterr().err
    cut(command(flags, "cut"), User, "local_update", 11)
    assert same(resumed(), whole(flags))


class GrowingLevel(Level):
    """Remembers its steps."""

    def objective(self, model, idx, targets):
        self.memory["steps"] = self.memory.get("steps", 0) + 1
        loss, objective = super().objective(model, idx, targets)
        return loss, objective * (1 + self.hyper["growth"] * self.memory["steps"])


class CountingUser(User):
    """Remembers its rounds, which are its weight."""

    def local_update(self, rhythm):
        self.memory["rounds"] = self.memory.get("rounds", 0) + 1
        if self.name == "anna":
            self.weight = self.memory["rounds"]
        return super().local_update(rhythm)


class MomentumServer(Server):
    """Remembers the last mean."""

    def merge(self, messages, weights):
        means = super().merge(messages, weights)
        last = self.memory.get("mean", self.generalists)
        self.memory["mean"] = means
        return {name: mean + 0.5 * (mean - last[name]) for name, mean in means.items()}


def test_the_memory_of_a_method_continues_in_levels_users_and_the_server(monkeypatch):
    row = Method(
        "",
        routed=True,
        hyper={"growth": 0.1},
        level=GrowingLevel,
        user=CountingUser,
        server=MomentumServer,
    )
    monkeypatch.setitem(METHODS, "mine", row)
    flags = f"{RUN} --method mine --set growth=0.2"
    cut(command(flags, "cut"), User, "local_update", 11)
    user = state("cut")["users"][0]
    assert user["memory"] == {"rounds": 2}
    assert user["lower"]["memory"] == {"steps": 4}
    assert same(resumed(), whole(flags))


def test_half_a_line_and_later_lines_are_dropped_and_earlier_seconds_count():
    cut(command(RUN, "cut"), folder.Folder, "save", 3)
    with open("cut/metrics.jsonl", "a") as file:
        file.write('{"round": 5, "us')
    torch.save(state("cut") | {"seconds": 1000.0}, "cut/checkpoint.pt")
    assert same(resumed(), whole(RUN))
    assert json.loads(Path("cut/result.json").read_text())["seconds"] >= 1000


DAMAGES = {
    "half": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "a wrong byte": lambda raw: raw[:-20000] + b"flip" + raw[-19996:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(damage, capsys):
    cut(command(RUN, "cut"), User, "local_update", 14)
    path = Path("cut/checkpoint.pt")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert "checkpoint.pt is damaged" in refusal(capsys, RESUME)


def test_while_a_checkpoint_is_written_the_old_one_is_there(monkeypatch):
    run_folder = train.Run(folder.settings_of(command(out="cut"))).folder
    seen = []
    replace = os.replace

    def watched(*paths):
        seen.append(checkpoint.load_checkpoint(Path("cut"))["round"])
        replace(*paths)

    run_folder.save({"round": 1})
    monkeypatch.setattr(os, "replace", watched)
    run_folder.save({"round": 2})
    assert seen == [1]
    assert state("cut")["round"] == 2
    names = {path.name for path in Path("cut").iterdir()}
    assert names == {"config.json", "lock", "checkpoint.pt"}


@pytest.mark.parametrize(("signals", "rounds"), [(1, 3), (2, 2)])
def test_ctrl_c_ends_after_the_round_and_a_second_one_at_once(signals, rounds, monkeypatch, capsys):
    local_update = User.local_update
    calls = iter(range(99))

    def interrupted(user, rhythm):
        if next(calls) == 7:  # in the third round
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
        return local_update(user, rhythm)

    monkeypatch.setattr(User, "local_update", interrupted)
    assert train.main(command(RUN, "cut")) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "train.py: stopped; continue with: python train.py --resume --out cut"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state("cut")["round"] == rounds
    assert same(resumed(), whole(RUN))


def test_a_run_that_is_killed_for_real_is_resumed():
    """kill -9, once it has a checkpoint with some rounds."""
    flags = f"{RUN} --rounds 10"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, train.__file__, *command(flags, "cut")]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    metrics = Path("cut/metrics.jsonl")
    while process.poll() is None and not (metrics.exists() and '"round": 4' in metrics.read_text()):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not Path("cut/result.json").exists()
    assert same(resumed(), whole(flags))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "--lr 1e-3",
            "--lr 0.001: the run in cut has 0.01; leave it out, or start again with --over",
        ),
        (
            "--specialists 1,2,3",
            r"--specialists 1,2,3: the run in cut has \[1, 1, 1\]; leave it out",
        ),
        ("--overwrite", "--overwrite: not together with --resume"),
        ("--rounds 9", "--rounds 9: the run in cut has 5"),
        ("--nonsense", "--nonsense: unknown"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings_only(more, message, capsys):
    cut(command(RUN, "cut"), User, "local_update", 1)
    assert re.search(message, refusal(capsys, [*RESUME, *more.split()]))
    assert folder.settings_of([*RESUME, "--lr", "0.01", "--users", "3"]).lr == 0.01


def test_a_run_that_cant_be_resumed_is_one_line(capsys):
    assert "; add --out" in refusal(capsys, ["--resume"])
    assert "holds no run to continue" in refusal(capsys, RESUME)
    assert train.main(command(out="cut", lora=True)) == 0
    assert "has ended; --overwrite starts a new one" in refusal(capsys, RESUME)
    Path("cut/result.json").unlink()
    Path("text/anna.txt").write_text("another text " * 300)
    assert "--data: has changed since the run" in refusal(capsys, RESUME)
    base = torch.load("base.pt", weights_only=True)
    base["model"]["ln_f.bias"] += 1
    torch.save(base, "base.pt")
    assert "--init-from: has changed since the run" in refusal(capsys, RESUME)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "["),
        ("config.json", "[]"),
        ("config.json", '{"format": 1}'),
        ("checkpoint.pt", {"format": 1}),
        ("checkpoint.pt", [2]),
    ],
)
def test_a_file_of_another_format_is_one_line(file, content, capsys):
    cut(command(RUN, "cut"), User, "local_update", 1)
    path = Path("cut", file)
    if isinstance(content, str):
        path.write_text(content)
    else:
        torch.save(content, path)
    assert re.search(f"in cut: {file} is .*; .*--overwrite", refusal(capsys, RESUME))


def test_a_state_that_lacks_something_is_a_mistake_in_the_program():
    cut(command(RUN, "cut"), User, "local_update", 1)
    torch.save(state("cut") | {"users": [{"name": "anna"}] * 3}, "cut/checkpoint.pt")
    with pytest.raises(KeyError):
        train.main(RESUME)


def test_a_folder_in_which_another_run_works_is_refused(capsys):
    other = train.Run(folder.settings_of(command(out="cut")))
    for flag in ("--overwrite", "--resume"):
        assert "another process works in it; wait, or" in refusal(capsys, command(flag, "cut"))
    del other
    assert train.main(command("--overwrite", "cut")) == 0
