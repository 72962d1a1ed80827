"""The server: it averages as train.py does, and continues from its own checkpoint.

    flwr run flower NAME --stream --run-config 'flags="--rounds 20" users="de,fr" out="out/server"'
"""

import json
import math
import secrets
import shlex
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MessageType, RecordDict
from flwr.app import Message as Envelope
from flwr.serverapp import Grid, ServerApp

from federated import Message
from methods import METHODS
from model import GENERALIST
from support.errors import BadInput
from support.files import locked, write, write_json, write_text
from support.runs.measuring import result_of, table
from support.runs.command_line import parsed
from support.runs.flags import refuse
from support.runs.settings import Settings, plain
from support.runs.start import starting_point
from support.server import privacy
from train import build_largest, build_model, build_server, called_of, drawn

Answers = dict[str, tuple[Message, dict]]  # by user: generalists, and what else it told


def sound(told: dict, last: bool) -> bool:
    """Whether what a device told is what a run needs."""
    kinds = {"weight": int | float, "lines": list} | ({"row": dict, "counts": dict} if last else {})
    return (isinstance(told, dict) and all(isinstance(told.get(name), kind) for name, kind in kinds.items())
            and all(isinstance(line, dict) and isinstance(line.get("round"), int) for line in told["lines"]))


@dataclass(frozen=True, eq=False)
class Remote:
    """What the server knows of a user."""

    name: str
    weight: float
    shared: dict[str, torch.Size]


def settings_in(context: Context) -> Settings:
    """The settings of a run, from the flags that it was started with. Raises BadInput."""
    return parsed(shlex.split(str(context.run_config["flags"])))


def check(settings: Settings, names: list[str], secret: bool) -> None:
    """secret: whether only sums of updates reach the server. Raises BadInput."""
    method = METHODS[settings.method]
    for wrong, name, why in (
        (len(names) != settings.users or len(set(names)) < len(names), "users",
         f"needs as many different names, not {','.join(names)}"),
        (method.pooled, "method", "needs everyone's text in one place"),
        (not method.server.bounded, "method", "isn't an average of updates"),
        (settings.target == "mixed", "target", "a device has its own text only"),
        (settings.drop_rate, "drop_rate", "real devices vanish by themselves"),
        (called_of(settings)[1] == 1 < settings.users, "participation", "calls one user, whom no other could hide"),
        (settings.device != "cpu", "device", "would be the same for everyone"),
        (secret and not 1 < settings.users < 1000, "users", "can't be so many where updates are secret"),
        (secret and not settings.clip_update, "clip_update", "is needed where updates are secret"),
        (secret and settings.average != "uniform", "average", "isn't possible where updates are secret"),
        (secret and GENERALIST in method.roles.values() and len(set(settings.specialists)) > 1, "method",
         "averages experts that not all users have, which isn't possible where updates are secret"),
    ):
        if wrong:
            refuse(name, getattr(settings, name), why, "correct that, or use train.py")


class Federation:
    """A run's server. send: gives messages to users in a round, and returns the answers that came. secret: as in check.
    Raises BadInput."""

    def __init__(self, settings: Settings, names: list[str], out: Path,
                 send: Callable[[str, int, dict[str, Message]], Answers], secret: bool = False):
        check(settings, names, secret)
        self.settings, self.names, self.out, self.send, self.began = settings, names, out, send, time.perf_counter()
        self.what = plain(settings) | {"names": names, "secret": secret}
        base, sizes = starting_point(settings), list(zip(settings.specialists, settings.lora_rank, strict=True))
        self.server = build_server(settings, build_largest(settings, base, "server"))
        if settings.dp_noise:
            self.server.generator = None  # the devices know the run's seed
        shapes = {size: {key: parameter.shape for key, parameter in build_model(
            settings, base, *size, "shapes").having(GENERALIST).items()} for size in set(sizes)}
        self.shared = {name: shapes[size] for name, size in zip(names, sizes, strict=True)}
        self.run, self.done, self.lines, self.whole = secrets.token_hex(8), 0, {}, True
        self.path = out / "server.pt"
        try:
            self.lock = locked(out)
        except BlockingIOError:
            raise BadInput(f"`out` {out}: another server works in it; wait until it has ended") from None
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            if saved["what"] != self.what:
                raise BadInput(f"`out` {out}: holds another run; take another folder")
            self.server.load(saved["server"])
            self.run, self.done, self.lines, self.whole = (saved[name] for name in ("run", "round", "lines", "whole"))
            self.began -= saved["seconds"]
        else:
            self.save(0)  # so that a run that is started again is the same to its devices

    def ask(self, number: int, names: list[str]) -> Answers:
        came = self.send(self.run, number, {name: self.server.give(self.shared[name]) for name in names})
        answers = {name: answer for name, answer in came.items() if sound(answer[1], number > self.settings.rounds)}
        for name, (_, told) in answers.items():
            self.lines |= {(line["round"], self.names.index(name)): line | {"user": name} for line in told["lines"]}
        return answers

    def weight(self, told: dict) -> float:
        """What a user asks for, where weights are tokens; 0, if that is no weight."""
        asked = told["weight"] if self.settings.average == "tokens" else 1.0
        return asked if 0 < asked < math.inf else 0.0

    def play(self) -> dict:
        """Play the rounds that are left; returns what result.json holds. A round with a single answer passes."""
        for number in range(self.done + 1, self.settings.rounds + 1):
            called = [self.names[i] for i in drawn(self.settings, number)[0]]
            answers, refused = self.ask(number, called), len(self.server.refused)
            if len(answers) >= min(2, len(self.names)):
                self.server.take({Remote(name, weight, self.shared[name]): answers[name][0]
                                  for name in self.names  # in this order, whoever came first
                                  if name in answers and (weight := self.weight(answers[name][1]))})
            self.whole &= len(answers) == len(called)  # everyone who was called is in the average
            print(f"round {number}: {len(answers)} of {len(called)} answered", flush=True)
            for name, reason in self.server.refused[refused:]:
                print(f"round {number}: the answer of user {name} was refused: {reason}", flush=True)
            self.save(number)
        answers = self.ask(self.settings.rounds + 1, self.names)
        if missing := [name for name in self.names if name not in answers]:
            print(f"the result is without {', '.join(missing)}, who didn't answer", flush=True)
        if not (told := [answers[name][1] for name in self.names if name in answers]):
            raise BadInput("nobody is left to be tested; start this run again when devices are there")
        result = result_of(self.settings, [each["row"] for each in told], [each["counts"] for each in told],
                           len(self.server.refused), time.perf_counter() - self.began) | self.privacy()
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(self.lines[key]) + "\n"
                                                                   for key in sorted(self.lines)))
        write_json(self.out / "result.json", result)
        return result

    def privacy(self) -> dict:
        """The devices know the seed, and with it who was called when: so that hides nobody, and who was called most
        often counts."""
        most = max(Counter(i for number in range(self.settings.rounds) for i in drawn(self.settings, number + 1)[0])
                   .values())
        return privacy.guarantee(self.settings, len(self.names), len(self.names), most,
                                 whole=self.whole and not self.server.refused)

    def save(self, number: int) -> None:
        state = {"what": self.what, "run": self.run, "round": number, "whole": self.whole, "lines": self.lines,
                 "server": self.server.state(), "seconds": time.perf_counter() - self.began}
        write(self.path, lambda path: torch.save(state, path))


