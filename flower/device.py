"""A device: one user, whose text is on its disk. Flower starts a process for every message.

    flower-supernode ... --node-config 'user="fr" text="text/fr.jsonl" state="states"'

A file in the folder `state`, one for each run, keeps the state between messages:
specialists, router, optimizers, generators and the number of the round. A reply holds the
device's generalists and its report (flower/messages.py), and nothing else.
"""

import traceback
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

import data
from data import DataConfig, Text
from federated import Message
from flower.messages import pack_reply, settings_of, unpack_message, users_of
from model import GENERALIST
from support.errors import BadInput
from support.files import write
from support.runs.checkpoint import restore_user, user_state
from support.runs.evaluation import (
    check_loss,
    counters,
    evaluate_at_end,
    initial_test_loss,
    metrics_line,
    result_row,
)
from support.runs.settings import Settings
from support.runs.start import starting_point
from train import build_largest, build_own_user, rhythm_of


class Refusal(BadInput):
    """An error whose message the server may read: it doesn't quote the device's text."""


def config_of_text(settings: Settings, number: int, path: str) -> DataConfig:
    """The data settings of user `number`."""
    config = replace(settings.data_config, users=1, data=path)
    if settings.train_kb:
        config = replace(config, train_kb=(settings.train_kb[number],))
    if settings.valid_kb:
        config = replace(config, valid_kb=(settings.valid_kb[number],))
    return config


def read_text(settings: Settings, names: list[str], user: str, path: str, tokenizer) -> Text:
    """The text on this device. Raises Refusal if it isn't the user's, and BadInput."""
    if user not in names:
        raise Refusal(f"user {user}: not in this run; it has {', '.join(names)}")
    (text,) = data.load(config_of_text(settings, names.index(user), path), tokenizer)
    if text.name != user:
        raise Refusal(f"user {user}: the text on this device is another user's")
    return text


class Device:
    """A user on its device.

    names: all users of the run. user: this device's user. path: its text. state: a folder.
    Raises Refusal, and BadInput.
    """

    def __init__(self, settings: Settings, names: list[str], user: str, path: str, state: Path):
        self.settings = settings
        self.state = state
        base = starting_point(settings)
        self.text = read_text(settings, names, user, path, base.encoding)
        server_model = build_largest(settings, base, "server")
        self.initial_generalists = server_model.having(GENERALIST)
        self.user = build_own_user(settings, base, server_model, self.text, names.index(user))

    def reply(self, run: str, number: int, generalists: Message) -> tuple[Message, dict]:
        """Run round `number` with the server's generalists. Returns the upload and the report.

        The round after the last one only evaluates; its upload is empty. A repeated message gets
        the same reply, without training again.
        """
        # The id is a number, so that the server can't choose a path.
        path = self.state / f"{int(run, 16):016x}.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            restore_user(self.user, state["user"])
        else:
            state = self.initial_state()
        if state["round"] > number:
            raise Refusal(f"round {number}: is over; this device finished round {state['round']}")
        if state["round"] == number:
            return self.upload(number), state["report"]
        state = self.play(number, generalists, state)
        upload = self.upload(number)
        state["user"] = user_state(self.user)
        write(path, lambda temporary: torch.save(state, temporary))
        return upload, state["report"]

    def upload(self, number: int) -> Message:
        return self.user.upload() if number <= self.settings.rounds else {}

    def initial_state(self) -> dict:
        """The state before the first round, with an evaluation of the untrained model."""
        self.user.set_generalists(self.initial_generalists)
        initial_loss = initial_test_loss(self.settings, self.user, self.text)
        lines = [self.metrics_line(0, None)]
        report = {"lines": lines}
        return {"round": 0, "train_loss": None, "initial_loss": initial_loss, "report": report}

    def play(self, number: int, generalists: Message, state: dict) -> dict:
        """Run a round. Returns the new state.

        The report repeats all earlier lines of metrics, so that a lost reply loses none.
        """
        report = {"weight": self.user.weight, "lines": list(state["report"]["lines"])}
        new = {
            "round": number,
            "train_loss": None,
            "initial_loss": state["initial_loss"],
            "report": report,
        }
        earlier_loss = None  # None if the user wasn't selected in the previous round
        if state["round"] == number - 1:
            earlier_loss = state["train_loss"]
        if number > self.settings.rounds:
            local = evaluate_at_end(self.settings, self.user, self.text)
            self.user.download(generalists)
            report["lines"].append(self.metrics_line(number - 1, earlier_loss))
            report["counters"] = counters(self.user)
            averaged = evaluate_at_end(self.settings, self.user, self.text)
            report["row"] = result_row(
                self.settings, self.user, self.text, state["initial_loss"], local, averaged
            )
            return new
        if number > 1 and (number - 1) % self.settings.eval_every == 0:
            # The previous round is evaluated with its average, which arrives now.
            self.user.set_generalists(generalists)
            report["lines"].append(self.metrics_line(number - 1, earlier_loss))
        self.user.download(generalists)
        new["train_loss"] = self.user.local_update(rhythm_of(self.settings))
        check_loss(self.settings, self.user, new["train_loss"])
        return new

    def metrics_line(self, number: int, train_loss: float | None) -> dict:
        return metrics_line(self.settings, number, self.user, self.text, train_loss)


app = ClientApp()


@app.query()
def user_name(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Reply with the name of this node's user."""
    name = str(context.node_config["user"])
    return FlowerMessage(RecordDict({"user": ConfigRecord({"name": name})}), reply_to=message)


@app.train()
def train(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Run a round and reply with the device's generalists and its report."""
    node = context.node_config
    generalists, run, number = unpack_message(message.content)
    try:
        settings = settings_of(context)
        names = users_of(context)
        state = Path(str(node["state"]))
        device = Device(settings, names, str(node["user"]), str(node["text"]), state)
        upload, report = device.reply(run, number, generalists)
    except Refusal:
        traceback.print_exc()
        raise
    except Exception as error:  # Flower sends the message to the server; it may quote the text
        traceback.print_exc()
        raise Refusal(f"{type(error).__name__}, see the log of this device") from None
    return FlowerMessage(pack_reply(upload, report), reply_to=message)
