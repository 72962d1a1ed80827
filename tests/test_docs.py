"""The documents keep up with the code: their commands parse, their names exist, their links lead somewhere."""

import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch

import compare
import methods
import train
from conftest import TINY
from lab import bench, experiments, pretrain, words
from methods import METHODS
from sample import Sampling
from support.runs.command_line import parsed
from support.runs.settings import Settings

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
def test_a_command_in_the_documents_parses(command, rest, own_methods):
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


def test_every_experiment_is_told_and_methods_that_are_told_exist():
    assert set(METHODS) >= set(re.findall(r"^\| `([\w-]+)` \|(?:[^|]+\|){3}$", PAGES["results.md"], re.MULTILINE))
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


@pytest.fixture
def own_methods(monkeypatch):
    """The guide's own methods, as if they stood at the end of methods.py. Gives what is defined there then."""
    for name in ("median", "fedprox"):
        monkeypatch.setitem(METHODS, name, None)  # so that the row is gone after the test
    there = dict(vars(methods))
    for block in BLOCKS:
        if "METHODS[" in block:
            exec(block, there)
    return there


def test_the_guides_server_takes_the_median_also_of_clipped_updates(own_methods, corpus):
    server = own_methods["Median"]({})
    for answers, median in (([1.0, 1e9, 2.0], 2.0), ([1.0, 1e9, 2.0, 4.0], 3.0)):
        merged = server.merge([{"a": torch.tensor([answer])} for answer in answers], [1.0] * len(answers))
        assert merged["a"].item() == median
    flags = [*TINY, "--data", "text", "--method", "median", "--out"]
    assert train.main([*flags, "free"]) == train.main([*flags, "clipped", "--clip-update", "0.001"]) == 0
    free, clipped = (json.loads(Path(out, "result.json").read_text()) for out in ("free", "clipped"))
    assert (free["method"], free["users"] != clipped["users"]) == ("median", True)


def test_the_guides_fedprox_is_comigs_without_its_weight_which_is_chosen_by_validation_text(own_methods, corpus):
    flags = [*TINY, *"--data text --specialists 1 --lr 1e-2 --local-steps 5".split()]
    comparison = compare.Comparison(1, sweep="mu=0,10", out="out")
    compare.compare({name: parsed([*flags, "--method", name]) for name in ("comigs", "fedprox")}, comparison)
    rows = json.loads(Path("out/table.json").read_text())
    comigs, fedprox = (rows[name]["valid_ppl_by_choice"] for name in ("comigs", "fedprox"))
    assert fedprox["0.01 mu=0.0"] == comigs["0.01"] != fedprox["0.01 mu=10.0"]
    assert rows["fedprox"]["choice"] == min(fedprox, key=fedprox.get)
