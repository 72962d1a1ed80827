"""A run that is cut off goes on, and ends bit for bit where it would have ended."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

import federated
import files
import runs
import train
from corpora import BadInput
from test_train import same

SHAPE = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "8"]
SCHEDULE = ["--users", "3", "--rounds", "5", "--local-steps", "2", "--router-every", "3", "--router-steps", "1",
            "--batch-size", "2", "--eval-every", "2", "--lr", "1e-2"]


class Killed(BaseException):
    """As if by kill -9: nobody catches it."""


@pytest.fixture
def flags(corpus, tmp_path, tiny_base):
    """A command line for a method, without --out, with low-rank experts on a base if the method is about them."""
    def of(method: str = "comigs", *more: str) -> list[str]:
        start = SHAPE
        if method not in ("comigs", "comigs-leaky", "centralized"):
            torch.save(tiny_base, tmp_path / "base.pt")
            start = ["--init-from", str(tmp_path / "base.pt"), "--expert", "lora", "--block-size", "8"]
        return [*start, *SCHEDULE, "--method", method, "--data", corpus, *more]
    return of


def end(folder) -> tuple:
    """All that a run leaves, but for times and where it lies."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    result = json.loads((folder / "result.json").read_text())
    for one in (state, result):
        del one["seconds"]
    state["settings"] = {name: value for name, value in state["settings"].items() if name not in ("out", "resume")}
    return state, result, (folder / "metrics.jsonl").read_text()


def is_same(one: tuple, two: tuple) -> bool:
    return all(same(a, b) for a, b in zip(one, two, strict=True))


def cut_off(monkeypatch, arguments: list[str], owner: object, name: str, call: int, after: bool = False) -> None:
    """Begin a run, whose end is a function, before or after it has done its work, when it is called so often."""
    work, calls = getattr(owner, name), []

    def deadly(*arguments, **more):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = work(*arguments, **more)
        if len(calls) == call:
            raise Killed
        return result
    with monkeypatch.context() as context:
        context.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            train.main(arguments)


@pytest.mark.parametrize("method", ["comigs", "comigs-leaky", "pcl", "fdlora", "hetlora", "flexlora", "centralized"])
def test_whatever_the_method_a_run_goes_on_to_the_same_bits(flags, tmp_path, monkeypatch, method):
    """Cut off in the middle of the fourth round."""
    arguments = flags(method)
    assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    cut_off(monkeypatch, [*arguments, "--out", str(tmp_path / "cut")], federated.User, "learn",
            4 if method == "centralized" else 11)
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 0
    assert is_same(end(tmp_path / "cut"), end(tmp_path / "whole"))


@pytest.mark.parametrize(("owner", "name", "call", "after"), [
    (federated.User, "learn", 1, False),  # before the first round
    (federated.User, "answer", 3, True),  # between users
    (federated.Server, "combine", 3, True),
    (runs, "save", 1, False),  # behind the lines of an evaluation, before its checkpoint
    (runs, "save", 2, False),
    (torch, "save", 2, False),  # in the middle of a checkpoint
    (os, "fsync", 3, True),  # a checkpoint is written, but the last one not yet renamed
    (os, "replace", 8, True),
    (files.os, "replace", 9, False),
    (train, "write_json", 1, False),  # before result.json
])
def test_whenever_it_is_cut_off_a_run_goes_on_to_the_same_bits(flags, tmp_path, monkeypatch, owner, name, call, after):
    arguments = flags("comigs", "--participation", "0.7", "--drop-rate", "0.3")
    assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    cut_off(monkeypatch, [*arguments, "--out", str(tmp_path / "cut")], owner, name, call, after)
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 0
    assert is_same(end(tmp_path / "cut"), end(tmp_path / "whole"))


