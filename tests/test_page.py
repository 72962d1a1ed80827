"""The page: the routing shown is the routing used, any text is safe, and metrics.jsonl is enough for what is drawn."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import data
import page
import plots
import sample
import train
from data import Text
from model import GENERALIST, GPT, SPECIALIST, GPTConfig, Routing

NASTY = "<script>alert('&amp;')</script>\t\"q\" 'x' \x00 שלום مرحبا é 漢字 \u2028 </article> @@DATA@@ "


def model_of(**more: int) -> GPT:
    shape = dict(vocab_size=257, block_size=8, n_layer=2, n_head=2, n_embd=8, specialists=2, routed=True)
    model = GPT(GPTConfig(**shape | more), torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data *= 100
    return model


def text_of(name: str, content: bytes) -> Text:
    tokens = np.concatenate([[256], np.frombuffer(content, np.uint8)]).astype(np.uint16)
    return Text(name, tokens, tokens, tokens, len(content), len(content))


def line(number: int, user: str, train_loss: float | None = None) -> dict:
    return {"round": number, "user": user, "train_loss": train_loss, "valid_loss": 5.0 - number,
            "generalist_share": [0.25, 1.0], "bytes_up": 1, "bytes_down": 1}


def made(tmp_path, texts: list[Text], metrics: list[dict], result: dict | None = None, **shape: int) -> str:
    models = [model_of(**shape) for _ in texts]
    page.write_page(tmp_path / "page.html", "a run", texts, models, data.tokenizer("bytes"), "test", metrics, result)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def gates_in(view: dict) -> np.ndarray:
    gates = np.frombuffer(base64.b64decode(view["gates"]), np.uint8)
    return gates.reshape(view["layers"], len(view["tokens"]), view["experts"]) / 255


def data_of(content: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', content, re.S)[1])


class Reader(HTMLParser):
    """What a browser without JavaScript would show of a page, and the tags in it."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, content):
        if self.inside not in ("script", "style"):
            self.text += content


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"specialists": 1}, {"routed": False}, {"generalists": 2}])
def test_the_routing_shown_is_the_routing_used(tmp_path, shape):
    """The gates of a few tokens, computed again from each router's input and weights, one token at a time."""
    text = text_of("a", b"some text to route, longer than a window")
    view = data_of(made(tmp_path, [text], [line(0, "a")], **shape))["own"][0]
    gates = gates_in(view)
    model, inputs = model_of(**shape), []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda module, arguments, _: inputs.append(arguments[0][0]))
    for t in (0, 5, 7, 8, 20, 39):
        inputs.clear()
        start = t // 8 * 8
        model.trunk(torch.from_numpy(text.test[start:t + 1].astype(np.int64))[None])
        for layer, (block, x) in enumerate(zip(model.blocks, inputs, strict=True)):
            if block.moe.router is None:
                expected = [1 / view["experts"]] * view["experts"]
            else:
                scores = (block.moe.router.scores.weight @ x[-1]).tolist()
                best = sorted(range(len(scores)), key=lambda e: -scores[e])[:2]
                total = sum(math.exp(scores[e]) for e in best)
                expected = [math.exp(scores[e]) / total if e in best else 0 for e in range(len(scores))]
            assert gates[layer, t] == pytest.approx(expected, abs=1 / 255)
    assert view["generalists"] == shape.get("generalists", 1)


def test_any_text_is_shown_as_it_is_and_as_nothing_else(tmp_path):
    """Tags, entities, quotes, tabs, letters from right to left, bytes that form no character, 10,000 tokens."""
    content = NASTY.encode() + b"\xff\xc3" + b"word " * 2000
    names = "<b>&'\""
    html = made(tmp_path, [text_of(names, content)], [line(0, names), line(1, names, 4.0)])
    reader, view = Reader(html), data_of(html)["own"][0]
    assert {tag for tag, _ in reader.tags} <= set(
        "html head meta link title style body h1 h2 h3 h4 p em i span div label select option table tr th td article b "
        "figure svg path polyline text figcaption script".split())
    assert sum(tag == "script" for tag, _ in reader.tags) == 2
    shown = "‖" + NASTY + "\ufffd\ufffdword "
    assert "".join(view["tokens"]).startswith(shown)
    assert shown in reader.text
    assert names in reader.text
    assert len(view["tokens"]) == page.OWN
    assert len(html) < 200_000


