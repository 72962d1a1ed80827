"""A run over Flower gives the bits of train.py, and its messages hold nothing private."""

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
from support.server.privacy import epsilon

pytest.importorskip("flwr", reason="flwr isn't installed: pip install -r flower/requirements.txt")
from flwr.app import Context, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity

from flower import device, server, try_it

pytestmark = pytest.mark.flower

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--specialists 1,2,4 --rounds 4 --average tokens --participation 0.7 --eval-every 2 --lr 1e-2"
)


@pytest.fixture(autouse=True)
def _text(corpus):
    pass


class LocalDevices:
    """Devices in this process; as in a network, each message meets a new object.

    is_absent(name, number): whether a user doesn't reply in a round.
    """

    def __init__(self, flags: str = FLAGS, out: str = "flower"):
        self.settings = settings_of(command(flags, "unused"))
        self.out = Path(out)
        try_it.write_texts(self.settings, self.out)
        self.is_absent = lambda name, number: False

    def device(self, folder: str, user: str) -> device.Device:
        home = self.out / folder
        text = str(home / "text.jsonl")
        return device.Device(self.settings, list(NAMES), user, text, home / "states")

    def send(self, run: str, number: int, messages: dict) -> dict:
        replies = {}
        for name in reversed(messages):  # not in the order of the average
            if not self.is_absent(name, number):
                replies[name] = self.device(name, name).reply(run, number, messages[name])
        return replies

    def server_run(self) -> server.ServerRun:
        return server.ServerRun(self.settings, list(NAMES), self.out / "server", self.send)


def assert_same_as_train(devices: LocalDevices, flags: str = FLAGS) -> None:
    """Results, metrics, the server's state and all users' states are those of train.py."""
    if not Path("plain").exists():
        assert train.main(command(flags, "plain")) == 0
    assert_same_result(devices.out / "server", Path("plain"))
    lines = (devices.out / "server" / "metrics.jsonl").read_text().splitlines()
    all_lines = Path("plain/metrics.jsonl").read_text().splitlines()
    assert set(lines) <= set(all_lines)  # users who aren't selected aren't evaluated
    checkpoint = state("plain")
    saved = torch.load(devices.out / "server" / "server.pt", weights_only=True)
    assert same(saved["server"], checkpoint["server"])
    for user in checkpoint["users"]:
        (path,) = (devices.out / user["name"] / "states").iterdir()
        assert same(torch.load(path, weights_only=True)["user"], user)


def assert_same_result(one: Path, two: Path) -> None:
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}


# --- Flower's messages


class LocalGrid:
    """Flower's grid in this process. Node i is user i; one more node has the last user's name."""

    def __init__(self, devices: LocalDevices):
        run_config = {"flags": shlex.join(command(FLAGS, "unused")), "users": ",".join(NAMES)}
        self.contexts = {}
        self.replies = []  # all that were sent
        self.waiting = {}  # id of a message -> its reply
        for node, name in enumerate((*NAMES, NAMES[-1])):
            home = devices.out / name
            node_config = {
                "user": name,
                "text": str(home / "text.jsonl"),
                "state": str(home / "states"),
            }
            self.contexts[node] = Context(1, node, node_config, RecordDict(), run_config)

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: list, timeout: float | None = None) -> list:
        replies = []
        for message in messages:
            context = self.contexts[message.metadata.dst_node_id]
            try:
                replies.append(device.app(copy.deepcopy(message), context))
            except Exception as error:  # as Flower does
                replies.append(FlowerMessage(Error(0, str(error)), reply_to=message))
        self.replies += replies
        return replies

    def push_messages(self, messages: list) -> list[str]:
        ids = []
        for message in messages:
            message_id = str(len(self.replies))
            message.metadata.__dict__["_message_id"] = message_id
            (self.waiting[message_id],) = self.send_and_receive([message])
            ids.append(message_id)
        return ids

    def pull_messages(self, ids: list[str]) -> list:
        return [self.waiting.pop(message_id) for message_id in ids]


@pytest.fixture(autouse=True)
def _task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 9)


LINE = {"round", "user", "train_loss", "valid_loss", "generalist_share", "bytes_up", "bytes_down"}
COUNTERS = {"tokens_seen", "bytes_up", "bytes_down"}


def test_a_run_over_messages_gives_the_bits_of_train_and_replies_hold_nothing_private():
    devices = LocalDevices()
    grid = LocalGrid(devices)
    nodes = server.Nodes(grid, patience=60, pause=0)
    server.ServerRun(devices.settings, list(NAMES), devices.out / "server", nodes.send).play()
    assert_same_as_train(devices)

    shared = state("plain")["server"]["generalists"].keys()
    row, *_ = json.loads(Path("plain/result.json").read_text())["users"]
    last_reports = 0
    for reply in grid.replies:
        if reply.metadata.message_type == "query":
            assert reply.content.keys() == {"user"}
            assert reply.content["user"].keys() == {"name"}
            continue
        assert reply.content.keys() == {"generalists", "report"}
        assert reply.content["report"].keys() == {"json"}
        report = json.loads(reply.content["report"]["json"])
        for line in report["lines"]:
            assert line.keys() == LINE
            assert len(line["generalist_share"]) == 1  # the only layer
        if "row" in report:
            last_reports += 1
            assert report.keys() == {"weight", "lines", "row", "counters"}
            assert report["row"].keys() == row.keys()
            assert report["counters"].keys() == COUNTERS
            assert not reply.content["generalists"]
        else:
            assert report.keys() == {"weight", "lines"}
            assert reply.content["generalists"].keys() == shared
    assert last_reports == 3  # one of the two nodes with the same name


