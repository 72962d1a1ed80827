"""The page of a run: every token coloured by the generalists' share of it, the curves, and the table, in one HTML file.

    python sample.py --run out/NAME --html page.html

Without JavaScript it shows the first and the last layer; with it any layer, any expert, and each token's gates.
"""

import base64
import codecs
import html
import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import tiktoken
import torch

import data
from bilevel import evaluate
from data import Text
from model import GENERALIST, GPT, dense_gates
from support.files import read_json, write_text
from support.folder import Learned

SHOWN = 8  # users on the page, at most
OWN, COMMON = 800, 150  # tokens shown of a user's text, and of each user's in the text that all users read
READ = 4000  # tokens that the lists of each expert's favourites are made from
KINDS = {"letters": r"\w*[^\W\d_]\w*", "digits": r"\d+", "space": r"\s+", "other": r".*"}  # of a token's text


def decode(tokens: Iterable[int], tokenizer: tiktoken.Encoding, end: str = "\n‖") -> Iterator[str]:
    """The text of each token; together they are the whole text. Half a character waits for its rest."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for number, token in enumerate(tokens):
        if token == tokenizer.eot_token:
            yield decoder.decode(b"", final=True) + (end if number else end.lstrip())
        else:
            yield decoder.decode(tokenizer.decode_single_token_bytes(token))


def windows(tokens: np.ndarray, model: GPT) -> Iterator[data.Batch]:
    """A text as a model reads it."""
    T = model.config.block_size
    return data.ordered_windows(tokens, max(1, 1024 // T), T, str(model.tokens.weight.device))


@torch.no_grad()
def gates_of(user: Learned, tokens: np.ndarray) -> np.ndarray:
    """Every expert's gate for every token when a user's model reads these tokens: (L, n, E)."""
    E = user.model.config.n_experts
    layers = [[dense_gates(routing, E) for routing in user.model.trunk(idx, user.gates)[1]]
              for idx, _ in windows(tokens, user.model)]
    return torch.stack([torch.cat(parts) for parts in zip(*layers, strict=True)]).float().cpu().numpy()


def of_run(folder: Path, path: Path, title: str, texts: list[Text], users: list[Learned],
           tokenizer: tiktoken.Encoding) -> None:
    """Write the page of a run, of test text if it has ended, else of validation text. A text's user is the one in the
    same place. Raises OSError, ValueError."""
    result = read_json(folder / "result.json") if (folder / "result.json").exists() else None
    write_page(path, title, texts, users, tokenizer, "test" if result else "valid",
               read_lines(folder / "metrics.jsonl"), result)


def write_page(path: Path, title: str, texts: list[Text], users: list[Learned], tokenizer: tiktoken.Encoding,
               split: str, metrics: list[dict], result: dict | None) -> None:
    """metrics: the lines of metrics.jsonl; result: what result.json holds, if the run has ended."""
    shown = [(text.name, getattr(text, split), user) for text, user in zip(texts, users, strict=True)][:SHOWN]
    mixed = len(shown) > 1 and all(np.array_equal(tokens, shown[0][1]) for _, tokens, _ in shown)
    common = np.concatenate([tokens[:COMMON] for _, tokens, _ in shown])
    own = [view(name, tokens, user, tokenizer, OWN) for name, tokens, user in shown]
    same = [] if mixed else [view(name, common, user, tokenizer, len(common)) for name, _, user in shown]
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(title),
        "LEFT_OUT": f"The first {SHOWN} of {len(texts)} users." if len(texts) > SHOWN else "",
        "ROUTED": "" if own[0]["worth"] else "<strong>There is no router here: all tokens have the same gates.</strong>",
        "OWN_IS": f"The mixed {split} text, which all users are to read" if mixed else f"Each user's own {split} text",
        "OWN": "".join(map(static, own)), "SAME": "".join(map(static, same)), "ONCE": "hidden" if mixed else "",
        "TABLE": table(result, metrics), "SHARES": shares(result, metrics), "CURVES": curves(metrics),
        "DATA": json.dumps({"own": own, "same": same}, ensure_ascii=False, default=packed).replace("<", "\\u003c"),
    }
    write_text(path, re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], page))


def packed(gates: np.ndarray) -> str:
    """Gates in 255ths, a byte each."""
    return base64.b64encode((gates * 255).round().astype(np.uint8).tobytes()).decode()


def view(title: str, tokens: np.ndarray, user: Learned, tokenizer: tiktoken.Encoding, shown: int) -> dict:
    """What is to be seen of a text and a model: tokens, gates, and what each expert has its largest shares of."""
    tokens = tokens[:READ]
    gates = gates_of(user, tokens)  # (L, n - 1, E): the last token is only a target
    words = list(decode(tokens.tolist(), tokenizer))[:gates.shape[1]]
    generalists = user.model.config.expert_roles.count(GENERALIST)
    return {
        "title": title, "tokens": words[:shown], "generalists": generalists, "experts": gates.shape[2],
        "layers": gates.shape[0], "gates": gates[:, :shown],
        "favourites": [[favourites(words, layer[:, e]) for e in range(gates.shape[2])] for layer in gates],
        "kinds": [by_kind(words, layer[:, :generalists].sum(1)) for layer in gates],
        "read": gates.shape[1], "worth": worth(user, tokens, gates),
    }


def worth(user: Learned, tokens: np.ndarray, gates: np.ndarray) -> tuple[float, float] | None:
    """The perplexity as routed, and if every token got the mean gates of all; None where nothing is routed."""
    if user.gates is not None or not user.model.config.routed:
        return None
    means = torch.from_numpy(gates.mean(1))  # (L, E)
    return tuple(math.exp(evaluate(user.model, windows(tokens, user.model), weights)[0]) for weights in (None, means))


def favourites(words: list[str], gates: np.ndarray, most: int = 10, often: int = 5) -> list[tuple[str, float]]:
    """The tokens, of those that come often enough, that an expert has its largest mean gates for, and these."""
    names, which = np.unique(words, return_inverse=True)
    count, total = np.bincount(which), np.bincount(which, gates)
    mean = np.where(count >= often, total / count, 0)
    return [(str(names[i]), float(mean[i])) for i in np.argsort(-mean, kind="stable")[:most] if mean[i] > 0]


def by_kind(words: list[str], share: np.ndarray) -> dict[str, float]:
    """The generalists' mean share of tokens of each kind that there is."""
    kinds = np.array([next(kind for kind, form in KINDS.items() if re.fullmatch(form, word.strip(" ") or word, re.S))
                      for word in words])
    return {kind: float(share[kinds == kind].mean()) for kind in KINDS if (kinds == kind).any()}


