"""Where documents come from: every kind of source is read by the code that a run uses, and a bad one is one line."""

import csv
import hashlib
import http.server
import json
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import corpora
import data
from corpora import CONFIGURATION, PUBLIC, BadInput, Piece
from settings import parse_settings
from texts import words

CACHE = Path("out/cache")


def read(where: object, **how: object) -> list[Piece]:
    return list(corpora.find(str(where), CACHE, **how).pieces())


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def nothing_left() -> bool:
    """No folder in the cache, neither whole nor unfinished."""
    return not [path for path in CACHE.glob("*") if path.is_dir()]


# --- anyone's own ----------------------------------------------------------------------------------------------------

def test_a_csv_file_with_quotes_commas_line_ends_and_a_byte_order_mark(tmp_path):
    content = 'who,what\r\nanna,"a ""quoted"" word, and\r\na second line"\r\nbert,ü\r\n'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read(tmp_path / "a.csv", user_field="who", text_field="what") == [
        Piece("anna", 'a "quoted" word, and\na second line'), Piece("bert", "ü")]


def test_a_json_lines_file_with_numbers_for_names_nested_fields_and_windows_line_ends(tmp_path):
    rows = [{"meta": {"id": 7}, "text": "one\r\ntwo"}, {"meta": {"id": "x"}, "text": None}]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(map(json.dumps, rows)).encode("utf-8-sig") + b"\r\n\r\n")
    assert read(tmp_path / "a.jsonl", user_field="meta.id") == [Piece("7", "one\ntwo"), Piece("x", "")]


def test_half_a_character_from_json_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"user": "a", "text": "\ud800!"}')
    assert read(tmp_path / "a.jsonl") == [Piece("a", "?!")]


def test_a_folders_users_are_files_folders_and_given_splits(tmp_path):
    for name, text in {"b.txt": "one", "a/1.md": "two", "a/deep/2": "three", "c/train.txt": "x", "c/valid.txt": "y",
                       "c/test.txt": "z", ".git/config": "hidden", "a/.git/x": "hidden", "n.md": "no user"}.items():
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(text, encoding="utf-8-sig")
    assert sorted(read(tmp_path / "t")) == [
        Piece("a", "three"), Piece("a", "two"), Piece("b", "one"),
        Piece("c", "x", "train"), Piece("c", "y", "valid"), Piece("c", "z", "test")]


def test_a_large_file_comes_in_pieces_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 1000)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text("é€" * 1700)
    pieces = read(tmp_path / "t")
    assert [len(piece.text) for piece in pieces] == [1000, 1000, 1000, 400]
    assert "".join(piece.text for piece in pieces) == "é€" * 1700


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", b'{"text": "x"}\n', "row 1: has no field user but text; name one: --user-field"),
    ("a.jsonl", b'{"user": "a", "body": "x"}\n', "has no field text but user, body; .*--text-field"),
    ("a.jsonl", b'["user", "text"]\n', "row 1: has no field user"),
    ("a.jsonl", b'{"user": {"a": 1}, "text": "x"}', "can't be a user's name"),
    ("a.jsonl", b'{"user": "a", "text": 5}\n', "row 1: its text is no text"),
    ("a.jsonl", b'{"user": "a", "text": "x"}\n{"user": "a", "te', "row 2 is no jsonl .*; mend it"),
    ("a.jsonl", b"[" * 100_000, "row 1 is no jsonl"),
    ("a.jsonl", b'{"user": "a", "text": "x"}\n{"user": "a", "text": "\xe9"}\n', "is not UTF-8"),
    ("a.csv", "user,text\na,Grüße\n".encode() + b"b,Gr\xfc\xdfe\n", "is not UTF-8"),  # mixed encodings
    ("a.csv", b"class,title\n1,x\n", "has no field user but class, title"),
    ("a.jsonl", b'{"user": "../b", "text": "x"}', "'../b' can't be a user's name; rename it"),
    ("a.jsonl", b'{"user": "..", "text": "x"}', "can't be a user's name"),
    ("a.csv", b"user,text\n/etc/x,x\n", "'/etc/x' can't be a user's name"),
    ("a.jsonl", b'{"user": "", "text": "x"}', "can't be a user's name"),
    ("a.jsonl", b'{"user": "a\\nb", "text": "x"}', "can't be a user's name"),
    ("a.jsonl", b'{"user": "a\\u2028b", "text": "x"}', "can't be a user's name"),
    ("a.csv", b'user,text\na,"no end\nb,x\n', "row 1 is no csv"),
    ("a.csv", b"user,text\na,one, two\n", "row 1 is no csv .more fields than the first row"),
    ("a.txt", b"text", "not a folder, nor a .csv or .jsonl file"),
])
def test_a_bad_table_is_one_line_and_nothing_is_left(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        data.load(str(tmp_path / name), 1)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value)
    assert nothing_left()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_line_of_100_megabytes_is_one_line_of_complaint(tmp_path, name):
    with open(tmp_path / name, "w") as file:
        file.write('{"user": "a", "text": "' if name == "a.jsonl" else "user,text\na,")
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write('"}\n')
    with pytest.raises(BadInput, match=r"row 1 is no (csv|jsonl) \(.*; mend it") as error:
        data.load(str(tmp_path / name), 1)
    assert len(str(error.value)) < 300
    assert nothing_left()


