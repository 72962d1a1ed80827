"""A run that is cut off is continued, and ends bit for bit where it would have ended."""

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
from federated import Server, User
from support import folder
from support.errors import BadInput
from support.files import write
from support.folder import Folder
from test_train import SCHEDULE, SHAPE, same, state

LORA = "--init-from base.pt --expert lora"
CUT = Path("cut")


@pytest.fixture
def flags(corpus, tiny_base):
    """A command line without --out: five rounds, of which the second, the fourth and the last are evaluated."""
    torch.save(tiny_base, "base.pt")
    return lambda more="", start=SHAPE: (
        f"{start} {SCHEDULE} --specialists 1 --rounds 5 --router-every 3 --lr 1e-2 --data {corpus} {more}".split())


class Killed(BaseException):
    """As if by kill -9: nobody catches it."""


def cut(arguments: list[str], owner: object, name: str, call: int, after: bool = False) -> Path:
    """Begin a run, or continue it, and kill it when `owner.name` is called for the so-many-th time, or after that."""
    work, calls = getattr(owner, name), []

    def deadly(*arguments, **more):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = work(*arguments, **more)
        if len(calls) == call:
            raise Killed
        return result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            train.main([*arguments, "--out", "cut"])
    return CUT


def end(path: Path) -> tuple:
    """All that a run leaves, but for times and where it lies."""
    saved, result = state(path), json.loads((path / "result.json").read_text())
    for one in (saved, result):
        del one["seconds"]
    del saved["settings"]["out"], saved["settings"]["resume"]
    return saved, result, (path / "metrics.jsonl").read_text()


def whole(arguments: list[str]) -> tuple:
    assert train.main([*arguments, "--out", "whole"]) == 0
    return end(Path("whole"))


def resumed() -> tuple:
    assert train.main(["--resume", "--out", "cut"]) == 0
    return end(CUT)


def refusal(capsys, *arguments: str) -> str:
    """The one line that a command is answered with."""
    capsys.readouterr()
    assert train.main([*arguments]) == 2
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(("more", "start", "moment"), [
    ("--method comigs-leaky", SHAPE, (User, "learn", 11)),  # between two users of the fourth round
    ("--method centralized", SHAPE, (User, "learn", 4)),
    ("--method pcl", LORA, (User, "learn", 11)),
    ("--method hetlora --lr 0.1", LORA, (User, "learn", 14)),
    ("--method fdlora", LORA, (train, "write_json", 1)),  # before result.json, which needs the users' gates
    *(("--participation 0.7 --drop-rate 0.3 --specialists 0,1,3", SHAPE, moment) for moment in (
        (User, "learn", 1), (Server, "take", 3, True), (os, "fsync", 3, True),  # in the middle of a checkpoint
        (Folder, "save", 1), (Folder, "save", 2)))])  # behind an evaluation's lines
def test_whatever_the_method_and_whenever_it_is_cut_off_a_run_ends_with_the_same_bits(more, start, moment, flags):
    expected, path = whole(flags(more, start)), cut(flags(more, start), *moment)
    if "hetlora" in more:  # somebody has pruned itself
        assert min(len(user["parameters"]["blocks.0.attention.qkv.change.A"]) for user in state(path)["users"]) < 8
    assert same(resumed(), expected)


def test_noise_and_refused_answers_are_continued_too(flags, monkeypatch, capsys):
    answer, arguments = User.answer, flags("--clip-update 0.05 --dp-noise 0.5")
    monkeypatch.setattr(User, "answer", lambda user: {
        name: tensor / (user.name != "bert") for name, tensor in answer(user).items()})  # bert's aren't finite
    expected = whole(arguments)
    assert "round 3: the answer of user bert was refused: " in capsys.readouterr().err
    assert expected[1]["refused"] == 5
    cut(arguments, User, "learn", 11)
    assert same(resumed(), expected)


def test_half_a_line_and_later_lines_are_forgotten_and_earlier_seconds_count(flags):
    expected, path = whole(flags()), cut(flags(), Folder, "save", 3)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"round": 5, "us')
    torch.save(state(path) | {"seconds": 1000.0}, path / "checkpoint.pt")
    assert same(resumed(), expected)
    assert min(state(path)["seconds"], json.loads((path / "result.json").read_text())["seconds"]) >= 1000


def flipped(raw: bytes) -> bytes:
    """With another bit in its middle."""
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1:]


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: b"", flipped])
def test_a_damaged_checkpoint_is_recognised_and_never_takes_the_place_of_a_whole_one(flags, capsys, damage):
    expected, path = whole(flags()), cut(flags(), User, "learn", 14)
    (path / "checkpoint.pt").write_bytes(damage((path / "checkpoint.pt").read_bytes()))
    cut(["--resume"], Folder, "save", 1, True)
    assert "checkpoint.pt is damaged; trying the one before it" in capsys.readouterr().err
    assert [torch.load(path / f"{name}.pt", weights_only=True)["round"] for name in ("previous", "checkpoint")] == [2, 4]
    assert same(resumed(), expected)
    for file in (*path.glob("*.pt"), path / "result.json"):
        file.write_bytes(b"damaged") if file.suffix == ".pt" else file.unlink()
    assert train.main(["--resume", "--out", "cut"]) == 2
    assert "holds no whole checkpoint; start anew with --overwrite" in capsys.readouterr().err


