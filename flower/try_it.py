"""The whole federation on one machine: a SuperLink, and a SuperNode with a folder of its own for each user.

    pip install -r flower/requirements.txt
    python -m flower.try_it --users 2 --rounds 3 --out out/flower
    python -m flower.try_it --users 4 --rounds 3 --clip-update 1 --secret --out out/secret

Takes any flag of train.py, deals its text out to the nodes, and comes to the same figures, bit for bit. With --secret
the server learns the sum of the users' updates only.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import data
from support.errors import BadInput
from support.files import write_text
from support.runs.folder import settings_of
from support.runs.command_line import as_arguments, run_command
from support.runs.settings import Settings
from support.runs.start import starting_point

HERE = Path(__file__).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Until something listens there, or the process that was to do so has ended."""
    while process.poll() is None:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.5)


def deal_out(settings: Settings, out: Path, secret: bool) -> list[str]:
    """Write each user's text to a folder of its own, as JSON lines. Returns the users' names. Raises BadInput."""
    from flower.server import check  # which needs Flower
    encoding = starting_point(settings).encoding
    users = data.load_documents(settings.data_config, encoding)
    data.encode_users(settings.data_config, users, encoding)  # refuses text that is too short
    check(settings, list(users), secret)
    if odd := [name for name in users if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise BadInput(f"`data` {settings.data}: user {odd[0]} can't have that name here; use letters and digits")
    for name, documents in users.items():
        lines = [{"user": name, "split": split, "text": text} for split in data.SPLITS for text in documents[split]]
        write_text(out / name / "text.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return list(users)


@contextmanager
def processes(out: Path) -> Iterator[Callable[[str, str], subprocess.Popen]]:
    """Gives a function that starts a command, with a log of that name, or with this process's output for none. All end
    when the block ends, and so does what they have started. SIGTERM and SIGHUP end the block, too."""
    started = []

    def start(command: str, name: str, log: bool = True) -> subprocess.Popen:
        program, *rest = shlex.split(command)
        output = open(out / f"{name}.log", "w") if log else None  # noqa: SIM115, the process holds it
        process = subprocess.Popen(
            [Path(sys.executable).parent / program, *rest], stdout=output, stderr=output, start_new_session=True,
            env=os.environ | QUIET | {"PYTHONPATH": str(HERE.parent), "FLWR_HOME": str(out / name / "home")})
        started.append(process)
        return process

    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda *_: sys.exit(143))
    try:
        yield start
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)  # what they started ends when it misses them
            time.sleep(1)
        for process in started:
            process.wait()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def try_it(settings: Settings, secret: bool) -> None:
    """Raises BadInput."""
    out = Path(settings.out or "out/flower").resolve()
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"`out` {out}: isn't empty; take another folder")
    names = deal_out(settings, out / "devices", secret)
    flags = as_arguments(replace(settings, data="builtin", user_field=None, text_field=None, train_kb=None,
                                 valid_kb=None, out=None))  # devices have their text, dealt as it is to be
    link, *own = free_ports(1 + len(names))
    keys, address = out / "keys", f"127.0.0.1:{link}"
    subprocess.run(["bash", HERE / "keys.sh", keys, "127.0.0.1", *names], check=True, capture_output=True)
    write_text(out / "run" / "home" / "config.toml", "[superlink]\ndefault = \"here\"\n\n[superlink.here]\n"
               f'address = "{address}"\nroot-certificates = "{keys / "ca.crt"}"\n')
    with processes(out) as start:
        superlink = start(f"flower-superlink --host 127.0.0.1 --port {link} --ssl-ca-certfile {keys}/ca.crt "
                          f"--ssl-certfile {keys}/server.pem --ssl-keyfile {keys}/server.key --enable-supernode-auth "
                          "--disable-runtime-dependency-installation", "superlink")
        wait_for(link, superlink)
        for name in names:
            if start(f"flwr supernode register {keys}/{name}.pub here --name {name}", "run").wait():
                raise BadInput(f"`out` {out}: the key of {name} couldn't be registered; see run.log there")
        for name, port in zip(names, own, strict=True):
            home = out / "devices" / name
            where = f'user="{name}" text="{home / "text.jsonl"}" state="{home / "states"}"'
            start(f"flower-supernode --superlink {address} --root-certificates {keys}/ca.crt --port {port} "
                  f"--auth-supernode-private-key {keys}/{name} --node-config {shlex.quote(where)}", f"devices/{name}")
        given = (f'flags={json.dumps(shlex.join(flags))} users="{",".join(names)}" out="{out / "server"}" '
                 f"secret={str(secret).lower()}")
        start(f"flwr run {HERE} here --stream --run-config {shlex.quote(given)}", "run", log=False).wait()
    if not (out / "server" / "result.json").exists():
        raise BadInput(f"`out` {out}: the run has no result; its logs are there")


def main(arguments: list[str] | None = None) -> int:
    flags = sys.argv[1:] if arguments is None else arguments
    return run_command("flower.try_it", lambda: try_it(settings_of([flag for flag in flags if flag != "--secret"]),
                                                     "--secret" in flags), "its logs are kept")


if __name__ == "__main__":
    sys.exit(main())
