"""Each method is a row: what it does to the roles, and which text teaches the router. The loop is always the same.

    python train.py --method fedavg
"""

from dataclasses import dataclass, field

from model import GENERALIST, SPECIALIST


@dataclass(frozen=True)
class Method:
    summary: str
    roles: dict[str, str] = field(default_factory=dict)  # role in the paper's model -> role here
    routed: bool = False  # True: a router, taught on validation text; False: the experts' outputs are averaged
    pooled: bool = False  # True: one model learns from everyone's text, which then has to leave the devices


METHODS = {
    "comigs": Method("generalists are averaged, specialists and routers stay, routers learn from validation text",
                     routed=True),
    "local": Method("every user trains the same parameters alone",
                    roles={GENERALIST: SPECIALIST}),
    "fedavg": Method("everything is averaged, each expert over the users who have it",
                     roles={SPECIALIST: GENERALIST}),
    "centralized": Method("one model, the largest user's, learns from everyone's text, a batch of each at a time",
                          roles={GENERALIST: SPECIALIST}, pooled=True),
}
