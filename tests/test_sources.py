"""Where documents come from: builtin text, folders and tables; bad text is reported in one line."""

import json
from pathlib import Path

import pytest

import data
from conftest import words
from data import DataConfig
from support.errors import BadInput
from support.text import sources
from support.text.sources import Document


def write(files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def refusal(source: str, users: int = 2) -> str:
    """The one line about a source, which names a remedy."""
    with pytest.raises(BadInput) as error:
        data.load(DataConfig(data=source, users=users), data.tokenizer("bytes"))
    message = str(error.value)
    assert "\n" not in message
    assert "; " in message
    assert len(message) < 600
    return message


def test_builtin_excerpts_are_the_beginnings_of_documents_without_blank_ones_and_copies():
    long = "x" * sources.EXCERPT
    documents = ["a", " \n", long + "1", "b", "a", long + "2"]
    assert list(sources.excerpts(documents)) == ["a", long, "b"]


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in refusal("builtin", users=4)


def test_a_csv_file_with_quotes_commas_line_ends_and_a_byte_order_mark():
    content = 'who,what\r\nanna,"a ""quoted"" word, and\r\na second line"\r\nbert,ü\r\n'
    write({"a.csv": b"\xef\xbb\xbf" + content.encode()})
    documents = list(sources.read("a.csv", user_field="who", text_field="what"))
    assert documents == [
        Document("anna", 'a "quoted" word, and\na second line'),
        Document("bert", "ü"),
    ]


def test_a_json_lines_file_with_numbers_as_names_nested_fields_and_windows_line_ends():
    rows = [
        {"meta": {"id": 7}, "text": "one\r\ntwo"},
        {"meta": {"id": "x"}, "text": None},
        {"meta": {"id": "y"}, "text": "\ud800!"},
    ]
    lines = [json.dumps(row) for row in rows]
    write({"a.jsonl": b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n"})
    documents = list(sources.read("a.jsonl", user_field="meta.id"))
    assert documents == [Document("7", "one\ntwo"), Document("x", ""), Document("y", "?!")]


def test_a_folders_users_are_files_folders_and_given_splits():
    write(
        {
            "t/b.txt": b"\xef\xbb\xbfone",
            "t/a/1.md": "two",
            "t/a/deep/2": "three",
            "t/c/train.txt": "x",
            "t/c/valid.txt": "y",
            "t/c/test.txt": "z",
            "t/.git/config": "hidden",
            "t/a/.git/x": "hidden",
            "t/n.md": "no user",
        }
    )
    assert sorted(sources.read("t")) == [
        Document("a", "three"),
        Document("a", "two"),
        Document("b", "one"),
        Document("c", "x", "train"),
        Document("c", "y", "valid"),
        Document("c", "z", "test"),
    ]


def test_a_file_and_a_folder_of_the_same_user_are_refused():
    write({"t/here/x": "x", "t/here.txt": "x"})
    assert "rename one" in refusal("t")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("t/.x", "x", "has text of 0"),
        ("t/a.txt", words(0, 5000), "has text of 1"),
        ("t/a.txt", b"caf\xe9 " * 100, "UTF-8"),
        ("t/a.txt", "Grüße".encode("utf-16"), "UTF-8"),
        ("t/a/test.txt", "x", "not all of train.txt, valid.txt and test.txt"),
        ("t/ a/x", "x", "' a' can't be a user's name"),
        ("t.jsonl", '{"text": "x"}\n', "row 1: has no field user"),
        ("t.jsonl", '{"user": "a", "body": "x"}\n', "has no field text"),
        ("t.jsonl", '["user", "text"]\n', "row 1: has no field user"),
        ("t.jsonl", '{"user": {"a": 1}, "text": "x"}', "can't be a user's name"),
        ("t.jsonl", '{"user": "a", "text": 5}\n', "row 1"),
        ("t.jsonl", '{"user": "a", "text": "x"}\n{"user": "a", "te', "row 2"),
        ("t.jsonl", "[" * 100_000, "row 1"),
        ("t.jsonl", b'{"user": "a", "text": "x"}\n{"user": "a", "text": "\xe9"}\n', "UTF-8"),
        ("t.jsonl", '{"user": "../b", "text": "x"}', "'../b' can't be a user's name"),
        ("t.jsonl", json.dumps({"user": "a\nb", "text": "x"}), "can't be a user's name"),
        ("t.jsonl", json.dumps({"user": "x" * 101, "text": "x"}), "can't be a user's name"),
        ("t.csv", b"user,text\na,x\nb,Gr\xfc\xdfe\n", "UTF-8"),
        ("t.csv", 'user,text\na,"no end\nb,x\n', "row 1"),
        ("t.csv", "user,text\na,one, two\n", "more fields than the first row"),
        ("t.txt", "text", "t.txt"),
    ],
)
def test_bad_text_is_one_line(name, content, part):
    write({name: content})
    assert part in refusal(name.partition("/")[0])


@pytest.mark.parametrize("corpus", sources.PREPARED)
def test_a_corpus_by_name_is_refused_with_the_command_that_makes_it(corpus):
    assert f"python -m lab.prepare {corpus}" in refusal(corpus)
