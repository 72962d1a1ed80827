"""One run of one method, from the command line to the table at its end.

    python train.py --users 4 --specialists 1,2,4,8
    python train.py --method fedavg --data FOLDER --users 3 --train-kb 20
    python train.py --resume --out FOLDER
    python train.py --help

The folder of a run holds config.json (settings, versions), metrics.jsonl (a line per user and
evaluation), checkpoint.pt (to continue from) and, at the end, result.json and page.html.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

import data
from bilevel import Batch, Rhythm, cosine
from data import Text
from federated import User, federated_round
from methods import METHODS
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig
from rivals import JudgingUser
from support.pretrained.base import Base
from support.report import page
from support.runs import processes
from support.runs.checkpoint import TrainedUser, restore_user, user_state
from support.runs.command_line import run_command
from support.runs.evaluation import (
    check_loss,
    counters,
    evaluate_at_end,
    initial_test_loss,
    metrics_line,
    refused_uploads,
    result_of,
    result_row,
    table,
)
from support.runs.folder import config_of, describe_base, settings_of, stop_after_round
from support.runs.settings import Settings, plain
from support.runs.start import check_device, starting_point
from support.server import privacy
from support.server.guard import Guard

# --- build: from settings to a server and users ---


def build_model(
    settings: Settings, base: Base, specialists: int, lora_rank: int, owner: str
) -> GPT:
    """The model of one owner. Weights that aren't in the base are drawn with its name as seed."""
    method = METHODS[settings.method]
    config = GPTConfig(
        **base.config,
        generalists=settings.generalists,
        specialists=specialists,
        top_k=settings.top_k,
        expert=settings.expert,
        lora_rank=lora_rank,
        routed=method.routed,
        by_kind=method.by_kind,
        roles=method.roles,
    )
    generator = data.seeded(settings.seed, owner, "weights")
    model = GPT(config, generator, base.tensors).to(settings.device)
    if settings.compile:
        model.compile()
    return model


def build_largest(settings: Settings, base: Base, owner: str) -> GPT:
    """The server's model, as large as the largest user's."""
    return build_model(settings, base, max(settings.specialists), max(settings.lora_rank), owner)


def build_batches(
    settings: Settings, texts: list[Text], splits: tuple[str, ...], purpose: str
) -> data.RandomWindows:
    """Random windows of some splits of each text."""
    tokens = [data.joined(text, splits) for text in texts]
    generators = [data.seeded(settings.seed, text.name, purpose) for text in texts]
    return data.RandomWindows(
        tokens, generators, settings.batch_size, settings.block_size, settings.device
    )


