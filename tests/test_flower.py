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
from conftest import NAMES, command, same, state
from support.errors import BadInput
from support.runs.folder import settings_of
from support.server.guard import clip
from support.server.privacy import epsilon

pytest.importorskip("flwr", reason="flwr isn't installed: pip install -r flower/requirements.txt")
from flwr.app import Context, Error, RecordDict
from flwr.app import Message as Envelope
from flwr.supercore.task_identity import TaskIdentity

from flower import device, secret, server, try_it

ROOT = Path(__file__).parent.parent
FLAGS = "--specialists 1,2,4 --rounds 4 --average tokens --participation 0.7 --eval-every 2 --lr 1e-2"


class Network:
    """Devices in this process, a new object for every message."""

    def __init__(self, flags: str = FLAGS, out: str = "flower"):
        self.settings, self.out = settings_of(command(flags, "unused")), Path(out)
        try_it.deal_out(self.settings, self.out, secret=False)
        self.absent = lambda name, number: False

    def device(self, name: str, **more) -> device.Device:
        text, states = str(self.out / name / "text.jsonl"), self.out / name / "states"
        return device.Device(self.settings, list(NAMES), more.get("user", name), text, states)

    def send(self, run: str, number: int, messages: dict) -> dict:
        answers = {}
        for name in reversed(messages):  # in another order than they are averaged
            if not self.absent(name, number):
                answers[name] = self.device(name).answer(run, number, messages[name])
        return answers

    def federation(self) -> server.Federation:
        return server.Federation(self.settings, list(NAMES), self.out / "server", self.send)


class Wires:
    """Flower's grid in this process: node i is the device of the i-th name, and the last one says that it is, too.
    Keeps the replies that cross it. lost: whether a node doesn't answer a message of SecAgg+'s stage."""

    def __init__(self, network: Network, flags: str, secret: bool = False):
        run = {"flags": shlex.join(command(flags, "unused")), "users": ",".join(NAMES), "secret": secret}
        self.contexts, self.replies, self.waiting, self.lost = {}, [], {}, lambda node, stage: False
        for node, name in enumerate((*NAMES, NAMES[-1])):
            home = network.out / name
            where = {"user": name, "text": str(home / "text.jsonl"), "state": str(home / "states")}
            self.contexts[node] = Context(1, node, where, RecordDict(), run)

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: list, timeout: float | None = None) -> list:
        replies = []
        for message in messages:
            node, stage = message.metadata.dst_node_id, message.content.get("secaggplus_configs", {}).get("stage")
            if not self.lost(node, stage):
                try:
                    replies.append(device.app(copy.deepcopy(message), self.contexts[node]))
                except Exception as error:  # as Flower does
                    replies.append(Envelope(Error(0, str(error)), reply_to=message))
        self.replies += replies
        return replies

    def push_messages(self, messages: list) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(len(self.replies))
            self.waiting[message.metadata.message_id], = self.send_and_receive([message])
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, asked: list[str]) -> list:
        return [self.waiting.pop(number) for number in asked]


@pytest.fixture(autouse=True)
def _task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 9)


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


LINE = {"round", "user", "train_loss", "valid_loss", "generalist_share", "bytes_up", "bytes_down"}
ROW = {"name", "generalists", "specialists", "train_bytes", "train_tokens", "parameters", "valid_ppl", "test_ppl_start",
       "test_ppl", "test_bpb", "trigram_ppl", "generalist_share"}
COUNTS = {"tokens_seen", "bytes_up", "bytes_down"}


def test_a_run_over_messages_comes_to_the_same_bits_and_only_what_may_cross_does():
    network = Network()
    wires = Wires(network, FLAGS)
    server.Federation(network.settings, list(NAMES), network.out / "server",
                      server.Nodes(wires, 60, pause=0).send).play()
    assert_as_train(network)
    shared = state("plain")["server"]["generalists"].keys()
    told = [reply.content for reply in wires.replies if reply.metadata.message_type == "train"]
    for content in told:
        assert content.keys() == {"generalists", "told"}
        assert content["generalists"].keys() in (shared, set())
        assert content["told"].keys() == {"json"}
    said = [json.loads(content["told"]["json"]) for content in told]
    for each in said:
        assert each.keys() in ({"weight", "lines"}, {"weight", "lines", "row", "counts"})
        assert all(line.keys() == LINE for line in each["lines"])
        assert all(isinstance(value, str | int | float | None) or len(value) == 1  # a number for the only layer
                   for line in each["lines"] for value in line.values())
    last = [each for each in said if "row" in each]
    assert len(last) == 3  # of two nodes with one name one is asked
    assert all(each["row"].keys() == ROW and each["counts"].keys() == COUNTS for each in last)
    others = {content.get("told") and content["told"]["user"] for reply in wires.replies
              if reply.metadata.message_type == "query" for content in [reply.content]}
    assert others == set(NAMES)


