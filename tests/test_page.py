"""The page: the routing shown is the routing used, any text is safe, and a run's folder is enough to draw it from."""

import base64
import json
import math
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import data
import sample
import train
from support import page, plots
from support.folder import Learned
from tiny import tiny

SOURCE = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8")
NAME, TEXT = "<b>&'\"", b"some text to route, longer than a window"
NASTY = "<script>alert('&amp;')</script>\t\"q\" 'x' שלום مرحبا é 漢字 \u2028 </article> @@DATA@@ <!-- word "
GIVEN = torch.tensor([[.5, .3, .2], [0, .9, .1]])


def user_of(gates: torch.Tensor | None = None, **shape) -> Learned:
    return Learned("a", tiny(vocab_size=257, block_size=8, specialists=2, **shape), gates)


def text_of(content: bytes, name: str = "a") -> data.Text:
    tokens = np.array([256, *content], np.uint16)
    return data.Text(name, tokens, tokens, tokens, len(content), len(content))


def data_of(path: str) -> dict:
    """What a page shows. It differs from page.html in that only, and no tag can begin in it."""
    content, (before, after) = Path(path).read_text(encoding="utf-8"), SOURCE.split("@@DATA@@")
    inert = content.removeprefix(before).removesuffix(after)
    assert (content, "<" in inert) == (before + inert + after, False)
    return json.loads(inert)


def made(texts: list[data.Text], user: Learned) -> dict:
    page.of_run(Path(), Path("page.html"), "a run", texts, [user] * len(texts), data.tokenizer("bytes"))
    return data_of("page.html")


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"generalists": 2}, {"routed": False}, {"gates": GIVEN}])
def test_the_routing_shown_is_the_routing_used(how):
    """All gates, computed again from what each router reads, and the perplexity as routed and with their mean."""
    text, user, inputs = text_of(TEXT), user_of(**how), []
    view, windows = made([text], user)["own"][0], list(data.ordered_windows(text.test, 8, B=1))
    shown = np.frombuffer(base64.b64decode(view["gates"]), np.uint8).reshape(2, 40, view["experts"]) / 255
    for block in user.model.blocks:
        block.moe.register_forward_hook(lambda module, given, _: inputs.append(given[0][0]))
    for idx, _ in windows:
        user.model.trunk(idx, user.gates)
    gates = (GIVEN if "gates" in how else torch.full((2, 3), 1 / 3))[:, None].expand(2, 40, 3)
    if not how.keys() & {"routed", "gates"}:
        scores = torch.stack([torch.cat(inputs[layer::2]) @ block.moe.router.scores.weight.T
                              for layer, block in enumerate(user.model.blocks)])
        gates = scores.where(scores >= scores.topk(2).values[..., 1:], -torch.inf).softmax(-1)
        for perplexity, given in zip(view.pop("worth"), (None, gates.mean(1)), strict=True):
            losses = [user.model(*window, given)[1].item() * window[1].numel() for window in windows]
            assert perplexity == pytest.approx(math.exp(sum(losses) / 40), rel=1e-5)
    assert np.abs(shown - gates.numpy()).max() <= 1 / 255
    assert view["kinds"][1]["other"] == pytest.approx(gates[1, [0, 19], :view["generalists"]].sum(1).mean().item())
    assert (view["generalists"], view.get("worth")) == (how.get("generalists", 1), None)


def test_any_text_is_only_ever_data():
    """Tags, quotes, letters from right to left, NUL, bytes that form no character, 10,000 tokens."""
    view = made([text_of(NASTY.encode() + b"\x00\xff\xc3" + b"word " * 2000, NAME)], user_of())["own"][0]
    assert "".join(view["tokens"]).startswith("‖" + NASTY + "\x00\ufffd\ufffdword")
    assert (view["name"], view["read"], len(view["tokens"])) == (NAME, page.READ - 1, page.OWN)
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\"" in SOURCE
    assert re.findall(r"\b(?:src|href)=(\S+?)>", SOURCE) == ['"data:,"']  # one file without network
    assert not re.search(r"HTML\b|document\.write|eval\(|Function\(|fetch|Request|Socket|import|url\(|srcdoc", SOURCE)


