"""One run of one method, from the command line to the table at its end.

    python train.py --users 4 --specialists 1,2,4,8
    python train.py --method fedavg --data FOLDER --users 3 --train-kb 20
    python train.py --resume --out FOLDER
    python train.py --help

A run's folder holds config.json (settings, versions), metrics.jsonl (a line per user and evaluation), checkpoint.pt and
previous.pt (states to continue from, for torch.load with weights_only=True) and, once it has ended, result.json.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

import data
from bilevel import Rhythm, cosine
from data import Text
from federated import User, federated_round
from methods import METHODS
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig
from support.files import write_json
from support.pretrained.base import Base
from support.report import page
from support.runs import folder, processes
from support.runs.folder import Folder, stopped_gently
from support.runs.measuring import check_loss, counts_of, line_of, result_of, row_of, table, untrained
from support.runs.settings import Settings, check_device, plain, status_of
from support.runs.start import starting_point
from support.server import privacy
from support.server.guard import Guard

JUDGED = 8  # windows of a user's validation text by which a device judges a model, where a method asks for that


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


def build_largest(settings: Settings, start: Base, owner: str) -> GPT:
    """A model in which every user's has a place, such as the server's."""
    return build_model(settings, start, max(settings.specialists), max(settings.lora_rank), owner)


def build_server(settings: Settings, model: GPT) -> Guard:
    kind = METHODS[settings.method].server if processes.count() == 1 else processes.Together
    return Guard(kind(model.having(GENERALIST), settings.hyper), settings.clip_update, settings.dp_noise,
                 data.seeded(settings.seed, "noise"))


def build_own(settings: Settings, start: Base, common: GPT, text: Text, number: int) -> User:
    """User `number`, with a model of its own and the server's backbone, which needn't be pretrained to be the same."""
    model = build_model(settings, start, settings.specialists[number], settings.lora_rank[number], text.name)
    frozen = common.having(BACKBONE)
    model.load_state_dict({name: frozen[name] for name in model.having(BACKBONE)}, strict=False, assign=True)
    return build_user(settings, text.name, model, [text])


def build(settings: Settings, start: Base, texts: list[Text]) -> tuple[Guard, list[User]]:
    """The server, and this process's users: one for each text, or a single one for all if the method pools them."""
    common = build_largest(settings, start, "server")
    server = build_server(settings, common)
    if METHODS[settings.method].pooled:
        return server, [build_user(settings, "everyone", build_largest(settings, start, "everyone"), texts)]
    return server, [build_own(settings, start, common, text, number)
                    for number, text in processes.own(list(enumerate(texts)))]


def rhythm_of(settings: Settings) -> Rhythm:
    return Rhythm(settings.local_steps, settings.router_every, settings.router_steps)


def drawn(settings: Settings, number: int) -> tuple[list[int], list[int]]:
    """Which users are called in a round, and which of them vanish before they answer."""
    generator = data.seeded(settings.seed, "called", number)
    total, count = called_of(settings)
    chosen = sorted(torch.randperm(total, generator=generator)[:count].tolist())
    luck = torch.rand(total, generator=generator).tolist()
    return chosen, [i for i in chosen if luck[i] < settings.drop_rate]


# --- the run ---------------------------------------------------------------------------------------------------------

class Run:
    """A run that is ready to be played, from its beginning or from a checkpoint. Raises BadInput."""

    def __init__(self, settings: Settings):
        self.settings, self.began = settings, time.perf_counter()
        check_device(settings.device)
        self.base = starting_point(settings)
        self.texts = data.load(settings.data_config, self.base.encoding)
        self.server, self.users = build(settings, self.base, self.texts)
        self.here = dict(zip(processes.own(list(range(called_of(settings)[0]))), self.users, strict=True))  # by number
        learners = self.users * len(self.texts) if METHODS[settings.method].pooled else self.users
        self.tested = list(zip(learners, processes.own(self.texts), strict=True))  # whose model is tested on which text
        self.first = processes.index() == 0  # of several processes, the first writes
        self.folder = Folder(settings, folder.config_of(settings, self.base, self.texts)) if self.first else None
        self.done, self.before = 0, None  # rounds, test losses at the start
        state = processes.gathered([self.folder.continued() if self.first else None])[0] if settings.resume else None
        if state:
            self.server.load(state["server"])
            for user, saved in zip(self.users, processes.own(state["users"]), strict=True):
                folder.restore_user(user, saved)
            if not self.first:
                self.server.refused = []  # the first process has everyone's
            self.done, self.before = state["round"], processes.own(state["test_start"])
            self.began -= state["seconds"]

    def play(self, bar: tqdm, stop: Callable[[], bool] = lambda: False) -> dict:
        """Play the rounds; returns what result.json holds. Moves the bar by `users` a round. If it is to stop, it ends
        after a round, with a checkpoint, and raises KeyboardInterrupt."""
        settings, rhythm = self.settings, rhythm_of(self.settings)
        bar.update(self.done * settings.users)
        if self.before is None:
            bar.set_description("measuring the untrained models")
            self.hand_out()
            self.before = [untrained(settings, self.base, *each) for each in self.tested]
            self.log(0, {})
            self.save(0)
        for number in range(self.done + 1, settings.rounds + 1):
            called, lost = ([self.here[i] for i in each if i in self.here] for each in drawn(settings, number))
            refused = len(self.server.refused)
            losses = federated_round(self.server, self.shown(called, number, bar), rhythm, lost)
            for user, loss in losses.items():
                check_loss(settings, user, loss)
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
        result = self.result()
        if self.first:
            write_json(self.folder.path / "result.json", result)
        return result

    def show(self) -> None:
        """Write the page of what everyone learned."""
        learned = [folder.Learned(user.name, user.model, user.gates) for user, _ in self.tested]
        page.of_run(self.folder.path, self.folder.path / "page.html", self.settings.title, self.texts, learned,
                    self.base.encoding)

    def shown(self, users: list[User], number: int, bar: tqdm) -> Iterator[User]:
        """The users, while the bar follows."""
        for user in users:
            bar.set_description(f"{self.settings.method}, round {number}/{self.settings.rounds}, {user.name}")
            yield user
            bar.update()

    def hand_out(self, counted: bool = False) -> None:
        """Give θ^G to everyone, to be evaluated. Only the last time is this a message; before, a simulation looks at
        users who needn't have been called."""
        for user in self.users:
            message = self.server.give(user.shared)
            user.receive(message) if counted else user.adopt(message)
            user.settle()

    def log(self, number: int, losses: dict[User, float]) -> None:
        """After a round: add everyone's line to metrics.jsonl."""
        lines = processes.gathered([line_of(self.settings, number, user, text, losses.get(user))
                                    for user, text in self.tested])
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

    def result(self) -> dict:
        """What result.json holds."""
        rows = processes.gathered([row_of(self.settings, *each, before)
                                   for each, before in zip(self.tested, self.before, strict=True)])
        counts, settings = processes.gathered(list(map(counts_of, self.users))), self.settings
        refused = sum(processes.gathered([len(self.server.refused)]))
        promise = privacy.guarantee(settings, *called_of(settings), settings.rounds,
                                    whole=not (settings.drop_rate or refused))
        return result_of(settings, rows, counts, refused, time.perf_counter() - self.began) | promise


# --- the command ----------------------------------------------------------------------------------------------------

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