def build_user(settings: Settings, name: str, model: GPT, texts: list[Text]) -> User:
    """A user who learns from one text, or, for pooled methods, from all texts."""
    method = METHODS[settings.method]

    rounds = settings.rounds * selected_per_round(settings) / number_of_clients(settings)
    steps = max(1, round(rounds)) * settings.local_steps  # a user's expected number
    schedule = cosine(steps, min(settings.warmup, steps // 5))
    splits = ("train", "valid") if settings.experts_see == "both" else ("train",)
    batches = build_batches(settings, texts, splits, "train")
    experts = model.having(GENERALIST, SPECIALIST)
    lower = method.level(
        experts, batches, settings.lr, settings.weight_decay, schedule, settings.hyper
    )

    upper = None
    router = model.having(ROUTER)
    if router:
        batches = build_batches(settings, texts, (method.router_text,), "valid")
        upper = method.router_level(
            router, batches, settings.router_rate, settings.router_decay, hyper=settings.hyper
        )

    weight = sum(len(text.train) for text in texts) if settings.average == "tokens" else 1
    user = method.user(name, model, lower, upper, weight, settings.hyper)
    if isinstance(user, JudgingUser):

        def validation_windows() -> Iterator[Batch]:
            return data.spread_windows(
                texts[0].valid, method.user.n_windows, settings.block_size, settings.device
            )

        user.validation_windows = validation_windows
    return user


def build_own_user(
    settings: Settings, base: Base, server_model: GPT, text: Text, number: int
) -> User:
    """User `number`, with a model of its size on the frozen backbone of the server's model."""
    model = build_model(
        settings, base, settings.specialists[number], settings.lora_rank[number], text.name
    )
    server_backbone = server_model.having(BACKBONE)
    backbone = {name: server_backbone[name] for name in model.having(BACKBONE)}
    model.load_state_dict(backbone, strict=False, assign=True)
    return build_user(settings, text.name, model, [text])


def build_server(settings: Settings, model: GPT) -> Guard:
    """The method's server, behind a guard that checks uploads, clips them and adds noise."""
    kind = METHODS[settings.method].server if processes.count() == 1 else processes.SummingServer
    server = kind(model.having(GENERALIST), settings.hyper)
    return Guard(
        server, settings.clip_update, settings.dp_noise, data.seeded(settings.seed, "noise")
    )


def build(settings: Settings, base: Base, texts: list[Text]) -> tuple[Guard, list[User]]:
    """The server and the users: one per text, or a single one if the method pools all texts."""
    server_model = build_largest(settings, base, "server")
    server = build_server(settings, server_model)
    if METHODS[settings.method].pooled:
        model = build_largest(settings, base, "everyone")
        return server, [build_user(settings, "everyone", model, texts)]
    users = []
    for number, text in processes.mine(list(enumerate(texts))):
        users.append(build_own_user(settings, base, server_model, text, number))
    return server, users


def rhythm_of(settings: Settings) -> Rhythm:
    return Rhythm(
        local_steps=settings.local_steps,
        router_every=settings.router_every,
        router_steps=settings.router_steps,
    )


# --- client sampling ---


def number_of_clients(settings: Settings) -> int:
    return 1 if METHODS[settings.method].pooled else settings.users


def selected_per_round(settings: Settings) -> int:
    return max(1, round(settings.participation * number_of_clients(settings)))


def sample_clients(settings: Settings, number: int) -> tuple[list[int], list[int]]:
    """The users selected in round `number`, and those of them that disappear before they upload."""
    generator = data.seeded(settings.seed, "called", number)
    order = torch.randperm(number_of_clients(settings), generator=generator).tolist()
    selected = sorted(order[: selected_per_round(settings)])
    draws = torch.rand(len(order), generator=generator).tolist()
    dropped = [i for i in selected if draws[i] < settings.drop_rate]
    return selected, dropped


# --- the run ---


class Run:
    """A server, its users and a folder, at the start of a run or at its checkpoint.

    Raises BadInput.
    """

    def __init__(self, settings: Settings):
        self.start_time = time.perf_counter()
        self.settings = settings
        check_device(settings.device)
        self.base = starting_point(settings)
        self.texts = data.load(settings.data_config, self.base.encoding)
        self.server, self.users = build(settings, self.base, self.texts)
        self.rounds_done = 0
        self.initial_losses = []  # on each test text, before the first round
        self.local_ends = []  # each text's evaluate_at_end before the last average
        self.folder = processes.run_folder(settings, config_of(settings, self.base, self.texts))
        if settings.resume:
            self.restore(self.folder.load())

    @property
    def readers(self) -> list[tuple[User, Text]]:
        """Each text with the user that is evaluated on it."""
        texts = processes.mine(self.texts)
        if METHODS[self.settings.method].pooled:
            return [(self.users[0], text) for text in texts]
        return list(zip(self.users, texts, strict=True))

    def play(self, bar: tqdm, should_stop: Callable[[], bool] = lambda: False) -> dict:
        """Run the remaining rounds. Returns the content of result.json.

        If `should_stop`, it saves a checkpoint after the round and raises KeyboardInterrupt.
        """
        settings = self.settings
        rhythm = rhythm_of(settings)
        bar.update(self.rounds_done * settings.users)
        if not self.initial_losses:
            self.evaluate_untrained(bar)
        for number in range(self.rounds_done + 1, settings.rounds + 1):
            selected, dropped = sample_clients(settings, number)
            selected = processes.select(self.users, selected)
            dropped = processes.select(self.users, dropped)
            refused_before = len(self.server.refused)
            users = self.with_progress(selected, number, bar)
            losses = federated_round(self.server, users, rhythm, dropped)
            for user, loss in losses.items():
                check_loss(settings, user, loss)
            for line in refused_uploads(number, self.server.refused[refused_before:]):
                bar.write(line, file=sys.stderr)

            last = number == settings.rounds
            stop = processes.total(should_stop()) > 0
            if last:
                self.evaluate_local()
                self.download_average()
                self.log(number, losses)
            elif number % settings.eval_every == 0:
                with self.averaged():
                    self.log(number, losses)
            if last or stop or number % settings.save_every == 0:
                self.save(number)
            if stop and not last:
                raise KeyboardInterrupt
        result = self.result()
        self.folder.finish(result)
        return result

    def evaluate_untrained(self, bar: tqdm) -> None:
        """Give all users the server's generalists, and evaluate them."""
        bar.set_description("evaluating the untrained models")
        for user in self.users:
            user.set_generalists(self.server.broadcast(user.shared))
        for user, text in self.readers:
            self.initial_losses.append(initial_test_loss(self.settings, user, text))
        self.log(number=0, losses={})
        self.save(number=0)

    def with_progress(self, users: list[User], number: int, bar: tqdm) -> Iterator[User]:
        """The users of a round, one by one. The bar advances by `settings.users` in total."""
        for user in users:
            progress = f"round {number}/{self.settings.rounds}"
            bar.set_description(f"{self.settings.method}, {progress}, {user.name}")
            yield user
            bar.update()
        bar.update(self.settings.users - len(users))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Temporarily give all users the server's generalists, to evaluate them.

        Afterwards they have their own again, as on a device. Only a simulation can do this, so it
        doesn't count as a message.
        """
        own = {user: user.copy_generalists() for user in self.users}
        for user in self.users:
            user.set_generalists(self.server.broadcast(user.shared))
        yield
        for user in self.users:
            user.model.load_state_dict(own[user], strict=False)

    def evaluate_local(self) -> None:
        """Evaluate every user as its last local steps left it, before the last average."""
        for user, text in self.readers:
            self.local_ends.append(evaluate_at_end(self.settings, user, text))

    def download_average(self) -> None:
        """Send all users the last average, which they keep."""
        for user in self.users:
            user.download(self.server.broadcast(user.shared))

    def log(self, number: int, losses: dict[User, float]) -> None:
        """Evaluate all users on validation text, and add their lines to metrics.jsonl."""
        lines = []
        for user, text in self.readers:
            lines.append(metrics_line(self.settings, number, user, text, losses.get(user)))
        self.folder.log(lines)

    def save(self, number: int) -> None:
        """Write the checkpoint after round `number`, with models that are ready for use."""
        for user in self.users:
            user.before_evaluation()
        self.folder.save(
            {
                "settings": plain(self.settings),
                "base": describe_base(self.base),
                "round": number,
                "seconds": time.perf_counter() - self.start_time,
                "initial_losses": self.initial_losses,
                "local_ends": self.local_ends,
                "server": self.server.state(),
                "users": [user_state(user) for user in self.users],
            }
        )

    def restore(self, state: dict | None) -> None:
        """Continue from a checkpoint, if there is one."""
        if state is None:
            return
        self.rounds_done = state["round"]
        self.start_time -= state["seconds"]
        self.initial_losses = state["initial_losses"]
        self.local_ends = state["local_ends"]
        self.server.load(state["server"])
        for user, saved in zip(self.users, state["users"], strict=True):
            restore_user(user, saved)

    def result(self) -> dict:
        """Evaluate all users on test text. Returns the content of result.json."""
        settings = self.settings
        rows = []
        measured = zip(self.readers, self.initial_losses, self.local_ends, strict=True)
        for (user, text), initial_loss, local in measured:
            averaged = evaluate_at_end(settings, user, text)
            rows.append(result_row(settings, user, text, initial_loss, local, averaged))
        rows = processes.gather(rows)
        counts = processes.gather([counters(user) for user in self.users])
        refused = processes.total(len(self.server.refused))
        guarantee = privacy.guarantee(
            settings.dp_noise,
            number_of_clients(settings),
            selected_per_round(settings),
            settings.rounds,
            complete=refused == 0 and settings.drop_rate == 0,
        )
        seconds = time.perf_counter() - self.start_time
        return result_of(settings, rows, counts, refused, seconds, guarantee)

    def write_page(self) -> None:
        """Write page.html: curves, and the experts of each token."""
        users = [TrainedUser(user.name, user.model, user.fixed_gates) for user, _ in self.readers]
        path = self.folder.path
        page.of_run(
            path, path / "page.html", self.settings.title, self.texts, users, self.base.encoding
        )


# --- the command ---


def train(settings: Settings) -> None:
    """Run a method and print its table. Raises BadInput."""
    processes.join(settings)
    run = Run(settings)
    path = run.folder.path
    total = settings.rounds * settings.users
    with (
        tqdm(total=total, unit="user", dynamic_ncols=True, disable=not processes.is_first()) as bar,
        stop_after_round(path) as should_stop,
    ):
        result = run.play(bar, should_stop)
    if not processes.is_first():
        return
    print(table(result, path))
    if processes.count() == 1:
        run.write_page()
        print(f"report: {path / 'page.html'}")
    else:  # this process doesn't have all models
        print(f"report: python sample.py --run {path} --html {path / 'page.html'}")


def main(arguments: list[str] | None = None) -> int:
    def work() -> None:
        train(settings_of(arguments))

    return run_command("train.py", work, "the checkpoint is kept; use --resume")


if __name__ == "__main__":
    sys.exit(main())
