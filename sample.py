"""Text from the models of a run, and a page that shows which expert each token was given to.

    python sample.py --run out/NAME --user english --prompt "The "
    python sample.py --run out/NAME --user all --prompt "The "
    python sample.py --run out/NAME --html page.html

A run that is still going, or was cut off, shows its newest checkpoint.
"""

import codecs
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import tiktoken
import torch

import base
import data
import page
import train
from corpora import BadInput
from files import read_json
from model import GPT, GPTConfig
from settings import Settings, check, parse_settings, setting, status_of


@dataclass
class Sampling:
    """What to show of a run. Raises BadInput."""

    run: str = setting("", "folder of the run")
    user: str | None = setting(None, "whose model; all: everyone's, side by side; default: the first user's")
    prompt: str | None = setting(None, "how the text begins; default: at a document's beginning")
    tokens: int = setting(300, "tokens to make", int, low=1)
    temperature: float = setting(0.8, "0 takes the likeliest token, 1 samples as the model says", float, low=0)
    top_k: int = setting(40, "only the likeliest tokens, so many, are sampled from", int, low=1)
    seed: int = setting(0, "of the sampling", int, low=0)
    html: str | None = setting(None, "write the page to this file, and no text")

    def __post_init__(self):
        check(self)


def load(run: Path) -> tuple[dict, list[tuple[str, GPT]]]:
    """The checkpoint of a run, and its users' models, as they are used, by name. Raises BadInput."""
    path = run / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        start, block_size = state["base"], state["users"][0]["config"]["block_size"]
        tensors = {} if start["name"] == "scratch" else base.load(start["name"], block_size).tensors
        if tensors and start["sha256"] != base.load(start["name"], block_size).sha256:
            raise ValueError(f"{start['name']}: isn't the file any more that the run started from")
    except FileNotFoundError:
        raise BadInput(f"--run {run}: holds no checkpoint.pt; give the folder of a run") from None
    except Exception as error:  # a foreign file can fail in any way
        raise BadInput(f"--run {run}: its model can't be read ({error}); give another run") from None
    models = []
    for user in state["users"]:
        model = GPT(GPTConfig(**user["config"]), torch.Generator(), tensors)
        for name, parameter in model.own().items():
            parameter.data = user["parameters"][name].data  # whose rank a method may have cut
        for block, weights in zip(model.blocks, user["weights"], strict=True):
            block.moe.weights = weights
        models.append((user["name"], model))
    return state, models


def continued(model: GPT, sampling: Sampling, encoding: tiktoken.Encoding) -> Iterator[str]:
    """The prompt, and then the text of each new token."""
    prompt = [encoding.eot_token, *encoding.encode_ordinary(sampling.prompt or "")]
    generator = torch.Generator().manual_seed(sampling.seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield sampling.prompt or ""
    for token in model.stream(torch.tensor([prompt]), sampling.tokens, sampling.temperature, sampling.top_k, generator):
        new = token.item()
        yield "\n\n" if new == encoding.eot_token else decoder.decode(encoding.decode_single_token_bytes(new))


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Texts in columns under their names."""
    column = max(20, width // len(texts) - 3)
    columns = [[name, "", *(part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""])]
               for name, text in texts.items()]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" │ ".join(cell[:column].ljust(column) for cell in row).rstrip() for row in rows)


def show_page(run: Path, state: dict, models: list[GPT], encoding: tiktoken.Encoding, path: Path) -> None:
    """Write the page: of test text where the run is through, else of validation text. Raises BadInput."""
    texts = train.load_texts(Settings(**state["settings"]), state["base"]["tokenizer"])
    models = models * (len(texts) // len(models))  # one for all, where text was pooled
    result = read_json(run / "result.json") if (run / "result.json").exists() else None
    try:
        page.write_page(path, texts, models, encoding, "test" if result else "valid",
                        page.read_lines(run / "metrics.jsonl"), result)
    except OSError as error:
        raise BadInput(f"--html {path}: {error.strerror}; give another file") from None
    print(path)


def show(sampling: Sampling) -> None:
    """Raises BadInput."""
    run = Path(sampling.run)
    state, models = load(run)
    encoding = data.tokenizer(state["base"]["tokenizer"])
    if sampling.html:
        show_page(run, state, [model for _, model in models], encoding, Path(sampling.html))
        return
    if sampling.user == "all":
        texts = {name: "".join(continued(model, sampling, encoding)) for name, model in models}
        print(side_by_side(texts, shutil.get_terminal_size().columns))
        return
    named = dict(models)
    user = sampling.user or models[0][0]
    if user not in named:
        raise BadInput(f"--user {user}: not in this run; give all, or one of {', '.join(named)}")
    for new in continued(named[user], sampling, encoding):
        print(new, end="", flush=True)
    print()


def main(arguments: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="replace")
    return status_of("sample.py", lambda: show(parse_settings(arguments, Sampling)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
