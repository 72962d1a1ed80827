"""The documents keep up with the code: commands parse, names exist, links lead somewhere."""

import inspect
import json
import pkgutil
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch

import compare
import federated
import methods
import model
import train
from conftest import TINY
from lab import experiments, pretrain, words
from methods import METHODS
from sample import Sampling
from support.runs.command_line import parsed
from support.runs.settings import Settings
from support.text.sources import PREPARED

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path.name: path.read_text().replace("\\\n", "") for path in FILES}
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES["guide.md"], re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Every command of the project in the documents, as (program, arguments)."""
    program = r"(?:train|compare|sample)\.py\b|-m lab\.\w+"
    found = set()
    for page in PAGES.values():
        found |= set(re.findall(rf"(?:python|uv run|torchrun .*?) ({program})([^`\n]*)", page))
    return sorted(found)


def test_the_readme_names_every_file_and_folder():
    folders = {path.parent.name for kind in ("py", "md") for path in ROOT.glob(f"*/*.{kind}")}
    files = {path.name for path in ROOT.glob("*.py")}
    expected = files | {f"{folder}/" for folder in folders if folder[0].isalpha()}
    named = set(re.findall(r"^\| `(\w+(?:\.py|/))` \|", PAGES["README.md"], re.MULTILINE))
    assert expected <= named | {"out/"}
    assert all((ROOT / name).exists() for name in named)


def test_ten_rows_lead_from_the_paper_to_functions_that_exist():
    names = re.findall(r"^\| .* \| `(\w+\.[\w.]+)` \|$", PAGES["README.md"], re.MULTILINE)
    assert len(names) == 10
    for name in names:
        assert callable(pkgutil.resolve_name(name))


def statements(code: str) -> str:
    """Code without docstrings, annotations' line breaks and indentation."""
    code = re.sub(r'"""(.*?)"""\n', "", code, flags=re.DOTALL)
    return re.sub(r"\s+", " ", textwrap.dedent(code)).strip()


def test_the_readme_quotes_the_round_and_the_tour_quotes_the_mixture():
    block = r"```python\ndef federated_round.*?:\n(.*?)```"
    (quoted,) = re.findall(block, PAGES["README.md"], re.DOTALL)
    assert statements(quoted) in statements(inspect.getsource(federated.federated_round))
    (quoted,) = re.findall(r"```python\n(.*?)```", PAGES["tour.md"], re.DOTALL)
    assert statements(quoted) in statements(inspect.getsource(model.MLPExperts.forward))


@pytest.mark.parametrize(("program", "rest"), commands())
def test_a_command_in_the_documents_parses(program, rest, own_methods):
    arguments = [word for word in shlex.split(rest, comments=True) if word != "--help"]
    kinds = {
        "train.py": Settings,
        "sample.py": Sampling,
        "-m lab.pretrain": pretrain.Pretraining,
        "-m lab.words": words.Words,
    }
    if program in kinds:
        assert parsed(arguments, kinds[program])
    elif program == "compare.py":
        comparison, more = compare.split(arguments, compare.OfMethods)
        for method in comparison.methods:
            assert parsed([*more, "--method", method])
    elif program == "-m lab.experiments" and arguments:
        _, more = compare.split(arguments[1:], compare.Comparison)
        for row in experiments.EXPERIMENTS[arguments[0]][1].values():
            assert parsed([*row.split(), *more])
    elif program == "-m lab.prepare" and arguments:
        assert arguments[0] in PREPARED
    else:
        assert program in ("-m lab.experiments", "-m lab.bench", "-m lab.play", "-m lab.prepare")


def test_every_experiment_has_its_command_and_every_method_named_in_the_results_exists():
    rows = re.findall(r"^\| `([\w-]+)` \|(?:[^|]+\|){3}$", PAGES["results.md"], re.MULTILINE)
    assert set(METHODS) >= set(rows)
    text = " ".join((PAGES["results.md"] + PAGES["tables.md"]).split())
    for name in experiments.EXPERIMENTS:
        assert f"python -m lab.experiments {name}" in text


def anchors(page: str) -> list[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for file, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        path = (folder / (file or page)).resolve()
        assert path.exists(), file
        if heading:
            assert heading in anchors(path.read_text()), heading


def test_the_guides_lines_print_how_good_each_model_is_on_each_text(corpus, capsys):
    (block,) = (block for block in BLOCKS if "open_run" in block)
    assert train.main([*TINY, "--data", "text", "--out", "out/NAME"]) == 0
    capsys.readouterr()
    exec(block, {})
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    users = json.loads(Path("out/NAME/result.json").read_text())["users"]
    assert len(rows) == len(users) == 3
    for i, (row, user) in enumerate(zip(rows, users, strict=True)):
        assert row[0] == user["name"]
        assert float(row[i + 1]) == round(user["test_ppl"], 2)


@pytest.fixture
def own_methods(monkeypatch):
    """The guide's methods, as if they stood at the end of methods.py. Returns its names."""
    for name in ("median", "fedprox"):
        monkeypatch.setitem(METHODS, name, None)  # so that the row is gone after the test
    names = dict(vars(methods))
    for block in BLOCKS:
        if "METHODS[" in block:
            exec(block, names)
    return names


def result_of(*flags: str) -> dict:
    """Run train.py on the tiny corpus. Returns its result.json."""
    assert train.main([*TINY, "--data", "text", "--out", "run", "--overwrite", *flags]) == 0
    return json.loads(Path("run/result.json").read_text())


def test_the_guides_server_takes_the_median_also_of_clipped_updates(own_methods, corpus):
    server = own_methods["Median"]({})
    for numbers, median in (([1.0, 1e9, 2.0], 2.0), ([1.0, 1e9, 2.0, 4.0], 3.0)):
        messages = [{"a": torch.tensor([number])} for number in numbers]
        assert server.merge(messages, [1.0] * len(messages))["a"].item() == median
    free = result_of("--method", "median")
    clipped = result_of("--method", "median", "--clip-update", "0.001")
    assert free["method"] == "median"
    assert free["users"] != clipped["users"]


def test_the_guides_fedprox_without_its_penalty_is_comigs_and_validation_text_chooses_the_weight(
    own_methods, corpus
):
    flags = [*TINY, *"--data text --specialists 1 --lr 1e-2 --local-steps 5".split()]
    comparison = compare.Comparison(1, sweep="mu=0,10", out="out")
    rows = {name: parsed([*flags, "--method", name]) for name in ("comigs", "fedprox")}
    compare.compare(rows, comparison)
    table = json.loads(Path("out/table.json").read_text())
    comigs = table["comigs"]["valid_ppl_by_choice"]
    fedprox = table["fedprox"]["valid_ppl_by_choice"]
    assert fedprox["0.01 mu=0.0"] == comigs["0.01"] != fedprox["0.01 mu=10.0"]
    assert table["fedprox"]["choice"] == min(fedprox, key=fedprox.get)
