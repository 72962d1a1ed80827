"""The server of a run over Flower. It averages as train.py does and has its own checkpoint.

flwr run flower NAME --stream --run-config 'flags="--rounds 20" users="de,fr" out="out/server"'
"""

import math
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context, MessageType, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid, ServerApp

from federated import Message
from flower.messages import is_valid_report, pack_message, settings_of, unpack_reply, users_of
from methods import METHODS
from model import GENERALIST
from support.errors import BadInput
from support.files import locked, write, write_json, write_lines
from support.pretrained.base import Base
from support.runs.evaluation import refused_uploads, result_of, table
from support.runs.flags import refuse
from support.runs.settings import Settings, plain
from support.runs.start import starting_point
from support.server import privacy
from train import build_largest, build_model, build_server, sample_clients, selected_per_round

Replies = dict[str, tuple[Message, dict]]  # by user: its generalists and its report


@dataclass(frozen=True, eq=False)
class RemoteUser:
    """A user as the server knows it."""

    name: str
    weight: float
    shared: dict[str, torch.Size]


def check(settings: Settings, names: list[str]) -> None:
    """Raise BadInput for settings that only train.py supports."""
    method = METHODS[settings.method]
    if len(names) != settings.users or len(set(names)) < len(names):
        refuse(
            "users",
            settings.users,
            f"the run config names {', '.join(names)}",
            "name each user once",
        )
    if method.pooled:
        refuse("method", settings.method, "needs all users' text in one place", "use train.py")
    if not method.clippable:
        refuse("method", settings.method, "isn't an average of updates", "use train.py")
    if settings.target == "mixed":
        refuse("target", "mixed", "a device has its own text only", "use train.py")
    if settings.drop_rate:
        refuse(
            "drop_rate", settings.drop_rate, "real devices disappear by themselves", "leave it out"
        )
    if selected_per_round(settings) == 1 < settings.users:
        refuse(
            "participation",
            settings.participation,
            "selects a single user, whose update would be public",
            "use a larger one",
        )
    if settings.device != "cpu":
        refuse("device", settings.device, "would be the same on all devices", "leave it out")


Shapes = dict[str, torch.Size]  # of a user's generalists, by name


def generalist_shapes(settings: Settings, base: Base, names: list[str]) -> dict[str, Shapes]:
    """For each user, the names and shapes of its generalists."""
    shapes = {}
    for number, name in enumerate(names):
        size = settings.specialists[number], settings.lora_rank[number]
        model = build_model(settings, base, *size, "shapes")
        shapes[name] = {key: tensor.shape for key, tensor in model.having(GENERALIST).items()}
    return shapes


