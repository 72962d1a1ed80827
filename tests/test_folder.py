"""A run that is cut off is continued, and ends bit for bit where it would have ended."""

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
from support.runs import folder

pytestmark = pytest.mark.usefixtures("text_and_base")

RUN = "--specialists 1 --rounds 5 --router-every 3 --lr 1e-2"  # is saved after rounds 2, 4 and 5
CUT, RESUME = Path("cut"), "--resume --out cut".split()


class Killed(BaseException):
    """As if by kill -9: nobody catches it."""


def cut(arguments: list[str], owner: object, name: str, call: int) -> None:
    """Begin a run, or continue it, and kill it when `owner.name` is called for the so-many-th time."""
    work, calls = getattr(owner, name), []

    def deadly(*arguments, **more):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return work(*arguments, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            train.main(arguments)


def end(out: str) -> list:
    """All that a run leaves, but for times and where it lies."""
    saved, result = state(out), json.loads(Path(out, "result.json").read_text())
    saved["settings"] |= {"out": "", "resume": False}
    return [saved | {"seconds": 0}, result | {"seconds": 0}, Path(out, "metrics.jsonl").read_text()]


@functools.cache
def whole(flags: str, lora: bool = False) -> list:
    assert train.main(command(flags, "whole", lora)) == 0
    return end("whole")


def resumed() -> list:
    assert train.main(RESUME) == 0
    return end("cut")


@pytest.mark.parametrize(("flags", "lora", "moment"), [
    ("--method comigs-leaky", False, (User, "learn", 11)),  # between two users of the fourth round
    ("--method centralized", False, (User, "learn", 4)),
    ("--method pcl", True, (User, "learn", 11)),
    ("--method hetlora --lr 0.1 --lora-rank 8,7,6", True, (User, "learn", 14)),
    ("--method fdlora", True, (train, "write_json", 1)),  # before result.json, which needs the users' gates
    *(("--participation 0.7 --drop-rate 0.3 --specialists 0,1,3", False, moment) for moment in (
        (User, "learn", 1), (Server, "take", 3), (folder, "on_disk", 3),  # in the middle of a checkpoint
        (folder.Folder, "save", 1), (folder.Folder, "save", 2)))])  # behind an evaluation's lines
def test_whatever_the_method_and_whenever_it_is_cut_off_a_run_ends_with_the_same_bits(flags, lora, moment):
    cut(command(f"{RUN} {flags}", "cut", lora), *moment)
    if "hetlora" in flags:  # somebody has pruned itself
        A = "blocks.0.attention.qkv.changes.0.A"
        assert [len(user["parameters"][A]) for user in state("cut")["users"]] != [8, 7, 6]
    assert same(resumed(), whole(f"{RUN} {flags}", lora))


def test_noise_and_refused_answers_are_continued_too(monkeypatch, capsys):
    answer, flags = User.answer, f"{RUN} --clip-update 0.05 --dp-noise 0.5"
    monkeypatch.setattr(User, "answer", lambda user: {
        name: tensor / (user.name != "bert") for name, tensor in answer(user).items()})  # bert's aren't finite
    assert whole(flags)[1]["refused"] == 5
    assert "round 3: the answer of user bert was refused: " in capsys.readouterr().err
    cut(command(flags, "cut"), User, "learn", 11)
    assert same(resumed(), whole(flags))


def test_what_a_method_remembers_in_levels_users_and_the_server_is_continued(monkeypatch):
    class Growing(Level):
        def losses(self, model, idx, targets):
            self.memory["steps"] = self.memory.get("steps", 0) + 1
            loss, _ = super().losses(model, idx, targets)
            return loss, self.hyper["growth"] * self.memory["steps"] * loss

    class Counting(User):
        def learn(self, rhythm):
            self.memory["rounds"] = self.memory.get("rounds", 0) + 1
            self.weight = self.memory["rounds"] ** (self.name == "anna")
            return super().learn(rhythm)

    class Momentum(Server):
        def merge(self, answers, weights):
            means = super().merge(answers, weights)
            last = self.memory.get("mean", self.generalists)
            self.memory["mean"] = means
            return {name: mean + 0.5 * (mean - last[name]) for name, mean in means.items()}

    monkeypatch.setitem(METHODS, "mine", Method("", routed=True, hyper={"growth": 0.1}, level=Growing, user=Counting,
                                                server=Momentum))
    flags = f"{RUN} --method mine --set growth=0.2"
    cut(command(flags, "cut"), User, "learn", 11)
    user = state("cut")["users"][0]
    assert (user["memory"], user["lower"]["memory"]) == ({"rounds": 2}, {"steps": 4})
    assert same(resumed(), whole(flags))


def test_half_a_line_and_later_lines_are_forgotten_and_earlier_seconds_count():
    cut(command(RUN, "cut"), folder.Folder, "save", 3)
    with open("cut/metrics.jsonl", "a") as file:
        file.write('{"round": 5, "us')
    torch.save(state("cut") | {"seconds": 1000.0}, "cut/checkpoint.pt")
    assert same(resumed(), whole(RUN))
    assert min(state("cut")["seconds"], json.loads(Path("cut/result.json").read_text())["seconds"]) >= 1000


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: raw[:-20000] + b"flip" + raw[-19996:]])
def test_a_damaged_checkpoint_is_recognised_and_never_takes_the_place_of_a_whole_one(damage, capsys):
    cut(command(RUN, "cut"), User, "learn", 14)
    files = [CUT / "previous.pt", CUT / "checkpoint.pt"]
    files[1].write_bytes(damage(files[1].read_bytes()))
    cut(RESUME, User, "learn", 7)  # after its first checkpoint
    assert "checkpoint.pt is damaged; trying the one before it" in capsys.readouterr().err
    assert [torch.load(file, weights_only=True)["round"] for file in files] == [2, 4]
    assert same(resumed(), whole(RUN))
    (CUT / "result.json").unlink()
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    assert train.main(RESUME) == 2
    assert "holds no whole checkpoint; " in capsys.readouterr().err.splitlines()[-1]


