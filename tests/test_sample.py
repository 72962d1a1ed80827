"""Text from a run's models: they are the models that were tested, and their tokens are printed."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import data
import sample
import train
from support.runs.checkpoint import TrainedUser
from tiny import tiny

SCRATCH = "--n-layer 1 --n-embd 16 --n-head 2"
LORA = "--init-from base.pt --expert lora"
SCHEDULE = (
    "--users 3 --rounds 2 --local-steps 2 --router-every 2 --router-steps 1 "
    "--batch-size 2 --block-size 8 --out run"
)


@pytest.fixture
def play(corpus, tiny_base):
    """Play a run in the folder "run"."""
    torch.save(tiny_base, "base.pt")

    def run(method: str = "comigs", start: str = LORA) -> None:
        flags = f"{start} {SCHEDULE} --method {method} --data {corpus}"
        assert train.main(flags.split()) == 0

    return run


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("comigs", SCRATCH),
        ("centralized", SCRATCH),
        ("pcl", LORA),
        ("fdlora", LORA),
        ("hetlora", LORA),
        ("ffa-lora", LORA),
    ],
)
def test_the_models_of_a_checkpoint_are_the_ones_that_were_tested(play, method, start):
    """And the report is written again to the byte."""
    play(method, start)
    run = sample.open_run("run")
    rows = json.loads(Path("run/result.json").read_text())["users"]
    assert list(run.texts) == [row["name"] for row in rows] == ["anna", "bert", "cleo"]
    for (user, text), row in zip(run.readers, rows, strict=True):
        assert run.perplexity(user, text.test) == pytest.approx(row["test_ppl"], rel=1e-6)
    assert sample.main(["--run", "run", "--html", "new/again.html"]) == 0
    assert Path("new/again.html").read_bytes() == Path("run/page.html").read_bytes()


def test_flags_reach_the_model_and_the_seed_decides(play, capsys):
    def printed(flags: str) -> str:
        capsys.readouterr()
        assert sample.main(f"--run run --tokens 40 {flags}".split()) == 0
        return capsys.readouterr().out

    play()
    one = printed("--prompt naïve --seed 1")
    assert one.startswith("naïve")
    assert printed("--prompt naïve --seed 1") == one
    assert printed("--prompt naïve --seed 2") != one
    likeliest = printed("--temperature 0")
    for flags in ("--temperature 0 --seed 7 --user anna", "--top-k 1", "--temperature 1e-40"):
        assert printed(flags) == likeliest
    all_users = printed("--user all --prompt 123")
    assert re.fullmatch("anna:\n123.*\n\nbert:\n123.*\n\ncleo:\n123.*", all_users, re.DOTALL)


def test_generated_text_includes_half_characters_and_ends_of_documents(monkeypatch):
    tokens = [0xC3, 0xA9, 0xFF, 0xC3, 256, 0xA9, 65]
    stream = Mock(return_value=map(torch.tensor, tokens))
    monkeypatch.setattr(sample, "stream", stream)
    user = TrainedUser("a", tiny(), "gates")
    parts = sample.generated(user, sample.Sampling("run", prompt="!"), data.tokenizer("bytes"))
    assert "|".join(parts) == "!||é|\ufffd||\ufffd\n\n|\ufffd|A"
    assert stream.call_args.kwargs["vocabulary"] == 257
    assert stream.call_args.kwargs["fixed_gates"] == "gates"


def test_bad_input_is_one_line_and_status_2(play, corpus, capsys):
    def refused(flags: str, message: str) -> None:
        capsys.readouterr()
        assert sample.main(flags.split()) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    play()
    refused("", "--run out: holds no checkpoint.pt; expected the folder of a run")
    refused("--run .", "--run .: holds no checkpoint.pt; expected the folder of a run, such as run")
    for flag in ("--user zoe", "--temperature -1.0", "--top-k 0", f"--seed {2**64}", "--html ."):
        refused(f"--run run {flag}", f"{flag}: ")
    Path("run/result.json").write_text("{\n")
    refused("--run run --html page.html", "--html page.html: ")
    (Path(corpus) / "anna.txt").write_text("another text " * 300)
    refused("--run run --html page.html", "has changed; restore it")


def test_a_run_whose_base_or_checkpoint_was_replaced_is_refused(play, tiny_base, capsys):
    play()
    changed = tiny_base["model"] | {"ln_f.bias": torch.ones(16)}
    torch.save(tiny_base | {"model": changed}, "base.pt")
    assert sample.main(["--run", "run"]) == 2
    assert "base.pt is no longer the file" in capsys.readouterr().err
    Path("run/checkpoint.pt").write_bytes(b"no checkpoint")
    assert sample.main(["--run", "run"]) == 2
    assert "checkpoint.pt is damaged" in capsys.readouterr().err