class ServerRun:
    """A run of the server, at its start or at its checkpoint. Raises BadInput.

    send: sends each user its generalists for a round, and returns the replies that arrived:
        send(run_id, number, {user: message})
    """

    def __init__(
        self,
        settings: Settings,
        names: list[str],
        out: Path,
        send: Callable[[str, int, dict[str, Message]], Replies],
    ):
        check(settings, names)
        self.start_time = time.perf_counter()
        self.settings = settings
        self.names = names
        self.out = out
        self.send = send
        base = starting_point(settings)
        self.server = build_server(settings, build_largest(settings, base, "server"))
        if settings.dp_noise:
            self.server.generator = None  # devices know the seed, so the system draws the noise
        self.shapes = generalist_shapes(settings, base, names)
        self.run_id = secrets.token_hex(8)
        self.rounds_done = 0
        self.lines = {}  # of metrics.jsonl, by round and user
        self.complete = True  # whether each average contains all selected users
        try:
            self.lock = locked(out)
        except BlockingIOError:
            refuse("out", str(out), "another server works in it", "wait until it has ended")
        self.path = out / "server.pt"
        if self.path.exists():
            self.restore(torch.load(self.path, weights_only=True))
        else:
            self.save(0)  # so that a server that is started again has the same run_id

    def play(self) -> dict:
        """Run the remaining rounds. Returns the content of result.json."""
        for number in range(self.rounds_done + 1, self.settings.rounds + 1):
            self.play_round(number)
            self.save(number)
        result = self.result()
        lines = [self.lines[key] for key in sorted(self.lines)]
        write_lines(self.out / "metrics.jsonl", lines)
        write_json(self.out / "result.json", result)
        return result

    def play_round(self, number: int) -> None:
        """Train the selected users and average their uploads.

        With a single reply, the average doesn't change.
        """
        selected = [self.names[i] for i in sample_clients(self.settings, number)[0]]
        replies = self.train(number, selected)
        refused_before = len(self.server.refused)
        if len(replies) >= min(2, len(self.names)):
            self.server.aggregate(self.uploads(replies))
        if len(replies) < len(selected):
            self.complete = False
        print(f"round {number}: {len(replies)} of {len(selected)} replied", flush=True)
        for line in refused_uploads(number, self.server.refused[refused_before:]):
            print(line, flush=True)

    def train(self, number: int, names: list[str]) -> Replies:
        """The valid replies of these users to round `number`."""
        messages = {name: self.server.broadcast(self.shapes[name]) for name in names}
        replies = {}
        for name, (upload, report) in self.send(self.run_id, number, messages).items():
            if not is_valid_report(report, last=number > self.settings.rounds):
                continue
            replies[name] = upload, report
            for line in report["lines"]:
                key = line["round"], self.names.index(name)
                self.lines[key] = line | {"user": name}
        return replies

    def uploads(self, replies: Replies) -> dict[RemoteUser, Message]:
        """The uploads with valid weights, in the order of users, not of arrival."""
        uploads = {}
        for name in self.names:
            if name not in replies:
                continue
            upload, report = replies[name]
            weight = report["weight"] if self.settings.average == "tokens" else 1.0
            if 0 < weight < math.inf:
                uploads[RemoteUser(name, weight, self.shapes[name])] = upload
        return uploads

    def result(self) -> dict:
        """Let all users evaluate the last average. Returns the content of result.json."""
        replies = self.train(self.settings.rounds + 1, self.names)
        missing = [name for name in self.names if name not in replies]
        if len(missing) == len(self.names):
            raise BadInput(
                "no device replied to the evaluation; start this run again when devices are "
                "connected"
            )
        if missing:
            print(f"the result is without {', '.join(missing)}: no reply", flush=True)
        reports = [replies[name][1] for name in self.names if name in replies]
        rows = [report["row"] for report in reports]
        counts = [report["counters"] for report in reports]
        seconds = time.perf_counter() - self.start_time
        refused = len(self.server.refused)
        return result_of(self.settings, rows, counts, refused, seconds, self.guarantee())

    def guarantee(self) -> dict:
        """The guarantee for the user that was selected most often.

        The devices know the seed, and therefore who was selected, so selection adds no privacy.
        """
        selections = Counter()
        for number in range(1, self.settings.rounds + 1):
            selections.update(sample_clients(self.settings, number)[0])
        users = len(self.names)
        rounds = max(selections.values())
        complete = self.complete and not self.server.refused
        return privacy.guarantee(self.settings.dp_noise, users, users, rounds, complete)

    @property
    def identity(self) -> dict:
        """The settings and names that a checkpoint must share with this run."""
        return plain(self.settings) | {"names": self.names}

    def save(self, number: int) -> None:
        """Write the checkpoint after round `number`."""
        state = {
            "identity": self.identity,
            "run_id": self.run_id,
            "round": number,
            "complete": self.complete,
            "lines": self.lines,
            "server": self.server.state(),
            "seconds": time.perf_counter() - self.start_time,
        }
        write(self.path, lambda path: torch.save(state, path))

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint. Raises BadInput if it belongs to another run."""
        if state["identity"] != self.identity:
            refuse("out", str(self.out), "holds another run", "use another folder")
        self.run_id = state["run_id"]
        self.rounds_done = state["round"]
        self.complete = state["complete"]
        self.lines = state["lines"]
        self.server.load(state["server"])
        self.start_time -= state["seconds"]


RETRY = 60.0  # seconds before a failed node gets a message again, and to reply with a name


class BadReply(ValueError):
    """A reply that is an error, or whose content isn't valid."""


