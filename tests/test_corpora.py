"""Where documents come from: every kind of source is read by the code that a run uses, and a bad one is one line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.text.corpora import CORPORA, EVERYTHING, Document

import data
from conftest import words
from support.errors import BadInput
from support.runs.settings import Settings
from support.text import corpora

CACHE = Path("out/cache")


def read(where: str, size: int = EVERYTHING, **how: object) -> list[Document]:
    return list(corpora.read(Settings(data=where, **how), size))


def load(where: str, users: int, **how: object) -> list[data.Text]:
    return data.load(Settings(data=where, users=users, **how), data.tokenizer("bytes"))


def refused(message: str, where: str, **how: object) -> None:
    """That a run can't be had is said in one line, with a remedy, and nothing is left of it."""
    with pytest.raises(BadInput, match=message) as error:
        load(where, 2, **how)
    assert "\n" not in str(error.value)
    assert "; " in str(error.value)
    assert len(str(error.value)) < 600
    assert not list(CACHE.glob("*"))


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_builtin_excerpts_are_the_beginnings_of_what_isnt_blank_each_only_once():
    long = "x" * corpora.EXCERPT
    assert list(corpora.excerpts(["a", " \n", long + "1", "b", "a", long + "2"])) == ["a", long, "b"]


def test_a_csv_file_with_quotes_commas_line_ends_and_a_byte_order_mark():
    content = 'who,what\r\nanna,"a ""quoted"" word, and\r\na second line"\r\nbert,ü\r\n'
    write({"a.csv": b"\xef\xbb\xbf" + content.encode()})
    assert read("a.csv", user_field="who", text_field="what") == [
        Document("anna", 'a "quoted" word, and\na second line'), Document("bert", "ü")]


def test_a_json_lines_file_with_numbers_for_names_nested_fields_windows_line_ends_and_half_a_character():
    rows = [{"meta": {"id": 7}, "text": "one\r\ntwo"}, {"meta": {"id": "x"}, "text": None},
            {"meta": {"id": "y"}, "text": "\ud800!"}]
    write({"a.jsonl": b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode() + b"\r\n\r\n"})
    assert read("a.jsonl", user_field="meta.id") == [
        Document("7", "one\ntwo"), Document("x", ""), Document("y", "?!")]


def test_a_folders_users_are_files_folders_and_given_splits():
    write({"t/b.txt": b"\xef\xbb\xbfone", "t/a/1.md": "two", "t/a/deep/2": "three", "t/c/train.txt": "x",
           "t/c/valid.txt": "y", "t/c/test.txt": "z", "t/.git/config": "hidden", "t/a/.git/x": "hidden", "t/n.md": "?"})
    assert sorted(read("t")) == [
        Document("a", "three"), Document("a", "two"), Document("b", "one"),
        Document("c", "x", "train"), Document("c", "y", "valid"), Document("c", "z", "test")]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("t/.x", "x", "`users` 2: `data` t has text of 0; add text"),
    ("t/a.txt", words(0, 5000), "has text of 1; take `users` 1, or add"),
    ("t/a.txt", b"caf\xe9 " * 100, "a.txt: is not UTF-8; convert"),
    ("t/a.txt", "Grüße".encode("utf-16"), "a.txt: is not UTF-8"),
    ("t/here/x", "x", "rename one"),  # beside here.txt
    ("t/a/test.txt", "x", "holds test.txt but not all of .*; give all three"),
    ("t/ a/x", "x", "' a' can't be a user's name"),
    ("t.jsonl", '{"text": "x"}\n', "row 1: has no field user but text; name one: `user_field`"),
    ("t.jsonl", '{"user": "a", "body": "x"}\n', "has no field text but user, body; .*`text_field`"),
    ("t.jsonl", '["user", "text"]\n', "row 1: has no field user"),
    ("t.jsonl", '{"user": {"a": 1}, "text": "x"}', "can't be a user's name"),
    ("t.jsonl", '{"user": "a", "text": 5}\n', "row 1: its text .*; correct"),
    ("t.jsonl", '{"user": "a", "text": "x"}\n{"user": "a", "te', "t.jsonl: row 2 .*; correct it"),
    ("t.jsonl", "[" * 100_000, "t.jsonl: row 1 .*; correct it"),
    ("t.jsonl", b'{"user": "a", "text": "x"}\n{"user": "a", "text": "\xe9"}\n', "is not UTF-8"),
    *(("t.jsonl", lines({"user": user, "text": "x"}), f"t.jsonl, row 1: '{shown}' can't be a user's name; rename it")
      for user, shown in [("../b", "../b"), ("..", r"\.\."), ("/etc/x", "/etc/x"), ("", ""), ("a\nb", r"a\\nb"),
                          ("a\u2028b", r"a\\u2028b"), ("x" * 101, "x{40}")]),
    ("t.csv", "user,text\na,Grüße\n".encode() + b"b,Gr\xfc\xdfe\n", "is not UTF-8"),  # mixed encodings
    ("t.csv", 'user,text\na,"no end\nb,x\n', "t.csv: row 1 .*; correct it"),
    ("t.csv", "user,text\na,one, two\n", "row 1 .*more fields than the first row.*; correct it"),
    ("t.csv", "user,text\na," + "x" * 17_000_000, "row 1 .*field larger than.*; correct it"),
    ("t.txt", "text", "not a folder, nor a .csv or .jsonl file; give one, or one of builtin,"),
])
def test_bad_text_is_one_line(name, content, message):
    write({name: content} | ({"t/here.txt": "x"} if "here" in name else {}))
    refused(message, name.partition("/")[0])