# --- without JavaScript ----------------------------------------------------------------------------------------------

def static(view: dict) -> str:
    """A text with its colours in the first and the last layer."""
    share = view["gates"][..., :view["generalists"]].sum(2)  # (L, n)
    sections = []
    for layer in dict.fromkeys((0, view["layers"] - 1)):
        runs = groupby(zip(view["tokens"], (10 * share[layer]).round().astype(int), strict=True), lambda pair: pair[1])
        text = "".join(f"<b style=--g:{shade}>{html.escape(''.join(word for word, _ in run))}</b>"
                       for shade, run in runs)
        sections.append(f"<h4>layer {layer + 1}</h4><p class=text dir=auto>{text}</p>")
    say = ""
    if view["worth"]:
        routed, same = view["worth"]
        say = (f"<p>Perplexity of the first {view['read']:,} tokens: {routed:.2f} as routed, {same:.2f} if all of them "
               "got the mean gates.</p>")
    return f"<article><h3>{html.escape(view['title'])}</h3>{say}<div class=still>{''.join(sections)}</div></article>"


def shares(result: dict | None, metrics: list[dict]) -> str:
    """The generalists' share of all tokens, by user and layer: of the test text, or the newest of validation text."""
    rows = result["users"] if result else newest(metrics)
    layers = range(len(rows[0]["generalist_share"])) if rows else []
    head = "".join(f"<th>layer {layer + 1}" for layer in layers)
    cells = [(row.get("name", row.get("user")), row["generalist_share"]) for row in rows[:SHOWN]]
    body = "".join(f"<tr><th>{html.escape(name)}" + "".join(
        f'<td style=--g:{10 * share:.0f}>{share:.0%}' for share in each) for name, each in cells)
    return f"<table><tr><th>user{head}{body}</table>"


