"""What a run's routers learned about words: the generalists' share of each class of tokens, by user and layer.

    python -m lab.experiments languages
    python -m lab.words --run out/languages/comigs-lr0.002-seed0

The paper finds that function words go to generalists and content words to specialists. Function words are told by the
lists below, of German and French. A token belongs to the word that it is a part of.
"""

import re
import sys
from dataclasses import dataclass

import numpy as np
import tiktoken

from model import GENERALIST
from sample import open_run
from support.report import page
from support.report.tables import markdown
from support.runs.checkpoint import TrainedUser
from support.runs.command_line import parsed, run_command
from support.runs.flags import check_values, setting

FUNCTION_WORDS = {  # by user
    "de": {
        "articles": "der die das den dem des ein eine einen einem einer eines",
        "pronouns": "ich du er es wir ihr sie mich dich sich uns euch ihn ihm ihnen mir dir man dies diese dieser "
                    "dieses diesen diesem ihre ihren ihrem ihrer ihres sein seine seinen seinem seiner welche welcher "
                    "welches was wer alle jede jeder jedes jeden einige etwas nichts",
        "prepositions": "in an auf aus bei mit nach von vor zu für über unter um durch ohne gegen zwischen während "
                        "wegen bis seit im am ins ans zum zur vom beim",
        "conjunctions": "und oder aber denn sondern wenn weil dass daß ob als wie falls damit sowie bevor nachdem "
                        "obwohl indem sodass sobald solange"},
    "fr": {
        "articles": "le la les l un une des du au aux",
        "pronouns": "je j tu il elle on nous vous ils elles me m te t se s lui leur leurs y ce c cela ceci ça cet "
                    "cette ces qui dont où votre vos notre nos son sa ses celui celle ceux celles quel quelle tout "
                    "tous toute toutes chaque",
        "prepositions": "de d à dans par pour sur avec sans sous en vers chez entre depuis pendant avant après lors "
                        "selon contre dès",
        "conjunctions": "et ou mais donc or ni car si que qu quand lorsque lorsqu comme puisque afin"}}
SPANS = {"word": r"[^\W\d_]+", "digits": r"\d+", "punctuation": r"[^\w\s]+|_+"}


@dataclass
class Words:
    """What a run's routers learned about words. Raises BadInput."""

    run: str = setting("out", "folder of a run whose users are called de, fr, ...")

    def __post_init__(self):
        check_values(self)


def classes(pieces: list[str], lists: dict[str, str]) -> list[set[str]]:
    """What each of a text's tokens is.

    classes(["Der", " Bau", "m", " 7"], {"articles": "der die"})
    -> [{"articles", "beginnings"}, {"other words", "beginnings"}, {"other words", "continuations"}, {"digits"}]
    """
    kinds = {word: kind for kind, words in lists.items() for word in words.split()}
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    found = [set() for _ in pieces]
    for span in re.finditer("|".join(f"(?P<{name}>{form})" for name, form in SPANS.items()), text):
        first, last = np.searchsorted(ends, (span.start(), span.end() - 1), "right")
        for i in range(first, last + 1):
            word = {kinds.get(span[0].lower(), "other words"), "beginnings" if i == first else "continuations"}
            found[i] |= word if span.lastgroup == "word" else {span.lastgroup}
    return found


def shares(user: TrainedUser, tokens: np.ndarray, tokenizer: tiktoken.Encoding) -> dict[str, tuple[int, np.ndarray]]:
    """How many tokens of a text there are of each class, and the generalists' mean gate for them in each layer (L,)."""
    generalist = [role == GENERALIST for role in user.model.config.expert_roles]
    gates = page.gates_of(user, tokens)[:, :, generalist].sum(2)  # (L, n - 1)
    found = classes(list(page.decode(tokens[:-1].tolist(), tokenizer, end="\n")), FUNCTION_WORDS.get(user.name, {}))
    table = {"all": (gates.shape[1], gates.mean(1))}
    for name in (*FUNCTION_WORDS["de"], "other words", "digits", "punctuation", "beginnings", "continuations"):
        chosen = np.array([name in each for each in found])
        if chosen.any():
            table[name] = int(chosen.sum()), gates[:, chosen].mean(1)
    return table


def report(found: dict[str, dict[str, tuple[int, np.ndarray]]], parts: int = 3) -> str:
    """Markdown: of each user the classes' counts and shares, in thirds of the layers; and in how many of the layers the
    share is above that of all tokens."""
    rows = [["user", "tokens", "count", "all layers"]]
    for name, table in found.items():
        overall = table["all"][1]
        thirds = np.array_split(np.arange(len(overall)), min(parts, len(overall)))
        rows[0][4:] = [*(f"{third[0] + 1} to {third[-1] + 1}" for third in thirds), "above all tokens'"]
        for kind, (count, share) in table.items():
            above = "" if kind == "all" else f"in {(share > overall).sum()} of {len(share)} layers"
            rows.append([name, kind, f"{count:,}", *(f"{part.mean():.1%}" for part in (
                share, *(share[third] for third in thirds))), above])
    return markdown(rows)


def show(words: Words) -> None:
    """Raises BadInput."""
    run = open_run(words.run)
    print(report({text.name: shares(user, text.test, run.encoding) for user, text in run.readers}))


def main(arguments: list[str] | None = None) -> int:
    return run_command("lab.words", lambda: show(parsed(arguments, Words)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
