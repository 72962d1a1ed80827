"""The page of a run: every token coloured by its gates, the curves of the losses, and the table, in one HTML file.

    python sample.py --run out/NAME --html page.html

What is to be seen is computed here and put as JSON into page.html, which draws it.
"""

import base64
import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
import torch

import data
from bilevel import evaluate
from data import Text
from model import GENERALIST, GPT, dense_gates
from support.files import read_json, read_lines, write_text
from support.folder import Learned

SHOWN = 8  # users on the page, at most
OWN, COMMON = 800, 150  # tokens shown of a user's text, and of each user's in the text that all users read
READ = 4000  # tokens that the lists of each expert's favourites are made from
KINDS = {"letters": r"\w*[^\W\d_]\w*", "digits": r"\d+", "space": r"\s+", "other": r".*"}  # of a token's text


def of_run(folder: Path, path: Path, title: str, texts: list[Text], users: list[Learned],
           tokenizer: tiktoken.Encoding) -> None:
    """Write the page of a run, of test text if it has ended, else of validation text. A text's user is the one in the
    same place. Raises OSError, ValueError."""
    result = read_json(folder / "result.json") if (folder / "result.json").exists() else None
    content = {"title": title, "users": len(texts), "result": result, "metrics": read_lines(folder / "metrics.jsonl")}
    shown = [(text.name, text.test if result else text.valid, user)
             for text, user in zip(texts, users, strict=True)][:SHOWN]
    content["own"] = [view(*each, tokenizer, OWN) for each in shown]
    mixed = len(shown) > 1 and all(np.array_equal(tokens, shown[0][1]) for _, tokens, _ in shown)
    common = np.concatenate([tokens[:COMMON] for _, tokens, _ in shown])
    content["same"] = [] if mixed else [view(name, common, user, tokenizer, len(common)) for name, _, user in shown]
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    inert = json.dumps(content).replace("<", "\\u003c")  # ASCII, and no tag can begin in it
    write_text(path, page.replace("@@DATA@@", inert))


def view(name: str, tokens: np.ndarray, user: Learned, tokenizer: tiktoken.Encoding, shown: int) -> dict:
    """What is to be seen of a text and a model: tokens, gates, and what each expert has its largest shares of."""
    tokens = tokens[:READ]
    gates = gates_of(user, tokens)  # (L, n - 1, E): the last token is only a target
    words = list(decode(tokens[:-1].tolist(), tokenizer))
    generalists = user.model.config.expert_roles.count(GENERALIST)
    return {
        "name": name, "tokens": words[:shown], "read": len(words), "worth": worth(user, tokens, gates),
        "layers": gates.shape[0], "experts": gates.shape[2], "generalists": generalists,
        "gates": base64.b64encode((gates[:, :shown] * 255).round().astype(np.uint8).tobytes()).decode(),  # in 255ths
        "favourites": [[favourites(words, each) for each in layer.T] for layer in gates],
        "kinds": [by_kind(words, layer[:, :generalists].sum(1)) for layer in gates]}


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
    return data.ordered_windows(tokens, model.config.block_size, str(model.tokens.weight.device))


@torch.no_grad()
def gates_of(user: Learned, tokens: np.ndarray) -> np.ndarray:
    """Every expert's gate for every token when a user's model reads these tokens: (L, n, E)."""
    E = user.model.config.n_experts
    layers = [[dense_gates(routing, E) for routing in user.model.trunk(idx, user.gates)[1]]
              for idx, _ in windows(tokens, user.model)]
    return torch.stack([torch.cat(parts) for parts in zip(*layers, strict=True)]).float().cpu().numpy()


def worth(user: Learned, tokens: np.ndarray, gates: np.ndarray) -> tuple[float, float] | None:
    """The perplexity as routed, and if every token got the mean gates of all; None where nothing is routed."""
    if user.gates is not None or not user.model.config.routed:
        return None
    means = torch.from_numpy(gates.mean(1))  # (L, E)
    return tuple(math.exp(evaluate(user.model, windows(tokens, user.model), weights)[0]) for weights in (None, means))


def favourites(words: list[str], gates: np.ndarray, most: int = 10, often: int = 5) -> list[tuple[str, float]]:
    """The tokens, of those that come often enough, that an expert has its largest mean gates for, and these."""
    names, which = np.unique(np.array(words, dtype=object), return_inverse=True)
    count, total = np.bincount(which), np.bincount(which, gates)
    mean = np.where(count >= often, total / count, 0)
    return [(names[i], float(mean[i])) for i in np.argsort(-mean, kind="stable")[:most] if mean[i] >= 0.005]


def by_kind(words: list[str], share: np.ndarray) -> dict[str, float]:
    """The generalists' mean share of tokens of each kind that there is."""
    kinds = np.array([next(kind for kind, form in KINDS.items() if re.fullmatch(form, word.strip(" ") or word, re.S))
                      for word in words])
    return {kind: float(share[kinds == kind].mean()) for kind in KINDS if (kinds == kind).any()}
