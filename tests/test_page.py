"""The page: the routing shown is the routing used, any text is safe, and a run's folder is enough to draw it from."""

import base64
import json
import math
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sample
import train
from data import Text
from model import GENERALIST, GPT, SPECIALIST, GPTConfig, Routing
from support import page, plots
from support.folder import Learned

BYTES, SOURCE = data.tokenizer("bytes"), Path(page.__file__).with_name("page.html").read_text(encoding="utf-8")
NAME = "<b>&'\""
NASTY = "<script>alert('&amp;')</script>\t\"q\" 'x' שלום مرحبا é 漢字 \u2028 </article> @@DATA@@ <!-- word "
SHAPE = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "8", "--local-steps", "2"]


def user_of(name: str = "a", gates: torch.Tensor | None = None, **shape) -> Learned:
    """With routers that have made up their minds."""
    config = dict(vocab_size=257, block_size=8, n_layer=2, n_head=2, n_embd=8, specialists=2) | shape
    model = GPT(GPTConfig(**config), torch.Generator().manual_seed(0))
    for parameter in model.having("router").values():
        parameter.data *= 100
    return Learned(name, model, gates)


def text_of(name: str, content: bytes) -> Text:
    tokens = np.concatenate([[256], np.frombuffer(content, np.uint8)]).astype(np.uint16)
    return Text(name, tokens, tokens, tokens, len(content), len(content))


def data_of(content: str) -> dict:
    """What a page shows. It differs from page.html in that only, and no tag can begin in it."""
    before, after = SOURCE.split("@@DATA@@")
    assert (content[:len(before)], content[-len(after):]) == (before, after)
    inert = content[len(before):-len(after)]
    assert "<" not in inert
    return json.loads(inert)


