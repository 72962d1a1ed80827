"""A federation on this machine: Flower's SuperLink, and a SuperNode with a folder per user.

    pip install -r flower/requirements.txt
    python -m flower.try_it --users 2 --rounds 3 --out out/flower

It accepts the flags of train.py, writes each user's text to the folder of its node, and gives the
same results as train.py, bit for bit.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import data
from support.errors import BadInput
from support.files import write_lines, write_text
from support.runs.command_line import as_arguments, run_command
from support.runs.flags import refuse
from support.runs.folder import settings_of
from support.runs.settings import Settings
from support.runs.start import starting_point

HERE = Path(__file__).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def write_texts(settings: Settings, folder: Path) -> list[str]:
    """Write each user's text to folder/NAME/text.jsonl. Returns the names. Raises BadInput."""
    from flower.server import check  # needs Flower

    tokenizer = starting_point(settings).encoding
    users = data.load_documents(settings.data_config, tokenizer)
    data.encode_users(settings.data_config, users, tokenizer)  # refuses text that is too short
    check(settings, list(users))
    for name in users:
        if not re.fullmatch(r"\w[\w.-]*", name):
            refuse(
                "data",
                settings.data,
                f"user {name} can't have this name over Flower",
                "use letters and digits",
            )
    for name, documents in users.items():
        entries = []
        for split in data.SPLITS:
            entries += [{"user": name, "split": split, "text": text} for text in documents[split]]
        write_lines(folder / name / "text.jsonl", entries)
    return list(users)


def free_ports(count: int) -> list[int]:
    """Different unused ports of this machine."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_port(port: int, process: subprocess.Popen) -> None:
    """Wait until something listens on a port, or until the process that should listen has ended."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)


class Processes:
    """Commands that run in the background, each with a log in `out`, until `stop`."""

    def __init__(self, out: Path):
        self.out = out
        self.started = []

    def start(self, command: str, name: str, log: bool = True) -> subprocess.Popen:
        """Start a command of Flower.

        log: write its output to NAME.log instead of this process's output.
        """
        program, *arguments = shlex.split(command)
        program = Path(sys.executable).parent / program
        environment = os.environ | QUIET
        environment["PYTHONPATH"] = str(HERE.parent)
        environment["FLWR_HOME"] = str(self.out / name / "home")
        output = open(self.out / f"{name}.log", "w") if log else None  # noqa: SIM115, the process holds it
        process = subprocess.Popen(
            [program, *arguments],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        """End all commands, and what they have started."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for process in self.started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)
            time.sleep(1)
        for process in self.started:
            process.wait()


@contextmanager
def background_processes(out: Path) -> Iterator[Processes]:
    """Processes that end with the block, even after Ctrl-C, SIGTERM or SIGHUP."""
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda *_: sys.exit(143))
    processes = Processes(out)
    try:
        yield processes
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        processes.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def make_keys(folder: Path, names: list[str]) -> None:
    """Make the certificates of the SuperLink, and a key for each node."""
    command = ["bash", HERE / "keys.sh", folder, "127.0.0.1", *names]
    subprocess.run(command, check=True, capture_output=True)


def start_superlink(processes: Processes, keys: Path, port: int) -> None:
    """Start the SuperLink, to which all nodes connect, and wait until it listens."""
    superlink = processes.start(
        f"flower-superlink --host 127.0.0.1 --port {port} --ssl-ca-certfile {keys}/ca.crt "
        f"--ssl-certfile {keys}/server.pem --ssl-keyfile {keys}/server.key --enable-supernode-auth "
        "--disable-runtime-dependency-installation",
        "superlink",
    )
    wait_for_port(port, superlink)


def start_supernode(processes: Processes, keys: Path, superlink: str, port: int, name: str) -> None:
    """Register the key of a user's node and start it."""
    command = f"flwr supernode register {keys}/{name}.pub here --name {name}"
    registration = processes.start(command, "run")
    if registration.wait() != 0:
        refuse(
            "out",
            str(processes.out),
            f"the key of {name} couldn't be registered",
            "see run.log there",
        )
    home = processes.out / "devices" / name
    config = f'user="{name}" text="{home / "text.jsonl"}" state="{home / "states"}"'
    processes.start(
        f"flower-supernode --superlink {superlink} --root-certificates {keys}/ca.crt --port {port} "
        f"--auth-supernode-private-key {keys}/{name} --node-config {shlex.quote(config)}",
        f"devices/{name}",
    )


def try_it(settings: Settings) -> None:
    """Execute a run over Flower. Raises BadInput."""
    out = Path(settings.out or "out/flower").resolve()
    if out.exists() and any(out.iterdir()):
        refuse("out", str(out), "isn't empty", "use another folder")
    names = write_texts(settings, out / "devices")
    # The nodes already have their text, cut according to these settings.
    remaining = replace(
        settings,
        data="builtin",
        user_field=None,
        text_field=None,
        train_kb=None,
        valid_kb=None,
        out=None,
    )
    flags = shlex.join(as_arguments(remaining))
    config = f'flags={json.dumps(flags)} users="{",".join(names)}" out="{out / "server"}"'

    keys = out / "keys"
    make_keys(keys, names)
    port, *node_ports = free_ports(1 + len(names))
    superlink = f"127.0.0.1:{port}"
    write_text(
        out / "run" / "home" / "config.toml",
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{superlink}"\n'
        f'root-certificates = "{keys / "ca.crt"}"\n',
    )
    with background_processes(out) as processes:
        start_superlink(processes, keys, port)
        for name, node_port in zip(names, node_ports, strict=True):
            start_supernode(processes, keys, superlink, node_port, name)
        command = f"flwr run {HERE} here --stream --run-config {shlex.quote(config)}"
        run = processes.start(command, "run", log=False)
        run.wait()
    if not (out / "server" / "result.json").exists():
        raise BadInput(f"`out` {out}: the run has no result; see the logs there")


def main(arguments: list[str] | None = None) -> int:
    return run_command("flower.try_it", lambda: try_it(settings_of(arguments)), "its logs are kept")


if __name__ == "__main__":
    sys.exit(main())