def test_the_page_is_one_file_without_network(tmp_path):
    reader = Reader(made(tmp_path, [text_of("a", b"text " * 10)], [line(0, "a")]))
    links = [value for _, attributes in reader.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links == ["data:,"]
    policy = next(attributes["content"] for tag, attributes in reader.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_without_javascript_first_and_last_layer_are_there(tmp_path):
    texts = [text_of(name, name.encode() * 50) for name in "ab"]
    reader = Reader(made(tmp_path, texts, [line(0, "a"), line(0, "b")], n_layer=3))
    texts_part = reader.text.split("The generalists' share")[0]
    assert [texts_part.count(f"layer {layer}") for layer in (1, 2, 3)] == [4, 0, 4]  # two texts of two users


def test_tokens_text_is_the_whole_text_and_half_a_character_waits_for_its_rest():
    encoding = data.tokenizer("bytes")
    tokens = [256, *"aé漢".encode(), 0xC3, 256, 98]
    assert list(page.decode(tokens, encoding)) == ["‖", "a", "", "é", "", "", "漢", "", "\ufffd\n‖", "b"]


def test_favourites_and_kinds_worked_by_hand():
    words, gates = ["a", "b", "a", "b", "c"] * 5, np.array([.9, .1, .7, .3, 1] * 5)
    assert page.favourites(words, gates) == [("c", 1), ("a", pytest.approx(.8)), ("b", pytest.approx(.2))]
    assert page.favourites([*words[:-2], "x", "y"], gates, most=1) == [("a", pytest.approx(.8))]  # c: only four
    assert page.favourites(words, np.zeros(25)) == []
    assert page.by_kind(["a1", "7", " ", ".", " the"], np.array([1, .5, 0, .25, 0])) == {
        "letters": .5, "digits": .5, "space": 0, "other": .25}


@torch.no_grad()
def test_the_worth_of_routing_is_the_loss_with_mean_gates():
    """Computed again with the mixture's gates replaced in each layer, and the model is left as it was."""
    model, tokens = model_of(), text_of("a", b"some text to route, longer than a window").test
    for parameter in model.having(GENERALIST, SPECIALIST).values():
        parameter *= 10
    gates = page.gates_of(model, tokens)
    routed, same = page.worth(model, tokens, gates)
    assert page.worth(model, tokens, gates) == (routed, same)

    def perplexity() -> float:
        losses = [model(idx, targets)[1] * targets.numel() for idx, targets in data.ordered_windows(tokens, 1, 8)]
        return math.exp(sum(losses).item() / (len(tokens) - 1))
    assert routed == pytest.approx(perplexity(), rel=1e-5)
    for block, mean in zip(model.blocks, gates.mean(1), strict=True):
        block.moe.router.forward = lambda x, mean=mean: Routing(
            torch.tensor(mean).expand(len(x), -1), torch.arange(len(mean)).expand(len(x), -1))
    assert same == pytest.approx(perplexity(), rel=1e-5)
    assert abs(routed - same) > 1e-3 * routed


def test_colours_without_javascript_are_the_generalists_gates(tmp_path):
    html = made(tmp_path, [text_of("a", b"some text to route")], [line(0, "a")])
    view = data_of(html)["own"][0]
    article = html.split("<article>")[1]
    for layer, part in zip((0, 1), article.split("<h4>")[1:], strict=True):
        shades = [(int(shade), word) for shade, word in re.findall(r"<b style=--g:(\d+)>(.*?)</b>", part, re.S)]
        shown = [shade for shade, word in shades for _ in word]
        assert shown == pytest.approx(10 * gates_in(view)[layer, :, 0], abs=0.52)
        assert len(set(shown)) > 3


def test_a_mixed_target_is_shown_once_and_a_method_without_router_says_so(tmp_path):
    texts = [text_of(name, b"the same text for all") for name in "ab"]
    html = made(tmp_path, texts, [line(0, "a"), line(0, "b")], routed=False)
    assert data_of(html)["same"] == []
    assert "The mixed test text" in html
    assert "<div hidden><h2>The same text" in html
    assert "Here is no router" in html
    assert "as routed" not in Reader(html).text
    different = made(tmp_path, [texts[0], text_of("b", b"another text")], [line(0, "a"), line(0, "b")])
    assert len(data_of(different)["same"]) == 2
    assert "Here is no router" not in different


def test_curves_stay_in_their_pictures():
    drawn = page.curves([line(n, user, None if n == 0 else 4.0) for n in range(3) for user in "ab"])
    found = " ".join(re.findall('points="(.*?)"', drawn))
    points = [tuple(map(float, point.split(","))) for point in found.split()]
    assert len(points) == 2 * (2 + 3)
    assert all(40 <= x <= 240 and 15 <= y <= 130 for x, y in points)
    assert {y for _, y in points} == {15.0, 130.0, 72.5}


def test_no_more_users_are_shown_than_fit(tmp_path):
    texts = [text_of(f"u{n}", b"text %d " % n * 10) for n in range(page.SHOWN + 3)]
    html = made(tmp_path, texts, [line(0, text.name) for text in texts])
    assert len(data_of(html)["own"]) == page.SHOWN
    assert f"The first {page.SHOWN} of {page.SHOWN + 3} users." in html


def test_a_run_ends_with_its_page_which_can_be_made_again_from_its_folder(corpus, tmp_path, capsys):
    flags = ["--users", "3", "--rounds", "2", "--n-layer", "1", "--n-embd", "16", "--block-size", "8", "--data", corpus,
             "--local-steps", "2", "--eval-every", "1", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    first = (tmp_path / "run" / "page.html").read_text()
    assert str(tmp_path / "run" / "page.html") in capsys.readouterr().out
    assert sample.main(["--run", str(tmp_path / "run"), "--html", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == first
    assert first.count("<polyline") == 6
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"{result['mean_test_ppl']:.2f}" in Reader(first).text

    (tmp_path / "run" / "result.json").unlink()  # as if it were still going
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "us')
    assert sample.main(["--run", str(tmp_path / "run"), "--html", str(tmp_path / "again.html")]) == 0
    again = Reader((tmp_path / "again.html").read_text()).text
    assert "validation perplexity after round 2" in again
    assert "Each user's own valid text" in again


def test_curves_are_written_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib", reason="draws; pip install matplotlib")
    plots.plot([line(n, user, None if n == 0 else 4.0) for n in range(3) for user in "ab"], tmp_path / "curves")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("flag", ["--plot", "--tensorboard"])
def test_an_optional_package_that_isnt_there_is_one_line(flag, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train.main([flag, "--data", corpus, "--out", str(tmp_path / "run")]) == 2
    error, = capsys.readouterr().err.splitlines()
    assert re.search(rf"{flag}: needs \w+, which isn't installed; pip install", error)
    assert not (tmp_path / "run").exists()


def test_an_evaluations_figures_go_to_tensorboard():
    class Board(dict):
        def add_scalar(self, name, figure, step):
            self[name, step] = figure

        def flush(self):
            pass
    board = Board()
    plots.show_on(board, [line(0, "a"), line(1, "a", 4.5)])
    assert board["train_loss/a", 1] == 4.5
    assert ("train_loss/a", 0) not in board
    assert board["generalist_share/layer 2/a", 1] == 1.0
    assert len(board) == 2 * 5 + 1