def test_a_half_written_line_and_later_lines_are_forgotten(flags, tmp_path, monkeypatch):
    assert train.main([*flags(), "--out", str(tmp_path / "whole")]) == 0
    cut_off(monkeypatch, [*flags(), "--out", str(tmp_path / "cut")], runs, "save", 3)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"round": 5, "us')
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 0
    assert is_same(end(tmp_path / "cut"), end(tmp_path / "whole"))


def flipped(raw: bytes) -> bytes:
    """With another bit in its middle."""
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1:]


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: bytes(100), flipped])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_used(flags, tmp_path, monkeypatch, capsys, damage):
    assert train.main([*flags(), "--out", str(tmp_path / "whole")]) == 0
    cut_off(monkeypatch, [*flags(), "--out", str(tmp_path / "cut")], federated.User, "learn", 14)
    file = tmp_path / "cut" / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 0
    assert "checkpoint.pt is damaged; trying the one before it" in capsys.readouterr().err
    assert is_same(end(tmp_path / "cut"), end(tmp_path / "whole"))
    assert runs.newest(tmp_path / "cut")["round"] == 5
    with zipfile.ZipFile(tmp_path / "cut" / "previous.pt") as archive:  # never the damaged one
        assert archive.testzip() is None
    for name in ("checkpoint.pt", "previous.pt"):
        (tmp_path / "cut" / name).write_bytes(b"damaged")
    (tmp_path / "cut" / "result.json").unlink()
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 2
    assert "holds no checkpoint that is whole; start anew with --overwrite" in capsys.readouterr().err


def test_ctrl_c_ends_after_a_checkpoint_and_says_how_to_go_on(flags, tmp_path, monkeypatch, capsys):
    assert train.main([*flags(), "--out", str(tmp_path / "whole")]) == 0
    learn, calls = federated.User.learn, []

    def interrupted(user, plan):
        calls.append(1)
        if len(calls) == 8:  # in the third round, which isn't evaluated
            signal.raise_signal(signal.SIGINT)
        return learn(user, plan)
    with monkeypatch.context() as context:
        context.setattr(federated.User, "learn", interrupted)
        assert train.main([*flags(), "--out", str(tmp_path / "cut")]) == 130
    assert len(calls) == 9
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"train.py: stopped; go on with: python train.py --resume --out {tmp_path / 'cut'}")
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 0
    assert is_same(end(tmp_path / "cut"), end(tmp_path / "whole"))


def test_a_run_that_is_killed_for_real_goes_on(flags, tmp_path):
    """kill -9, once it has written its second checkpoint."""
    arguments = flags("comigs", "--rounds", "30")
    assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    process = subprocess.Popen([sys.executable, train.__file__, *arguments, "--out", str(tmp_path / "cut")],
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "previous.pt").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 0
    assert is_same(end(tmp_path / "cut"), end(tmp_path / "whole"))


@pytest.mark.parametrize(("more", "message"), [
    (["--lr", "1e-3"], "--lr 0.001: the run in .* has 0.01; leave it out, or start anew with --overwrite"),
    (["--specialists", "1,2,3"], "--specialists 1,2,3: the run in .* has .1, 1, 1.; leave it out"),
    (["--overwrite"], "--resume: can't be along with --overwrite"),
    (["--rounds", "0"], "--rounds 0: not possible"),
    (["--nonsense"], "--nonsense: not known"),
])
def test_other_settings_are_refused(flags, tmp_path, monkeypatch, more, message):
    cut_off(monkeypatch, [*flags(), "--out", str(tmp_path / "cut")], federated.User, "learn", 5)
    with pytest.raises(BadInput, match=message):
        train.settings_of(["--resume", "--out", str(tmp_path / "cut"), *more])
    train.settings_of(["--resume", "--out", str(tmp_path / "cut"), "--lr", "0.01", "--users", "3"])


