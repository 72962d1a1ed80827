"""The report: it shows the routing that is used, and any text is safe in it."""

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
from model import GENERALIST, SPECIALIST
from support.files import read_lines
from support.report import page
from support.runs.checkpoint import TrainedUser
from support.sampling import generate
from tiny import tiny

SOURCE = page.TEMPLATE.read_text(encoding="utf-8")
NAME = "<b>&'\""
TEXT = b"some text to route, longer than a window"
NASTY = (
    "<script>alert('&amp;')</script>\t\"q\" 'x' שלום مرحبا é 漢字 \u2028 </article> @@DATA@@ "
    "<!-- word "
)
FIXED = torch.tensor([[0.5, 0.3, 0.2], [0, 0.9, 0.1]])


def user_of(fixed_gates: torch.Tensor | None = None, **shape) -> TrainedUser:
    model = tiny(vocab_size=257, block_size=8, specialists=2, **shape)
    return TrainedUser("a", model, fixed_gates)


def text_of(content: bytes, name: str = "a") -> data.Text:
    tokens = np.array([256, *content], np.uint16)
    return data.Text(name, tokens, tokens, tokens, len(content), len(content))


def content_of(path: str) -> dict:
    """The JSON of a page. The page differs from page.html only in that, and no tag begins in it."""
    before, after = SOURCE.split("@@DATA@@")
    text = Path(path).read_text(encoding="utf-8")
    inert = text.removeprefix(before).removesuffix(after)
    assert text == before + inert + after
    assert "<" not in inert
    return json.loads(inert)


def page_of(texts: list[data.Text], user: TrainedUser) -> dict:
    """The page of a run that has just begun."""
    lines = [json.dumps({"round": 0, "user": text.name, "valid_loss": 5.0}) for text in texts]
    Path("metrics.jsonl").write_text("\n".join(lines))
    users = [user] * len(texts)
    page.of_run(Path(), Path("page.html"), "a run", texts, users, data.tokenizer("bytes"))
    return content_of("page.html")


def shown_gates(view: dict, tokens: int) -> np.ndarray:
    """The gates in a view: (L, tokens, E)."""
    raw = np.frombuffer(base64.b64decode(view["gates"]), np.uint8)
    return raw.reshape(view["layers"], tokens, view["experts"]) / 255


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"generalists": 2}])
def test_the_routing_shown_is_the_routing_used(shape):
    """The oracle computes gates from what each router reads, and perplexities from the model."""
    text = text_of(TEXT)
    user = user_of(**shape)
    view = page_of([text], user)["own"][0]
    assert view["generalists"] == shape.get("generalists", 1)
    inputs = []
    for block in user.model.blocks:
        block.moe.register_forward_hook(lambda module, given, _: inputs.append(given[0][0]))
    windows = list(data.ordered_windows(text.test, 8, batch_size=1))
    for idx, _ in windows:
        user.model.trunk(idx)
    layers = []
    for i, block in enumerate(user.model.blocks):
        scores = torch.cat(inputs[i::2]) @ block.moe.router.linear.weight.T
        kth = scores.topk(2).values[:, 1:]
        layers.append(scores.where(scores >= kth, -torch.inf).softmax(-1))
    gates = torch.stack(layers)  # (L, n, E)
    assert np.abs(shown_gates(view, 40) - gates.numpy()).max() <= 1 / 255
    for shown, fixed in zip(view["perplexities"], (None, gates.mean(1)), strict=True):
        losses = [user.model(*window, fixed)[1].item() * window[1].numel() for window in windows]
        assert shown == pytest.approx(math.exp(sum(losses) / 40), rel=1e-5)


@pytest.mark.parametrize(
    ("user", "expected"),
    [(user_of(routed=False), torch.full((2, 3), 1 / 3)), (user_of(FIXED), FIXED)],
)
def test_without_a_router_all_tokens_have_the_same_gates(user, expected):
    view = page_of([text_of(TEXT)], user)["own"][0]
    assert np.abs(shown_gates(view, 40) - expected[:, None].numpy()).max() <= 1 / 255
    assert view["perplexities"] is None


def test_any_text_is_only_ever_data():
    """Tags, quotes, letters from right to left, NUL, bytes that form no character, long texts."""
    text = text_of(NASTY.encode() + b"\x00\xff\xc3" + b"word " * 2000, NAME)
    view = page_of([text], user_of())["own"][0]
    assert "".join(view["tokens"]).startswith("‖" + NASTY + "\x00\ufffd\ufffdword")
    assert view["name"] == NAME
    assert view["read"] == page.TOKENS_READ - 1
    assert len(view["tokens"]) == page.TOKENS_SHOWN


def test_the_page_is_one_file_that_loads_nothing_and_never_makes_html_of_text():
    inline = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert f"content=\"default-src 'none'; {inline}; img-src data:\"" in SOURCE
    assert re.findall(r"\b(?:src|href)=(\S+?)>", SOURCE) == ['"data:,"']
    assert not re.search(r"HTML\b|document\.write|eval\(|Function\(|fetch|import|url\(", SOURCE)


def test_favourites_worked_by_hand():
    """Of five occurrences at least, by their mean gates, if those aren't close to 0."""
    pieces = ["a", "b", "a", "b", "\0"] * 5
    gates = np.array([0.9, 0.1, 0.7, 0.3, 1] * 5)
    ((found,),) = page.favourites(pieces, gates.reshape(1, 25, 1))
    assert found == [("\0", 1), ("a", pytest.approx(0.8)), ("b", pytest.approx(0.2))]
    ((found,),) = page.favourites([*pieces[:-2], "x", "y"], gates.reshape(1, 25, 1))
    assert [name for name, _ in found] == ["a", "b"]  # \0 occurs only four times
    ((found,),) = page.favourites(pieces, np.full((1, 25, 1), 0.009))
    assert found == []


