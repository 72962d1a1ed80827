"""Secure aggregation: the server learns the sum of the updates, and no single one (SecAgg+, Bell et al. 2020).

Flower has the protocol; here is what it asks of a device and of the server. A device cuts its update to the bound C,
rounds it to multiples of 2C / 2²², and hides it under masks that cancel out in the sum. A round takes four messages.
"""

import json
import math
import time

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app import Message as Envelope
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, recorddict_to_fitins
from flwr.server import LegacyContext
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid

from federated import Message
from flower.server import Answers, Nodes, settings_in
from support.errors import BadInput
from support.guard import clip, fault


def arrays(message: Message) -> list:
    return [tensor.numpy() for tensor in message.values()]


# --- the device ------------------------------------------------------------------------------------------------------

def secretly(message: Envelope, context: Context, call_next) -> Envelope:
    """Flower's hook around a device's answer: where the server is to learn a sum only, it masks what leaves."""
    def answer(message: Envelope, context: Context) -> Envelope:
        given = recorddict_to_fitins(message.content, keep_input=True)
        names, asked = json.loads(given.config["names"]), {key: given.config[key] for key in ("run", "round")}
        held = {name: torch.tensor(array)
                for name, array in zip(names, parameters_to_ndarrays(given.parameters), strict=True)}
        message.content = RecordDict({"generalists": ArrayRecord(held), "asked": ConfigRecord(asked)})
        reply = call_next(message, context)
        change = update(reply.content["generalists"].to_torch_state_dict(), held, settings_in(context).clip_update)
        reply.content = fitres_to_recorddict(FitRes(
            Status(Code.OK, ""), ndarrays_to_parameters(arrays(change)), 1, dict(reply.content["told"])), False)
        return reply
    if RECORD_KEY_CONFIGS in message.content:
        return secaggplus_mod(message, context, answer)
    last = settings_in(context).rounds < message.content["asked"]["round"]
    if context.run_config["secret"] and not last:  # when no generalists leave the device
        raise BadInput("this run is secret: updates leave the device in a sum only")
    return call_next(message, context)


def update(answer: Message, held: Message, bound: float) -> Message:
    """Δ_i = θ_i^G − θ^G, at most as long as the bound. Raises BadInput, since nobody else can see what is wrong."""
    if reason := fault(answer, {name: tensor.shape for name, tensor in held.items()}, held):
        raise BadInput(f"generalists: {reason}")
    return {name: tensor - held[name] for name, tensor in clip(answer, held, bound).items()}


# --- the server ------------------------------------------------------------------------------------------------------

class Asking:
    """What the protocol takes for a strategy: whom it asks what, and who answered."""

    def __init__(self, asked: list[tuple[GridClientProxy, FitIns]]):
        self.asked, self.answered = asked, []

    def configure_fit(self, *_) -> list[tuple[GridClientProxy, FitIns]]:
        return self.asked

    def aggregate_fit(self, _, answered: list[tuple[GridClientProxy, FitRes]], failures: list) -> tuple[None, dict]:
        self.answered = answered  # everyone with the mean
        return None, {}


class Sums(Nodes):
    """Nodes of whose updates the mean is known: it stands for each of them."""

    def __init__(self, grid: Grid, patience: float, context: Context, bound: float, rounds: int):
        super().__init__(grid, patience)
        self.context, self.bound, self.rounds = context, bound, rounds

    def send(self, run: str, number: int, messages: dict[str, Message]) -> Answers:
        """Needs all who are called, and two thirds of them until the end; else nobody has answered."""
        if number > self.rounds:  # no generalists leave a device then
            return super().send(run, number, messages)
        until = time.monotonic() + self.patience
        while missing := messages.keys() - (nodes := self.greet()).keys():
            if time.monotonic() > until:
                print(f"round {number}: {', '.join(sorted(missing))} can't be reached", flush=True)
                return {}
            time.sleep(self.pause)
        names = {nodes[name]: name for name in messages}
        asking = Asking([(GridClientProxy(node, self.grid, self.context.run_id), FitIns(
            ndarrays_to_parameters(arrays(messages[name])),
            {"run": run, "round": number, "names": json.dumps(list(messages[name]))})) for node, name in names.items()])
        context = LegacyContext(self.context, strategy=asking)
        context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: number})
        context.state[MAIN_PARAMS_RECORD] = ArrayRecord()
        SecAggPlusWorkflow(1.0, math.ceil(len(names) * 2 / 3), max_weight=1.0, clipping_range=self.bound,
                           timeout=self.patience)(self, context)
        answers = {names[proxy.node_id]: mean for proxy, mean in asking.answered}
        return {name: (moved(messages[name], mean), json.loads(mean.metrics["json"])) for name, mean in answers.items()}

    def send_and_receive(self, messages: list[Envelope], timeout: float | None) -> list[Envelope]:
        """The grid's, which the protocol uses, and prints why somebody didn't answer."""
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        for reply in replies:
            if reply.has_error():
                print(f"user {self.owner.get(reply.metadata.src_node_id)}: {reply.error.reason}", flush=True)
        return replies


def moved(held: Message, mean: FitRes) -> Message:
    """θ^G + the mean of Δ_i."""
    changes = zip(held.items(), parameters_to_ndarrays(mean.parameters), strict=True)
    return {name: tensor + torch.tensor(change, dtype=tensor.dtype) for (name, tensor), change in changes}
