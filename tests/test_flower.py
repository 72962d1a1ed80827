"""Over Flower a run comes to the bits of train.py, whatever vanishes on the way, and only what may cross does."""

import copy
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from support.errors import BadInput
from support.folder import settings_of
from support.guard import clip
from test_train import NAMES, command, same, state

pytest.importorskip("flwr", reason="flwr isn't installed: pip install -r flower/requirements.txt")
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flower import device, secret, server, try_it

ROOT = Path(__file__).parent.parent
FLAGS = "--specialists 1,2,4 --rounds 4 --average tokens --participation 0.7 --eval-every 2 --lr 1e-2"


class Network:
    """Devices in this process, a new object for every message. Keeps what they told."""

    def __init__(self, flags: str = FLAGS, out: str = "flower"):
        self.settings, self.told, self.out = settings_of(command(flags, "unused")), [], Path(out)
        try_it.deal_out(self.settings, self.out)
        self.absent = lambda name, number: False

    def device(self, name: str, **more) -> device.Device:
        text, states = str(self.out / name / "text.jsonl"), self.out / name / "states"
        return device.Device(self.settings, list(NAMES), more.get("user", name), text, states)

    def send(self, run: str, number: int, messages: dict) -> dict:
        answers = {}
        for name in reversed(messages):  # in another order than they are averaged
            if not self.absent(name, number):
                answers[name] = self.device(name).answer(run, number, messages[name])
                self.told.append(answers[name][1])
        return answers

    def federation(self) -> server.Federation:
        return server.Federation(self.settings, list(NAMES), self.out / "server", self.send)


@pytest.fixture(autouse=True)
def _text(corpus):
    pass


def assert_as_train(network: Network, flags: str = FLAGS) -> None:
    """All figures, the server's generalists, and everything of every user."""
    if not Path("plain").exists():
        assert train.main(command(flags, "plain")) == 0
    mine, theirs = (json.loads(Path(path, "result.json").read_text()) for path in (network.out / "server", "plain"))
    assert mine | {"seconds": 0} == theirs | {"seconds": 0}
    lines, whole = (Path(path, "metrics.jsonl").read_text().splitlines() for path in (network.out / "server", "plain"))
    assert set(lines) <= set(whole)  # who isn't called isn't looked at
    saved = state("plain")
    assert same(torch.load(network.out / "server" / "server.pt", weights_only=True)["server"], saved["server"])
    for user in saved["users"]:
        path, = (network.out / user["name"] / "states").iterdir()
        assert same(torch.load(path, weights_only=True)["user"], user)


def test_a_run_over_messages_comes_to_the_same_bits_and_only_what_may_cross_does():
    network = Network()
    network.federation().play()
    assert_as_train(network)
    columns = json.loads(Path("plain/metrics.jsonl").read_text().splitlines()[0]).keys()
    row = json.loads(Path("plain/result.json").read_text())["users"][0].keys()
    for told in network.told:
        assert told.keys() - {"row", "counts"} == {"weight", "lines"}
        assert all(line.keys() == columns for line in told["lines"])
        assert told.get("row", dict.fromkeys(row)).keys() == row
        assert set(told.get("counts", ())) <= {"tokens_seen", "bytes_up", "bytes_down"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 3, 5, 7])
def test_killed_at_any_moment_both_sides_go_on_bit_for_bit(moment, monkeypatch):
    """The server dies when a state has just been written, the device's or its own; then it asks again."""
    network, writes = Network(), []

    def deadly(path, save, work=device.write):
        work(path, save)
        writes.append(path)
        if len(writes) == moment:
            raise Killed
    for side in (device, server):
        monkeypatch.setattr(side, "write", deadly)
    with pytest.raises(Killed):
        network.federation().play()
    network.federation().play()
    assert_as_train(network)


def test_a_round_with_one_answer_passes_and_one_that_isnt_finite_is_refused():
    network = Network("--specialists 1 --rounds 2")
    run = network.federation()
    before = {name: tensor.clone() for name, tensor in run.server.generalists.items()}
    network.absent = lambda name, number: name != "anna"
    run.save = lambda number: (same(before, run.server.generalists) or pytest.fail("averaged"))
    run.play()
    network, send = Network("--specialists 1 --rounds 1", "other"), Network.send

    def poisoned(run: str, number: int, messages: dict) -> dict:
        answers = send(network, run, number, messages)
        for tensor in answers["bert"][0].values():
            tensor.fill_(torch.nan)
        return answers
    network.send = poisoned
    assert network.federation().play()["refused"] == 1


