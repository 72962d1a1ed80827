"""One run of one method, from the command line to the table at its end.

    python train.py --users 4 --specialists 1,2,4,8
    python train.py --method fedavg --data FOLDER --users 3 --train-kb 20
    python train.py --resume --out FOLDER
    python train.py --help

A run's folder holds config.json (settings, versions), metrics.jsonl (a line per user and evaluation), checkpoint.pt and
previous.pt (states to continue from, for torch.load with weights_only=True) and, once it has ended, result.json.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from bilevel import Rhythm, cosine, evaluate
from data import Text
from federated import User, federated_round
from methods import METHODS
from model import BACKBONE, GENERALIST, GPT, ROLES, ROUTER, SPECIALIST, GPTConfig
from support import folder, page, processes
from support.errors import Diverged
from support.files import kept, write_json
from support.folder import Folder, stopped_gently
from support.guard import Guard
from support.pretrained import Base
from support.settings import Settings, check_device, plain, status_of
from support.start import starting_point
from support.trigram import trigram_loss

DIVERGED = 100.0  # nats; guessing at random costs less than 11, with GPT-2's vocabulary
GLANCE = 2048  # tokens of a user's validation text that a point of its curve is made of
JUDGED = 8  # windows of it by which a device judges a model, where a method asks for that


# --- build: from settings to a server and users ----------------------------------------------------------------------

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


def called_of(settings: Settings) -> tuple[int, int]:
    """How many users there are, and how many of them are called in a round."""
    total = 1 if METHODS[settings.method].pooled else settings.users
    return total, max(1, round(settings.participation * total))


def build_user(settings: Settings, name: str, model: GPT, texts: list[Text]) -> User:
    """A user with the text of one, or, for pooled methods, of all."""
    method = METHODS[settings.method]

    def batches(splits: tuple[str, ...], purpose: str) -> data.RandomWindows:
        return data.RandomWindows([data.joined(text, splits) for text in texts],
                                  [data.seeded(settings.seed, text.name, purpose) for text in texts],
                                  settings.batch_size, settings.block_size, settings.device)

    def judge() -> Iterator[data.Batch]:
        return data.spread_windows(texts[0].valid, JUDGED, settings.block_size, settings.device)

    total, count = called_of(settings)
    steps = max(1, round(settings.rounds * count / total)) * settings.local_steps  # as many as it may expect
    seen = ("train", "valid") if settings.experts_see == "both" else ("train",)
    lower = method.level(model.having(GENERALIST, SPECIALIST), batches(seen, "train"), settings.lr,
                         settings.weight_decay, cosine(steps, min(settings.warmup, steps // 5)), settings.hyper)
    router = model.having(ROUTER)
    routing = batches((method.router_text,), "valid")
    upper = method.router_level(router, routing, settings.rate_of_routers, hyper=settings.hyper) if router else None
    weight = sum(len(text.train) for text in texts) if settings.average == "tokens" else 1
    return method.user(name, model, lower, upper, weight, judge, settings.hyper)


def build(settings: Settings, start: Base, texts: list[Text]) -> tuple[Guard, list[User]]:
    """The server, and this process's users: one for each text, or a single one for all if the method pools them."""
    method = METHODS[settings.method]
    largest = max(settings.specialists), max(settings.lora_rank)
    common = build_model(settings, start, *largest, "server")
    kind = method.server if processes.count() == 1 else processes.Together
    server = Guard(kind(common.having(GENERALIST), settings.hyper), settings.clip_update, settings.dp_noise,
                   data.seeded(settings.seed, "noise"))
    if method.pooled:
        return server, [build_user(settings, "everyone", build_model(settings, start, *largest, "everyone"), texts)]
    users, frozen = [], common.having(BACKBONE)
    for text, specialists, rank in processes.own(
            list(zip(texts, settings.specialists, settings.lora_rank, strict=True))):
        model = build_model(settings, start, specialists, rank, text.name)
        same = {name: frozen[name] for name in model.having(BACKBONE)}  # for all, if it isn't pretrained either
        model.load_state_dict(same, strict=False, assign=True)
        users.append(build_user(settings, text.name, model, [text]))
    return server, users


# --- the run: rounds, evaluations, a result --------------------------------------------------------------------------

