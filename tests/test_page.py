"""The page: what it says of a run is so, the routing shown is the routing used, and any text is safe."""

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
from support.report import page
from support.runs.folder import Learned
from support.sampling import generate
from tiny import tiny

SOURCE = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8")
NAME, TEXT = "<b>&'\"", b"some text to route, longer than a window"
NASTY = "<script>alert('&amp;')</script>\t\"q\" 'x' שלום مرحبا é 漢字 \u2028 </article> @@DATA@@ <!-- word "
OWN = {GENERALIST: SPECIALIST}
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
    """The page of a run that has just begun."""
    lines = [{"round": 0, "user": text.name, "valid_loss": 5.0} for text in texts]
    Path("metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page.of_run(Path(), Path("page.html"), "a run", texts, [user] * len(texts), data.tokenizer("bytes"))
    return data_of("page.html")


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"generalists": 2}, {"routed": False}, {"gates": GIVEN}])
def test_the_routing_shown_is_the_routing_used(how):
    """All gates, computed again from what each router reads, and the perplexity as routed and with their mean."""
    text, user, inputs = text_of(TEXT), user_of(**how), []
    view, windows = made([text], user)["own"][0], list(data.ordered_windows(text.test, 8, batch_size=1))
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
    assert page.favourites(words, np.full(25, .009)) == []  # hardly ever chosen
    kinds = [page.KINDS.fullmatch(word).lastgroup for word in ("a1", " the", "7", " 42", " ", "\n  ", ".", " +=", "")]
    assert kinds == ["letters"] * 2 + ["digits"] * 2 + ["space"] * 2 + ["other"] * 3


def test_at_most_8_users_read_the_same_text_but_a_mixed_target_only_once():
    several = made([text_of(b"text %d" % n) for n in range(11)], user_of())
    assert (len(several["own"]), len(several["progress"])) == (8, 11)
    assert {view["read"] for view in several["same"]} == {8 * 7 - 1}
    assert made([text_of(TEXT)] * 2, user_of())["same"] == []


TABLE = "a trigram table of their own text"


@pytest.mark.parametrize(("perplexities", "roles", "sentence"), [
    ([(200, 8, 9), (280, 7.4, 9)], {},
     f"Two users learned together for 4 rounds: test perplexity 240.0 → 7.70 on average; both beat {TABLE}"),
    ([(200, 8, 9)] * 3 + [(8, 10, 9)], OWN,
     f"Four users learned alone for 4 rounds: test perplexity 152.0 → 8.50 on average; three of four beat {TABLE}; "
     "one of four got worse"),
    ([(10, 12, 9)] * 12, {},
     "12 users learned together for 4 rounds: test perplexity 10.0 → 12.00 on average; all 12 got worse; "
     f"all 12 lost to {TABLE}"),
    ([(200, 8, 9)], {}, f"One user learned for 4 rounds: test perplexity 200.0 → 8.00; they beat {TABLE}"),
    ([(200, 30, None)] * 3, {},
     "Three users learned together for 4 rounds so far: validation perplexity 200.0 → 30.00 on average"),
])
def test_the_headline_says_who_learned_how_and_whether_it_worked(perplexities, roles, sentence):
    rows, users = [["a", *each] for each in perplexities], [user_of(roles=roles) for _ in perplexities]
    assert page.headline(rows, 4, users) == sentence.replace(" → ", "\xa0→\xa0")


def test_the_headline_of_one_model_for_all_says_so():
    told = page.headline([["a", 10, 5, 9], ["b", 10, 5, 9]], 1, [user_of(roles=OWN)] * 2)
    assert told.startswith("Two users learned from pooled text for 1 round: ")


def test_what_a_model_writes_is_likeliest_and_the_same_every_time_half_characters_included():
    user, tokenizer = user_of(), data.tokenizer("bytes")
    start = data.encode("ein Märchen", tokenizer)[:6]  # in the middle of the ä
    prompt, more = page.written(user, start, tokenizer)
    tokens = generate(user.model, torch.tensor(start.astype(int))[None], page.WRITTEN, temperature=0)[0].tolist()
    assert prompt == "ein M"
    assert prompt + more == "".join(page.decode(tokens, tokenizer)).removeprefix("‖")
    assert page.written(user, start, tokenizer) == [prompt, more]


def test_tokens_are_legible_on_every_colour_in_light_and_in_dark():
    def channels(colour: str) -> np.ndarray:
        return np.array([int(colour[i:i + 2], 16) for i in (0, 2, 4)] if len(colour) == 6 else
                        [int(digit * 2, 16) for digit in colour]) / 255

    def luminance(colour: np.ndarray) -> float:  # as WCAG 2 defines it
        return np.where(colour <= .04045, colour / 12.92, ((colour + .055) / 1.055) ** 2.4) @ [.2126, .7152, .0722]

    schemes = [dict(re.findall(r"--(\w+): #(\w+)", rule)) for rule in re.findall(":root {(.*?)}", SOURCE)]
    assert len(schemes) == 2
    for scheme in schemes:
        ink, generalist, neutral, specialist = (channels(scheme[name]) for name in (
            "ink", "generalist", "neutral", "specialist"))
        for end in (generalist, specialist):
            for share in np.linspace(0, 1, 11):
                low, high = sorted((luminance(ink), luminance(share * end + (1 - share) * neutral)))
                assert (high + .05) / (low + .05) >= 4.5


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
    assert train.main("--users 3 --specialists 4,1,1 --rounds 2 --eval-every 1 --n-layer 1 --n-embd 16 --out run "
                      "--data text".split()) == 0
    result = json.loads(Path("run/result.json").read_text())
    Path("run/result.json").unlink()
    assert sample.main("--run run --html going.html".split()) == 0
    ended, going, metrics = data_of("run/page.html"), data_of("going.html"), page.read_lines(Path("run/metrics.jsonl"))
    assert (ended["result"], ended["metrics"], going["result"], going["metrics"]) == (result, metrics, None, metrics)
    assert going["own"][1]["tokens"] != ended["own"][1]["tokens"]  # validation text
    elements, text = drawn(tmp_path / "run" / "page.html")
    assert f"{ended['headline']}comigs: generalists are averaged, " in text
    for user in result["users"]:
        assert (f"{user['name']}1{user['specialists']}{user['test_ppl_start']:.1f} → {user['test_ppl']:.2f}  "
                f"◇ {user['trigram_ppl']:.2f}") in text
    assert NASTY * 2 in text
    assert f"mean{result['mean_test_ppl']:.2f}" in text
    assert [curve.count(",") for curve in re.findall('points="(.*?)"', elements)] == [2, 3] * 3  # training, validation
    gates = np.frombuffer(base64.b64decode(ended["own"][0]["gates"]), np.uint8).reshape(-1, 5) / 255
    shares = re.findall("<b [^>]*--at: ([^;]*)", elements)[:len(gates)]
    assert list(map(float, shares)) == pytest.approx(gates[:, 0], abs=1e-4)  # the generalist's, of the only layer
    first, second, third, *others = sorted(gates[0], reverse=True)
    assert re.search(rf"‖{NAME}, layer 1: \w+ \d: {first:.0%}, \w+ \d: {second:.0%}, \w+ \d: {third:.0%}; "
                     rf"2 more: {sum(others):.0%}\b", text)
    before, now = (math.exp(metrics[i]["valid_loss"]) for i in (0, -3))
    assert f"{NAME}14{before:.1f} → {now:.2f}" in drawn(tmp_path / "going.html")[1]