def made(folder: Path, texts: list[Text], users: list[Learned]) -> dict:
    page.of_run(folder, folder / "page.html", "a run", texts, users, BYTES)
    return data_of((folder / "page.html").read_text(encoding="utf-8"))


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"generalists": 2}, {"routed": False}, {"gates": torch.tensor([[.5, .3, .2]] * 2)}])
def test_the_routing_shown_is_the_routing_used(tmp_path, shape):
    """The gates of a few tokens, computed again from what each router reads, one token at a time."""
    text, user = text_of("a", b"some text to route, longer than a window"), user_of(**shape)
    view, inputs = made(tmp_path, [text], [user])["own"][0], []
    shown = np.frombuffer(base64.b64decode(view["gates"]), np.uint8).reshape(2, 40, view["experts"]) / 255
    for block in user.model.blocks:
        block.moe.register_forward_hook(lambda module, given, _: inputs.append(given[0][0, -1]))
    for t in (0, 5, 7, 8, 20, 39):
        inputs.clear()
        user.model.trunk(torch.tensor([text.test[t // 8 * 8:t + 1].tolist()]), user.gates)
        for layer, (block, x) in enumerate(zip(user.model.blocks, inputs, strict=True)):
            expected = shape.get("gates", torch.full((2, view["experts"]), 1 / view["experts"]))[layer].tolist()
            if user.model.config.routed and user.gates is None:
                scores = (block.moe.router.scores.weight @ x).tolist()
                best = sorted(scores)[-2:]
                total = sum(map(math.exp, best))
                expected = [math.exp(score) / total if score in best else 0 for score in scores]
            assert shown[layer, t] == pytest.approx(expected, abs=1 / 255)
    assert view["generalists"] == shape.get("generalists", 1)
    assert (view["worth"] is None) == ("routed" in shape or "gates" in shape)


def test_any_text_is_only_ever_data(tmp_path):
    """Tags, quotes, letters from right to left, NUL, bytes that form no character, 10,000 tokens."""
    content = NASTY.encode() + b"\x00\xff\xc3" + b"word " * 2000
    view = made(tmp_path, [text_of(NAME, content)], [user_of()])["own"][0]
    assert "".join(view["tokens"]).startswith("‖" + NASTY + "\x00\ufffd\ufffdword")
    assert (view["name"], view["read"], len(view["tokens"])) == (NAME, page.READ - 1, page.OWN)


def test_the_page_is_one_file_without_network_that_shows_text_as_text():
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\"" in SOURCE
    assert re.findall(r"\b(?:src|href)=(\S+?)>", SOURCE) == ['"data:,"']
    assert not re.search(r"HTML\b|document\.write|eval\(|Function\(|fetch|Request|Socket|import|url\(|srcdoc", SOURCE)


def test_tokens_text_is_the_whole_text_and_half_a_character_waits_for_its_rest():
    tokens = [256, *"aé漢".encode(), 0xC3, 256, 98]
    assert list(page.decode(tokens, BYTES)) == ["‖", "a", "", "é", "", "", "漢", "", "\ufffd\n‖", "b"]


def test_favourites_and_kinds_worked_by_hand():
    words, gates = ["a", "b", "a", "b", "\0"] * 5, np.array([.9, .1, .7, .3, 1] * 5)
    assert page.favourites(words, gates) == [("\0", 1), ("a", pytest.approx(.8)), ("b", pytest.approx(.2))]
    assert page.favourites([*words[:-2], "x", "y"], gates, most=1) == [("a", pytest.approx(.8))]  # \0: only four
    assert page.favourites(words, np.full(25, .004)) == []  # 0%
    assert page.by_kind(["a1", "7", " ", ".", " the"], np.array([1, .5, 0, .25, 0])) == {
        "letters": .5, "digits": .5, "space": 0, "other": .25}


@torch.no_grad()
def test_the_worth_of_routing_is_the_loss_with_mean_gates():
    """Computed again with each router replaced by one that gives every token the same."""
    user, tokens = user_of(), text_of("a", b"some text to route, longer than a window").test
    for parameter in user.model.having(GENERALIST, SPECIALIST).values():
        parameter *= 10
    gates = page.gates_of(user, tokens)
    routed, alike = page.worth(user, tokens, gates)

    def perplexity() -> float:
        losses = [user.model(idx, targets)[1] * targets.numel() for idx, targets in data.ordered_windows(tokens, 1, 8)]
        return math.exp(sum(losses).item() / (len(tokens) - 1))
    assert routed == pytest.approx(perplexity(), rel=1e-5)
    for block, mean in zip(user.model.blocks, torch.from_numpy(gates.mean(1)), strict=True):
        block.moe.router.forward = lambda x, mean=mean: Routing(mean.expand(len(x), -1), torch.arange(3).expand(len(x), -1))
    assert alike == pytest.approx(perplexity(), rel=1e-5)
    assert abs(routed - alike) > 1e-3 * routed


def test_the_same_text_is_read_by_all_unless_all_have_the_same_anyway(tmp_path):
    texts = [text_of(f"u{n}", b"text %d " % n * 10) for n in range(page.SHOWN + 3)]
    several = made(tmp_path, texts, [user_of()] * len(texts))
    assert (len(several["own"]), several["users"]) == (page.SHOWN, page.SHOWN + 3)
    assert {"".join(view["tokens"]).count("‖") for view in several["same"]} == {page.SHOWN}
    mixed = made(tmp_path, [text_of(name, b"the same text for all") for name in "ab"], [user_of()] * 2)
    assert (len(mixed["own"]), mixed["same"]) == (2, [])


@pytest.fixture
def ended(corpus, tmp_path) -> Path:
    """The folder of a run, of three users of whom one is out for mischief."""
    (Path(corpus) / "bert.txt").rename(Path(corpus) / f"{NAME}.txt").write_text(NASTY * 60)
    flags = ["--users", "3", "--rounds", "2", "--eval-every", "1", "--data", corpus, "--out", str(tmp_path / "run")]
    assert train.main([*SHAPE, *flags]) == 0
    return tmp_path / "run"


def again(run: Path) -> str:
    assert sample.main(["--run", str(run), "--html", "again.html"]) == 0
    return Path("again.html").read_text(encoding="utf-8")


def still_going(run: Path) -> None:
    (run / "result.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "us')


def test_a_run_ends_with_its_page_which_can_be_made_again_from_its_folder(ended):
    first = (ended / "page.html").read_text(encoding="utf-8")
    assert again(ended) == first
    shown, lines = data_of(first), (ended / "metrics.jsonl").read_text().splitlines()
    assert shown["result"] == json.loads((ended / "result.json").read_text())
    assert shown["metrics"] == [json.loads(line) for line in lines]
    still_going(ended)
    now = data_of(again(ended))
    assert (now["result"], now["metrics"]) == (None, shown["metrics"])
    assert now["own"][0]["tokens"] != shown["own"][0]["tokens"]  # validation text


def drawn(path: Path) -> tuple[str, str]:
    """A page as a browser draws it: its document, and the text in that."""
    browser = shutil.which("chromium") or pytest.skip("draws; apt-get install chromium")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --enable-logging=stderr --v=0".split()
    done = subprocess.run([browser, *flags, f"--user-data-dir={path.parent}/profile", "--dump-dom", path.as_uri()],
                          capture_output=True, encoding="utf-8", timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    document = done.stdout.partition("<body>")[2].partition("<script")[0]
    return document, unescape(re.sub(r"<[^>]*>", "", document))


def test_a_browser_draws_the_page(ended):
    document, text = drawn(ended / "page.html")
    shown = data_of((ended / "page.html").read_text(encoding="utf-8"))
    assert NASTY * 2 in text
    assert f"comigs on {ended.parent / 'text'}, seed 0" in text
    for figure in ("mean_test_ppl", "mean_test_bpb"):
        assert f"{shown['result'][figure]:.2f}" in text
    gates = base64.b64decode(shown["own"][0]["gates"])[::2]  # the generalist's; the last of its layers is the only one
    assert [float(share) for share in re.findall(r'<b [^>]*--share: ([\d.]+)', document)][:len(gates)] == [
        pytest.approx(gate / 255, abs=1e-4) for gate in gates]
    lines = [re.findall(r"([\d.]+),([\d.]+)", points) for points in re.findall('points="(.*?)"', document)]
    assert [len(points) for points in lines] == [2, 3] * 3  # training, validation
    assert all(40 <= float(x) <= 240 and 15 <= float(y) <= 130 for points in lines for x, y in points)
    still_going(ended)
    again(ended)
    _, text = drawn(Path("again.html").absolute())
    assert f"validation perplexity after round 2anna{math.exp(shown['metrics'][-2]['valid_loss']):.2f}" in text


def line(number: int, user: str, train_loss: float | None = None) -> dict:
    return {"round": number, "user": user, "train_loss": train_loss, "valid_loss": 5.0 - number,
            "generalist_share": [0.25, 1.0], "bytes_up": 1, "bytes_down": 1}


def test_curves_are_written_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib", reason="draws; pip install matplotlib")
    plots.plot([line(n, user, 4.0 if n else None) for n in range(3) for user in "ab"], tmp_path / "curves")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_an_optional_package_that_isnt_there_is_one_line(corpus, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flag in ("--plot", "--tensorboard"):
        assert train.main([flag, "--data", corpus, "--out", "run"]) == 2
        error, = capsys.readouterr().err.splitlines()
        assert re.search(rf"{flag}: needs \w+, which isn't installed; pip install", error)
    assert not Path("run").exists()


def test_an_evaluations_figures_go_to_tensorboard():
    class Board(dict):
        def add_scalar(self, name, figure, step):
            self[name, step] = figure

        def flush(self):
            pass
    plots.show_on(board := Board(), [line(0, "a"), line(1, "a", 4.5)])
    assert board["train_loss/a", 1] == 4.5
    assert board["generalist_share/layer 2/a", 1] == 1.0
    assert len(board) == 2 * 5 + 1  # no training loss before the first round