def test_at_most_8_users_are_shown_and_a_mixed_target_only_once():
    several = page_of([text_of(b"text %d" % n) for n in range(11)], user_of())
    assert len(several["own"]) == 8
    assert len(several["progress"]) == 11
    assert {view["read"] for view in several["same"]} == {8 * 7 - 1}
    assert page_of([text_of(TEXT)] * 2, user_of())["same"] == []


def progress(*perplexities) -> list[dict]:
    keys = ("before", "after", "trigram")
    return [{"name": "a"} | dict(zip(keys, row, strict=True)) for row in perplexities]


@pytest.mark.parametrize(
    ("rows", "roles", "ended", "expected"),
    [
        (
            [(200, 8, 9), (280, 7.4, 9)],
            {},
            True,
            "2 users learned together for 4 rounds: mean test perplexity 240.0 → 7.70; "
            "2 of 2 beat a trigram model of their training text",
        ),
        (
            [(200, 8, 9)] * 3 + [(8, 10, 9)],
            {GENERALIST: SPECIALIST},
            True,
            "4 users learned alone for 4 rounds: mean test perplexity 152.0 → 8.50; "
            "3 of 4 beat a trigram model of their training text; 1 of 4 got worse",
        ),
        (
            [(200, 30, None)] * 3,
            {},
            False,
            "3 users learned together for 4 rounds: mean validation perplexity 200.0 → 30.00",
        ),
    ],
)
def test_the_headline_says_how_users_learned_and_whether_it_worked(rows, roles, ended, expected):
    users = [user_of(roles=roles) for _ in rows]
    found = page.headline(progress(*rows), users, 4, ended)
    assert found == expected.replace(" → ", "\xa0→\xa0")


def test_the_headline_of_one_model_for_all_users_says_so():
    user = user_of(roles={GENERALIST: SPECIALIST})
    found = page.headline(progress((10, 5, 9), (10, 5, 9)), [user] * 2, 1, True)
    assert found.startswith("2 users learned from pooled text for 1 round: ")


def test_a_sample_is_the_likeliest_continuation_half_characters_included():
    user = user_of()
    tokenizer = data.tokenizer("bytes")
    prompt = data.encode("ein Märchen", tokenizer)[:6]  # up to the middle of the ä
    found = page.sample(user, prompt, tokenizer)
    idx = torch.tensor(prompt.astype(int))[None]
    tokens = generate(user.model, idx, page.NEW_TOKENS, temperature=0)[0].tolist()
    expected = "".join(page.decode(tokens, tokenizer)).removeprefix("‖")
    assert found["prompt"] == "ein M"
    assert found["prompt"] + found["continuation"] == expected


def drawn(path: Path) -> tuple[str, str]:
    """The elements that a browser makes of a page, and their text."""
    browser = shutil.which("chromium") or pytest.skip("draws; apt-get install chromium")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
        "--enable-logging=stderr --user-data-dir=profile --dump-dom"
    )
    done = subprocess.run(
        [browser, *flags.split(), path.as_uri()], capture_output=True, encoding="utf-8"
    )
    assert "CONSOLE" not in done.stderr
    elements = done.stdout.partition("<body>")[2].partition("<script")[0]
    return elements, unescape(re.sub("<[^>]*>", "", elements))


@pytest.fixture
def played(corpus) -> dict:
    """A run with a user whose name and text are malicious. Returns its result.json."""
    (Path(corpus) / "bert.txt").rename(Path(corpus) / f"{NAME}.txt").write_text(NASTY * 60)
    flags = (
        "--users 3 --specialists 4,1,1 --rounds 2 --eval-every 1 --n-layer 1 --n-embd 16 "
        "--out run --data text"
    )
    assert train.main(flags.split()) == 0
    return json.loads(Path("run/result.json").read_text())


def test_a_page_shows_test_text_at_the_end_and_validation_text_before(played):
    Path("run/result.json").unlink()
    assert sample.main("--run run --html going.html".split()) == 0
    ended, going = content_of("run/page.html"), content_of("going.html")
    metrics = read_lines(Path("run/metrics.jsonl"))
    assert ended["metrics"] == going["metrics"] == metrics
    assert ended["result"] == played
    assert going["result"] is None
    assert going["own"][1]["tokens"] != ended["own"][1]["tokens"]
    text = data.load(sample.open_run("run").settings.data_config, data.tokenizer("bytes"))[1]
    shown = "".join(going["own"][1]["tokens"])
    assert shown == "".join(
        page.decode(text.valid[: len(going["own"][1]["tokens"])].tolist(), data.tokenizer("bytes"))
    )


def test_a_browser_draws_the_page(played, tmp_path):
    content = content_of("run/page.html")
    elements, text = drawn(tmp_path / "run" / "page.html")
    assert f"{content['headline']}comigs: generalists are averaged" in text
    for user in played["users"]:
        numbers = f"{user['test_ppl_start']:.1f}{user['test_ppl_local']:.2f}{user['test_ppl']:.2f}"
        assert numbers in text
    assert NASTY * 2 in text
    assert f"mean{played['mean_test_ppl_local']:.2f}{played['mean_test_ppl']:.2f}" in text
    points = [curve.count(",") for curve in re.findall('points="(.*?)"', elements)]
    assert points == [2, 3] * 3  # training and validation, of each user
    gates = shown_gates(content["own"][0], len(content["own"][0]["tokens"]))[0]
    shares = re.findall("<b [^>]*--at: ([^;]*)", elements)[: len(gates)]
    assert [float(share) for share in shares] == pytest.approx(gates[:, 0], abs=1e-4)
