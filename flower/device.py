"""A device: one user, with its own text on its own disk. Flower starts a process of this for every message.

    flower-supernode ... --node-config 'user="fr" text="text/fr.jsonl" state="states"'

What must outlive a message, such as specialists, router, optimizers and generators, is kept in a file for each run in
the state's folder, with the round that it belongs to. What leaves the device is its generalists, its weight, its lines
of metrics.jsonl and result.json, and, if it can't answer, why.
"""

import json
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app import Message as Envelope
from flwr.clientapp import ClientApp

import data
from federated import Message
from flower.server import settings_in
from model import GENERALIST
from support.errors import BadInput
from support.files import write
from support.runs.folder import restore_user, states
from support.runs.measuring import check_loss, counts_of, line_of, row_of, untrained
from support.runs.flags import flags
from support.runs.settings import Settings
from support.runs.start import starting_point
from train import build_largest, build_own, rhythm_of


def own(settings: Settings, number: int, text: str) -> Settings:
    """The settings by which user `number` reads its text."""
    several = {name: getattr(settings, name) for name, flag in flags(Settings).items() if flag.many}
    return replace(settings, users=1, data=text, dp_noise=0.0, **{  # noise is the server's business
        name: values and (values[number],) for name, values in several.items()})


class Refusal(BadInput):
    """What a device may say of why it doesn't answer: nothing of its text."""


class Device:
    """User `user` of a run: the one of `names` that is on this device. Raises Refusal, and BadInput for its text."""

    def __init__(self, settings: Settings, names: list[str], user: str, text: str, state: Path):
        if user not in names:
            raise Refusal(f"user {user}: not in this run; it has {', '.join(names)}")
        self.settings, self.state, self.base = settings, state, starting_point(settings)
        self.text, = data.load(own(settings, names.index(user), text).data_config, self.base.encoding)
        if self.text.name != user:
            raise Refusal(f"user {user}: the text on this device is another user's")
        self.common = build_largest(settings, self.base, "server")
        self.user = build_own(settings, self.base, self.common, self.text, names.index(user))

    def answer(self, run: str, number: int, given: Message) -> tuple[Message, dict]:
        """Take θ^G, learn for a round, and answer. In the round after the last θ^G is tested instead. A round that this
        device has had already isn't played twice: it gives the same answer again."""
        path = self.state / f"{int(run, 16):016x}.pt"  # a number: no path of the server's choosing
        if path.exists():
            saved = torch.load(path, weights_only=True)
            restore_user(self.user, saved["user"])
        else:
            saved = self.begin()
        if saved["round"] > number:
            raise Refusal(f"round {number}: is over; this device has had round {saved['round']}")
        new = saved["round"] < number
        if new:
            saved |= self.play(number, given, saved)
        answer = {} if number > self.settings.rounds else self.user.answer()
        if new:
            saved["user"], = states([self.user])
            write(path, lambda temporary: torch.save(saved, temporary))
        return answer, saved["told"]

    def play(self, number: int, given: Message, saved: dict) -> dict:
        """A round: what is new in the device's state. Lines are all there were, so that none is lost with an answer."""
        settings, last, loss, lines = self.settings, number > self.settings.rounds, None, saved["told"]["lines"]
        before = saved["loss"] if saved["round"] == number - 1 else None  # None, where it wasn't called
        if not last and number > 1 and (number - 1) % settings.eval_every == 0:
            self.user.adopt(given)
            lines = [*lines, self.line(number - 1, before)]  # of the average, which is new here
        self.user.receive(given)
        if last:
            lines = [*lines, self.line(number - 1, before)]
            more = {"counts": counts_of(self.user), "row": row_of(settings, self.user, self.text, saved["start"])}
        else:
            more, loss = {}, self.user.learn(rhythm_of(settings))
            check_loss(settings, self.user, loss)
        return {"round": number, "loss": loss, "told": {"weight": self.user.weight, "lines": lines, **more}}

    def begin(self) -> dict:
        """What a user's first message comes before: its models as they are without training."""
        self.user.adopt(self.common.having(GENERALIST))
        start = untrained(self.settings, self.base, self.user, self.text)
        return {"round": 0, "loss": None, "start": start, "told": {"lines": [self.line(0, None)]}}

    def line(self, number: int, loss: float | None) -> dict:
        self.user.settle()
        return line_of(self.settings, number, self.user, self.text, loss)


app = ClientApp()


@app.query()
def who(message: Envelope, context: Context) -> Envelope:
    return Envelope(RecordDict({"told": ConfigRecord({"user": str(context.node_config["user"])})}), reply_to=message)


@app.train()
def learn(message: Envelope, context: Context) -> Envelope:
    here, run, asked = context.node_config, context.run_config, message.content["asked"]
    given = message.content["generalists"].to_torch_state_dict()
    try:
        device = Device(settings_in(context), str(run["users"]).split(","), str(here["user"]), str(here["text"]),
                        Path(str(here["state"])))
        answer, told = device.answer(asked["run"], asked["round"], given)
    except Exception as error:  # Flower sends its message, which may quote the text
        traceback.print_exc()
        raise Refusal(str(error) if isinstance(error, Refusal) else f"{type(error).__name__}, see its log") from None
    return Envelope(RecordDict({"generalists": ArrayRecord(answer), "told": ConfigRecord({"json": json.dumps(told)})}),
                    reply_to=message)