def test_a_name_never_becomes_a_path(tmp_path):
    rows = [{"user": f"{name} ~$HOME", "text": words(n, 3000)} for n, name in enumerate("ab")]
    before = set(tmp_path.iterdir())
    texts = data.load(str(jsonl(tmp_path / "t.jsonl", rows)), 2)
    assert [text.name for text in texts] == ["a ~$HOME", "b ~$HOME"]
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"t.jsonl", "out"}
    assert not [path for path in CACHE.rglob("*") if "HOME" in path.name]


# --- public corpora --------------------------------------------------------------------------------------------------

NEWS = [("3", "Oil rises", "Crude rose to  #36;45 a barrel\\in New York &lt;CL.N&gt;."),
        ("1", 'A "word"', "He said #39;yes #39;."),
        ("2", "", "S amp;P \\$5 \\\\b hellip;"), ("4", "Mars", "x #151; y")]


@pytest.fixture
def news(tmp_path):
    """AG News in small: 40 articles a class."""
    path = tmp_path / "news.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        for n in range(40):
            writer.writerows((label, f"{title} {n}", text) for label, title, text in NEWS)
    return path


def test_ag_news_articles_are_cleaned_and_given_to_their_topics_user(news):
    pieces = read("agnews", source=str(news))
    assert pieces[:4] == [
        Piece("business", "Oil rises 0\nCrude rose to $45 a barrel\nin New York <CL.N>."),
        Piece("world", 'A "word" 0\nHe said\'yes\'.'), Piece("sports", " 0\nS&P $5 \nb…"),
        Piece("science", "Mars 0\nx— y")]
    assert Counter(piece.user for piece in pieces) == dict.fromkeys(PUBLIC["agnews"].users, 40)


def test_ag_news_is_split_by_article(news):
    """40 articles a user, each in one split."""
    encoding = data.tokenizer("bytes")
    for text in data.load("agnews", 4, source=str(news), block_size=8):
        splits = [encoding.decode(part.tolist()).split(data.END)[1:] for part in (text.train, text.valid, text.test)]
        assert len({article for split in splits for article in split}) == sum(map(len, splits)) == 40
        assert [len(split) for split in splits][1:] == pytest.approx([4, 4], abs=1)


def test_a_download_is_checked_kept_with_a_manifest_and_needed_once(news, monkeypatch):
    md5 = hashlib.md5(news.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLIC, "agnews", replace(PUBLIC["agnews"], source=news.as_uri(), md5=md5))
    first = read("agnews")
    kept = CACHE / "agnews-all"
    manifest = json.loads((kept / "manifest.json").read_text())
    assert {path.name for path in kept.iterdir()} == {"documents.jsonl", "manifest.json"}
    assert manifest["revision"] == f"MD5 {md5}"
    assert manifest["documents"] == dict.fromkeys(PUBLIC["agnews"].users, 40)
    assert manifest["sha256"] == hashlib.sha256((kept / "documents.jsonl").read_bytes()).hexdigest()
    news.unlink()
    assert read("agnews") == first


def test_a_wrong_checksum_is_one_line_and_nothing_is_kept(news, monkeypatch):
    monkeypatch.setitem(PUBLIC, "agnews", replace(PUBLIC["agnews"], source=news.as_uri()))
    with pytest.raises(BadInput, match=f"has MD5 [0-9a-f]*, not {PUBLIC['agnews'].md5}; try again"):
        read("agnews")
    assert nothing_left()