class Run:
    """A run that is ready to be played, from its beginning or from a checkpoint. Raises BadInput."""

    def __init__(self, settings: Settings):
        self.settings, self.began = settings, time.perf_counter()
        check_device(settings.device)
        self.base = starting_point(settings)
        self.texts = data.load(settings, self.base.encoding)
        self.server, self.users = build(settings, self.base, self.texts)
        learners = self.users * len(self.texts) if METHODS[settings.method].pooled else self.users
        self.tested = list(zip(learners, processes.own(self.texts), strict=True))  # whose model is tested on which text
        self.first = processes.index() == 0  # of several processes, the first writes
        self.folder = Folder(settings, folder.config_of(settings, self.base, self.texts)) if self.first else None
        self.done, self.before = 0, None  # rounds, test losses at the start
        state = processes.gathered([self.folder.continued() if self.first else None])[0] if settings.resume else None
        if state:
            folder.restore(state["server"], processes.own(state["users"]), self.server, self.users)
            if not self.first:
                self.server.refused = []  # the first process has everyone's
            self.done, self.before = state["round"], processes.own(state["test_start"])
            self.began -= state["seconds"]

    def play(self, bar: tqdm, stop: Callable[[], bool] = lambda: False) -> dict:
        """Play the rounds; returns what result.json holds. Moves the bar by `users` a round. If it is to stop, it ends
        after a round, with a checkpoint, and raises KeyboardInterrupt."""
        settings = self.settings
        rhythm = Rhythm(settings.local_steps, settings.router_every, settings.router_steps)
        bar.update(self.done * settings.users)
        if self.before is None:
            bar.set_description("measuring the untrained models")
            self.hand_out()
            self.before = [self.untrained(*each) for each in self.tested]
            self.log(0, {})
            self.save(0)
        for number in range(self.done + 1, settings.rounds + 1):
            called, lost = self.called(number)
            refused = len(self.server.refused)
            losses = federated_round(self.server, self.shown(called, number, bar), rhythm, lost)
            for user, loss in losses.items():
                self.check(user, loss)
            for name, reason in self.server.refused[refused:]:
                bar.write(f"round {number}: the answer of user {name} was refused: {reason}", file=sys.stderr)
            bar.update(settings.users - len(called))  # who weren't called
            last, stopping = number == settings.rounds, any(processes.gathered([stop()]))
            look, save = (last or number % every == 0 for every in (settings.eval_every, settings.save_every))
            if look or save:
                self.hand_out(counted=last)
            if look:
                self.log(number, losses)
            if save or stopping:
                self.save(number)
            if stopping and not last:
                raise KeyboardInterrupt
        result = self.summarize(self.measure("valid"), self.measure("test"))
        if self.first:
            write_json(self.folder.path / "result.json", result)
        return result

    def show(self) -> None:
        """Write the page of what everyone learned."""
        learned = [folder.Learned(user.name, user.model, user.gates) for user, _ in self.tested]
        page.of_run(self.folder.path, self.folder.path / "page.html", self.settings.title, self.texts, learned,
                    self.base.encoding)

    def called(self, number: int) -> tuple[list[User], list[User]]:
        """Who is called in a round, and who of them vanishes before it answers; of this process's users."""
        generator = data.seeded(self.settings.seed, "called", number)
        total, count = called_of(self.settings)
        chosen = set(torch.randperm(total, generator=generator)[:count].tolist())
        luck = torch.rand(total, generator=generator).tolist()
        mine = [(user, i) for user, i in zip(self.users, processes.own(list(range(total))), strict=True) if i in chosen]
        return [user for user, _ in mine], [user for user, i in mine if luck[i] < self.settings.drop_rate]

    def shown(self, users: list[User], number: int, bar: tqdm) -> Iterator[User]:
        """The users, while the bar follows."""
        for user in users:
            bar.set_description(f"{self.settings.method}, round {number}/{self.settings.rounds}, {user.name}")
            yield user
            bar.update()

    def check(self, user: User, loss: float) -> None:
        """Raises Diverged."""
        if not loss < DIVERGED:
            flag = f"`dp_noise` {self.settings.dp_noise}" if self.settings.dp_noise else f"`lr` {self.settings.lr}"
            raise Diverged(f"{flag}: the loss of user {user.name} has grown to {loss:.3g}; take a smaller one")

    def hand_out(self, counted: bool = False) -> None:
        """Give θ^G to everyone, to be evaluated. Only the last time is this a message; before, a simulation looks at
        users who needn't have been called."""
        for user in self.users:
            message = self.server.give(user.shared)
            user.receive(message) if counted else user.adopt(message)
            user.settle()

    def untrained(self, user: User, text: Text) -> float:
        """The loss in nats on test text before the first round. Low-rank changes are none at all then, so that it is
        the base's, the same in every run: it is computed once, and kept."""
        config, batches = user.model.config, self.all_of(text.test)
        if config.expert != "lora":
            return evaluate(user.model, batches, user.gates)[0]
        first = torch.eye(config.n_experts)[:1].expand(config.n_layer, -1)  # the gates of no mixture
        key = self.base.sha256, self.base.config, sha256(text.test).hexdigest(), torch.__version__
        return kept(Path(self.settings.cache), key, lambda: evaluate(user.model, batches, first)[0])

    def all_of(self, tokens: np.ndarray) -> Iterator[data.Batch]:
        return data.ordered_windows(tokens, self.settings.block_size, self.settings.device)

    def glance(self, tokens: np.ndarray) -> Iterator[data.Batch]:
        """Windows that are spread over a text; a short one is read whole."""
        if len(tokens) <= GLANCE:
            return self.all_of(tokens)
        T = self.settings.block_size
        return data.spread_windows(tokens, max(1, GLANCE // T), T, self.settings.device)

    def measure(self, split: str, read: Callable | None = None) -> list[tuple[float, list[float]]]:
        """Of each text: the loss in nats on that split, and the generalists' mean gate in each layer. `read` makes
        batches of tokens; by default of all."""
        measured = []
        for user, text in self.tested:
            loss, gates = evaluate(user.model, (read or self.all_of)(getattr(text, split)), user.gates)  # gates: (L, E)
            self.check(user, loss)
            generalist = [role == GENERALIST for role in user.model.config.expert_roles]
            measured.append((loss, gates[:, generalist].sum(1).tolist()))
        return measured

    def log(self, number: int, losses: dict[User, float]) -> None:
        """After a round: glance at validation text, and add what is seen to metrics.jsonl."""
        valid = self.measure("valid", self.glance)
        lines = processes.gathered([{
            "round": number, "user": text.name, "train_loss": losses.get(user), "valid_loss": loss,
            "generalist_share": share, "bytes_up": user.bytes_up, "bytes_down": user.bytes_down}
            for (user, text), (loss, share) in zip(self.tested, valid, strict=True)])
        if self.first:
            self.folder.log(lines)

    def save(self, number: int) -> None:
        """Write the checkpoint of a round's end."""
        users, before = processes.gathered(folder.states(self.users)), processes.gathered(self.before)
        refused = [each for mine in processes.gathered([self.server.refused]) for each in mine]
        if self.first:
            self.folder.save({
                "settings": plain(self.settings), "base": folder.reference(self.base), "round": number,
                "test_start": before, "seconds": time.perf_counter() - self.began,
                "server": self.server.state() | {"refused": refused}, "users": users})

    def summarize(self, valid: list, after: list) -> dict:
        """What result.json holds."""
        rows = []
        for (user, text), before, (valid_loss, _), (loss, share) in zip(
                self.tested, self.before, valid, after, strict=True):
            config = user.model.config
            rows.append({
                "name": text.name, "generalists": config.generalists, "specialists": config.specialists,
                "train_bytes": text.train_bytes, "train_tokens": len(text.train),
                "parameters": {role: sum(p.numel() for p in user.model.having(role).values()) for role in ROLES},
                "valid_ppl": math.exp(valid_loss), "test_ppl_start": math.exp(before), "test_ppl": math.exp(loss),
                "test_bpb": loss * (len(text.test) - 1) / math.log(2) / text.test_bytes,
                "trigram_ppl": math.exp(trigram_loss(text.train, text.test, config.vocab_size)),
                "generalist_share": share})
        rows = processes.gathered(rows)
        counts = processes.gathered([{
            "tokens_seen": sum(level.steps * level.batches.tokens_per_batch for level in user.levels),
            "bytes_up": user.bytes_up, "bytes_down": user.bytes_down} for user in self.users])
        return {
            "method": self.settings.method, "seed": self.settings.seed,
            "seconds": round(time.perf_counter() - self.began, 1), "rounds": self.settings.rounds,
            **{name: sum(user[name] for user in counts) for name in counts[0]},
            "refused": sum(processes.gathered([len(self.server.refused)])),
            **{f"mean_{name}": sum(row[name] for row in rows) / len(rows)
               for name in ("valid_ppl", "test_ppl", "test_bpb")}, "users": rows}


# --- the table and the command ---------------------------------------------------------------------------------------

def table(result: dict, path: Path) -> str:
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
                 f"everything is in {path}")
    return "\n".join(lines)


def train(settings: Settings) -> None:
    """Raises BadInput."""
    processes.join(settings)
    run = Run(settings)
    total = settings.rounds * settings.users
    with (tqdm(total=total, unit="user", dynamic_ncols=True, disable=not run.first) as bar,
          stopped_gently(run.folder.path if run.first else settings.out) as stop):
        result = run.play(bar, stop)
    if not run.first:
        return
    path = run.folder.path
    print(table(result, path))
    if processes.count() == 1:
        run.show()
        print(f"what it learned: {path / 'page.html'}")
    else:  # the other users' models are elsewhere
        print(f"what it learned: python sample.py --run {path} --html {path / 'page.html'}")


def main(arguments: list[str] | None = None) -> int:
    return status_of("train.py", lambda: train(folder.settings_of(arguments)), "nothing is lost; --resume continues")


if __name__ == "__main__":
    sys.exit(main())
