"""The page of a run: what is to be seen is computed here and put as JSON into page.html, which draws it."""

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
from model import GENERALIST, GPT, dense_gates
from support.files import read_json, read_lines, write_text
from support.runs.checkpoint import TrainedUser
from support.sampling import stream

SHOWN = 8  # users on the page, at most
OWN, COMMON = 800, 150  # tokens shown of a user's text, and of each user's in the text that all users read
PROMPT, WRITTEN = 20, 60  # tokens of a beginning that all models are given, and that each adds to it
READ = 4000  # tokens that an expert's favourites and the shares by kind are computed from
KINDS = re.compile(r" *(?:(?P<letters>\w*[^\W\d_]\w*)|(?P<digits>\d+)) *|(?P<space>\s+)|(?P<other>.*)", re.S)
NUMBERS = dict(enumerate("no one two three four five six seven eight nine ten".split()))


def of_run(folder: Path, path: Path, title: str, texts: list[data.Text], users: list[TrainedUser],
           tokenizer: tiktoken.Encoding) -> None:
    """Write the page of a run, of test text if it has ended, else of validation text. A text's user is the one in the
    same place. Raises OSError, ValueError."""
    metrics, n = read_lines(folder / "metrics.jsonl"), len(texts)
    result = read_json(folder / "result.json") if (folder / "result.json").exists() else None
    progress = [[user[key] for key in ("name", "test_ppl_start", "test_ppl", "trigram_ppl")]
                for user in result["users"]] if result else [
        [first["user"], math.exp(first["valid_loss"]), math.exp(last["valid_loss"]), None]
        for first, last in zip(metrics[:n], metrics[-n:], strict=True)]
    shown = [(text.name, text.test if result else text.valid, user)
             for text, user in zip(texts, users, strict=True)][:SHOWN]
    alike = len({tokens.tobytes() for _, tokens, _ in shown}) == 1
    prompt, common = shown[0][1][:PROMPT], np.concatenate([tokens[:COMMON] for _, tokens, _ in shown])
    content = {
        "title": title, "headline": headline(progress, max(line["round"] for line in metrics), users),
        "written": [[user.name, *written(user, prompt, tokenizer)] for user in dict.fromkeys(users[:SHOWN])],
        "own": [view(*each, tokenizer, OWN) for each in shown],
        "same": [] if alike else [view(name, common, user, tokenizer, len(common)) for name, _, user in shown],
        "progress": progress, "result": result, "metrics": metrics}
    inert = json.dumps(content).replace("<", "\\u003c")  # ASCII, and no tag can begin in it
    write_text(path, Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("@@DATA@@", inert))


def headline(progress: list[list], rounds: int, users: list[TrainedUser]) -> str:
    """A run in a sentence. progress: each user's name, perplexity before and after, and, at the end, its trigram's."""
    n, (before, after, trigram) = len(progress), np.array([row[1:] for row in progress], float).T  # None becomes nan
    model, number = users[0].model, NUMBERS.get(n, n)
    how = "from pooled text" if model is users[-1].model else "together" if model.having(GENERALIST) else "alone"
    who, mean = ("One user learned", "") if n == 1 else (f"{number} users learned {how}".capitalize(), " on average")
    when = f"for {rounds} round{'s' * (rounds != 1)}{' so far: validation' if np.isnan(trigram).all() else ': test'}"
    everyone = {1: "they", 2: "both"}.get(n, f"all {number}")
    claims = {"beat a trigram table of their own text": (after < trigram).sum(), "got worse": (after > before).sum(),
              "lost to a trigram table of their own text": (after >= trigram).all() * n}
    told = (f"{everyone if k == n else f'{NUMBERS.get(k, k)} of {number}'} {claim}" for claim, k in claims.items() if k)
    return "; ".join([f"{who} {when} perplexity {before.mean():.1f}\xa0→\xa0{after.mean():.2f}{mean}", *told])


def written(user: TrainedUser, prompt: np.ndarray, tokenizer: tiktoken.Encoding) -> list[str]:
    """A prompt, and how a user's model goes on, always with the likeliest token."""
    idx = torch.from_numpy(prompt.astype(np.int64))[None].to(user.model.device)
    new = stream(user.model, idx, WRITTEN, temperature=0, vocabulary=tokenizer.n_vocab, fixed_gates=user.fixed_gates)
    words = list(decode([*prompt.tolist(), *map(int, new)], tokenizer))
    return ["".join(words[1:len(prompt)]), "".join(words[len(prompt):])]


def view(name: str, tokens: np.ndarray, user: TrainedUser, tokenizer: tiktoken.Encoding, shown: int) -> dict:
    """What is to be seen of a text and a model: tokens, gates, and what each expert has its largest shares of."""
    tokens = tokens[:READ]
    gates = gates_of(user, tokens)  # (L, n - 1, E): the last token is only a target
    words = list(decode(tokens[:-1].tolist(), tokenizer))
    kinds = np.array([KINDS.fullmatch(word).lastgroup for word in words])
    generalists = user.model.config.expert_roles.count(GENERALIST)
    return {
        "name": name, "tokens": words[:shown], "read": len(words), "worth": worth(user, tokens, gates),
        "layers": gates.shape[0], "experts": gates.shape[2], "generalists": generalists,
        "gates": base64.b64encode((gates[:, :shown] * 255).round().astype(np.uint8).tobytes()).decode(),  # in 255ths
        "favourites": [[favourites(words, each) for each in layer.T] for layer in gates],
        "kinds": [{kind: float(layer[kinds == kind, :generalists].sum(1).mean()) for kind in sorted(set(kinds))}
                  for layer in gates]}


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
    return data.ordered_windows(tokens, model.config.block_size, str(model.device))


@torch.no_grad()
def gates_of(user: TrainedUser, tokens: np.ndarray) -> np.ndarray:
    """Every expert's gate for every token when a user's model reads these tokens: (L, n, E)."""
    E = user.model.config.n_experts
    layers = [[dense_gates(routing, E) for routing in user.model.trunk(idx, user.fixed_gates)[1]]
              for idx, _ in windows(tokens, user.model)]
    return torch.stack([torch.cat(parts) for parts in zip(*layers, strict=True)]).float().cpu().numpy()


def worth(user: TrainedUser, tokens: np.ndarray, gates: np.ndarray) -> tuple[float, float] | None:
    """The perplexity as routed, and if every token got the mean gates of all; None where nothing is routed."""
    if user.fixed_gates is not None or not user.model.config.routed:
        return None
    means = torch.from_numpy(gates.mean(1))  # (L, E)
    return tuple(math.exp(evaluate(user.model, windows(tokens, user.model), weights)[0]) for weights in (None, means))


def favourites(words: list[str], gates: np.ndarray, most: int = 10, often: int = 5) -> list[tuple[str, float]]:
    """The tokens, of those that come often enough, that an expert has its largest mean gates for, and these."""
    names, which = np.unique(np.array(words, dtype=object), return_inverse=True)
    count, total = np.bincount(which), np.bincount(which, gates)
    mean = np.where(count >= often, total / count, 0)
    return [(names[i], float(mean[i])) for i in np.argsort(-mean, kind="stable")[:most] if mean[i] >= 0.01]
