"""CoMiGS, its ablations and its rivals. Each is a row of METHODS.

    python train.py --method fedavg

A method is mostly an assignment of roles: FedAvg makes every expert a generalist, local training
makes every expert a specialist. The parts that a row can't express are classes: the leaky level of
the authors' code below, and those of the rivals in rivals.py. The round is the same for all methods
(federated.federated_round).
"""

from dataclasses import dataclass, field

from torch import Tensor

from bilevel import Level
from federated import Server, User
from model import BACKBONE, GENERALIST, ROUTER, SPECIALIST
from rivals import (
    BalancedLevel,
    FDLoRAUser,
    FlexLoRAServer,
    HetLoRALevel,
    HetLoRAServer,
    HetLoRAUser,
    PCLServer,
    PCLUser,
    SeparateLevel,
)


class LeakyLevel(Level):
    """The gradient leak of the authors' code, on purpose.

    A step differentiates with respect to all parameters but clears only its own level's gradients.
    The other level's next step descends what has accumulated.
    """

    def differentiate(self, objective: Tensor) -> None:
        objective.backward()


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    `needs`, `sizes` and `clippable` decide which flags a run accepts (support/runs/settings.py).
    """

    summary: str
    roles: dict[str, str] = field(default_factory=dict)  # role in CoMiGS or factor -> role here
    routed: bool = False  # False: no router, the experts' outputs are averaged
    by_kind: bool = False  # the router weighs generalists against specialists, not each expert
    router_text: str = "valid"  # the split that trains the router
    pooled: bool = False  # one model learns from all users' text, which leaves the devices
    needs: str = ""  # "lora": LoRA adapters; "both": generalists and specialists
    sizes: str = "specialists"  # users may differ in "specialists", in "ranks" too, or in "nothing"
    clippable: bool = True  # a message is an update of the server's, whose norm can be clipped
    level: type[Level] = Level  # the lower one
    router_level: type[Level] = Level
    user: type[User] = User
    server: type[Server] = Server
    hyper: dict[str, float] = field(default_factory=dict)  # hyper-parameters; `--set` changes them


SHARED = {SPECIALIST: GENERALIST}  # every expert is a generalist
OWN = {GENERALIST: SPECIALIST}  # every expert is a specialist
JOINT = {ROUTER: SPECIALIST}  # the router is trained with the experts, on training text

METHODS = {
    "comigs": Method(
        "generalists are averaged, specialists and routers stay, "
        "routers learn from validation text",
        routed=True,
    ),
    # Ablations
    "comigs-2g": Method("CoMiGS with generalists only", SHARED, routed=True),
    "comigs-2s": Method(
        "CoMiGS with specialists only: nothing is sent", OWN, routed=True, sizes="ranks"
    ),
    "comigs-uniform": Method("CoMiGS without routers: all experts have the same weight"),
    "comigs-train": Method(
        "CoMiGS with routers that learn from training text", routed=True, router_text="train"
    ),
    "comigs-joint": Method(
        "CoMiGS in one level: routers learn with the experts, from training text",
        JOINT,
        routed=True,
    ),
    "comigs-leaky": Method(
        "CoMiGS with the gradient leak of its authors' code",
        routed=True,
        level=LeakyLevel,
        router_level=LeakyLevel,
    ),
    "comigs-apart": Method(
        "beyond the paper: each kind of expert learns alone, as in fdlora, and a router weighs the "
        "two kinds",
        routed=True,
        by_kind=True,
        needs="both",
        level=SeparateLevel,
    ),
    # Baselines
    "local": Method("every user trains the same parameters alone", OWN, sizes="ranks"),
    "fedavg": Method("everything is averaged, each expert over the users who have it", SHARED),
    "centralized": Method(
        "one model, the largest user's, learns from all users' text, a batch of each in every step",
        OWN,
        pooled=True,
        sizes="ranks",
    ),
    # Rivals
    "pcl": Method(
        "all users' models are mixed by their perplexity on the user's validation text",
        SHARED,
        sizes="nothing",
        clippable=False,
        user=PCLUser,
        server=PCLServer,
    ),
    "pfedmoe": Method(
        "as comigs-joint, with a load-balancing loss",
        JOINT,
        routed=True,
        level=BalancedLevel,
        hyper={"balance": 0.01},
    ),
    "hetlora": Method(
        "zero-padded averaging by the norm of BA, ranks prune themselves",
        SHARED,
        needs="lora",
        sizes="ranks",
        clippable=False,
        level=HetLoRALevel,
        user=HetLoRAUser,
        server=HetLoRAServer,
        hyper={"lambda": 0.01, "gamma": 0.99},
    ),  # as in the code of CoMiGS's authors
    "flexlora": Method(
        "products BA are averaged, and cut to each rank by SVD",
        SHARED,
        needs="lora",
        sizes="ranks",
        clippable=False,
        server=FlexLoRAServer,
    ),
    "ffa-lora": Method(
        "A stays at its random start, B is averaged", SHARED | {"lora_A": BACKBONE}, needs="lora"
    ),
    "fedsa-lora": Method(
        "A is averaged, B stays", {"lora_A": GENERALIST, "lora_B": SPECIALIST}, needs="lora"
    ),
    "fdlora": Method(
        "a global and a personal adapter, fused by a search on validation text",
        needs="both",
        level=SeparateLevel,
        user=FDLoRAUser,
    ),
}
