"""Text from a run's models: they are the ones that were tested, and what is printed is what they make."""

import json
import math
from pathlib import Path

import pytest
import torch

import data
import sample
import train
from bilevel import evaluate
from corpora import BadInput
from model import GPT, GPTConfig

SHAPE = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "8"]
SCHEDULE = ["--users", "3", "--rounds", "2", "--local-steps", "2", "--router-every", "2", "--router-steps", "1",
            "--batch-size", "2", "--eval-every", "1"]


@pytest.fixture
def a_run(corpus, tmp_path, tiny_base):
    """Makes a run, with low-rank experts on a base of its own if the method is about them, and returns its folder."""
    def make(method: str = "comigs", *more: str):
        start = SHAPE
        if method not in ("comigs", "centralized"):
            torch.save(tiny_base, tmp_path / "base.pt")
            start = ["--init-from", str(tmp_path / "base.pt"), "--expert", "lora", "--block-size", "8"]
        arguments = [*start, *SCHEDULE, "--method", method, "--data", corpus, "--out", str(tmp_path / method), *more]
        assert train.main(arguments) == 0
        return tmp_path / method
    return make


@pytest.mark.parametrize("method", ["comigs", "centralized", "pcl", "fdlora", "hetlora", "flexlora", "ffa-lora"])
def test_the_models_of_a_checkpoint_are_those_that_were_tested(a_run, corpus, method):
    folder = a_run(method)
    result = json.loads((folder / "result.json").read_text())
    _, models = sample.load(folder)
    models = [model for _, model in models] * (3 if method == "centralized" else 1)
    for text, model, reported in zip(data.load(corpus, 3, block_size=8), models, result["users"], strict=True):
        loss, _ = evaluate(model, data.ordered_windows(text.test, 128, 8))
        assert math.exp(loss) == pytest.approx(reported["test_ppl"], rel=1e-6)


def said(capsys, *flags: str) -> str:
    capsys.readouterr()
    assert sample.main([*flags, "--tokens", "40"]) == 0
    return capsys.readouterr().out


def test_the_prompt_is_continued_and_the_seed_decides(a_run, capsys):
    folder = str(a_run())
    one, two, other = (said(capsys, "--run", folder, "--prompt", "naïve 1", "--seed", seed) for seed in ("1", "1", "2"))
    assert one == two != other
    assert one.startswith("naïve 1")
    assert len(one) > 30
    assert said(capsys, "--run", folder, "--user", "anna", "--temperature", "0") == said(
        capsys, "--run", folder, "--temperature", "0", "--seed", "7")


def test_flags_of_sampling_reach_the_model(a_run, capsys):
    folder = str(a_run())
    likeliest = said(capsys, "--run", folder, "--temperature", "0")
    assert said(capsys, "--run", folder, "--top-k", "1") == likeliest
    assert said(capsys, "--run", folder, "--temperature", "1e-40") == likeliest
    assert said(capsys, "--run", folder, "--temperature", "9") != said(capsys, "--run", folder, "--temperature", "0.1")


def test_tokens_that_the_tokenizer_doesnt_have_are_never_sampled():
    model = GPT(GPTConfig(vocab_size=300, block_size=8, n_layer=1, n_head=1, n_embd=4, specialists=0))
    tokens = torch.cat(list(model.stream(torch.zeros(1, 1).long(), 60, 5.0, vocabulary=3)))
    assert set(tokens.flatten().tolist()) == {0, 1, 2}


def test_the_page_of_pooled_text_shows_every_text_with_the_one_model(a_run):
    folder = a_run("centralized")
    assert sample.main(["--run", str(folder), "--html", "again.html"]) == 0
    assert Path("again.html").read_text() == (folder / "page.html").read_text()


@pytest.mark.parametrize("file", ["result.json", "metrics.jsonl"])
def test_a_damaged_run_folder_is_one_line(a_run, file, capsys):
    folder = a_run()
    (folder / file).write_text("{\n")
    capsys.readouterr()
    assert sample.main(["--run", str(folder), "--html", "page.html"]) == 2
    assert "--html page.html: " in capsys.readouterr().err
    assert list(Path().glob("page.html*")) == []


def test_all_users_stand_side_by_side_or_below_each_other(a_run, capsys, monkeypatch):
    folder = str(a_run())
    monkeypatch.setenv("COLUMNS", "40")
    assert said(capsys, "--run", folder, "--user", "all", "--prompt", "123").startswith("anna:\n123")
    monkeypatch.setenv("COLUMNS", "100")
    head, _, *lines = said(capsys, "--run", folder, "--user", "all", "--prompt", "123").splitlines()
    assert [name.strip() for name in head.split("│")] == ["anna", "bert", "cleo"]
    assert all(cell.startswith("123") for cell in lines[0].split(" │ "))


def test_new_text_is_what_the_model_samples_half_characters_and_ends_included(a_run):
    _, ((_, model), *_) = sample.load(a_run())
    encoding = data.tokenizer("bytes")
    tokens = [0xC3, 0xA9, 0xFF, 0xC3, 256, 0xA9, 65]
    model.stream = lambda *_, **more: (torch.tensor([[token]]) for token in tokens)
    parts = list(sample.continued(model, sample.Sampling(run="x", prompt="!"), encoding))
    assert parts == ["!", "", "é", "\ufffd", "", "\ufffd\n\n", "\ufffd", "A"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--run", "nowhere"], "--run nowhere: holds no checkpoint.pt"),
    ([], "--run: missing; give the folder of a run"),
    (["--run", "RUN", "--seed", "99999999999999999999"], "--seed 99999999999999999999"),
    (["--run", "RUN", "--html", "."], "--html .: "),
    (["--run", "RUN", "--user", "zoe"], "--user zoe: not in this run; give all, or one of anna, bert, cleo"),
    (["--run", "RUN", "--temperature", "-1"], "--temperature -1"),
    (["--run", "RUN", "--tokens", "0"], "--tokens 0"),
    (["--run", "RUN", "--top-k", "0"], "--top-k 0"),
    (["--run", "RUN", "--html", "nowhere/page.html"], "--html nowhere/page.html: [Errno 2] No such file"),
])
def test_bad_input_is_one_line_and_status_2(a_run, capsys, flags, message):
    flags = [str(a_run()) if flag == "RUN" else flag for flag in flags]
    capsys.readouterr()
    assert sample.main(flags) == 2
    line, = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_damaged_checkpoint_and_another_base_are_one_line(a_run, tmp_path, tiny_base):
    folder = a_run("ffa-lora")
    other = tiny_base["model"] | {"ln_f.bias": torch.ones(16)}
    torch.save(tiny_base | {"model": other}, tmp_path / "base.pt")
    with pytest.raises(BadInput, match="isn't the file any more that the run started from"):
        sample.load(folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"base": {"name": "scratch"}, "users": [{"config": {}}]}, folder / "checkpoint.pt")
    with pytest.raises(BadInput, match="its models can't be read"):
        sample.load(folder)
    (folder / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(BadInput, match="its models can't be read"):
        sample.load(folder)
