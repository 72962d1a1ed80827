"""Public corpora: what lab.prepare writes is what `--data` reads."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import data
from data import DataConfig
from lab import prepare
from support.text import sources
from support.text.sources import Document


def refusal(capsys, arguments: str) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert prepare.main(arguments.split()) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def news():
    """AG News in small: 40 articles in each of four topics."""
    rows = []
    for n in range(40):
        rows.append(f'"3","Oil rises {n}","Crude rose to  #36;45\\in New York &lt;CL.N&gt;."')
        rows.append(f'"4","NA","{n} #151; y"')
        rows.append(f'"1","A ""word"" {n}","He said #39;yes #39;."')
        rows.append(f'"2"," {n}","S amp;P \\$5 \\\\b hellip;"')
    Path("news.csv").write_text("\n".join(rows) + "\n")
    return Path("news.csv").resolve()


def test_ag_news_articles_are_cleaned_and_belong_to_their_topics(news):
    assert prepare.main(["agnews", "--source", str(news)]) == 0
    assert list(sources.read("agnews.jsonl"))[:4] == [
        Document("business", "Oil rises 0\nCrude rose to $45\nin New York <CL.N>."),
        Document("science", "NA\n0— y"),
        Document("world", "A \"word\" 0\nHe said'yes'."),
        Document("sports", " 0\nS&P $5 \nb…"),
    ]


def test_every_article_is_in_one_split(news):
    assert prepare.main(["agnews", "--source", str(news)]) == 0
    tokenizer = data.tokenizer("bytes")
    texts = data.load(DataConfig(data="agnews.jsonl", users=4, block_size=8), tokenizer)
    articles = list(sources.read("agnews.jsonl"))
    for text in texts:
        found = []
        for split in (text.train, text.valid, text.test):
            found += tokenizer.decode(split.tolist()).split(data.END)[1:]
        assert sorted(found) == sorted(doc.text for doc in articles if doc.user == text.name)


def test_a_file_can_come_from_an_address(news, monkeypatch):
    corpus = replace(prepare.CORPORA["agnews"], address=news.as_uri())
    monkeypatch.setitem(prepare.CORPORA, "agnews", corpus)
    assert prepare.main(["agnews"]) == 0
    assert len(list(sources.read("agnews.jsonl"))) == 160


def test_what_is_there_isnt_replaced_and_nothing_is_left_of_a_failure(news, capsys):
    Path("agnews.jsonl").write_text("precious")
    assert "exists" in refusal(capsys, f"agnews --source {news}")
    assert Path("agnews.jsonl").read_text() == "precious"
    assert "nowhere.csv" in refusal(capsys, "agnews --source nowhere.csv --out new.jsonl")
    assert not list(Path().glob("new.*"))


@pytest.mark.parametrize(
    "arguments",
    [
        "nonsense",
        "agnews --kb 0",
        "agnews --source file:///nowhere/x.csv --out a.jsonl",
        "languages",
        "languages --source nowhere --out l",
    ],
)
def test_bad_input_is_one_line_with_a_remedy(arguments, capsys):
    assert "; " in refusal(capsys, arguments)


def test_a_library_that_isnt_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(capsys, "wikipedia")


def test_a_data_set_is_streamed_only_as_far_as_needed(capsys):
    """Local files in the form of the hub; excerpts of 20,000 characters, copies once."""
    pytest.importorskip("datasets", reason="streams data sets; pip install datasets")
    values = list(prepare.CORPORA["commoncorpus"].users.values())
    Path("hub").mkdir()
    with open("hub/train.jsonl", "w") as file:
        for n in range(400):
            text = f"{n % 300} " * 300 + "x" * (40_000 if n == 7 else 0)
            file.write(json.dumps({"text": text, "collection": values[n % 4]}) + "\n")
    assert prepare.main("commoncorpus --source hub --kb 10".split()) == 0
    documents = list(sources.read("commoncorpus.jsonl"))
    for user in prepare.CORPORA["commoncorpus"].users:
        texts = [document.text for document in documents if document.user == user]
        size = sum(len(text) for text in texts)
        assert size >= 10_000
        assert size - len(texts[-1]) < 10_000
        assert len(set(texts)) == len(texts)
    assert max(len(document.text) for document in documents) <= 20_000


def test_a_section_of_the_guide_is_the_text_of_its_page():
    page = """<html><head><title>no</title></head><body>
        <div class="navheader"><div>no</div><p>no</p></div>
        <h2>Title</h2><p>Some   <em>more</em>\n text.</p><pre>a  b\n  c</pre>
        <ul><li>one</li></ul><hr></body></html>"""
    text = prepare.Section(page).text
    assert text.split() == "Title Some more text. a b c one".split()
    assert "a  b\n  c" in text  # blanks count in <pre>


def test_the_guide_becomes_a_folder_with_a_file_per_section():
    for language in ("de", "fr", "it", "nl"):
        folder = Path("debian/usr/share/doc/installation-guide-amd64", language)
        folder.mkdir(parents=True)
        (folder / "ch01.html").write_text(f"<body><p>{language} {'words ' * 100}</p></body>")
        (folder / "index.html").write_text(f"<body><p>{'contents ' * 100}</p></body>")
    assert prepare.main("languages --source debian".split()) == 0
    documents = list(sources.read("languages"))
    assert [document.user for document in documents] == ["de", "fr", "it", "nl"]
    assert documents[0].text.startswith("de words words")
