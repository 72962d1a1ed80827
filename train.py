"""One run of one method, from the command line to the table at its end.

    python train.py --users 4 --specialists 1,2,4,8
    python train.py --method fedavg --data FOLDER --users 3 --train-kb 20
    python train.py --resume --out FOLDER
    python train.py --help

A run's folder holds config.json (settings, versions), metrics.jsonl (a line per user and evaluation), checkpoint.pt and
previous.pt (states to go on from, for torch.load with weights_only=True) and, once it is through, result.json.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import base
import data
import page
import plots
import ranks
import runs
from base import Base
from bilevel import Alternation, constant, cosine, evaluate
from data import BadInput, Diverged, Text
from federated import Server, User, federated_round
from files import read_json, write_json
from methods import METHODS
from model import BACKBONE, GENERALIST, GPT, ROLES, ROUTER, SPECIALIST, GPTConfig
from settings import SCRATCH, Settings, Training, flags, parse_given, refuse_rest, status_of

DIVERGED = 100.0  # nats; guessing at random costs less than 11, with GPT-2's vocabulary


# --- from settings to users ------------------------------------------------------------------------------------------

def blank(settings: Training, tokenizer: str) -> Base:
    """Where a model from scratch starts: a shape without tensors."""
    shape = {name: getattr(settings, name) or default for name, default in SCRATCH.items()}
    if shape["n_embd"] % shape["n_head"]:
        raise BadInput(f"--n-embd {shape['n_embd']}: not divisible by --n-head {shape['n_head']}; change one of them")
    config = {"vocab_size": data.tokenizer(tokenizer).n_vocab, "block_size": settings.block_size, **shape}
    return Base("scratch", "", {}, config, tokenizer)


def starting_point(settings: Settings) -> Base:
    """Where the models start: a pretrained GPT, or from scratch. Raises BadInput."""
    if settings.init_from == "scratch":
        return blank(settings, settings.tokenizer or "bytes")
    for name in ("n_layer", "n_embd"):
        if getattr(settings, name):
            flags(Settings)[name].refuse(getattr(settings, name), "--init-from has its own", "leave it out")
    try:
        start = base.load(settings.init_from, settings.block_size, settings.n_head)
    except ValueError as error:
        raise BadInput(f"--init-from {error}") from None
    tokenizer = settings.tokenizer or start.tokenizer or "gpt2"
    if tokenizer != (start.tokenizer or tokenizer) or data.tokenizer(tokenizer).n_vocab > start.config["vocab_size"]:
        raise BadInput(f"--tokenizer {tokenizer}: not the one that --init-from {settings.init_from} was trained with; "
                       "take the other")
    return replace(start, tokenizer=tokenizer)


def build_model(settings: Settings, start: Base, specialists: int, rank: int, owner: str) -> GPT:
    """The model of one owner, with initial weights of its own where the start gives none."""
    method = METHODS[settings.method]
    config = GPTConfig(**start.config, generalists=settings.generalists, specialists=specialists,
                       top_k=settings.top_k, expert=settings.expert, lora_rank=rank, routed=method.routed,
                       roles=method.roles)
    model = GPT(config, data.seeded(settings.seed, owner, "weights"), start.tensors).to(settings.device)
    if settings.compile:
        model.compile()
    return model


def crowd(settings: Settings) -> tuple[int, int]:
    """How many users there are, and how many of them are called in a round."""
    total = 1 if METHODS[settings.method].pooled else settings.users
    return total, max(1, round(settings.participation * total))


def build_user(settings: Settings, name: str, model: GPT, texts: list[Text]) -> User:
    """A user with the text of one, or, for pooled methods, of all."""
    method = METHODS[settings.method]

    def batches(splits: tuple[str, ...], purpose: str) -> data.RandomWindows:
        return data.RandomWindows([data.joined([getattr(text, split) for split in splits]) for text in texts],
                                  [data.seeded(settings.seed, text.name, purpose) for text in texts],
                                  settings.batch_size, settings.block_size, settings.device)

    def judge() -> Iterator[data.Batch]:
        valid = data.joined([text.valid for text in texts])
        return data.spread_windows(valid, 32, settings.block_size, settings.device)

    seen = ("train", "valid") if settings.experts_see == "both" else ("train",)
    total, count = crowd(settings)
    steps = max(1, round(settings.rounds * count / total)) * settings.local_steps  # as many as it may expect
    lower = method.level(model.having(GENERALIST, SPECIALIST), batches(seen, "train"), settings.lr,
                         settings.weight_decay, cosine(steps, min(settings.warmup, steps // 5)))
    router = model.having(ROUTER)
    upper = method.router_level(router, batches((method.router_text,), "valid"), settings.router_lr or settings.lr,
                                0.0, constant) if router else None
    weight = sum(len(text.train) for text in texts) if settings.average == "tokens" else 1
    return method.user(name, model, lower, upper, weight, judge)


def build(settings: Settings, start: Base, texts: list[Text]) -> tuple[Server, list[User]]:
    """The server, and this process's users: one for each text, or a single one for all if the method pools them."""
    method = METHODS[settings.method]
    largest = max(settings.specialists), max(settings.lora_rank)
    common = build_model(settings, start, *largest, "server")
    kind = method.server if ranks.count() == 1 else ranks.Together
    server = kind(common.having(GENERALIST), bound=settings.clip_update, noise=settings.dp_noise,
                  generator=data.seeded(settings.seed, "noise"))
    if method.pooled:
        return server, [build_user(settings, "everyone", build_model(settings, start, *largest, "everyone"), texts)]
    sizes = ranks.own(list(zip(settings.specialists, settings.lora_rank, strict=True)))
    texts = ranks.own(texts)
    models = [build_model(settings, start, *size, text.name) for text, size in zip(texts, sizes, strict=True)]
    frozen = common.having(BACKBONE)
    for model in models:  # what is frozen is the same for all, if it isn't pretrained either
        model.load_state_dict({name: frozen[name] for name in model.having(BACKBONE)}, strict=False, assign=True)
    return server, [build_user(settings, text.name, model, [text]) for text, model in zip(texts, models, strict=True)]