def test_fdloras_fusion_is_that_of_train_too():
    flags = "--method fdlora --specialists 1 --rounds 2 --eval-every 2 --lr 1e-2"
    devices = LocalDevices(flags)
    devices.server_run().play()
    assert_same_as_train(devices, flags)


def test_an_error_of_a_device_doesnt_quote_its_text():
    devices = LocalDevices()
    grid = LocalGrid(devices)
    grid.contexts[0].node_config["text"] = "headless.csv"
    Path("headless.csv").write_text("patient A. was ill\npatient B. wasn't\n")
    generalists = devices.server_run().server.generalists
    nodes = server.Nodes(grid, patience=0.1, pause=0)
    assert nodes.send("1", 1, {"anna": generalists}) == {}
    assert grid.replies[-1].error.reason == "BadInput, see the log of this device"


# --- what can go wrong


@pytest.mark.parametrize(
    "report",
    [
        [],
        {},
        {"weight": 1},
        {"weight": 1, "lines": None},
        {"weight": "x", "lines": []},
        {"weight": 1, "lines": [{"x": 1}]},
    ],
)
def test_a_reply_with_an_invalid_report_is_ignored(report):
    devices = LocalDevices("--specialists 1 --rounds 1")
    send = devices.send

    def send_invalid(*message) -> dict:
        replies = send(*message)
        replies["bert"] = replies["bert"][0], report
        return replies

    devices.send = send_invalid
    result = devices.server_run().play()
    assert [user["name"] for user in result["users"]] == ["anna", "cleo"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 3, 5, 7])
def test_a_run_that_is_killed_at_any_moment_continues_bit_for_bit(moment, monkeypatch):
    """The server dies when a state, a device's or its own, has been written, and starts again."""
    devices = LocalDevices()
    write = device.write
    written = []

    def deadly_write(path, save):
        write(path, save)
        written.append(path)
        if len(written) == moment:
            raise Killed

    for module in (device, server):
        monkeypatch.setattr(module, "write", deadly_write)
    with pytest.raises(Killed):
        devices.server_run().play()
    devices.server_run().play()
    assert_same_as_train(devices)


def test_with_a_single_reply_the_average_stays():
    devices = LocalDevices("--specialists 1 --rounds 2")
    run = devices.server_run()
    before = {name: tensor.clone() for name, tensor in run.server.generalists.items()}
    devices.is_absent = lambda name, number: name != "anna"
    result = run.play()
    assert [user["name"] for user in result["users"]] == ["anna"]
    assert same(before, run.server.generalists)


def test_an_upload_that_isnt_finite_is_refused():
    devices = LocalDevices("--specialists 1 --rounds 1")
    send = devices.send

    def send_nan(*message) -> dict:
        replies = send(*message)
        for tensor in replies["bert"][0].values():
            tensor.fill_(torch.nan)
        return replies

    devices.send = send_nan
    assert devices.server_run().play()["refused"] == 1


@pytest.mark.parametrize("absent", [None, "anna"])
def test_noise_cant_be_drawn_again_and_epsilon_counts_the_most_frequent_user(absent):
    pytest.importorskip("dp_accounting", reason="dp-accounting isn't installed")
    flags = "--specialists 1 --rounds 4 --participation 0.7 --clip-update 0.1 --dp-noise 3"
    averages = []
    for out in ("one", "two"):
        devices = LocalDevices(flags, out)
        devices.is_absent = lambda name, number: name == absent and number == 2
        run = devices.server_run()
        privacy = run.play()["privacy"]
        averages.append(run.server.generalists)
    assert not same(*averages)
    selected = [train.sample_clients(run.settings, number)[0] for number in range(1, 5)]
    most = max(sum(user in users for users in selected) for user in range(3))
    assert most < 4
    expected = None if absent else epsilon(3, most, 3, 3, privacy["delta"])
    assert privacy["epsilon"] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method centralized --specialists 1", "`method` centralized: .*one place"),
        ("--method pcl --specialists 1", "`method` pcl: isn't an average"),
        ("--target mixed", "`target` mixed"),
        ("--drop-rate 0.1", "`drop_rate` 0.1"),
        ("--participation 0.1", "`participation` 0.1: selects a single user"),
        ("--users 2 --specialists 1", "`users` 2: the run config names anna, bert, cleo"),
    ],
)
def test_what_only_train_can_do_is_refused(flags, message):
    with pytest.raises(BadInput, match=message):
        server.check(settings_of(command(flags, "unused")), list(NAMES))


def test_a_device_is_a_user_of_the_run_and_has_that_users_text():
    devices = LocalDevices()
    with pytest.raises(BadInput, match="not in this run"):
        devices.device("anna", user="zoe")
    with pytest.raises(BadInput, match="text on this device is another user's"):
        devices.device("anna", user="bert")


def test_a_folder_has_one_server_and_one_run():
    devices = LocalDevices()
    run = devices.server_run()
    with pytest.raises(BadInput, match="another server works in it"):
        devices.server_run()
    run.lock.close()
    devices.settings = settings_of(command(f"{FLAGS} --seed 1", "unused"))
    with pytest.raises(BadInput, match="holds another run"):
        devices.server_run()


def test_a_network_on_this_machine_gives_the_results_of_train_and_leaves_no_process():
    flags = "--users 2 --specialists 1 --rounds 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "flower.try_it", *command(flags, "flower")]
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert "round 1: 2 of 2 replied" in done.stdout
    assert train.main(command(flags, "plain")) == 0
    assert_same_result(Path("flower/server"), Path("plain"))
    for _ in range(30):
        listing = subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout
        running = str(Path("flower").resolve()) in listing
        if not running:
            break
        time.sleep(1)
    assert not running
