"""Comparisons: what is run, what is chosen by which text, and what the tables say."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest

import compare
import train
from conftest import TINY, refusal
from lab import experiments
from support.errors import Diverged
from support.report.tables import curves, latex, markdown, summarize, table
from support.runs import folder
from support.runs.command_line import parsed

SHORT = f"{' '.join(TINY)} --rounds 1 --specialists 1 --data text"


@pytest.fixture
def compared(corpus, monkeypatch):
    """Runs compare.py on the tiny corpus, without pages: its exit status."""
    monkeypatch.setattr(train.Run, "show", lambda run: None)

    def run(more: str = "") -> int:
        monkeypatch.setattr("sys.argv", f"compare.py --methods comigs,local --seeds 2 --out out {SHORT} {more}".split())
        return compare.main()
    return run


def result(method: str, rate: float, seed: int) -> dict:
    return json.loads(Path(f"out/{method}-lr{rate}-seed{seed}/result.json").read_text())


def test_what_is_there_isnt_run_again_what_was_cut_off_is_and_other_settings_are_refused(compared, monkeypatch, capsys):
    assert compared() == 0
    runs, text = [result("local", 0.006, seed) for seed in (0, 1)], Path("out/table.md").read_text()
    assert f"{sum(run['mean_test_ppl'] for run in runs) / 2:.2f} ±" in text.splitlines()[3]
    assert all(name in text for name in ("anna", "bert", "cleo", "no training", "trigram"))
    assert all(name in text for name in ("Text: text, target: own.", "2 seeds", "hurt: "))
    ends, way = (list(csv.DictReader(Path("out", file).read_text().splitlines()[1:]))
                 for file in ("table.csv", "curves.csv"))
    assert [float(end["test_ppl"]) for end in ends if end["row"] == "local"] == [
        user["test_ppl"] for run in runs for user in run["users"]]
    assert {point["user"] for point in way} == {"anna", "bert", "cleo"}
    assert "local & 0.006 &" in Path("out/table.tex").read_text()
    monkeypatch.setattr("federated.User.learn", None)  # nothing is missing any more
    assert compared() == compared("--overwrite") == 0
    Path("out").rename("kept")
    assert compared("--out kept") == 0  # wherever they are now
    assert Path("kept/table.md").read_text() == text
    Path("kept").rename("out")
    Path("out/local-lr0.006-seed1/result.json").unlink()  # cut off after its last checkpoint
    assert compared() == 0
    assert result("local", 0.006, 1)["users"] == runs[1]["users"]
    assert compared("--local-steps 3") == 2
    assert "holds a run" in capsys.readouterr().err


def test_a_run_of_other_code_is_kept_with_a_word_or_made_anew(compared, monkeypatch, capsys):
    assert compared() == 0
    monkeypatch.setattr("compare.code", lambda: "other")
    monkeypatch.setattr("support.folder.code", lambda: "other")
    capsys.readouterr()
    assert compared() == 0
    assert "4 of these 4 runs are the work of other code; --anew makes them again" in capsys.readouterr().err
    assert compared("--anew") == 0
    capsys.readouterr()
    assert compared() == 0
    assert "code" not in capsys.readouterr().err


def test_a_run_that_read_other_text_under_the_same_name_is_told(compared, corpus, capsys):
    assert compared("--methods comigs") == 0
    (Path(corpus) / "anna.txt").write_text("another text " * 300)
    capsys.readouterr()
    assert compared("--methods comigs,local") == 0
    assert "some of these runs read other text" in capsys.readouterr().err


def test_the_digest_of_the_code_is_of_what_it_does(tmp_path, monkeypatch):
    def digest(source: str) -> str:
        for name in folder.DECIDING:
            (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}.py").write_text(source)
        return folder.code()
    monkeypatch.setattr(folder, "__file__", str(tmp_path / "support" / "folder.py"))
    one = digest('"""One."""\ndef f():\n    """One."""\n    return 1  # one\n')
    assert one == digest('"""Two."""\n\ndef f():\n    """Two."""\n    return 1\n')
    assert one != digest('"""One."""\ndef f():\n    """One."""\n    return 2  # one\n')


def test_each_method_gets_the_rate_that_is_best_on_validation_text_of_the_first_seed(compared):
    """One that diverges isn't chosen, and stops nothing, if there is another."""
    assert compared("--rates 1e-4,1e-2,1e30") == 0
    for method, row in json.loads(Path("out/table.json").read_text()).items():
        tried = {str(rate): result(method, rate, 0)["mean_valid_ppl"] for rate in (0.0001, 0.01)}
        assert row["valid_ppl_by_choice"] == tried | {"1e+30": None}
        assert row["choice"] == min(tried, key=tried.get)
        assert [path.name for path in Path("out").glob(f"{method}-*-seed1")] == [f"{method}-lr{row['choice']}-seed1"]
    assert compared("--rates 1e30") == 2


def test_a_run_that_diverges_is_named_and_the_others_make_the_table(compared, monkeypatch, capsys):
    def diverging(run, bar):
        if run.settings.method == "local" and run.settings.seed == 1:
            raise Diverged("`lr` 0.006: the loss has grown")
        return play(run, bar)
    play = train.Run.play
    monkeypatch.setattr(train.Run, "play", diverging)
    assert compared() == 0
    assert "local, seed 1: --lr 0.006: the loss has grown" in capsys.readouterr().err
    rows = json.loads(Path("out/table.json").read_text())
    assert {label: len(row["mean"]) for label, row in rows.items()} == {"comigs": 2, "local (1 of 2 seeds)": 1}