# --- the run ---------------------------------------------------------------------------------------------------------

class Run:
    """A whole run: play() plays the rounds and writes the folder. Raises BadInput."""

    def __init__(self, settings: Settings):
        self.start = time.perf_counter()
        self.settings = settings
        self.base = starting_point(settings)
        self.texts = load_texts(settings, self.base.tokenizer)
        self.server, self.users = build(settings, self.base, self.texts)
        pooled = METHODS[settings.method].pooled
        self.own_texts = ranks.own(self.texts)
        self.learners = self.users * len(self.texts) if pooled else self.users  # whose model a text is tested on
        opened = runs.open_folder(settings, self.base, self.texts) if ranks.rank() == 0 else (None, None)
        self.folder, self.lock = ranks.gathered([opened[0]])[0], opened[1]
        self.done, self.before, self.stopping = 0, None, False  # rounds, test losses at the start, asked to stop
        if settings.resume:
            self.go_on()
        self.board = plots.board(self.folder) if settings.tensorboard and ranks.rank() == 0 else None

    def go_on(self) -> None:
        """Take up the newest checkpoint. Raises BadInput."""
        if (self.folder / "result.json").exists():
            raise BadInput(f"--resume: the run in {self.folder} is through; --overwrite starts anew")
        first = ranks.rank() == 0
        try:
            made_with = json.loads(json.dumps(runs.config_of(self.settings, self.base, self.texts)))
            config = read_json(self.folder / "config.json")
            for name, what in (("base", "--init-from"), ("texts", "--data")):
                if config[name] != made_with[name]:
                    raise BadInput(f"{what}: isn't any more what the run in {self.folder} began with; bring it back, "
                                   "or start anew with --overwrite")
            if state := runs.newest(self.folder, self.settings.device, clean=first):
                runs.restore(state["server"], ranks.own(state["users"]), self.server, self.users)
                self.done, self.before = state["round"], state["test_start"]
                self.start -= state["seconds"]
            if first:
                runs.forget_later(self.folder, self.done if state else -1)
            else:
                self.server.refused = []  # rank 0 has them
        except (KeyError, ValueError, TypeError, FileNotFoundError) as error:
            raise BadInput(f"--resume: what is in {self.folder} is damaged or of another version ({error!r}); start "
                           "anew with --overwrite") from None

    def play(self, bar: tqdm) -> dict:
        """Returns what result.json holds. Moves the bar by `users` in each round. Raises KeyboardInterrupt behind a
        round, with a checkpoint, if it is to stop."""
        settings = self.settings
        plan = Alternation(settings.local_steps, settings.router_every, settings.router_steps)
        bar.update(self.done * settings.users)
        valid = None
        if self.before is None:
            self.before = self.measure("test")
            self.log(0, {})
        for number in range(self.done + 1, settings.rounds + 1):
            called, lost = self.called(number)
            losses, refused = {}, len(self.server.refused)
            for user, loss in federated_round(self.server, called, plan, lost):
                losses[user] = self.finite(user, loss)
                bar.update()
                bar.set_description(f"{settings.method}, round {number}/{settings.rounds}, {user.name}, "
                                    f"loss {loss:.2f}")
            for name, reason in self.server.refused[refused:]:
                bar.write(f"round {number}: the answer of user {name} was refused: {reason}", file=sys.stderr)
            bar.update(settings.users - len(called))  # who weren't called
            evaluated = number % settings.eval_every == 0 or number == settings.rounds
            if evaluated:
                valid = self.log(number, losses)
            if any(ranks.gathered([self.stopping])) and number < settings.rounds:
                if not evaluated:
                    self.save(number)
                raise KeyboardInterrupt
        result = self.summarize(self.before, valid or self.measure("valid"), self.measure("test"))
        if ranks.rank() == 0:
            write_json(self.folder / "result.json", result)
        return result

    def called(self, number: int) -> tuple[list[User], list[User]]:
        """Who is called in a round, and who of them vanishes before it answers; of this process's users."""
        generator = data.seeded(self.settings.seed, "called", number)
        total, count = crowd(self.settings)
        chosen = set(torch.randperm(total, generator=generator)[:count].tolist())
        luck = torch.rand(total, generator=generator).tolist()
        mine = [(user, i) for user, i in zip(self.users, ranks.own(list(range(total))), strict=True) if i in chosen]
        return [user for user, _ in mine], [user for user, i in mine if luck[i] < self.settings.drop_rate]

    def finite(self, user: User, loss: float) -> float:
        """That loss, if it's one. Raises Diverged."""
        if not loss < DIVERGED:
            flag = f"--dp-noise {self.settings.dp_noise}" if self.settings.dp_noise else f"--lr {self.settings.lr}"
            raise Diverged(f"{flag}: the loss of user {user.name} has grown to {loss:.3g}; take a smaller one")
        return loss

    def measure(self, split: str) -> list[tuple[float, list[float]]]:
        """Of each text: the loss in nats on all of that split, and the generalists' mean gate in each layer."""
        T, measured = self.settings.block_size, []
        for user, text in zip(self.learners, self.own_texts, strict=True):
            self.server.deliver(user)
            user.settle()
            windows = data.ordered_windows(getattr(text, split), max(1, 1024 // T), T, self.settings.device)
            loss, gates = evaluate(user.model, windows)  # gates: (L, E)
            generalist = [role == GENERALIST for role in user.model.config.expert_roles]
            measured.append((self.finite(user, loss), gates[:, generalist].sum(1).tolist()))
        return ranks.gathered(measured)

    def log(self, number: int, losses: dict[User, float]) -> list:
        """Measure validation losses after a round, add them to metrics.jsonl, save the checkpoint, return them."""
        valid = self.measure("valid")
        lines = ranks.gathered([{
            "round": number, "user": text.name, "train_loss": losses.get(user), "valid_loss": loss,
            "generalist_share": share, "bytes_up": user.bytes_up, "bytes_down": user.bytes_down}
            for text, user, (loss, share) in zip(self.own_texts, self.learners, ranks.own(valid), strict=True)])
        if ranks.rank() == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        if self.board:
            plots.show_on(self.board, lines)
        self.save(number)
        return valid

    def save(self, number: int) -> None:
        """Write the checkpoint of a round's end."""
        users = ranks.gathered(runs.states(self.users))
        refused = [each for mine in ranks.gathered([self.server.refused]) for each in mine]
        if ranks.rank() == 0:
            runs.save({"settings": asdict(self.settings), "base": runs.reference(self.base), "round": number,
                       "test_start": self.before, "seconds": time.perf_counter() - self.start,
                       "server": self.server.state() | {"refused": refused}, "users": users}, self.folder)

    def summarize(self, before: list, valid: list, after: list) -> dict:
        """What result.json holds."""
        rows = []
        for text, user, (start, _), (valid_loss, _), (loss, share) in zip(
                self.own_texts, self.learners, *map(ranks.own, (before, valid, after)), strict=True):
            config = user.model.config
            rows.append({
                "name": text.name, "generalists": config.generalists, "specialists": config.specialists,
                "train_bytes": text.train_bytes, "train_tokens": len(text.train),
                "parameters": {role: sum(p.numel() for p in user.model.having(role).values()) for role in ROLES},
                "valid_ppl": math.exp(valid_loss), "test_ppl_start": math.exp(start), "test_ppl": math.exp(loss),
                "test_bpb": loss * (len(text.test) - 1) / math.log(2) / text.test_bytes,
                "trigram_ppl": math.exp(data.trigram_loss(text.train, text.test, config.vocab_size)),
                "generalist_share": share})
        rows = ranks.gathered(rows)
        levels = [level for user in self.users for level in (user.lower, user.upper) if level]
        totals = ranks.gathered([{
            "tokens_seen": sum(level.steps * level.batches.tokens_per_batch for level in levels),
            "bytes_up": sum(user.bytes_up for user in self.users),
            "bytes_down": sum(user.bytes_down for user in self.users), "refused": len(self.server.refused)}])
        return {
            "method": self.settings.method, "seed": self.settings.seed,
            "seconds": round(time.perf_counter() - self.start, 1), "rounds": self.settings.rounds,
            **{name: sum(each[name] for each in totals) for name in totals[0]},
            **{f"mean_{name}": sum(row[name] for row in rows) / len(rows)
               for name in ("valid_ppl", "test_ppl", "test_bpb")}, "users": rows}


def table(result: dict, folder: Path) -> str:
    """The result as a person reads it."""
    lines = [f"{'user':<14}{'experts':>9}{'parameters':>12}{'train kB':>10}{'test perplexity':>20}{'trigram':>9}"
             f"{'bits/byte':>11}{'to generalists':>16}"]
    for user in result["users"]:
        share = f"{sum(user['generalist_share']) / len(user['generalist_share']):.0%}"
        lines.append(
            f"{user['name']:<14}{user['generalists']:>5}G {user['specialists']}S{sum(user['parameters'].values()):>12,}"
            f"{user['train_bytes'] / 1000:>10.0f}{user['test_ppl_start']:>10.1f} → {user['test_ppl']:<7.2f}"
            f"{user['trigram_ppl']:>9.2f}{user['test_bpb']:>11.3f}"
            f"{share if METHODS[result['method']].routed else '–':>15}")
    lines.append(f"{'mean':<45}{'':>13}{result['mean_test_ppl']:<7.2f}{'':>9}{result['mean_test_bpb']:>11.3f}")
    lines.append(f"{result['method']}, seed {result['seed']}: {result['rounds']} rounds in {result['seconds']:.0f} s; "
                 f"users sent {result['bytes_up'] / 1e6:.1f} MB and received {result['bytes_down'] / 1e6:.1f} MB; "
                 f"all of it is in {folder}")
    return "\n".join(lines)


# --- the command ----------------------------------------------------------------------------------------------------

def train(settings: Settings) -> None:
    """Raises BadInput."""
    ranks.join(settings.device)
    first = ranks.rank() == 0
    run = Run(settings)
    total = settings.rounds * settings.users
    with tqdm(total=total, unit="user", dynamic_ncols=True, disable=not first) as bar, stop_gently(run, bar):
        result = run.play(bar)
    if not first:
        return
    print(table(result, run.folder))
    if settings.plot:
        plots.plot(page.read_lines(run.folder / "metrics.jsonl"), run.folder / "curves")
    if run.board:
        run.board.close()
    if ranks.count() == 1:
        page.of_run(run.folder, run.folder / "page.html", settings.title, run.texts,
                    [user.model for user in run.learners], data.tokenizer(run.base.tokenizer))
        print(f"what it learned: {run.folder / 'page.html'}")
    else:  # the other users' models are elsewhere
        print(f"what it learned: python sample.py --run {run.folder} --html {run.folder / 'page.html'}")


def load_texts(settings: Settings, tokenizer: str) -> list[Text]:
    """The users' text. Raises BadInput."""
    return data.load(settings.data, settings.users, settings.train_kb, settings.target, tokenizer, settings.block_size,
                     settings.short_users, settings.cache, user_field=settings.user_field,
                     text_field=settings.text_field, source=settings.source)


@contextmanager
def stop_gently(run: Run, bar: tqdm) -> Iterator[None]:
    """Let the first Ctrl-C end the run after its round, with a checkpoint, and the second one at once."""
    def stop(*_) -> None:
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping = True
        bar.write("stopping at the end of this round; Ctrl-C again: at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with: python train.py --resume --out {run.folder}") from None
    finally:
        signal.signal(signal.SIGINT, before)


def settings_of(arguments: list[str] | None) -> Settings:
    """The settings of a command line; of a run that goes on, its own. Raises BadInput."""
    given, rest = parse_given(arguments, Settings)
    refuse_rest(rest)
    if not given.get("resume"):
        return Settings(**given)
    if "out" not in given:
        raise BadInput("--resume: goes on with which run? give the folder with --out")
    saved = runs.saved_settings(Path(given["out"]))
    try:
        settings = Settings(**saved | {"overwrite": False} | given)
    except TypeError as error:
        raise BadInput(f"--resume: the run in {given['out']} is of another version ({error}); start anew with "
                       "--overwrite") from None
    wanted = json.loads(json.dumps(asdict(settings)))
    for name in given.keys() - {"resume", "out"}:
        if wanted[name] != saved[name]:
            flags(Settings)[name].refuse(given[name], f"the run in {given['out']} has {saved[name]}",
                                         "leave it out, or start anew with --overwrite")
    return settings


def main(arguments: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="replace")  # the table's arrows, on a terminal without Unicode
    return status_of("train.py", lambda: train(settings_of(arguments)), "nothing is lost; --resume goes on")


if __name__ == "__main__":
    sys.exit(main())