def test_an_error_that_leaves_a_device_doesnt_quote_its_text():
    network = Network()
    wires = Wires(network, FLAGS)
    wires.contexts[0].node_config["text"] = "headless.csv"
    Path("headless.csv").write_text("patient A. was ill\npatient B. wasn't\n")
    nodes, given = server.Nodes(wires, 0.1, pause=0), network.federation().server.generalists
    assert nodes.send("1", 1, {"anna": given}) == {}
    assert wires.replies[-1].error.reason == "BadInput, see its log"


@pytest.mark.parametrize("told", [[], {}, {"weight": 1}, {"weight": 1, "lines": None}, {"weight": "x", "lines": []},
                                  {"weight": 1, "lines": [{"x": 1}]}])
def test_a_malformed_answer_is_none(told):
    network, send = Network("--specialists 1 --rounds 1"), Network.send
    network.send = lambda *given: {name: (answer, told if name == "bert" else right)
                                   for name, (answer, right) in send(network, *given).items()}
    assert [user["name"] for user in network.federation().play()["users"]] == ["anna", "cleo"]


@pytest.mark.parametrize("absent", [None, "anna"])
def test_noise_is_nobodys_to_draw_again_and_counts_for_whoever_was_called_most_often(absent, capsys):
    pytest.importorskip("dp_accounting", reason="dp-accounting isn't installed")
    flags = "--specialists 1 --rounds 4 --participation 0.7 --clip-update 0.1 --dp-noise 3"
    ends = []
    for out in ("one", "two"):
        network = Network(flags, out)
        network.absent = lambda name, number: name == absent and number == 2
        run = network.federation()
        found = run.play()["privacy"]
        ends.append(run.server.generalists)
    assert not same(*ends)
    most = max(sum(i in train.drawn(run.settings, number)[0] for number in range(1, 5)) for i in range(3))
    assert most < 4
    assert found["epsilon"] == (None if absent else epsilon(3, most, 3, 3, found["delta"]))


def test_two_servers_dont_work_in_one_folder_and_a_secret_run_isnt_continued_in_the_clear():
    network = Network("--specialists 1 --clip-update 1")
    run = server.Federation(network.settings, list(NAMES), network.out / "server", network.send, secret=True)
    with pytest.raises(BadInput, match="another server works in it"):
        network.federation()
    run.lock.close()
    with pytest.raises(BadInput, match="holds another run"):
        network.federation()


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
    for user, message in (("zoe", "not in this run"), ("bert", "text on this device is another user's")):
        with pytest.raises(BadInput, match=message):
            network.device("anna", user=user)
    run = network.federation()
    run.play()
    run.lock.close()
    network.settings = settings_of(command(f"{FLAGS} --seed 1", "unused"))
    with pytest.raises(BadInput, match="holds another run"):
        network.federation()


@pytest.mark.parametrize("lost", [None, 0])
def test_a_secret_sum_is_the_mean_of_the_clipped_updates_of_those_who_stayed(lost):
    """anna, node 0, vanishes when she has already shared her keys."""
    flags, bound = "--specialists 1,2,4 --rounds 1 --clip-update 0.02", 0.02
    network = Network(flags)
    run, wires = network.federation(), Wires(network, flags, secret=True)
    given = {name: run.server.give(shapes) for name, shapes in run.shared.items()}
    wires.lost = lambda node, stage: node == lost and stage == "collect_masked_vectors"
    sums = secret.Sums(wires, 0.1, Context(1, 9, {}, RecordDict(), {}), bound, 1)
    answers = sums.send(run.run, 1, given)
    stayed = [name for i, name in enumerate(NAMES) if i != lost]
    assert list(answers) == stayed
    for reply in wires.replies:  # numbers of a single device are masked
        assert not any(reply.content.array_records.values())
        assert reply.content.config_records.keys() <= {"told", "secaggplus_configs", "fitres.num_examples",
                                                       "fitres.metrics", "fitres.status"}
    free = network.send(run.run, 1, given)
    own = {name: clip(answer, given[name], bound) for name, (answer, _) in free.items()}
    for key in given["bert"]:
        assert not any(torch.equal(own[name][key], free[name][0][key]) for name in NAMES)
        mean = sum(own[name][key] for name in stayed) / len(stayed)
        for answer, _ in answers.values():
            torch.testing.assert_close(answer[key], mean, rtol=0, atol=2 * bound / 2 ** 22 + 3e-7)
    assert server.Nodes(wires, 0.1, pause=0).send(run.run, 1, given) == {}  # a device doesn't answer without a mask
    assert sums.send(run.run, 2, given).keys() == set(NAMES)  # but when no generalists leave it
    wires.contexts.pop(1)
    assert sums.send(run.run, 1, given) == {}  # without bert there is no round


def test_a_device_doesnt_send_a_secret_that_isnt_finite():
    held = {"a": torch.ones(3)}
    with pytest.raises(BadInput, match="isn't finite"):
        secret.update({"a": torch.full((3,), torch.nan)}, held, 1.0)


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