def test_a_changed_cache_is_noticed(news):
    read("agnews", source=str(news))
    file, = CACHE.glob("agnews-*/documents.jsonl")
    file.write_text(file.read_text().replace("barrel", "bottle"))
    with pytest.raises(BadInput, match="isn't what its manifest says; delete .* to fetch it again"):
        read("agnews", source=str(news))
    file.with_name("manifest.json").write_text("{")
    with pytest.raises(BadInput, match="isn't what its manifest says; delete .* to fetch it again"):
        read("agnews", source=str(news))


def test_a_download_that_breaks_off_is_one_line_and_nothing_is_kept(news):
    class HalfWay(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(news.stat().st_size))
            self.end_headers()
            self.wfile.write(news.read_bytes()[:1000])

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), HalfWay) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(BadInput, match="can't be downloaded .*; try again") as error:
            read("agnews", source=f"http://127.0.0.1:{server.server_port}/train.csv")
    assert "\n" not in str(error.value)
    assert nothing_left()


@pytest.mark.parametrize("source", [
    "file:///nowhere/train.csv", "nonsense://here/x.csv", "http://127.0.0.1:1/x.csv?download=true"])
def test_an_address_that_cant_be_read_is_one_line(source):
    with pytest.raises(BadInput, match="can't be downloaded .*--source") as error:
        read("agnews", source=source)
    assert "\n" not in str(error.value)
    assert nothing_left()


@pytest.mark.parametrize("source", ["http://127.0.0.1:1/", "x.parquet"])
def test_a_source_that_is_no_table_nor_a_data_set_is_one_line(source):
    Path("x.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=f"--source {source}: not a .csv or .jsonl file; give one, or a data set"):
        read("slimpajama", source=source, size=1000)
    assert nothing_left()


def test_a_source_that_holds_nothing_of_a_user_is_one_line(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"text": "x", "collection": "USPTO"}])
    with pytest.raises(BadInput, match="x.jsonl holds nothing of .*books.*; give another --source"):
        read("commoncorpus", source=str(source))
    assert nothing_left()


def test_a_public_corpus_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="--data wikipedia: .*pip install datasets"):
        read("wikipedia", size=1000)
    assert nothing_left()


def test_every_recipe_names_its_source_users_and_licence():
    assert list(PUBLIC) == ["agnews", "wikipedia", "slimpajama", "commoncorpus"]
    for recipe in PUBLIC.values():
        assert len(recipe.users) == 4
        assert recipe.licence
        assert recipe.md5 if "://" in recipe.source else recipe.source.count("/") == 1
    assert {recipe.user_field for recipe in PUBLIC.values()} == {
        "class", CONFIGURATION, "meta.redpajama_set_name", "collection"}


@pytest.fixture
def library():
    return pytest.importorskip("datasets", reason="streams the public corpora; pip install datasets")


def public_rows(name: str, documents: int = 30) -> list[dict]:
    """Rows as the corpus has them, each user's in turn, of 1000 bytes and more."""
    values = list(PUBLIC[name].users.values())
    return [{"text": f"{value} {n} {words(n * 4 + i, 1000)}", "id": str(n), **(
        {"meta": {"redpajama_set_name": value}} if name == "slimpajama" else {"collection": value})}
        for n in range(documents) for i, value in enumerate([*values, "another"])]