def test_at_every_moment_of_saving_a_whole_checkpoint_is_there_the_old_one_or_the_new(monkeypatch):
    saving, there, replace = train.Run(folder.settings_of(command(out="cut"))).folder, [], os.replace

    def watched(*paths):
        there.append(folder.newest(CUT)["round"])
        replace(*paths)
    saving.save({"round": 1})
    monkeypatch.setattr(os, "replace", watched)
    saving.save({"round": 2})
    assert ({*there}, state("cut")["round"]) == ({1}, 2)
    assert {path.name for path in CUT.iterdir()} == {"config.json", "lock", "checkpoint.pt", "previous.pt"}


@pytest.mark.parametrize(("often", "rounds"), [(1, 3), (2, 2)])
def test_ctrl_c_ends_after_the_round_and_a_second_one_at_once(often, rounds, monkeypatch, capsys):
    learn, calls = User.learn, iter(range(99))

    def interrupted(user, rhythm):
        if next(calls) == 7:  # in the third round, which isn't evaluated
            for _ in range(often):
                signal.raise_signal(signal.SIGINT)
        return learn(user, rhythm)
    monkeypatch.setattr(User, "learn", interrupted)
    assert train.main(command(RUN, "cut")) == 130
    assert capsys.readouterr().err.endswith("\ntrain.py: stopped; continue with: python train.py --resume --out cut\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state("cut")["round"] == rounds
    assert same(resumed(), whole(RUN))


def test_a_run_that_is_killed_for_real_is_continued():
    """kill -9, once it has written its second checkpoint."""
    flags, environment = f"{RUN} --rounds 20", os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, train.__file__, *command(flags, "cut")], env=environment)
    while process.poll() is None and not Path("cut/previous.pt").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not Path("cut/result.json").exists()
    assert same(resumed(), whole(flags))


@pytest.mark.parametrize(("more", "message"), [
    ("--lr 1e-3", "--lr 0.001: the run in cut has 0.01; leave it out, or start anew with --overwrite"),
    ("--specialists 1,2,3", "--specialists 1,2,3: the run in cut has .1, 1, 1.; leave it out"),
    ("--overwrite", "--overwrite: not together with --resume"), ("--nonsense", "--nonsense: not known")])
def test_a_run_is_continued_with_its_own_settings_only(more, message, capsys):
    cut(command(RUN, "cut"), User, "learn", 1)
    assert re.search(message, refusal(capsys, [*RESUME, *more.split()]))
    assert folder.settings_of([*RESUME, "--lr", "0.01", "--users", "3"]).lr == 0.01


def test_what_cant_be_continued_is_one_line(capsys):
    assert "; give --out" in refusal(capsys, ["--resume"])
    assert "holds no run to continue" in refusal(capsys, RESUME)
    assert train.main(command(out="cut", lora=True)) == 0
    assert "has ended; --overwrite starts anew" in refusal(capsys, RESUME)
    assert "ended after 3, and the cosine of its learning rates" in refusal(capsys, [*RESUME, "--rounds", "9"])
    Path("cut/result.json").unlink()
    Path("text/anna.txt").write_text("another text " * 300)
    assert "--data: is no longer what the run" in refusal(capsys, RESUME)
    torch.save(torch.load("base.pt", weights_only=True) | {"more": 1}, "base.pt")
    assert "--init-from: is no longer what the run" in refusal(capsys, RESUME)


@pytest.mark.parametrize(("file", "content"), [
    ("config.json", "["), ("config.json", "[]"), ("config.json", '{"format": 1}'),
    ("checkpoint.pt", {"format": 1}), ("checkpoint.pt", [2])])
def test_a_folder_that_is_damaged_or_of_another_format_is_one_line(file, content, capsys):
    cut(command(RUN, "cut"), User, "learn", 1)
    (CUT / file).write_text(content) if isinstance(content, str) else torch.save(content, CUT / file)
    assert re.search(f"in cut: {file} is .*; .*--overwrite", refusal(capsys, RESUME))


def test_a_state_that_lacks_something_isnt_called_damaged_but_is_a_mistake_in_the_program():
    cut(command(RUN, "cut"), User, "learn", 1)
    torch.save(state("cut") | {"users": [{"name": "anna"}] * 3}, "cut/checkpoint.pt")
    with pytest.raises(KeyError):
        train.main(RESUME)


def test_a_folder_in_which_another_run_works_is_refused(capsys):
    other = train.Run(folder.settings_of(command(out="cut")))
    for how in ("--overwrite", "--resume"):
        assert "another process works in it; wait, or" in refusal(capsys, command(how, "cut"))
    del other
    assert train.main(command("--overwrite", "cut")) == 0