def read_reply(reply: FlowerMessage) -> tuple[Message, dict]:
    """A device's generalists and its report. Raises BadReply."""
    if reply.has_error():
        raise BadReply(reply.error.reason)
    try:
        return unpack_reply(reply.content)
    except (ValueError, KeyError, TypeError) as error:
        raise BadReply(f"not a valid reply: {error!r}") from None


class Nodes:
    """The users' nodes in Flower's grid. A node that reconnects gets its message again.

    patience: seconds that a round waits for replies. pause: seconds between two polls.
    """

    def __init__(self, grid: Grid, patience: float, pause: float = 3.0):
        self.grid = grid
        self.patience = patience
        self.pause = pause
        self.users = {}  # node -> name of its user
        self.failed = {}  # node -> when it failed

    def find(self) -> dict[str, int]:
        """The node of each user; the first, if two have the same name."""
        now = time.monotonic()
        nodes = []
        for node in self.grid.get_node_ids():
            if node not in self.failed or now - self.failed[node] >= RETRY:
                nodes.append(node)
        new = [node for node in nodes if node not in self.users]
        self.users = {node: name for node, name in self.users.items() if node in nodes}
        if new:
            self.ask_names(new)
        found = {}
        for node, name in self.users.items():
            found.setdefault(name, node)
        return found

    def ask_names(self, nodes: list[int]) -> None:
        """Ask nodes for their users' names. A node that doesn't reply has failed."""
        questions = [FlowerMessage(RecordDict(), node, MessageType.QUERY) for node in nodes]
        for reply in self.grid.send_and_receive(questions, timeout=RETRY):
            if not reply.has_error():
                self.users[reply.metadata.src_node_id] = reply.content["user"]["name"]
        for node in nodes:
            if node not in self.users:
                self.failed[node] = time.monotonic()

    def send(self, run: str, number: int, messages: dict[str, Message]) -> Replies:
        """Send users their messages for round `number`. Returns the replies that arrive in time."""
        replies = {}
        waiting = {}  # id of a message -> user, node
        end = time.monotonic() + self.patience
        while len(replies) < len(messages) and time.monotonic() < end:
            sent = [name for name, _ in waiting.values()]
            for name, node in self.find().items():
                if name in messages and name not in replies and name not in sent:
                    content = pack_message(messages[name], run, number)
                    message_id = self.push(node, content, number, end)
                    if message_id:
                        waiting[message_id] = name, node
            for reply in self.grid.pull_messages(list(waiting)):
                name, node = waiting.pop(reply.metadata.reply_to_message_id)
                try:
                    replies[name] = read_reply(reply)
                except BadReply as error:
                    print(f"round {number}, user {name}: {error}", flush=True)
                    self.failed[node] = time.monotonic()
            time.sleep(self.pause)
        return replies

    def push(self, node: int, content: RecordDict, number: int, end: float) -> str | None:
        """Send a message that expires with the round. Returns its id, or None if that failed."""
        seconds = end - time.monotonic() + self.pause
        message = FlowerMessage(content, node, MessageType.TRAIN, group_id=str(number), ttl=seconds)
        ids = list(self.grid.push_messages([message]))
        return ids[0] if ids else None


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    out = Path(str(config["out"]))
    nodes = Nodes(grid, float(config["patience"]))
    run = ServerRun(settings_of(context), users_of(context), out, nodes.send)
    print(table(run.play(), out), flush=True)