def test_favourites_and_kinds_worked_by_hand():
    words, gates = ["a", "b", "a", "b", "\0"] * 5, np.array([.9, .1, .7, .3, 1] * 5)
    assert page.favourites(words, gates) == [("\0", 1), ("a", pytest.approx(.8)), ("b", pytest.approx(.2))]
    assert page.favourites([*words[:-2], "x", "y"], gates, most=1) == [("a", pytest.approx(.8))]  # \0: only four
    assert page.favourites(words, np.full(25, .004)) == []  # 0%
    assert page.by_kind(["a1", "7", " ", ".", " the"], np.array([1, .5, 0, .25, 0])) == {
        "letters": .5, "digits": .5, "space": 0, "other": .25}


def test_at_most_8_users_read_the_same_text_but_a_mixed_target_only_once():
    several = made([text_of(b"text %d" % n) for n in range(11)], user_of())
    assert (len(several["own"]), several["users"], {view["read"] for view in several["same"]}) == (8, 11, {8 * 7 - 1})
    assert made([text_of(TEXT)] * 2, user_of())["same"] == []


def drawn(path: Path) -> tuple[str, str]:
    """The elements that a browser makes of a page, and the text in them."""
    browser = shutil.which("chromium") or pytest.skip("draws; apt-get install chromium")
    flags = ("--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
             "--enable-logging=stderr --user-data-dir=profile --dump-dom")
    done = subprocess.run([browser, *flags.split(), path.as_uri()], capture_output=True, encoding="utf-8")
    assert "CONSOLE" not in done.stderr
    elements = done.stdout.partition("<body>")[2].partition("<script")[0]
    return elements, unescape(re.sub("<[^>]*>", "", elements))


def test_a_runs_page_is_made_from_its_folder_and_drawn_by_a_browser(corpus, tmp_path):
    """One of the users is out for mischief, and the run is looked at again as if it were still going."""
    (Path(corpus) / "bert.txt").rename(Path(corpus) / f"{NAME}.txt").write_text(NASTY * 60)
    assert train.main("--users 3 --rounds 2 --eval-every 1 --n-layer 1 --n-embd 16 --out run --data text".split()) == 0
    result = json.loads(Path("run/result.json").read_text())
    Path("run/result.json").unlink()
    assert sample.main("--run run --html going.html".split()) == 0
    ended, going, metrics = data_of("run/page.html"), data_of("going.html"), page.read_lines(Path("run/metrics.jsonl"))
    assert (ended["result"], ended["metrics"], going["result"], going["metrics"]) == (result, metrics, None, metrics)
    assert going["own"][1]["tokens"] != ended["own"][1]["tokens"]  # validation text
    elements, text = drawn(tmp_path / "run" / "page.html")
    assert NASTY * 2 in text
    assert f"mean{result['mean_test_ppl']:.2f}" in text
    gates = base64.b64decode(ended["own"][0]["gates"])[::2]  # the generalist's, of the only layer
    shares = re.findall("<b [^>]*--share: ([^;]*)", elements)[:len(gates)]
    assert list(map(float, shares)) == pytest.approx([gate / 255 for gate in gates], abs=1e-4)
    assert [curve.count(",") for curve in re.findall('points="(.*?)"', elements)] == [2, 3] * 3  # training, validation
    assert f"round 2{NAME}{math.exp(metrics[-3]['valid_loss']):.2f}" in drawn(tmp_path / "going.html")[1]


def test_curves_are_drawn_by_matplotlib_and_tensorboard_where_these_are_there(corpus, monkeypatch, capsys):
    metrics = [{"round": n, "user": user, "train_loss": 4.5 if n else None, "valid_loss": 5.0, "bytes_up": 1,
                "bytes_down": 1, "generalist_share": [0.25, 1.0]} for n in (0, 1) for user in "ab"]
    plots.show_on(board := Mock(), metrics)
    figures = {(name, number): figure for (name, figure, number), _ in board.add_scalar.call_args_list}
    assert (figures["train_loss/a", 1], figures["generalist_share/layer 2/b", 1]) == (4.5, 1.0)
    assert len(figures) == 2 * (5 + 6)  # at first no training loss
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        for flag in ("--plot", "--tensorboard"):
            assert train.main([flag, "--data", corpus]) == 2
            assert re.fullmatch(rf".* {flag}: needs (\w+), .*; pip install \1\n", capsys.readouterr().err)
    pytest.importorskip("matplotlib", reason="draws; pip install matplotlib")
    plots.plot(metrics, Path("curves"))
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("curves.svg").read_text()
