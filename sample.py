"""Text from the models of a run, and a page that shows which expert each token was given to.

    python sample.py --run out/NAME --user english --prompt "The "
    python sample.py --run out/NAME --user all --prompt "The "
    python sample.py --run out/NAME --html page.html

A run that hasn't ended shows its newest checkpoint.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

import data
from model import GPT, GPTConfig
from support import folder, page, pretrained
from support.errors import BadInput
from support.folder import Learned
from support.sampling import stream
from support.settings import Settings, check, parsed, setting, status_of


@dataclass
class Sampling:
    """Show what a run's models learned. Raises BadInput."""

    run: str | None = setting(None, "folder of the run")
    user: str | None = setting(None, "whose model; all: everyone's, one after the other (default: the first user's)")
    prompt: str | None = setting(None, "how the text begins (default: the start of a document)")
    tokens: int = setting(300, "tokens to generate", int, low=1)
    temperature: float = setting(0.8, "0 takes the likeliest token, 1 samples as the model says", float, low=0)
    top_k: int = setting(40, "sample from this many of the likeliest tokens", int, low=1)
    seed: int = setting(0, "the seed of the sampling", int, low=0, high=2 ** 63)
    html: str | None = setting(None, "write the page to this file instead of printing text")

    def __post_init__(self):
        if self.run is None:
            raise BadInput("`run`: missing; give the folder of a run")
        check(self)


def load(run: Path) -> tuple[dict, list[Learned], tiktoken.Encoding]:
    """The newest checkpoint of a run, its users' models and their tokenizer. Raises BadInput."""
    state = folder.newest(run)
    if state is None:
        raise BadInput(f"`run` {run}: holds no checkpoint.pt; give the folder of a run")
    known, users, start = state["base"], [], None
    if known["name"] != "scratch":
        config = state["users"][0]["config"]
        start = pretrained.load(known["name"], config["block_size"], config["n_head"], config["dtype"])
        if start.sha256 != known["sha256"]:
            raise BadInput(f"`run` {run}: {known['name']} is no longer the file that it started from; restore it")
    for saved in state["users"]:
        model = GPT(GPTConfig(**saved["config"]), torch.Generator(), start and start.tensors)
        folder.restore_model(saved, model)
        users.append(Learned(saved["name"], model, saved["gates"]))
    return state, users, (start and start.encoding) or data.tokenizer(known["tokenizer"])


def continued(user: Learned, sampling: Sampling, tokenizer: tiktoken.Encoding) -> Iterator[str]:
    """The prompt, and then the text of each new token."""
    prompt = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(sampling.prompt or "")]])
    new = stream(user.model, prompt, sampling.tokens, sampling.temperature, min(sampling.top_k, tokenizer.n_vocab),
                 torch.Generator().manual_seed(sampling.seed), vocabulary=tokenizer.n_vocab, gates=user.gates)
    yield sampling.prompt or ""
    yield from page.decode((token.item() for token in new), tokenizer, end="\n\n")


def show_page(run: Path, state: dict, users: list[Learned], tokenizer: tiktoken.Encoding, path: Path) -> None:
    """Raises BadInput."""
    settings = Settings(**state["settings"] | {"resume": False, "overwrite": False})
    texts = data.load(settings, tokenizer)
    if folder.described(texts) != folder.json_of(run / "config.json")["texts"]:
        raise BadInput(f"`run` {run}: its text, {settings.data}, has changed; restore it")
    users = users * (len(texts) // len(users))  # one for all, where text was pooled
    if path.is_dir():
        raise BadInput(f"`html` {path}: is a folder; give a file")
    try:
        page.of_run(run, path, settings.title, texts, users, tokenizer)
    except (OSError, ValueError) as error:
        raise BadInput(f"`html` {path}: {error}; give another file, or check the run") from None
    print(path)


def show(sampling: Sampling) -> None:
    """Raises BadInput."""
    run = Path(sampling.run)
    state, users, tokenizer = load(run)
    named = {user.name: user for user in users}
    if sampling.user not in (None, "all", *named):
        raise BadInput(f"`user` {sampling.user}: not in this run; give all, or one of {', '.join(named)}")
    if sampling.html:
        show_page(run, state, users, tokenizer, Path(sampling.html))
    elif sampling.user == "all":
        print("\n\n".join(f"{user.name}:\n{''.join(continued(user, sampling, tokenizer))}" for user in users))
    else:
        for new in continued(named[sampling.user or users[0].name], sampling, tokenizer):
            print(new, end="", flush=True)
        print()


def main(arguments: list[str] | None = None) -> int:
    return status_of("sample.py", lambda: show(parsed(arguments, Sampling)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
