"""CoMiGS and its rivals, each a row of a table: what it does to the roles, and which text teaches the router.

    python train.py --method fedavg

What a row can't say is said above the table: a term beside a level's loss, what a device does with what it receives, or
how the server merges the answers, each with the equation of its paper. The loop is always the same (federated.py).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel import Level, Rhythm, evaluate
from federated import Message, Server, User, average
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig, LowRank, Routing
from support.errors import BadInput

# --- what is added to a level's loss ---------------------------------------------------------------------------------


class Leaky(Level):
    """The gradient leak of the authors' code, on purpose: a step differentiates with respect to everything, but clears
    its own level's gradients only, so that the other level's next step descends what has piled up."""

    def differentiate(self, loss: Tensor) -> None:
        loss.backward()


def balance(routing: Routing) -> Tensor:
    """E Σ_e f_e P_e, with f_e expert e's share of the tokens' choices and P_e its mean probability, a softmax over all
    experts: 1 where all have the same (Fedus et al. 2021, equation 4; for k > 1 as in Mixtral)."""
    E = routing.scores.shape[1]
    f = routing.chosen.flatten().bincount(minlength=E) / routing.chosen.numel()  # (E,)
    return E * (f * routing.scores.softmax(-1).mean(0)).sum()


class Balanced(Level):
    """pFedMoE as the paper adapts it: the layers' load-balancing losses are added, weighted."""

    def losses(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden, routings = model.trunk(idx)
        return model.loss(hidden, targets), self.hyper["balance"] * sum(map(balance, routings))


def by_kind(config: GPTConfig, weight: float) -> Tensor:
    """Gates (L, E) that give `weight` to the generalists together, and the rest to the specialists."""
    roles = config.expert_roles
    share = {GENERALIST: weight / roles.count(GENERALIST), SPECIALIST: (1 - weight) / roles.count(SPECIALIST)}
    return torch.tensor([[share[role] for role in roles]] * config.n_layer)


class Apart(Level):
    """FDLoRA (Qi et al. 2024): a global and a personal adapter learn each alone, L(generalists) + L(specialists), from
    the same batches. What the adapters have in common here, attention's changes, descends the sum. The mean of the two
    is reported."""

    def losses(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = [model(idx, targets, by_kind(model.config, weight))[1] for weight in (1.0, 0.0)]
        mean = sum(losses) / 2
        return mean, mean


class Fusing(User):
    """FDLoRA's last stage: the adapters' weights w, 1 − w are those of least loss on a few windows of validation text.

    Outputs are fused, not factors, and w is searched on a grid.
    """

    @torch.no_grad()
    def settle(self) -> None:
        grid = [by_kind(self.model.config, tenths / 10) for tenths in range(11)]
        self.gates = min(grid, key=lambda gates: evaluate(self.model, self.judge(), gates)[0])


# --- trust between users ---------------------------------------------------------------------------------------------


class Collecting(Server):
    """Keeps all users' answers, stacked, and sends every user all of them. `--average` has no say here."""

    bounded = False

    def __init__(self, generalists: Message, hyper: dict[str, float] | None = None):
        super().__init__(self.merge([generalists], [1]), hyper)

    def merge(self, answers: list[Message], weights: list[float]) -> Message:
        return {name: torch.stack([answer[name].detach() for answer in answers]) for name in answers[0]}


class Trusting(User):
    """PCL, strategy 2 (Wagner et al. 2024): θ_i = Σ_j w_ij θ_j, with the trust w_ij = softmax_j(−perplexity of θ_j on
    some validation text of user i), all computed on the device. The price: users see each other's parameters."""

    @torch.no_grad()
    def adopt(self, message: Message) -> None:
        count = len(next(iter(message.values())))
        candidates = [{name: tensor[j] for name, tensor in message.items()} for j in range(count)]
        losses = []
        for candidate in candidates:
            super().adopt(candidate)
            losses.append(evaluate(self.model, self.judge())[0])
        trust = (-torch.tensor(losses).exp()).softmax(0)  # (users,); a perplexity is exp of a loss
        super().adopt(average(candidates, trust.tolist()))


# --- low-rank changes of different ranks -----------------------------------------------------------------------------


def pairs(message: Message) -> list[str]:
    """The low-rank changes in a message: each has an A (r, n_in) and a B (n_out, r)."""
    return [name.removesuffix(".A") for name in message if name.endswith(".A")]


def fit(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A matrix cut or padded with zeros, at its ends, to a shape."""
    rows, columns = shape
    tensor = tensor[:rows, :columns]
    return F.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))


def hetlora_average(answers: list[Message], weights: list[float]) -> Message:
    """Ā = Σ_i p_i pad(A_i), B̄ = Σ_i p_i pad(B_i), with p_i = ‖B_i A_i‖ / Σ_j ‖B_j A_j‖ in the Frobenius norm, times the
    user's weight, for each low-rank change by itself (Cho et al. 2024, section 3)."""
    means = {}
    for pair in dict.fromkeys(pair for answer in answers for pair in pairs(answer)):
        A, B = f"{pair}.A", f"{pair}.B"
        held = [(answer, weight) for answer, weight in zip(answers, weights, strict=True) if A in answer]
        norms = [weight * (torch.linalg.matrix_norm(one[B] @ one[A]).item() + 1e-12) for one, weight in held]
        rank = max(len(one[A]) for one, _ in held)
        means |= average([{A: fit(one[A], (rank, one[A].shape[1])), B: fit(one[B], (len(one[B]), rank))}
                          for one, _ in held], norms)
    return means


def flexlora_average(answers: list[Message], weights: list[float]) -> Message:
    """W = Σ_i w_i s_i B_i A_i / Σ_i w_i, decomposed as U Σ Vᵀ and kept as B = U Σ and A = Vᵀ, whose first r columns and
    rows are the best change of rank r (Bai et al. 2024, section 3). The scale s_i = α/√r_i is the model's own."""
    products = average([{pair: LowRank.scale_of(len(answer[f"{pair}.A"])) * answer[f"{pair}.B"] @ answer[f"{pair}.A"]
                         for pair in pairs(answer)} for answer in answers], weights)
    merged = {}
    for pair, product in products.items():
        U, singular, V = torch.linalg.svd(product, full_matrices=False)
        merged |= {f"{pair}.A": V, f"{pair}.B": U * singular}
    return merged


class HetLoRA(Server):
    """Averages padded factors and sends each user the ranks it has a place for. The users' scales α/√r don't count, as
    in its paper."""

    bounded = False

    def merge(self, answers: list[Message], weights: list[float]) -> Message:
        """Ranks that nobody who answered has stay as they are."""
        merged = {}
        for name, mean in hetlora_average(answers, weights).items():
            held = self.generalists[name]
            merged[name] = fit(held, torch.Size(map(max, held.shape, mean.shape))).clone()
            merged[name][:mean.shape[0], :mean.shape[1]] = mean
        return merged

    def give(self, shapes: dict[str, torch.Size]) -> Message:
        return {name: fit(self.generalists[name], shape) for name, shape in shapes.items()}


class FlexLoRA(HetLoRA):
    """Averages products and sends each user their best change of its rank. Users keep their optimizers' moments, as in
    all methods, although each round's factors come in new coordinates."""

    def merge(self, answers: list[Message], weights: list[float]) -> Message:
        return flexlora_average(answers, weights)

    def give(self, shapes: dict[str, torch.Size]) -> Message:
        return {name: tensor / LowRank.scale_of(tensor.shape[1]) if name.endswith(".B") else tensor
                for name, tensor in super().give(shapes).items()}


def kept(rank: int, gamma: float) -> int:
    """γr: the ranks that self-pruning would keep."""
    return max(1, int(gamma * rank))


def changes(model: GPT) -> list[LowRank]:
    return [module for module in model.modules() if isinstance(module, LowRank)]


def tail(model: GPT, gamma: float) -> Tensor:
    """Σ ‖B[:, γr:]‖ ‖A[γr:, :]‖ over the model's low-rank changes: the size of what self-pruning would take away."""
    ranks = [(change, kept(len(change.A), gamma)) for change in changes(model)]
    return sum(change.B[:, rank:].norm() * change.A[rank:].norm() for change, rank in ranks)


class Shrinking(Level):
    """HetLoRA's loss: λ times the tail is added to it (Cho et al. 2024, section 3)."""

    def losses(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, _ = super().losses(model, idx, targets)
        return loss, self.hyper["lambda"] * tail(model, self.hyper["gamma"])


class SelfPruning(User):
    """HetLoRA's device: where the tail is smaller after a round's work than before it, it is cut off for good."""

    def learn(self, rhythm: Rhythm) -> float:
        before = tail(self.model, self.hyper["gamma"]).item()
        loss = super().learn(rhythm)
        if tail(self.model, self.hyper["gamma"]).item() < before:
            self.prune()
        return loss

    @torch.no_grad()
    def prune(self) -> None:
        """Every A and B, and its moments in the optimizer, lose the ranks above γr."""
        for change in changes(self.model):
            rank = kept(len(change.A), self.hyper["gamma"])
            for parameter, axis in ((change.A, 0), (change.B, 1)):
                parameter.data = parameter.narrow(axis, 0, rank).clone()
                moments = self.lower.optimizer.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = moments[name].narrow(axis, 0, rank).clone()


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    summary: str
    roles: dict[str, str] = field(default_factory=dict)  # role, or factor A or B, in the paper's model -> role here
    routed: bool = False  # True: there is a router; False: the experts' outputs are averaged
    router_text: str = "valid"  # the split that teaches the router
    pooled: bool = False  # True: one model learns from everyone's text, which then has to leave the devices
    needs: str = ""  # "lora" or "both", what a run of it can't be without: low-rank changes; both kinds of experts
    sizes: str = "specialists"  # in what users may differ: "specialists", "ranks" too, or "nothing"
    level: type[Level] = Level  # the lower one
    router_level: type[Level] = Level
    hyper: dict[str, float] = field(default_factory=dict)  # hyper-parameters, which `--set` can change
    user: type[User] = User
    server: type[Server] = Server

    def check(self, settings: "Settings") -> None:  # noqa: F821
        """Raises BadInput where a run of these settings can't be one of this method."""
        lora, both = settings.expert == "lora", settings.generalists and min(settings.specialists)
        sizes, ranks = len(set(settings.specialists)), len(set(settings.lora_rank))
        for wrong, message in (
            (self.needs == "lora" and not lora, "needs low-rank changes; give `expert` lora, and a base"),
            (self.needs == "both" and not both, "needs both kinds of experts; give each user at least 1 of each"),
            (self.sizes == "nothing" and sizes > 1, "needs users of one size; give one number of `specialists`"),
            (self.sizes != "ranks" and lora and ranks > 1, "averages the users' changes; give one `lora_rank` for all"),
            (settings.clip_update and not self.server.bounded, "has no updates to clip; leave `clip_update` out"),
            (settings.dp_noise and self.server is not Server, "has a server of its own; leave `dp_noise` out"),
            (settings.dp_noise and self.roles == OWN, "averages nothing; leave `dp_noise` out"),
            (settings.dp_noise and GENERALIST in self.roles.values() and sizes > 1,
             "averages experts that not all users have; with `dp_noise` give one number of `specialists` for all"),
        ):
            if wrong:
                raise BadInput(f"`method` {settings.method}: {message}")


SHARED, OWN = {SPECIALIST: GENERALIST}, {GENERALIST: SPECIALIST}
JOINT = {ROUTER: SPECIALIST}  # the router learns with the experts, from the same text

METHODS = {
    "comigs": Method("generalists are averaged, specialists and routers stay, routers learn from validation text",
                     routed=True),
    "comigs-2g": Method("CoMiGS with generalists only", SHARED, routed=True),
    "comigs-2s": Method("CoMiGS with specialists only: nothing is sent", OWN, routed=True, sizes="ranks"),
    "comigs-uniform": Method("CoMiGS without routers: all experts have the same weight"),
    "comigs-train": Method("CoMiGS with routers that learn from training text", routed=True, router_text="train"),
    "comigs-joint": Method("CoMiGS in one level: routers learn with the experts, from training text", JOINT,
                           routed=True),
    "comigs-leaky": Method("CoMiGS with the gradient leak of its authors' code", routed=True, level=Leaky,
                           router_level=Leaky),
    "comigs-apart": Method("beyond the paper: each kind of expert learns alone, as in fdlora, and a router mixes them",
                           routed=True, needs="both", level=Apart),
    "local": Method("every user trains the same parameters alone", OWN, sizes="ranks"),
    "fedavg": Method("everything is averaged, each expert over the users who have it", SHARED),
    "centralized": Method("one model, the largest user's, learns from everyone's text, a batch of each at a time", OWN,
                          pooled=True, sizes="ranks"),
    "pcl": Method("everyone's models are mixed by their perplexity on one's own validation text", SHARED,
                  sizes="nothing", user=Trusting, server=Collecting),
    "pfedmoe": Method("as comigs-joint, with a load-balancing loss", JOINT, routed=True, level=Balanced,
                      hyper={"balance": 0.01}),
    "hetlora": Method("zero-padded averaging by the norm of BA, ranks prune themselves", SHARED, needs="lora",
                      sizes="ranks", level=Shrinking, user=SelfPruning, server=HetLoRA,
                      hyper={"lambda": 0.01, "gamma": 0.99}),  # as in the code of CoMiGS's authors
    "flexlora": Method("products BA are averaged, and cut to each rank by SVD", SHARED, needs="lora", sizes="ranks",
                       server=FlexLoRA),
    "ffa-lora": Method("A stays as it was at the start, B is averaged", {**SHARED, "A": BACKBONE}, needs="lora"),
    "fedsa-lora": Method("A is averaged, B stays", {"A": GENERALIST, "B": SPECIALIST}, needs="lora"),
    "fdlora": Method("a global and a personal adapter, fused by a search on validation text", needs="both",
                     level=Apart, user=Fusing),
}