@pytest.fixture
def library():
    return pytest.importorskip("datasets", reason="streams the paper's corpora; pip install datasets")


@pytest.fixture
def news():
    """AG News in small: 40 articles a class."""
    write({"news.csv": "".join(
        f'"3","Oil rises {n}","Crude rose to  #36;45 a barrel\\in New York &lt;CL.N&gt;."\n"4","NA","{n} #151; y"\n'
        f'"1","A ""word"" {n}","He said #39;yes #39;."\n"2"," {n}","S amp;P \\$5 \\\\b hellip;"\n' for n in range(40))})
    return Path("news.csv").resolve()


def test_ag_news_articles_are_cleaned_given_to_their_topics_user_and_stand_in_one_split(news):
    documents = read("agnews", source=str(news))
    assert documents[:4] == [
        Document("business", "Oil rises 0\nCrude rose to $45 a barrel\nin New York <CL.N>."),
        Document("science", "NA\n0— y"),
        Document("world", 'A "word" 0\nHe said\'yes\'.'), Document("sports", " 0\nS&P $5 \nb…")]
    for user in load("agnews", 4, source=str(news), block_size=8):
        splits = [data.tokenizer("bytes").decode(part.tolist()).split(data.END)[1:]
                  for part in (user.valid, user.test, user.train)]
        articles = {text for name, text, _ in documents if name == user.name}
        assert {article for split in splits for article in split} == articles
        assert list(map(len, splits)) == pytest.approx([4, 4, 32], abs=1)
        assert sum(map(len, splits)) == len(articles)


def test_a_file_from_an_address_is_kept_as_it_is_and_needed_once(news, monkeypatch):
    monkeypatch.setitem(CORPORA, "agnews", replace(CORPORA["agnews"], source=news.as_uri()))
    first = read("agnews")
    assert first == read("agnews", source=str(news))
    kept, = CACHE.iterdir()
    assert kept.read_bytes() == news.read_bytes()
    news.unlink()
    assert read("agnews") == first


def test_a_data_set_from_the_hub_is_kept_as_lines_of_user_and_text_and_needed_once(monkeypatch):
    documents = [Document("book", "ü\n"), Document("arxiv", "x")]
    monkeypatch.setattr(corpora, "streamed", lambda *_: iter(documents))
    assert read("slimpajama") == documents
    monkeypatch.setattr(corpora, "streamed", None)
    kept, = CACHE.iterdir()
    assert read("slimpajama") == read(str(kept)) == documents