@pytest.mark.parametrize(("flags", "message"), [
    ("--method centralized --specialists 1", "`method` centralized: .*one place"),
    ("--method pcl --specialists 1", "`method` pcl: isn't an average"),
    ("--target mixed", "`target` mixed"), ("--drop-rate 0.1", "`drop_rate`"),
    ("--specialists 1", "`clip_update` None: is needed"), ("--clip-update 1 --average tokens", "`average` tokens"),
    ("--clip-update 1 --method fedavg", "`method` fedavg: averages experts that not all users have")])
def test_what_doesnt_fit_is_refused(flags, message):
    with pytest.raises(BadInput, match=message):
        server.check(settings_of(command(flags, "unused")), list(NAMES), secret=True)


def test_a_device_is_one_user_of_the_run_with_that_users_text():
    network = Network()
    for user, message in (("zoe", "not in this run"), ("bert", "is user anna's, not bert's")):
        with pytest.raises(BadInput, match=message):
            network.device("anna", user=user)
    network.federation().play()
    network.settings = settings_of(command(f"{FLAGS} --seed 1", "unused"))
    with pytest.raises(BadInput, match="holds another run"):
        network.federation()


class Wires:
    """Flower's grid in this process: node i is the device of the i-th name. Keeps the replies that cross it."""

    def __init__(self, network: Network, flags: str):
        self.run_config = {"flags": shlex.join(command(flags, "unused")), "users": ",".join(NAMES)}
        self.contexts, self.replies, self.lost = {}, [], lambda node, stage: False
        for node, name in enumerate(NAMES):
            home = network.out / name
            where = {"user": name, "text": str(home / "text.jsonl"), "state": str(home / "states")}
            self.contexts[node] = Context(1, node, where, RecordDict(), self.run_config)

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: list, timeout: float | None = None) -> list:
        replies = []
        for message in messages:
            node, asked = message.metadata.dst_node_id, message.content.config_records
            if not self.lost(node, asked["secaggplus_configs"]["stage"] if "secaggplus_configs" in asked else None):
                replies.append(device.app(copy.deepcopy(message), self.contexts[node]))
        self.replies += replies
        return replies


@pytest.mark.parametrize("lost", [None, "anna"])
def test_a_secret_sum_is_the_mean_of_the_updates_of_those_who_stayed(lost, monkeypatch):
    """anna vanishes when she has already shared her keys."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 9)
    flags, bound = "--specialists 1,2,4 --rounds 1 --clip-update 0.5", 0.5
    network = Network(flags)
    run, wires = network.federation(), Wires(network, flags)
    given = {name: run.server.give(shapes) for name, shapes in run.shared.items()}
    wires.lost = lambda node, stage: NAMES[node] == lost and stage == "collect_masked_vectors"
    sums = secret.Sums(wires, 60, Context(1, 9, {}, RecordDict(), wires.run_config), bound, 1)
    answers = sums.send(run.run, 1, given)
    stayed = [name for name in NAMES if name != lost]
    assert list(answers) == stayed
    own = {name: clip(answer, given[name], bound) for name, (answer, _) in network.send(run.run, 1, given).items()}
    for key, held in given["bert"].items():
        mean = sum(own[name][key] for name in stayed) / len(stayed)
        assert not torch.equal(mean, held)
        for answer, _ in answers.values():
            torch.testing.assert_close(answer[key], mean, rtol=0, atol=2 * bound / 2 ** 22 + 1e-7)
    for reply in wires.replies:  # masked: of a single device's numbers the server can make nothing
        assert not any(reply.content.array_records.values())
        assert reply.content.config_records.keys() <= {"told", "secaggplus_configs", "fitres.num_examples",
                                                       "fitres.metrics", "fitres.status"}


def test_the_whole_of_it_on_this_machine_leaves_nothing_behind():
    flags = command("--users 2 --specialists 1 --rounds 1", "flower")
    done = subprocess.run([sys.executable, "-m", "flower.try_it", *flags], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=True)
    assert "round 1: 2 of 2 answered" in done.stdout
    assert train.main(command("--users 2 --specialists 1 --rounds 1", "plain")) == 0
    mine, theirs = (json.loads(Path(path, "result.json").read_text()) for path in ("flower/server", "plain"))
    assert mine | {"seconds": 0} == theirs | {"seconds": 0}
    for _ in range(30):
        left = subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout
        if not (still := str(Path("flower").resolve()) in left):
            break
        time.sleep(1)
    assert not still
