"""Comparisons: what is run, what is chosen on which text, and what the tables say."""

import csv
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import compare
import train
from conftest import TINY, refusal
from lab import experiments
from methods import METHODS
from support.errors import Diverged
from support.report.intervals import behind, paired_interval, t_quantile
from support.report.tables import (
    PROTOCOLS,
    Row,
    all_tables,
    clear_winners,
    costs,
    curves,
    lags,
    latex,
    markdown,
    summarize,
    table,
)
from support.runs.command_line import parsed

SHORT = f"{' '.join(TINY)} --rounds 1 --specialists 1 --data text"


@pytest.fixture
def compared(corpus, no_report, monkeypatch):
    """Run compare.py on the tiny corpus, without reports. Returns its exit status."""

    def run(more: str = "") -> int:
        command = f"compare.py --methods comigs,local --seeds 2 --out out {SHORT} {more}"
        monkeypatch.setattr("sys.argv", command.split())
        return compare.main()

    return run


def result(method: str, rate: float, seed: int) -> dict:
    return json.loads(Path(f"out/{method}-lr{rate}-seed{seed}/result.json").read_text())


def records(path: str) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_all_results(compared):
    assert compared() == 0
    runs = [result("comigs", 0.006, seed) for seed in (0, 1)]
    text = Path("out/table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| comigs |")][:2]
    for line, name in zip(lines, ("mean_test_ppl_local", "mean_test_ppl"), strict=True):
        mean = sum(run[name] for run in runs) / 2
        assert f"{mean:.2f} ±" in line
    for part in ("anna", "no training", "trigram", "Text: text, target: own.", "2 seeds", "hurt: "):
        assert part in text
    assert "local & 0.006 &" in Path("out/table.tex").read_text()
    for name in ("test_ppl", "test_ppl_local"):
        found = [float(row[name]) for row in records("out/table.csv") if row["row"] == "comigs"]
        assert found == [user[name] for run in runs for user in run["users"]]
    assert {row["user"] for row in records("out/curves.csv")} == {"anna", "bert", "cleo"}


def test_a_run_that_is_there_isnt_repeated_wherever_it_is_now(compared, monkeypatch):
    assert compared() == 0
    text = Path("out/table.md").read_text()
    monkeypatch.setattr("federated.User.local_update", None)  # it would fail
    assert compared() == compared("--overwrite") == 0
    Path("out").rename("kept")
    assert compared("--out kept") == 0
    assert Path("kept/table.md").read_text() == text


def test_a_run_that_was_cut_off_is_resumed_and_other_settings_are_refused(compared, capsys):
    assert compared() == 0
    before = result("local", 0.006, 1)["users"]
    Path("out/local-lr0.006-seed1/result.json").unlink()
    assert compared() == 0
    assert result("local", 0.006, 1)["users"] == before
    assert compared("--local-steps 3") == 2
    assert "holds a run" in capsys.readouterr().err


def test_a_run_of_other_code_is_reported_and_anew_repeats_it(compared, monkeypatch, capsys):
    assert compared() == 0
    monkeypatch.setattr("compare.code_digest", lambda method: "other")
    monkeypatch.setattr("support.runs.folder.code_digest", lambda method: "other")
    capsys.readouterr()
    assert compared() == 0
    assert "4 of these 4 runs were made by other code" in capsys.readouterr().err
    assert compared("--anew") == 0
    capsys.readouterr()
    assert compared() == 0
    assert "code" not in capsys.readouterr().err


def test_a_run_isnt_taken_for_one_with_other_hyper_parameters_of_its_row(
    compared, monkeypatch, capsys
):
    assert compared("--methods pfedmoe --seeds 1") == 0
    row = replace(METHODS["pfedmoe"], hyper={"balance": 0.9})
    monkeypatch.setitem(METHODS, "pfedmoe", row)
    assert compared("--methods pfedmoe --seeds 1") == 2
    assert "holds a run" in capsys.readouterr().err


def test_a_run_with_other_text_under_the_same_name_is_reported(compared, corpus, capsys):
    assert compared("--methods comigs") == 0
    (Path(corpus) / "anna.txt").write_text("another text " * 300)
    capsys.readouterr()
    assert compared("--methods comigs,local") == 0
    assert "some of these runs had other text" in capsys.readouterr().err


def test_each_method_gets_the_rate_that_is_best_on_validation_text_of_the_first_seed(compared):
    """A rate that diverges isn't chosen."""
    assert compared("--rates 1e-4,1e-2,1e30") == 0
    for method, row in json.loads(Path("out/table.json").read_text()).items():
        expected = {"1e+30": None}
        for rate in (0.0001, 0.01):
            expected[str(rate)] = result(method, rate, 0)["mean_valid_ppl"]
        assert row["valid_ppl_by_choice"] == expected
        best = min(("0.0001", "0.01"), key=expected.get)
        assert row["choice"] == best
        second_seed = [path.name for path in Path("out").glob(f"{method}-*-seed1")]
        assert second_seed == [f"{method}-lr{best}-seed1"]