def write_parquet(library, path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    library.Dataset.from_list(rows).to_parquet(path)


@pytest.fixture(params=["slimpajama, parquet", "slimpajama, json lines", "commoncorpus, parquet", "wikipedia, parquet"])
def local(request, library, tmp_path):
    """The name of a public corpus, and a data set like it on the disk, in files as the hub has them."""
    name, kind = request.param.split(", ")
    folder = tmp_path / "hub"
    if name == "wikipedia":
        for value in PUBLIC[name].users.values():
            rows = [{"id": "1", "url": "-", "title": "-", "text": f"{value} {n} {words(n, 1000)}"} for n in range(30)]
            write_parquet(library, folder / value / "train-00000-of-00001.parquet", rows)
        configs = "".join(f"- config_name: {value}\n  data_files:\n  - split: train\n    path: {value}/train-*\n"
                          for value in PUBLIC[name].users.values())
        (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    elif kind == "parquet":
        rows = public_rows(name)
        write_parquet(library, folder / "data" / "train-00000-of-00002.parquet", rows[:70])
        write_parquet(library, folder / "data" / "train-00001-of-00002.parquet", rows[70:])
    else:
        folder.mkdir()
        jsonl(folder / "train.jsonl", public_rows(name))
    return name, folder


def test_public_corpora_are_streamed_only_as_far_as_needed_and_then_need_no_source(local, monkeypatch):
    name, folder = local
    pieces = read(name, source=str(folder), size=10_000)
    for user, value in PUBLIC[name].users.items():
        mine = [piece.text for piece in pieces if piece.user == user]
        assert all(text.startswith(f"{value} ") for text in mine)
        assert 10_000 <= sum(map(len, mine)) < 10_000 + len(mine[-1])
    kept, = CACHE.glob(f"{name}-*-10000")
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["source"] == str(folder)
    assert manifest["documents"] == Counter(piece.user for piece in pieces)
    monkeypatch.setattr(corpora, "hub", None)
    assert read(name, source=str(folder), size=10_000) == pieces


def test_a_local_data_set_that_has_changed_is_read_again(library, tmp_path):
    (tmp_path / "hub").mkdir()
    for beginning in ("old ", "new "):
        rows = [row | {"text": beginning + row["text"]} for row in public_rows("commoncorpus")]
        jsonl(tmp_path / "hub" / "train.jsonl", rows)
        pieces = read("commoncorpus", source=str(tmp_path / "hub"), size=5000)
        assert all(piece.text.startswith(beginning) for piece in pieces)


def test_the_default_of_a_public_corpus_is_enough_for_all_splits(library, tmp_path, monkeypatch):
    """Whatever the documents' lengths: here up to the 20,000 characters of an excerpt, some of them copies."""
    monkeypatch.setitem(PUBLIC, "commoncorpus", replace(PUBLIC["commoncorpus"], train_kb=300))
    sizes = np.random.default_rng(0).lognormal(9, 1, 400).astype(int).clip(100, 60_000)
    rows = [{"text": words(n % 390, int(sizes[n % 390])), "collection": value}
            for n in range(400) for value in [list(PUBLIC["commoncorpus"].users.values())[n % 4]]]
    write_parquet(library, tmp_path / "hub" / "train.parquet", rows)
    texts = data.load("commoncorpus", 4, source=str(tmp_path / "hub"))
    assert all(text.train_bytes >= 300_000 and text.test_bytes >= 32_000 for text in texts)


def test_a_run_on_a_public_corpus_takes_users_text_and_sizes_from_it(local):
    name, folder = local
    texts = data.load(name, 2, [5, 4], source=str(folder), block_size=16)
    assert [text.name for text in texts] == sorted(PUBLIC[name].users)[:2]
    for text, kb in zip(texts, (5, 4), strict=True):
        assert 1000 * kb <= text.train_bytes < 1000 * kb + 1200
        assert len(text.test) > 1000


def test_a_field_that_a_data_set_lacks_is_one_line(library, tmp_path):
    write_parquet(library, tmp_path / "hub" / "train.parquet", [{"body": "x", "collection": "USPTO"}])
    with pytest.raises(BadInput, match="has no field text but configuration, body, collection; give another --source"):
        read("commoncorpus", source=str(tmp_path / "hub"), size=1000)
    assert nothing_left()


def test_a_data_set_that_breaks_off_is_one_line_and_nothing_is_kept(library, tmp_path):
    rows = public_rows("commoncorpus")
    write_parquet(library, tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", rows[:70])
    (tmp_path / "hub" / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadInput, match="--data commoncorpus: .* can't be read .*; try again") as error:
        read("commoncorpus", source=str(tmp_path / "hub"), size=20_000)
    assert "\n" not in str(error.value)
    assert nothing_left()


def test_a_hub_that_cant_be_reached_is_one_line(library, monkeypatch):
    import huggingface_hub

    def offline(*_):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(BadInput, match="--data wikipedia: .* can't be read .ConnectionError: no network") as error:
        read("wikipedia", size=1000)
    assert "\n" not in str(error.value)
    assert nothing_left()


def test_a_source_is_for_public_corpora_only():
    with pytest.raises(BadInput, match="--source x: --data builtin is no public corpus; take one of agnews"):
        parse_settings(["--source", "x"])