@pytest.fixture(params=["slimpajama jsonl", "commoncorpus parquet", "wikipedia parquet"])
def local(request, library):
    """A corpus, and a data set like it on the disk: in files as the hub has them, the last of which is damaged."""
    name, kind = request.param.split()
    values = [*CORPORA[name].users.values(), "another"]
    parts = {value: [{"text": f"{value} {n} {words(n * 5 + i, 1000 + 300 * i)}", "collection": value,
                      "meta": {"redpajama_set_name": value}} for n in range(30)] for i, value in enumerate(values)}
    if name == "wikipedia":
        configs = [{"config_name": value, "data_files": f"{value}/*"} for value in values]
        write({"hub/README.md": f"---\nconfigs: {json.dumps(configs)}\n---\n"})
    else:
        parts = {"data": [row for turn in zip(*parts.values(), strict=True) for row in turn]}
    for part, rows in parts.items():
        write({f"hub/{part}/train-1.{kind}": lines(*rows), f"hub/{part}/train-2.{kind}": "PAR1 and no more"})
        if kind == "parquet":
            library.Dataset.from_list(rows).to_parquet(f"hub/{part}/train-1.parquet")
    return name


def test_a_data_set_is_streamed_only_as_far_as_needed_and_damage_further_on_is_one_line(local):
    documents = read(local, 10_000, source="hub")
    for user, value in CORPORA[local].users.items():
        mine = [document.text for document in documents if document.user == user]
        assert all(text.startswith(f"{value} ") for text in mine)
        assert 10_000 <= data.bytes_of(mine) < 10_000 + len(mine[-1])
    refused(f"`data` {local}: hub can't be read .*; try again, or give a copy with `source`", local, source="hub")


def test_what_is_streamed_by_default_is_enough_for_all_splits(library, monkeypatch):
    """Whatever the documents' lengths: here up to the 20,000 characters of an excerpt, some of them copies."""
    monkeypatch.setitem(CORPORA, "commoncorpus", replace(CORPORA["commoncorpus"], train_kb=300))
    sizes = np.random.default_rng(0).lognormal(9, 1, 400).astype(int).clip(100, 60_000)
    values = list(CORPORA["commoncorpus"].users.values())
    write({"hub/train.jsonl": lines(*({"text": words(n % 390, int(sizes[n % 390])), "collection": values[n % 4]}
                                      for n in range(400)))})
    documents = read("commoncorpus", source="hub")
    assert len({document.text for document in documents}) == len(documents) < 400
    assert max(len(document.text) for document in documents) == corpora.CORPUS_EXCERPT
    texts = load("commoncorpus", 4, source="hub")
    assert [text.name for text in texts] == ["books", "patents", "tenders", "youtube"]
    assert all(text.test_bytes >= 32_000 and 300_000 <= text.train_bytes < 320_000 for text in texts)


def test_a_data_set_without_the_field_is_one_line(library):
    write({"hub/train.jsonl": lines({"body": "x", "collection": "USPTO"})})
    refused("has no field text but body, .*; give another `source`", "commoncorpus", source="hub")


@pytest.mark.parametrize("source", ["file:///nowhere/x.csv", "nonsense://here/x.csv", "http://127.0.0.1:1/x.csv?y=z"])
def test_an_address_that_cant_be_read_is_one_line(source):
    refused("`source` .* can't be downloaded .*; try again, or give a file", "agnews", source=source)


def test_a_hub_that_cant_be_reached_is_one_line(library, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(library, "load_dataset", offline)
    refused("`data` commoncorpus: .* can't be read .*; try again, or give a copy with", "commoncorpus")


@pytest.mark.parametrize("source", ["nowhere.csv", "x.parquet"])
def test_a_source_that_is_no_table_nor_a_data_set_is_one_line(source):
    write({"x.parquet": "PAR1"})
    refused(f"`source` {source}: not a .csv or .jsonl file; give one, or a data set", "slimpajama", source=source)


def test_a_cache_that_cant_be_written_is_one_line(news):
    refused("news.csv/cache: .*; .*take another `cache`", "agnews", source="file:///x.csv", cache=str(news / "cache"))


def test_a_library_that_isnt_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("`data` wikipedia: .*pip install datasets.* or give a file", "wikipedia")