def test_if_all_rates_diverge_the_command_is_refused(compared):
    assert compared("--rates 1e30") == 2


def test_a_run_that_diverges_is_reported_and_the_others_make_the_table(
    compared, monkeypatch, capsys
):
    play = train.Run.play

    def diverging(run, bar):
        if run.settings.method == "local" and run.settings.seed == 1:
            raise Diverged("`lr` 0.006: the loss has grown")
        return play(run, bar)

    monkeypatch.setattr(train.Run, "play", diverging)
    assert compared() == 0
    assert "local, seed 1: --lr 0.006: the loss has grown" in capsys.readouterr().err
    rows = json.loads(Path("out/table.json").read_text())
    assert len(rows["comigs"]["measured"]["averaged"]["mean"]) == 2
    assert rows["local (1 of 2 seeds)"]["seeds"] == [0]


def fake_run(folder: Path, seed: int, *perplexities: float, **settings: str) -> Path:
    """The folder of a run with a user for each perplexity; before the last average it was half."""
    folder.mkdir()
    users = []
    for i, perplexity in enumerate(perplexities):
        parameters = {"backbone": 1000, "generalist": 10 * (i + 1), "specialist": 5, "router": 1}
        users.append(
            {
                "name": f"u{i}",
                "test_ppl": perplexity,
                "test_ppl_local": perplexity / 2,
                "test_ppl_start": 9.0,
                "trigram_ppl": 8.0,
                "parameters": parameters,
            }
        )
    mean = sum(perplexities) / len(perplexities)
    usual = {"method": "comigs", "experts_see": "train", "target": "own"}
    config = {"settings": usual | settings, "texts": [["u0", "a digest"]]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(
        json.dumps(
            {
                "users": users,
                "mean_test_ppl": mean,
                "mean_test_ppl_local": mean / 2,
                "bytes_up": 400,
                "bytes_down": 800,
                "rounds": 10,
                "seconds": 3.0,
                "seed": seed,
            }
        )
    )
    lines = []
    for number, loss in ((0, 3.0), (0, 5.0), (10, 1.0), (10, 2.0)):
        lines.append(json.dumps({"round": number, "valid_loss": loss}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_a_row_worked_by_hand(tmp_path):
    ours = [fake_run(tmp_path / "a", 0, 2.0, 6.0), fake_run(tmp_path / "b", 1, 4.0, 8.0)]
    local = [fake_run(tmp_path / "d", 1, 5.0, 9.0), fake_run(tmp_path / "c", 0, 3.0, 5.0)]
    row = summarize(ours, {"0.1": 7.0, "0.2": 6.0}, local)
    assert row.choice == "0.2"
    averaged = row.measured["averaged"]
    assert averaged.users == {"u0": [2, 4], "u1": [6, 8]}
    assert row.measured["local"].users == {"u0": [1, 2], "u1": [3, 4]}
    assert averaged.mean == [4, 6]
    assert row.measured["local"].mean == [2, 3]
    assert averaged.worst == [6, 8]
    assert averaged.hurt == 0.25  # one of four: 6 against 5
    assert row.trained == 21
    assert row.sent == 15
    assert row.bytes_up == 20
    assert row.bytes_down == 40
    assert row.valid_loss_by_round == {0: 4.0, 10: 1.5}
    cells = table({"ours": row}, "averaged")
    assert [line[0] for line in cells] == ["", "ours", "no training", "trigram"]
    means = ["3.00 ± 1.41", "7.00 ± 1.41", "**5.00 ± 1.41**"]
    assert cells[1] == ["ours", "0.2", *means, "first", "7.00 ± 1.41", "25%"]
    assert costs({"ours": row})[1] == ["ours", "21", "15", "0", "0", "3"]
    assert summarize(ours, {"0.2": 6.0}, []).measured["averaged"].hurt is None
    assert curves({"ours": row})[1] == ["ours", "4.000", "1.500"]


# --- intervals, and who is first


def test_a_paired_interval_worked_by_hand():
    """Differences 1, 2, 3: mean 2, s = 1, t = 4.303 with two degrees of freedom."""
    interval = paired_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.low == pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3)
    assert interval.high == pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3)
    assert interval.is_level
    assert not paired_interval([2.0, 2.1, 2.2]).is_level
    assert paired_interval([2.0]) == (2.0, -math.inf, math.inf)


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (3, 3.182), (11, 2.201), (100, 1.984)])
def test_quantiles_of_students_t_are_those_of_the_tables(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, abs=1e-3)


