"""Text from a run's models: they are the ones that were tested, and what is printed is what they make."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import data
import sample
import train
from support.runs.folder import Learned
from tiny import tiny

SCRATCH, LOW_RANK = "--n-layer 1 --n-embd 16 --n-head 2", "--init-from base.pt --expert lora"
USUAL = "--users 3 --rounds 2 --local-steps 2 --router-every 2 --router-steps 1 --batch-size 2 --block-size 8 --out run"


def run(corpus: str, base: dict, method: str = "comigs", start: str = LOW_RANK) -> None:
    """Play a run in the folder "run"."""
    torch.save(base, "base.pt")
    assert train.main(f"{start} {USUAL} --method {method} --data {corpus}".split()) == 0


@pytest.mark.parametrize("method", ["comigs", "centralized", "pcl", "fdlora", "hetlora", "flexlora", "ffa-lora"])
def test_the_models_of_a_checkpoint_are_those_that_were_tested(corpus, tiny_base, method):
    run(corpus, tiny_base, method, SCRATCH if method in ("comigs", "centralized") else LOW_RANK)
    opened = sample.open_run("run")
    rows = json.loads(Path("run/result.json").read_text())["users"]
    assert [*opened.texts] == [row["name"] for row in rows] == ["anna", "bert", "cleo"]
    for (user, text), row in zip(opened.readers, rows, strict=True):
        assert opened.perplexity(user, text.test) == pytest.approx(row["test_ppl"], rel=1e-6)
    assert sample.main(["--run", "run", "--html", "new/again.html"]) == 0
    assert Path("new/again.html").read_bytes() == Path("run/page.html").read_bytes()


def test_flags_reach_the_model_and_the_seed_decides(corpus, tiny_base, capsys):
    def said(flags: str) -> str:
        capsys.readouterr()
        assert sample.main(f"--run run --tokens 40 {flags}".split()) == 0
        return capsys.readouterr().out
    run(corpus, tiny_base)
    one, same, other = (said(f"--prompt naïve --seed {seed}") for seed in (1, 1, 2))
    assert one == same != other
    assert one.startswith("naïve")
    assert said("--prompt=")
    likeliest = ("--temperature 0", "--temperature 0 --seed 7 --user anna", "--top-k 1", "--temperature 1e-40")
    assert len(set(map(said, likeliest))) == 1
    assert re.fullmatch("anna:\n123.*\n\nbert:\n123.*\n\ncleo:\n123.*", said("--user all --prompt 123"), re.S)


def test_what_is_sampled_is_said_half_characters_included_and_the_tokenizer_has_it(monkeypatch):
    assert set(map(int, sample.stream(tiny(), torch.zeros(1, 1).long(), 60, 9.0, vocabulary=3))) == {0, 1, 2}
    stream = Mock(return_value=map(torch.tensor, [0xC3, 0xA9, 0xFF, 0xC3, 256, 0xA9, 65]))
    monkeypatch.setattr(sample, "stream", stream)
    user, sampling = Learned("a", None, "gates"), sample.Sampling("run", prompt="!")
    assert "|".join(sample.continued(user, sampling, data.tokenizer("bytes"))) == "!||é|\ufffd||\ufffd\n\n|\ufffd|A"
    assert [stream.call_args.kwargs[name] for name in ("vocabulary", "gates")] == [257, "gates"]


def test_bad_input_is_one_line_and_status_2(corpus, tiny_base, capsys):
    def refused(flags: str, message: str) -> None:
        capsys.readouterr()
        assert sample.main(flags.split()) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    run(corpus, tiny_base)
    refused("", "--run out: holds no checkpoint.pt; give the folder of a run")
    refused("--run no", "--run no: holds no checkpoint.pt; give the folder of a run")
    refused("--run .", "--run .: holds no checkpoint.pt; give the folder of a run, such as run")
    for flag in ("--user zoe", "--temperature -1.0", "--top-k 0", f"--seed {2 ** 64}", "--html ."):
        refused(f"--run run {flag}", f"{flag}: ")
    for damaged in (Path("run/result.json"), Path("run/metrics.jsonl")):
        damaged.write_text("{\n")
        refused("--run run --html page.html", "--html page.html: ")
        damaged.unlink()
    (Path(corpus) / "anna.txt").write_text("another text " * 300)
    refused("--run run --html page.html", "has changed; restore it")
    torch.save(tiny_base | {"model": tiny_base["model"] | {"ln_f.bias": torch.ones(16)}}, "base.pt")
    refused("--run run", "base.pt is no longer the file that it started from")
    for checkpoint in Path("run").glob("*.pt"):
        checkpoint.write_bytes(b"no checkpoint")
    refused("--run run", "holds no whole checkpoint")