def test_at_every_moment_a_whole_file_is_there_the_old_one_or_the_new(flags, monkeypatch):
    saving, rounds, replace = train.Run(folder.settings_of([*flags(), "--out", "cut"])).folder, [], os.replace

    def watched(*paths):
        rounds.append(folder.newest(CUT)["round"])
        replace(*paths)
        rounds.append(folder.newest(CUT)["round"])
    saving.save({"round": 0})
    with monkeypatch.context() as context:
        context.setattr(os, "replace", watched)
        for number in (1, 2):
            saving.save({"round": number})
    assert sorted(rounds) == rounds
    assert {*rounds} == {0, 1, 2}

    def half(path):
        path.write_text("ne")
        raise Killed
    with pytest.raises(Killed):
        write(CUT / "config.json", half)
    assert "settings" in json.loads((CUT / "config.json").read_text())
    assert {path.name for path in CUT.iterdir()} == {"config.json", "lock", "checkpoint.pt", "previous.pt"}


@pytest.mark.parametrize(("often", "rounds"), [(1, 3), (2, 2)])
def test_ctrl_c_ends_after_the_round_and_a_second_one_at_once(often, rounds, flags, monkeypatch, capsys):
    expected, learn, calls = whole(flags()), User.learn, []

    def interrupted(user, rhythm):
        calls.append(1)
        if len(calls) == 8:  # in the third round, which isn't evaluated
            for _ in range(often):
                signal.raise_signal(signal.SIGINT)
        return learn(user, rhythm)
    with monkeypatch.context() as context:
        context.setattr(User, "learn", interrupted)
        assert train.main([*flags(), "--out", "cut"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train.py: stopped; continue with: python train.py --resume --out cut")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state(CUT)["round"] == rounds
    assert same(resumed(), expected)


def test_a_run_that_is_killed_for_real_is_continued(flags):
    """kill -9, once it has written its second checkpoint."""
    arguments = flags("--rounds 40")
    process = subprocess.Popen([sys.executable, train.__file__, *arguments, "--out", "cut"], stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (CUT / "previous.pt").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (CUT / "result.json").exists()
    assert same(resumed(), whole(arguments))


@pytest.mark.parametrize(("more", "message"), [
    ("--lr 1e-3", "--lr 0.001: the run in cut has 0.01; leave it out, or start anew with --overwrite"),
    ("--specialists 1,2,3", "--specialists 1,2,3: the run in cut has .1, 1, 1.; leave it out"),
    ("--overwrite", "--resume.*: not together with --overwrite"), ("--nonsense", "--nonsense: not known")])
def test_a_run_is_continued_with_its_own_settings_only(flags, capsys, more, message):
    cut(flags(), User, "learn", 5)
    assert re.search(message, refusal(capsys, "--resume", "--out", "cut", *more.split()))
    assert folder.settings_of("--resume --out cut --lr 0.01 --users 3".split()).lr == 0.01


def test_what_cant_be_continued_is_one_line(flags, capsys, corpus):
    assert "--resume: which run? give its folder with --out" in refusal(capsys, "--resume")
    assert "holds no run to continue" in refusal(capsys, "--resume", "--out", "nowhere")
    whole(flags(start=LORA))
    again = ("--resume", "--out", "whole")
    assert "has ended; --overwrite starts anew" in refusal(capsys, *again)
    Path("whole/result.json").unlink()
    with open(f"{corpus}/anna.txt", "a") as file:
        file.write("more text")
    assert "--data: is no longer what the run" in refusal(capsys, *again)
    base = torch.load("base.pt", weights_only=True)
    base["model"]["wte.weight"] += 1
    torch.save(base, "base.pt")
    assert "--init-from: is no longer what the run" in refusal(capsys, *again)


@pytest.mark.parametrize(("file", "content"), [
    ("metrics.jsonl", "{\n"), ("metrics.jsonl", None), ("config.json", "["), ("config.json", "[]"),
    ("config.json", '{"format": 1}'), ("checkpoint.pt", {"format": 1}), ("checkpoint.pt", [2])])
def test_a_folder_that_is_damaged_or_of_another_format_is_one_line(flags, capsys, file, content):
    path = cut(flags(), User, "learn", 8) / file
    path.unlink()
    if isinstance(content, str):
        path.write_text(content)
    elif content:
        torch.save(content, path)
    assert re.search(f"--out cut: {file} is .*; start anew with --overwrite", refusal(capsys, "--resume", "--out", "cut"))


def test_a_state_that_lacks_something_isnt_called_damaged_but_is_a_mistake_in_the_program(flags):
    saved = state(cut(flags(), User, "learn", 8))
    del saved["users"][1]["gradients"]
    torch.save(saved, CUT / "checkpoint.pt")
    with pytest.raises(KeyError, match="gradients"):
        train.main(["--resume", "--out", "cut"])


def test_a_full_disk_is_one_line(flags, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "checkpoint.pt")
    monkeypatch.setattr(torch, "save", full)
    assert train.main([*flags(), "--out", "cut"]) == 2
    assert capsys.readouterr().err.endswith("train.py: checkpoint.pt: No space left on device; check the disk\n")


def test_a_folder_in_which_another_run_works_is_refused(flags):
    other = train.Run(folder.settings_of([*flags(), "--out", "cut"]))
    for how in ("--overwrite", "--resume"):
        with pytest.raises(BadInput, match="another process works in it; wait, or take another folder"):
            train.Run(folder.settings_of([*flags(), "--out", "cut", how]))
    del other
    assert train.main([*flags(), "--out", "cut", "--overwrite"]) == 0