def test_how_far_a_row_is_behind_is_paired_by_seed_and_user():
    """0.4 in each pair, 10 % of the mean. A pair that one row lacks is left out."""
    theirs = {(0, "a"): 2.0, (0, "b"): 4.0, (1, "a"): 6.0}
    ours = {pair: ppl + 0.4 for pair, ppl in theirs.items()} | {(1, "b"): 999.0}
    assert behind(ours, theirs) == pytest.approx((0.1, 0.1, 0.1))


def winners(rows: dict[str, Row], protocol: str) -> list[str]:
    return clear_winners(rows, lags(rows, protocol))


def row_of(folder: Path, *by_seed: tuple, **more) -> Row:
    folder.mkdir()
    runs = []
    for seed, perplexities in enumerate(by_seed):
        runs.append(fake_run(folder / str(seed), seed, *perplexities, **more))
    return summarize(runs, {"0.1": 1.0}, [])


def test_the_first_mean_is_bold_only_if_no_other_row_is_level(tmp_path):
    """Rows whose experts learn from more text are never first."""
    best = row_of(tmp_path / "best", (2.0, 4.0), (2.02, 4.02))
    near = row_of(tmp_path / "near", (2.1, 3.95), (2.0, 4.1))
    far = row_of(tmp_path / "far", (3.0, 6.0), (3.1, 6.1))
    cheats = {
        "centralized": row_of(tmp_path / "pooled", (1.0, 1.0), (1.0, 1.0), method="centralized"),
        "leaky": row_of(tmp_path / "leaky", (1.0, 1.0), (1.0, 1.0), method="comigs-leaky"),
        "both": row_of(tmp_path / "both", (1.0, 1.0), (1.0, 1.0), experts_see="both"),
    }
    for protocol in PROTOCOLS:
        rows = {"far": far, "best": best} | cheats
        assert winners(rows, protocol) == ["best"]
        assert lags(rows, protocol)["best"] is None
        assert lags(rows, protocol)["far"].low > 0.1
        assert lags(rows, protocol)["both"].high < 0
        rows["near"] = near
        assert winners(rows, protocol) == []
        assert table(rows, protocol)[-3][5].startswith("level: ")
    assert table(rows, "averaged")[2][4:6] == ["3.01 ± 0.01", "first"]


def test_a_row_that_lacks_seeds_isnt_first_but_can_prevent_a_clear_first_place(tmp_path):
    whole = row_of(tmp_path / "whole", (2.1, 4.1), (1.0, 1.0))
    lacks = row_of(tmp_path / "lacks", (0.5, 0.5))
    rows = {"whole": whole, "lacks": lacks}
    assert lags(rows, "averaged")["whole"] is None
    assert lags(rows, "averaged")["lacks"].mean == pytest.approx(-2.6 / 3.1)
    assert winners(rows, "averaged") == []


def test_if_all_rows_learn_from_more_text_one_of_them_is_first_but_not_if_level(tmp_path):
    one = row_of(tmp_path / "one", (2.0, 4.0), (2.0, 4.0), experts_see="both")
    near = row_of(tmp_path / "near", (2.1, 3.95), (2.0, 4.1), experts_see="both")
    far = row_of(tmp_path / "far", (3.0, 5.0), (3.1, 5.0), experts_see="both")
    assert winners({"one": one, "far": far}, "averaged") == ["one"]
    assert winners({"one": one, "near": near}, "averaged") == []


def test_a_single_pair_is_always_level(tmp_path):
    rows = {}
    for name, ppl in (("one", 2.0), ("far", 9.0)):
        rows[name] = row_of(tmp_path / name, (ppl, ppl), target="mixed")
    assert winners(rows, "averaged") == []
    assert table(rows, "averaged")[2][5] == "level: +350.0 % (one pair)"


def test_with_a_mixed_target_a_pair_is_the_mean_over_users_of_a_seed(tmp_path):
    row = row_of(tmp_path / "a", (1.0, 4.0), (2.0, 8.0), target="mixed")
    assert row.scores("averaged") == {(0, "all users"): 2.5, (1, "all users"): 5.0}


def test_rows_are_compared_with_rows_of_the_same_text_only(tmp_path):
    little = row_of(tmp_path / "little", (9.0, 9.0))
    little.texts = [["u0", "another digest"]]
    much = row_of(tmp_path / "much", (2.0, 2.0))
    intervals = lags({"little": little, "much": much}, "averaged")
    assert intervals == {"little": None, "much": None}


