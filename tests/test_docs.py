"""The documents keep up with the code: their commands parse, their names exist, their links lead somewhere."""

import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
import train
from lab import bench, experiments, pretrain, words
from methods import METHODS
from sample import Sampling
from support.settings import Settings, parsed
from test_train import TINY

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text().replace("\\\n", "") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
COMMANDS = sorted({found for page in PAGES.values() for found in re.findall(
    r"(?:python|torchrun .*?) ((?:train|compare|sample)\.py\b|-m lab\.\w+)([^`\n]*)", page)})
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES["guide.md"], re.DOTALL)


def test_the_readme_is_short_and_names_every_file_and_room():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000
    rooms = {path.parent.name for kind in ("py", "md") for path in ROOT.glob(f"*/*.{kind}")}
    files = "model bilevel federated methods data train sample compare".split()  # a method of one's own may stand there
    names = {f"{file}.py" for file in files} | {f"{room}/" for room in rooms if room[0].isalpha()}
    assert names == set(re.findall(r"^\| `(\w+(?:\.py|/))` \|", PAGES["README.md"], re.MULTILINE))
    assert {f"{file}.py" for file in files} <= {path.name for path in ROOT.glob("*.py")}


def test_ten_rows_lead_from_the_paper_to_functions_that_exist():
    names = re.findall(r"^\| .* \| `(\w+\.[\w.]+)` \|$", PAGES["README.md"], re.MULTILINE)
    assert (len(names), [name for name in names if not callable(pkgutil.resolve_name(name))]) == (10, [])


@pytest.mark.parametrize(("command", "rest"), COMMANDS)
def test_a_command_in_the_documents_parses(command, rest):
    arguments = [each for each in shlex.split(rest, comments=True) if each != "--help"]
    kinds = {"train.py": Settings, "sample.py": Sampling, "-m lab.pretrain": pretrain.Pretraining,
             "-m lab.words": words.Words}
    if command in kinds:
        assert parsed(arguments, kinds[command])
    elif command == "compare.py":
        comparison, more = compare.split(arguments, compare.OfMethods)
        assert [parsed([*more, "--method", method]) for method in comparison.methods]
    elif command == "-m lab.experiments" and arguments:
        _, more = compare.split(arguments[1:], compare.Comparison)
        rows = experiments.EXPERIMENTS[arguments[0]][1].values()
        assert [parsed([*row.split(), *more]) for row in rows]
    else:
        assert command in ("-m lab.experiments", "-m lab.bench", "-m lab.play", "-m lab.languages")
        assert command != "-m lab.bench" or all(hasattr(bench, f"bench_{what}") for what in arguments)


def test_every_method_and_every_experiment_is_told():
    assert set(METHODS) == set(re.findall(r"^\| `([\w-]+)` \|(?:[^|]+\|){3}$", PAGES["results.md"], re.MULTILINE))
    told = PAGES["results.md"] + PAGES["tables.md"]
    assert all(f"python -m lab.experiments {name}" in told for name in experiments.EXPERIMENTS)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for file, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        path = (ROOT / ("" if page == "README.md" else "docs") / (file or page)).resolve()
        titles = re.findall(r"^#+ (.+)$", path.read_text() if heading else "", re.MULTILINE)
        assert path.exists(), file
        assert heading in ["", *(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)]


def test_the_guides_three_lines_say_how_good_each_model_is_on_each_text(corpus, capsys):
    block, = (block for block in BLOCKS if "open_run" in block)
    assert train.main([*TINY, "--data", "text", "--out", "out/NAME"]) == 0
    capsys.readouterr()
    exec(block, {})
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert [len(row) for row in rows] == [4, 4, 4]
    result = json.loads(Path("out/NAME/result.json").read_text())["users"]
    assert [(row[0], float(row[i + 1])) for i, row in enumerate(rows)] == [
        (user["name"], round(user["test_ppl"], 2)) for user in result]


def test_the_guides_own_method_trains_and_takes_the_median(tmp_path, corpus, monkeypatch):
    (tmp_path / "median.py").write_text(next(block for block in BLOCKS if "class Median" in block))
    flags = f"--method median --data {corpus} --users 3 --rounds 2 --local-steps 2 --n-layer 1 --n-embd 8 --out run"
    subprocess.run([sys.executable, "median.py", *flags.split()], check=True, capture_output=True, timeout=120,
                   env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert json.loads((tmp_path / "run" / "result.json").read_text())["method"] == "median"
    monkeypatch.setitem(METHODS, "median", None)  # so that the row is gone after this test
    server = runpy.run_path("median.py")["Median"]({})
    for answers, median in (([1.0, 1e9, 2.0], 2.0), ([1.0, 1e9, 2.0, 4.0], 3.0)):
        merged = server.merge([{"a": torch.tensor([answer])} for answer in answers], [1.0] * len(answers))
        assert merged["a"].item() == median