def fake_run(folder, seed: int, *ppls) -> object:
    folder.mkdir()
    users = [{"name": f"u{i}", "test_ppl": ppl, "test_ppl_start": 9.0, "trigram_ppl": 8.0, "parameters": {
        "backbone": 1000, "generalist": 10 * (i + 1), "specialist": 5, "router": 1}} for i, ppl in enumerate(ppls)]
    (folder / "result.json").write_text(json.dumps({
        "users": users, "mean_test_ppl": sum(ppls) / len(ppls), "bytes_up": 400, "bytes_down": 800, "rounds": 10,
        "seconds": 3.0, "seed": seed}))
    lines = [{"round": round, "valid_loss": loss} for round, loss in ((0, 3.0), (0, 5.0), (10, 1.0), (10, 2.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_row_worked_by_hand(tmp_path):
    ours = [fake_run(tmp_path / "a", 0, 2.0, 6.0), fake_run(tmp_path / "b", 1, 4.0, 8.0)]
    local = [fake_run(tmp_path / "d", 1, 5.0, 9.0), fake_run(tmp_path / "c", 0, 3.0, 5.0)]
    row = summarize(ours, {"0.1": 7.0, "0.2": 6.0}, local)
    assert row | {"choice": "0.2", "users": {"u0": [2, 4], "u1": [6, 8]}, "mean": [4, 6], "worst": [6, 8],
                  "hurt": 0.25,  # one of four: 6 against 5
                  "trained": 21, "sent": 15, "bytes_up": 20, "bytes_down": 40,  # means over users; and rounds
                  "valid_loss_by_round": {0: 4.0, 10: 1.5}} == row
    assert summarize(ours, {0.2: 6.0}, None)["hurt"] is None
    (_, ours, *others), both = table({"ours": row}), table({"ours": row, "other": row | {"trigram": [1.0, 2.0]}})
    assert ([cells[0] for cells in others], both[-1][0]) == (["no training", "trigram"], "no training")
    assert ours[:9] == "ours|0.2|3.00 ± 1.41|7.00 ± 1.41|5.00 ± 1.41|7.00 ± 1.41|25%|21|15".split("|")
    assert markdown([["", "a"], ["b", "c"]]) == "|  | a |\n| --- | --- |\n| b | c |"
    assert r"50\% \& a\_b & 1 $\pm$ 2 \\" in latex([["", "a"], ["50% & a_b", "1 ± 2"]], "")
    assert curves({"ours": row}).splitlines()[2] == "| ours | 4.000 | 1.500 |"


def test_a_plot_is_a_picture(compared):
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed")
    assert compared("--plot") == 0
    assert Path("out/table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [
    "--methods comigs,,local", "--seeds 0", "--rates 1e-3,x", "--nonsense 1", "--resume", "--rounds 0", "--method a",
    "--method=fedavg", "--rates 1e-3 --experts-see both", "--plot", "--sweep mu=1",
    "--sweep mu", "--sweep mu=1,", "--set mu=nan"])  # --plot without matplotlib
def test_bad_input_is_one_line_before_anything_is_run(wrong, compared, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refusal(capsys, wrong, compared)
    assert re.match(f"compare.py: {re.match('--[a-z]+', wrong)[0]}.*; [a-z-]", line)
    assert not Path("out").exists()


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_in_an_experiment_only_what_it_asks_about_differs(name):
    """Where devices differ, users have as many parameters in all rows, to within 3 %, but for the routers."""
    rows = [parsed(row.split()) for row in experiments.EXPERIMENTS[name][1].values()]
    base = {"smollm2": experiments.SMOLLM2, "scratch": experiments.SCRATCH}.get(rows[0].init_from, experiments.BYTES)
    for same in ("rounds", "local_steps", "batch_size", "block_size", "users", "router_every", "router_steps", "target",
                 "data", "init_from", "warmup", "weight_decay"):
        assert len({getattr(row, same) for row in rows}) == 1, same
    for row in rows:
        assert row.lr == base.others.get(row.method, base.rate)
        if row.valid_kb:
            assert [4 * kB for kB in row.valid_kb] == list(row.train_kb)
        if name in ("more", "less", "E-more", "E-less"):
            attention, expert = (2688, 6336) if base is experiments.SMOLLM2 else (6, 10)
            for i, (S, rank) in enumerate(zip(row.specialists, row.lora_rank, strict=True)):
                ours = 8 * attention + 8 * (1 + 2 ** i) * expert
                assert rank * (attention + (row.generalists + S) * expert) == pytest.approx(ours, rel=0.03)
    assert "comigs" in {row.method for row in rows}


def test_an_experiment_is_one_command(corpus, monkeypatch, capsys):
    base = experiments.Base(SHORT, 6e-3, {})
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", ("a title", {
        "comigs": base.run("comigs"), "local 2 S": base.run("local", "--specialists 2")}))
    assert experiments.main("tiny --out tiny --seeds 1".split()) == 0
    assert json.loads(Path("tiny/table.json").read_text()).keys() == {"comigs", "local 2 S"}
    assert {path.parent.name for path in Path("tiny").glob("*/page.html")} == {
        "comigs-lr0.006-seed0", "local-2-S-lr0.006-seed0"}
    assert experiments.main([]) == experiments.main(["--help"]) == 0
    assert capsys.readouterr().out.count("a title") == 3
    assert "the first word is one of languages" in refusal(capsys, ["nonsense"], experiments.main)
    assert "--method: the rows" in refusal(capsys, "tiny --method local".split(), experiments.main)