def test_runs_that_were_not_tested_locally_stand_beside_others(tmp_path):
    """Kept runs of an earlier version: their table by that protocol is left out."""
    kept = fake_run(tmp_path / "kept", 0, 2.0, 4.0)
    result = json.loads((kept / "result.json").read_text())
    result["mean_test_ppl_local"] = None
    for user in result["users"]:
        user["test_ppl_local"] = None
    (kept / "result.json").write_text(json.dumps(result))
    new = summarize([fake_run(tmp_path / "new", 0, 3.0, 5.0)], {"0.1": 1.0}, [kept])
    assert new.measured["local"].hurt is None
    assert new.measured["averaged"].hurt == 1.0
    rows = {"kept": summarize([kept], {"0.1": 1.0}, []), "new": new}
    assert [title.split(":")[0] for title in all_tables(rows)] == ["averaged", "costs"]


def test_markdown_and_latex():
    assert markdown([["", "a"], ["b", "c"]]) == "|  | a |\n| --- | --- |\n| b | c |"
    assert r"50\% \& a\_b & 1 $\pm$ 2 \\" in latex([["", "a"], ["50% & a_b", "1 ± 2"]], "")
    assert r"\textbf{1.00}" in latex([["", "a"], ["b", "**1.00**"]], "")


def test_a_plot_is_a_picture(compared):
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed")
    assert compared("--plot") == 0
    assert Path("out/table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong",
    [
        "--methods comigs,,local",
        "--seeds 0",
        "--rates 1e-3,x",
        "--nonsense 1",
        "--resume",
        "--rounds 0",
        "--method a",
        "--method=fedavg",
        "--rates 1e-3 --experts-see both",
        "--plot",
        "--sweep mu=1",
        "--sweep mu",
        "--sweep mu=1,",
        "--set mu=nan",
    ],
)
def test_bad_input_is_one_line_before_anything_is_run(wrong, compared, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refusal(capsys, wrong, compared)
    flag = re.match("--[a-z]+", wrong)[0]
    assert re.match(f"compare.py: {flag}.*; [a-z-]", line)
    assert not Path("out").exists()


COMMON = (
    "rounds",
    "local_steps",
    "batch_size",
    "block_size",
    "users",
    "router_every",
    "router_steps",
    "target",
    "data",
    "init_from",
    "warmup",
    "weight_decay",
)


def base_of(init_from: str) -> experiments.Base:
    if init_from == "smollm2":
        return experiments.SMOLLM2
    return experiments.SCRATCH if init_from == "scratch" else experiments.BYTES


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_rows_of_an_experiment_differ_only_in_what_it_asks(name):
    rows = [parsed(row.split()) for row in experiments.EXPERIMENTS[name][1].values()]
    base = base_of(rows[0].init_from)
    for setting in COMMON:
        assert len({getattr(row, setting) for row in rows}) == 1, setting
    for row in rows:
        assert row.lr == base.other_rates.get(row.method, base.rate)
        if row.valid_kb:
            assert [4 * kb for kb in row.valid_kb] == list(row.train_kb)
    assert "comigs" in {row.method for row in rows}


@pytest.mark.parametrize("name", ["more", "less", "E-more", "E-less"])
def test_devices_of_different_size_have_as_many_parameters_in_all_rows(name):
    """To within 3 %, without the routers; per layer and unit of rank."""
    for flags in experiments.EXPERIMENTS[name][1].values():
        row = parsed(flags.split())
        attention, expert = (2688, 6336) if row.init_from == "smollm2" else (6, 10)
        for i, (S, rank) in enumerate(zip(row.specialists, row.lora_rank, strict=True)):
            expected = 8 * attention + 8 * (1 + 2**i) * expert
            found = rank * (attention + (row.generalists + S) * expert)
            assert found == pytest.approx(expected, rel=0.03)


def test_an_experiment_is_one_command(corpus, monkeypatch, capsys):
    base = experiments.Base(SHORT, 6e-3)
    rows = {
        "comigs": base.flags_of("comigs"),
        "local 2 S": base.flags_of("local", "--specialists 2"),
    }
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", ("a title", rows))
    assert experiments.main("tiny --out tiny --seeds 1".split()) == 0
    assert json.loads(Path("tiny/table.json").read_text()).keys() == rows.keys()
    folders = {path.parent.name for path in Path("tiny").glob("*/page.html")}
    assert folders == {"comigs-lr0.006-seed0", "local-2-S-lr0.006-seed0"}
    assert experiments.main([]) == experiments.main(["--help"]) == 0
    assert capsys.readouterr().out.count("a title") == 3
    assert "expected one of languages" in refusal(capsys, ["nonsense"], experiments.main)
    assert "--method: " in refusal(capsys, "tiny --method local".split(), experiments.main)
