"""The content of Flower's messages between the server and the devices.

A message to a device holds the server's generalists, the id of the run and the number of the round.
A reply holds the device's generalists and a report, as JSON:

    {"weight", "lines": [of metrics.jsonl], and at the end "counters", "row": of result.json}
"""

import json
import shlex

from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from federated import Message
from support.runs.command_line import parsed
from support.runs.settings import Settings


def settings_of(context: Context) -> Settings:
    """The settings of a run, from the flags in its run config. Raises BadInput."""
    return parsed(shlex.split(str(context.run_config["flags"])))


def users_of(context: Context) -> list[str]:
    """The names of all users, from the run config."""
    return str(context.run_config["users"]).split(",")


def pack_message(generalists: Message, run: str, number: int) -> RecordDict:
    """The content of a message to a device for round `number`."""
    return RecordDict(
        {
            "generalists": ArrayRecord(generalists),
            "round": ConfigRecord({"run": run, "number": number}),
        }
    )


def unpack_message(content: RecordDict) -> tuple[Message, str, int]:
    """The generalists, the id of the run and the number of the round."""
    generalists = dict(content["generalists"].to_torch_state_dict())
    return generalists, content["round"]["run"], content["round"]["number"]


def pack_reply(generalists: Message, report: dict) -> RecordDict:
    """The content of a device's reply."""
    return RecordDict(
        {
            "generalists": ArrayRecord(generalists),
            "report": ConfigRecord({"json": json.dumps(report)}),
        }
    )


def unpack_reply(content: RecordDict) -> tuple[Message, dict]:
    """A device's generalists and its report. Raises ValueError, KeyError, TypeError."""
    generalists = dict(content["generalists"].to_torch_state_dict())
    return generalists, json.loads(content["report"]["json"])


def is_valid_report(report: object, last: bool) -> bool:
    """Whether a report has the entries that the server reads. last: for the report at the end."""
    if not isinstance(report, dict):
        return False
    if not isinstance(report.get("weight"), int | float):
        return False
    if not isinstance(report.get("lines"), list):
        return False
    for line in report["lines"]:
        if not isinstance(line, dict) or not isinstance(line.get("round"), int):
            return False
    if last:
        return isinstance(report.get("row"), dict) and isinstance(report.get("counters"), dict)
    return True