AGAIN = 60.0  # seconds until a node that failed is asked again, and that a new one has to say whose it is


class Nodes:
    """Users by way of Flower: a node says whose it is, and whoever comes back is asked again, as another node."""

    def __init__(self, grid: Grid, patience: float, pause: float = 3.0):
        self.grid, self.patience, self.pause = grid, patience, pause
        self.owner, self.gone = {}, {}  # node -> user; nodes that failed -> when that was

    def greet(self) -> dict[str, int]:
        """Each user's node, after asking new ones whose they are. Of two with one name the first counts."""
        there = {node for node in self.grid.get_node_ids() if time.monotonic() - self.gone.get(node, -AGAIN) >= AGAIN}
        new = [Envelope(RecordDict(), node, MessageType.QUERY) for node in there - self.owner.keys()]
        told = self.grid.send_and_receive(new, timeout=AGAIN) if new else ()
        names = {reply.metadata.src_node_id: reply.content["told"]["user"] for reply in told if not reply.has_error()}
        self.owner = {node: name for node, name in self.owner.items() if node in there} | names
        self.gone |= dict.fromkeys({question.metadata.dst_node_id for question in new} - names.keys(), time.monotonic())
        return {name: node for node, name in reversed(self.owner.items())}

    def send(self, run: str, number: int, messages: dict[str, Message]) -> Answers:
        """Raises nothing: whoever hasn't answered when patience ends has no part in the round."""
        answers, asked, until = {}, {}, time.monotonic() + self.patience  # asked: message -> user, node
        while len(answers) < len(messages) and time.monotonic() < until:
            nodes = self.greet()
            letters = {name: Envelope(
                RecordDict({"generalists": ArrayRecord(messages[name]), "asked": ConfigRecord({
                    "run": run, "round": number})}), nodes[name], MessageType.TRAIN, group_id=str(number),
                ttl=until - time.monotonic() + self.pause)
                for name in nodes.keys() & messages.keys() - answers.keys() - {name for name, _ in asked.values()}}
            if letters:
                pushed = zip(self.grid.push_messages(letters.values()), letters, strict=False)
                asked |= {message: (name, nodes[name]) for message, name in pushed if message}
            for reply in self.grid.pull_messages(list(asked)):
                name, node = asked.pop(reply.metadata.reply_to_message_id)
                try:
                    told = json.loads(reply.content["told"]["json"])  # ValueError, where it is an error
                    answers[name] = dict(reply.content["generalists"].to_torch_state_dict()), told
                except (ValueError, KeyError, TypeError) as error:
                    why = reply.error.reason if reply.has_error() else f"not an answer: {error!r}"
                    print(f"round {number}, user {name}: {why}", flush=True)
                    self.gone[node] = time.monotonic()
            time.sleep(self.pause)
        return answers


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    run = context.run_config
    settings, names = settings_in(context), str(run["users"]).split(",")
    out, patience, secret = Path(str(run["out"])), float(run["patience"]), bool(run["secret"])
    nodes = Nodes(grid, patience)
    if secret:
        from flower.secret import Sums
        nodes = Sums(grid, patience, context, settings.clip_update, settings.rounds)
    print(table(Federation(settings, names, out, nodes.send, secret).play(), out), flush=True)
