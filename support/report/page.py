"""The report of a run: numbers and texts are computed here, and page.html draws them.

The page is one file that loads nothing. Its content is JSON, which replaces @@DATA@@.
"""

import base64
import codecs
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
import torch

import data
from bilevel import Batch, dense_gates, evaluate
from data import Text
from model import GENERALIST, GPT
from support.files import read_json, read_lines, write_text
from support.runs.checkpoint import TrainedUser
from support.sampling import stream

TEMPLATE = Path(__file__).with_name("page.html")
USERS_SHOWN = 8
TOKENS_SHOWN = 800  # of a user's text
TOKENS_SHARED = 150  # of each user's text in the text that all models read
TOKENS_READ = 4000  # of a text, for favourites and perplexities
PROMPT_TOKENS = 20
NEW_TOKENS = 60  # that each model adds to the prompt
FAVOURITES = 10  # tokens listed for an expert
FREQUENT = 5  # minimum number of occurrences of a favourite
HARDLY_EVER = 0.01  # minimum mean gate of a favourite


def of_run(
    folder: Path,
    path: Path,
    title: str,
    texts: list[Text],
    users: list[TrainedUser],
    tokenizer: tiktoken.Encoding,
) -> None:
    """Write the page of the run in `folder` to `path`.

    texts, users: users[i] is evaluated on texts[i]. The page shows test text if the run
    has ended, else validation text. Raises OSError, ValueError.
    """
    metrics = read_lines(folder / "metrics.jsonl")
    result = None
    if (folder / "result.json").exists():
        result = read_json(folder / "result.json")
        progress = progress_of_result(result)
    else:
        progress = progress_of_metrics(metrics, len(texts))

    users_shown = users[:USERS_SHOWN]
    texts_shown = texts[:USERS_SHOWN]
    names = [text.name for text in texts_shown]
    split = "valid" if result is None else "test"
    tokens = [getattr(text, split) for text in texts_shown]
    prompt = tokens[0][:PROMPT_TOKENS]
    content = {
        "title": title,
        "headline": headline(progress, users, metrics[-1]["round"], result is not None),
        "progress": progress,
        "result": result,
        "metrics": metrics,
        "samples": [sample(user, prompt, tokenizer) for user in dict.fromkeys(users_shown)],
        "own": own_views(names, tokens, users_shown, tokenizer),
        "same": same_views(names, tokens, users_shown, tokenizer),
    }
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace("@@DATA@@", inert(content)))


def inert(content: dict) -> str:
    """JSON in which no HTML tag can begin."""
    return json.dumps(content).replace("<", "\\u003c")


# --- perplexities ------------------------------------------------------------------------


def progress_of_result(result: dict) -> list[dict]:
    """Each user's test perplexity before and after training, and that of its trigram model."""
    rows = []
    for user in result["users"]:
        rows.append(
            {
                "name": user["name"],
                "before": user["test_ppl_start"],
                "after": user["test_ppl"],
                "trigram": user["trigram_ppl"],
            }
        )
    return rows


def progress_of_metrics(metrics: list[dict], users: int) -> list[dict]:
    """Each user's validation perplexity at the start and at the last evaluation.

    metrics: lines of metrics.jsonl; each evaluation is one line for each user, in order.
    """
    rows = []
    for first, last in zip(metrics[:users], metrics[-users:], strict=True):
        rows.append(
            {
                "name": first["user"],
                "before": math.exp(first["valid_loss"]),
                "after": math.exp(last["valid_loss"]),
                "trigram": None,
            }
        )
    return rows


def headline(progress: list[dict], users: list[TrainedUser], rounds: int, ended: bool) -> str:
    """One sentence that describes the run.

    "2 users learned together for 1 round: mean test perplexity 9.0 → 5.00; 1 of 2 beat a
    trigram model of their training text"
    """
    before = statistics.mean(row["before"] for row in progress)
    after = statistics.mean(row["after"] for row in progress)
    when = f"for {counted(rounds, 'round')}"
    split = "test" if ended else "validation"
    number = len(progress)
    parts = [
        f"{counted(number, 'user')} learned {manner(users)} {when}: mean {split} "
        f"perplexity {before:.1f}\xa0→\xa0{after:.2f}"
    ]
    if ended:
        better = sum(row["after"] < row["trigram"] for row in progress)
        parts.append(f"{better} of {number} beat a trigram model of their training text")
    worse = sum(row["after"] > row["before"] for row in progress)
    if worse:
        parts.append(f"{worse} of {number} got worse")
    return "; ".join(parts)


def counted(number: int, noun: str) -> str:
    """counted(2, "user") -> "2 users"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def manner(users: list[TrainedUser]) -> str:
    """How the users of a run learned."""
    if len(users) == 1:
        return "alone"
    if users[0].model is users[1].model:
        return "from pooled text"
    return "together" if users[0].model.having(GENERALIST) else "alone"


# --- texts, tokens and gates --------------------------------------------------------------


def sample(user: TrainedUser, prompt: np.ndarray, tokenizer: tiktoken.Encoding) -> dict:
    """The most likely continuation of a prompt (n,) by a user's model."""
    idx = torch.from_numpy(prompt.astype(np.int64))[None].to(user.model.device)  # (1, n)
    new = stream(
        user.model,
        idx,
        NEW_TOKENS,
        temperature=0,
        vocabulary=tokenizer.n_vocab,
        fixed_gates=user.fixed_gates,
    )
    tokens = prompt.tolist() + [token.item() for token in new]
    pieces = list(decode(tokens, tokenizer))
    return {
        "name": user.name,
        "prompt": "".join(pieces[1 : len(prompt)]),  # without the mark
        "continuation": "".join(pieces[len(prompt) :]),
    }