def newest(metrics: list[dict]) -> list[dict]:
    """The last evaluation's lines."""
    return [line for line in metrics if line["round"] == metrics[-1]["round"]]


def table(result: dict | None, metrics: list[dict]) -> str:
    """What a run ended with; or how far it has come, on validation text."""
    if result is None:
        rows = [(line["user"], f"{math.exp(line['valid_loss']):.2f}") for line in newest(metrics)]
        head = f"<tr><th>user<th>validation perplexity after round {metrics[-1]['round']}" if metrics else ""
        return f"<table>{head}{''.join(f'<tr><th>{html.escape(name)}<td>{ppl}' for name, ppl in rows)}</table>"
    rows = [(user["name"], f"{user['generalists']} + {user['specialists']}", f"{sum(user['parameters'].values()):,}",
             f"{user['train_bytes'] / 1000:.0f}", f"{user['test_ppl_start']:.1f} → {user['test_ppl']:.2f}",
             f"{user['trigram_ppl']:.2f}", f"{user['test_bpb']:.3f}") for user in result["users"]]
    rows.append(("mean", "", "", "", f"{result['mean_test_ppl']:.2f}", "", f"{result['mean_test_bpb']:.3f}"))
    head = "".join(f"<th>{name}" for name in ("user", "generalists + specialists", "parameters", "training kB",
                                              "test perplexity", "trigram", "bits per byte"))
    body = "".join(f"<tr><th>{html.escape(name)}" + "".join(f"<td>{cell}" for cell in cells) for name, *cells in rows)
    return (f"<table><tr>{head}{body}</table><p>{result['rounds']} rounds in {result['seconds']:.0f} s; users sent "
            f"{result['bytes_up'] / 1e6:.1f} MB and received {result['bytes_down'] / 1e6:.1f} MB.</p>")


def read_lines(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that is only half written, of a run that is still going, is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curves(metrics: list[dict]) -> str:
    """Training (dashed) and validation loss by round, a small picture for each user."""
    users = list(dict.fromkeys(line["user"] for line in metrics))[:SHOWN]
    losses = [line[name] for line in metrics for name in ("train_loss", "valid_loss") if line[name] is not None]
    last = max((line["round"] for line in metrics), default=0)
    if last == 0:
        return "<p>None yet.</p>"
    low, high = min(losses), max(losses)
    pictures = []
    for user in users:
        lines = []
        for name in ("train_loss", "valid_loss"):
            points = " ".join(
                f"{40 + 200 * line['round'] / last:.1f},{130 - 115 * (line[name] - low) / ((high - low) or 1):.1f}"
                for line in metrics if line["user"] == user and line[name] is not None)
            lines.append(f'<polyline class={name.split("_")[0]} points="{points}"/>')
        pictures.append(
            f'<figure><svg viewBox="0 0 250 150" role=img aria-label="losses of {html.escape(user, quote=True)}">'
            f'<path class=axis d="M40 10V130H240"/>{"".join(lines)}<text x=36 y=18 text-anchor=end>{high:.1f}</text>'
            f'<text x=36 y=133 text-anchor=end>{low:.1f}</text><text x=240 y=146 text-anchor=end>round {last}</text>'
            f'</svg><figcaption>{html.escape(user)}</figcaption></figure>')
    return f"<div class=curves>{''.join(pictures)}</div>"
