"""The generalists' share by class of tokens: articles, pronouns, digits, ...

    python -m lab.experiments languages
    python -m lab.words --run out/languages/comigs-lr0.002-seed0

The paper finds that function words are routed to generalists and content words to specialists. Here
the lists below define the function words of German and French. A token belongs to the word that it
is a part of.
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

FUNCTION_WORDS = {  # user -> class -> words
    "de": {
        "articles": ("der die das den dem des ein eine einen einem einer eines"),
        "pronouns": (
            "ich du er es wir ihr sie mich dich sich uns euch ihn ihm ihnen mir dir man dies "
            "diese dieser dieses diesen diesem ihre ihren ihrem ihrer ihres sein seine seinen "
            "seinem seiner welche welcher welches was wer alle jede jeder jedes jeden einige "
            "etwas nichts"
        ),
        "prepositions": (
            "in an auf aus bei mit nach von vor zu für über unter um durch ohne gegen zwischen "
            "während wegen bis seit im am ins ans zum zur vom beim"
        ),
        "conjunctions": (
            "und oder aber denn sondern wenn weil dass daß ob als wie falls damit sowie bevor "
            "nachdem obwohl indem sodass sobald solange"
        ),
    },
    "fr": {
        "articles": ("le la les l un une des du au aux"),
        "pronouns": (
            "je j tu il elle on nous vous ils elles me m te t se s lui leur leurs y ce c cela "
            "ceci ça cet cette ces qui dont où votre vos notre nos son sa ses celui celle ceux "
            "celles quel quelle tout tous toute toutes chaque"
        ),
        "prepositions": (
            "de d à dans par pour sur avec sans sous en vers chez entre depuis pendant avant "
            "après lors selon contre dès"
        ),
        "conjunctions": (
            "et ou mais donc or ni car si que qu quand lorsque lorsqu comme puisque afin"
        ),
    },
}
SPANS = re.compile(r"(?P<word>[^\W\d_]+)|(?P<digits>\d+)|(?P<punctuation>[^\w\s]+|_+)")
CLASSES = (
    *FUNCTION_WORDS["de"],
    "other words",
    "digits",
    "punctuation",
    "beginnings",
    "continuations",
)
Shares = dict[str, tuple[int, np.ndarray]]  # class -> number of tokens, and share by layer (L,)


@dataclass
class Words:
    """Show how a run's routers treat classes of words. Raises BadInput."""

    run: str = setting("out", "folder of a run whose users are named de, fr, ...")

    def __post_init__(self):
        check_values(self)


def classes(pieces: list[str], function_words: dict[str, str]) -> list[set[str]]:
    """The classes of each token of a text.

    classes(["Der", " Bau", "m", " 7"], {"articles": "der die"})
    -> [{"articles", "beginnings"}, {"other words", "beginnings"},
        {"other words", "continuations"}, {"digits"}]
    """
    class_of_word = {}
    for name, words in function_words.items():
        for word in words.split():
            class_of_word[word] = name
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])  # where each token ends in the text
    found = [set() for _ in pieces]
    for span in SPANS.finditer(text):
        first = np.searchsorted(ends, span.start(), "right")
        last = np.searchsorted(ends, span.end() - 1, "right")
        for i in range(first, last + 1):
            if span.lastgroup != "word":
                found[i].add(span.lastgroup)
                continue
            found[i].add(class_of_word.get(span[0].lower(), "other words"))
            found[i].add("beginnings" if i == first else "continuations")
    return found


def shares(user: TrainedUser, tokens: np.ndarray, tokenizer: tiktoken.Encoding) -> Shares:
    """For each class of tokens, the generalists' mean gate in each layer."""
    generalist = [role == GENERALIST for role in user.model.config.expert_roles]
    gates = page.gates_of(user, tokens)[:, :, generalist].sum(2)  # (L, n - 1)
    pieces = list(page.decode(tokens[:-1].tolist(), tokenizer, end="\n"))
    found = classes(pieces, FUNCTION_WORDS.get(user.name, {}))
    by_class = {"all": (gates.shape[1], gates.mean(1))}
    for name in CLASSES:
        members = np.array([name in each for each in found])
        if members.any():
            by_class[name] = int(members.sum()), gates[:, members].mean(1)
    return by_class


def report(users: dict[str, Shares], parts: int = 3) -> str:
    """Markdown: the classes' counts and shares for each user, over all layers and by thirds.

    The last column counts the layers in which the share is above that of all tokens.
    """
    layers = len(next(iter(users.values()))["all"][1])
    thirds = np.array_split(np.arange(layers), min(parts, layers))
    header = ["user", "tokens", "count", "all layers"]
    header += [f"{third[0] + 1} to {third[-1] + 1}" for third in thirds]
    cells = [[*header, "above all tokens'"]]
    for user, by_class in users.items():
        _, overall = by_class["all"]
        for name, (count, share) in by_class.items():
            means = [share.mean(), *(share[third].mean() for third in thirds)]
            above = ""
            if name != "all":
                above = f"in {(share > overall).sum()} of {layers} layers"
            cells.append([user, name, f"{count:,}", *(f"{mean:.1%}" for mean in means), above])
    return markdown(cells)


def show(words: Words) -> None:
    """Raises BadInput."""
    run = open_run(words.run)
    users = {}
    for user, text in run.readers:
        users[text.name] = shares(user, text.test, run.tokenizer)
    print(report(users))


def main(arguments: list[str] | None = None) -> int:
    return run_command("lab.words", lambda: show(parsed(arguments, Words)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