def test_resuming_nothing_or_what_is_through_or_has_other_text_is_one_line(flags, tmp_path, capsys, corpus):
    def refusal(*arguments: str) -> str:
        capsys.readouterr()
        assert train.main([*arguments]) == 2
        line, = capsys.readouterr().err.splitlines()
        return line
    assert "--resume: goes on with which run? give the folder with --out" in refusal("--resume")
    assert "holds no run to go on with" in refusal("--resume", "--out", str(tmp_path / "nowhere"))
    assert train.main([*flags(), "--out", str(tmp_path / "run")]) == 0
    assert "is through; --overwrite starts anew" in refusal("--resume", "--out", str(tmp_path / "run"))
    (tmp_path / "run" / "result.json").unlink()
    with open(f"{corpus}/anna.txt", "a") as file:
        file.write("more text")
    assert "--data: isn't any more what the run" in refusal("--resume", "--out", str(tmp_path / "run"))


def test_a_checkpoint_of_another_version_is_one_line(flags, tmp_path, monkeypatch, capsys):
    cut_off(monkeypatch, [*flags(), "--out", str(tmp_path / "cut")], federated.User, "learn", 5)
    state = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    del state["users"][1]["gradients"]
    torch.save(state, tmp_path / "cut" / "checkpoint.pt")
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 2
    assert "is damaged or of another version" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "content"), [
    ("metrics.jsonl", "{\n"), ("metrics.jsonl", None), ("config.json", "{}"), ("config.json", "["),
    ("config.json", '{"settings": {"nonsense": 1}}'), ("config.json", None)])
def test_a_damaged_folder_is_one_line(flags, tmp_path, monkeypatch, capsys, file, content):
    cut_off(monkeypatch, [*flags(), "--out", str(tmp_path / "cut")], federated.User, "learn", 8)
    if content is None:
        (tmp_path / "cut" / file).unlink()
    else:
        (tmp_path / "cut" / file).write_text(content)
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_full_disk_is_one_line(flags, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "checkpoint.pt")
    monkeypatch.setattr(runs, "save", full)
    assert train.main([*flags(), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(
        "train.py: checkpoint.pt: No space left on device; check the disk")


def test_a_folder_in_which_another_process_works_is_refused(flags, tmp_path):
    code = f"""
import sys, time
sys.path[:0] = {sys.path}
import train
train.Run.play = lambda *_: (print("working", flush=True), time.sleep(60))
train.main({[*flags(), "--out", str(tmp_path / "run")]})"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert other.stdout.readline() == "working\n"
    for how in ("--overwrite", "--resume"):
        with pytest.raises(BadInput, match="another process is at work in it; wait, or take another folder"):
            train.Run(train.settings_of([*flags(), "--out", str(tmp_path / "run"), how]))
    other.kill()
    other.wait()
    other.stdout.close()
    assert train.main([*flags(), "--out", str(tmp_path / "run"), "--overwrite"]) == 0


def test_who_is_called_and_who_vanishes_is_drawn_anew_each_round_and_the_same_again(flags, tmp_path):
    arguments = flags("comigs", "--participation", "0.67", "--drop-rate", "0.5")
    run = train.Run(train.settings_of([*arguments, "--out", str(tmp_path / "run")]))
    rounds = [run.called(number) for number in range(1, 200)]
    assert all(len(called) == 2 for called, _ in rounds)
    assert len({tuple(user.name for user in called) for called, _ in rounds}) == 3
    assert sum(len(lost) for _, lost in rounds) / 398 == pytest.approx(0.5, abs=0.1)
    assert rounds == [run.called(number) for number in range(1, 200)]


def test_what_is_refused_is_said_and_counted(flags, tmp_path, monkeypatch, capsys):
    answer = federated.User.answer

    def poisoned(user):
        message = answer(user)
        return {name: tensor * torch.nan for name, tensor in message.items()} if user.name == "bert" else message
    monkeypatch.setattr(federated.User, "answer", poisoned)
    assert train.main([*flags(), "--out", str(tmp_path / "run")]) == 0
    assert "round 3: the answer of user bert was refused: " in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["refused"] == 5