def own_views(
    names: list[str],
    tokens: list[np.ndarray],
    users: list[TrainedUser],
    tokenizer: tiktoken.Encoding,
) -> list[dict]:
    """Each user's text, with the gates of its model."""
    views = []
    for name, text, user in zip(names, tokens, users, strict=True):
        views.append(view(name, text, user, tokenizer, TOKENS_SHOWN))
    return views


def same_views(
    names: list[str],
    tokens: list[np.ndarray],
    users: list[TrainedUser],
    tokenizer: tiktoken.Encoding,
) -> list[dict]:
    """Parts of all users' texts, joined and read by each model; [] if they share one text."""
    if all(np.array_equal(text, tokens[0]) for text in tokens):
        return []
    shared = np.concatenate([text[:TOKENS_SHARED] for text in tokens])
    views = []
    for name, user in zip(names, users, strict=True):
        views.append(view(name, shared, user, tokenizer, len(shared)))
    return views


def view(
    name: str, tokens: np.ndarray, user: TrainedUser, tokenizer: tiktoken.Encoding, shown: int
) -> dict:
    """A text (n,) and how a user's model routes it. `shown` tokens are on the page."""
    tokens = tokens[:TOKENS_READ]
    gates = gates_of(user, tokens)  # (L, n - 1, E): the last token is only a target
    in_255ths = (gates[:, :shown] * 255).round().astype(np.uint8)
    pieces = list(decode(tokens[:-1].tolist(), tokenizer))
    return {
        "name": name,
        "tokens": pieces[:shown],
        "read": len(pieces),
        "layers": gates.shape[0],
        "experts": gates.shape[2],
        "generalists": user.model.config.expert_roles.count(GENERALIST),
        "gates": base64.b64encode(in_255ths.tobytes()).decode(),
        "favourites": favourites(pieces, gates),
        "perplexities": routed_and_mean_perplexity(user, tokens, gates),
    }


def decode(tokens: Iterable[int], tokenizer: tiktoken.Encoding, end: str = "\n‖") -> Iterator[str]:
    """The text of each token. A character that spans several tokens comes with the last one.

    end: the text of the token between documents. At the start it has no leading blanks.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for number, token in enumerate(tokens):
        if token != tokenizer.eot_token:
            yield decoder.decode(tokenizer.decode_single_token_bytes(token))
            continue
        unfinished = decoder.decode(b"", final=True)
        yield unfinished + (end.lstrip() if number == 0 else end)


def windows(tokens: np.ndarray, model: GPT) -> Iterator[Batch]:
    """A whole text (n,), in windows of the model's block size."""
    return data.ordered_windows(tokens, model.config.block_size, str(model.device))


@torch.no_grad()
def gates_of(user: TrainedUser, tokens: np.ndarray) -> np.ndarray:
    """Each expert's gate for each token, when a user's model reads a text (n,): (L, n - 1, E)."""
    experts = user.model.config.n_experts
    parts = []
    for idx, _ in windows(tokens, user.model):
        _, routings = user.model.trunk(idx, user.fixed_gates)
        layers = [dense_gates(routing, experts) for routing in routings]
        parts.append(torch.stack(layers))  # (L, B * T, E)
    return torch.cat(parts, dim=1).float().cpu().numpy()


def perplexity(
    user: TrainedUser, tokens: np.ndarray, fixed_gates: torch.Tensor | None = None
) -> float:
    """The perplexity of a user's model on a text (n,), with its gates or with fixed ones."""
    if fixed_gates is None:
        fixed_gates = user.fixed_gates
    loss, _ = evaluate(user.model, windows(tokens, user.model), fixed_gates)
    return math.exp(loss)


def routed_and_mean_perplexity(
    user: TrainedUser, tokens: np.ndarray, gates: np.ndarray
) -> tuple[float, float] | None:
    """The perplexity with the router's gates, and with the mean gates for every token.

    gates: those of gates_of. None if the model has no routers.
    """
    if user.fixed_gates is not None or not user.model.config.routed:
        return None
    mean_gates = torch.from_numpy(gates.mean(1))  # (L, E)
    return perplexity(user, tokens), perplexity(user, tokens, mean_gates)


def favourites(pieces: list[str], gates: np.ndarray) -> list[list[list[tuple[str, float]]]]:
    """The tokens with the highest mean gates of each expert, and these means.

    pieces: the text of n tokens. gates: (L, n, E). Returns favourites[layer][expert].
    """
    layers, _, experts = gates.shape
    names, indices, counts = np.unique(
        np.array(pieces, dtype=object), return_inverse=True, return_counts=True
    )
    totals = np.zeros((len(names), layers, experts))
    np.add.at(totals, indices, gates.transpose(1, 0, 2))
    frequent = counts >= FREQUENT
    means = totals[frequent] / counts[frequent, None, None]  # (names, L, E)
    found = []
    for layer in range(layers):
        found.append([highest(names[frequent], means[:, layer, e]) for e in range(experts)])
    return found


def highest(names: np.ndarray, means: np.ndarray) -> list[tuple[str, float]]:
    """The names with the highest means, highest first."""
    order = np.argsort(-means, kind="stable")[:FAVOURITES]
    return [(names[i], float(means[i])) for i in order if means[i] >= HARDLY_EVER]
