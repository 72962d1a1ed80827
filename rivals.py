"""The parts of rival methods that a row of methods.METHODS can't express, with their equations.

A part is a subclass of `Level` (another objective), of `User` (what a device does with the
message it receives, or before its model is used) or of `Server` (how it merges messages).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel import Batch, Level, Rhythm, evaluate
from federated import Message, Server, User, average
from lora import LoRAAdapter, lora_scale
from model import GENERALIST, GPT, SPECIALIST, GPTConfig, Routing


class JudgingUser(User):
    """A user whose method compares models on validation text, on the device.

    validation_windows: returns a few windows of the user's validation text, always the same ones.
    train.build_user sets it.
    """

    n_windows = 8
    validation_windows: Callable[[], Iterator[Batch]]


# --- pFedMoE, as the paper adapts it ---


def load_balancing_loss(routing: Routing) -> Tensor:
    """E Σ_e f_e P_e (Fedus et al. 2021, equation 4; for k > 1 as in Mixtral).

    f_e is expert e's share of the tokens' choices, P_e its mean probability in a softmax over all
    experts. The loss is 1 if all experts have the same shares.
    """
    E = routing.logits.shape[1]
    counts = routing.selected.flatten().bincount(minlength=E)
    f = counts / routing.selected.numel()  # (E,)
    P = routing.logits.softmax(-1).mean(0)  # (E,)
    return E * (f * P).sum()


class BalancedLevel(Level):
    """Adds the mean of the layers' load-balancing losses, weighted by `balance`."""

    def objective(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden, routings = model.trunk(idx)
        loss = model.loss(hidden, targets)
        layers = [load_balancing_loss(routing) for routing in routings]
        return loss, loss + self.hyper["balance"] * sum(layers) / len(layers)


# --- FDLoRA (Qi et al. 2024): a global and a personal adapter ---


def gates_by_kind(config: GPTConfig, generalist_weight: float) -> Tensor:
    """Gates (L, E), equal for all generalists and equal for all specialists.

    generalist_weight: the sum of the generalists' gates; the specialists' sum to the rest of 1.
    """
    roles = config.expert_roles
    weight = {
        GENERALIST: generalist_weight / roles.count(GENERALIST),
        SPECIALIST: (1 - generalist_weight) / roles.count(SPECIALIST),
    }
    layer = [weight[role] for role in roles]
    return torch.tensor([layer] * config.n_layer)


class SeparateLevel(Level):
    """Each kind of expert learns alone, from the same batches.

    The objective is L(generalists only) + L(specialists only). Attention's adapters, which both
    use, descend the sum. The mean of the two losses is reported.
    """

    def objective(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        _, generalist_loss = model(idx, targets, fixed_gates=gates_by_kind(model.config, 1.0))
        _, specialist_loss = model(idx, targets, fixed_gates=gates_by_kind(model.config, 0.0))
        total = generalist_loss + specialist_loss
        return total / 2, total


class FDLoRAUser(JudgingUser):
    """FDLoRA's last stage: fuses the outputs of the two kinds with the weights w and 1 − w.

    w is the one of 0, 0.1, ..., 1 with the least loss on a few windows of validation text. Here the
    outputs are fused, not the factors.
    """

    @torch.no_grad()
    def before_evaluation(self) -> None:
        losses = {}
        for tenths in range(11):
            gates = gates_by_kind(self.model.config, tenths / 10)
            losses[tenths], _ = evaluate(self.model, self.validation_windows(), gates)
        best = min(losses, key=losses.get)
        self.fixed_gates = gates_by_kind(self.model.config, best / 10)


# --- PCL, strategy 2 (Wagner et al. 2024): trust between users ---


class PCLServer(Server):
    """Stacks all users' generalists, and sends all of them to every user, unweighted."""

    def __init__(self, generalists: Message, hyper: dict[str, float] | None = None):
        super().__init__(self.merge([generalists], [1]), hyper)

    def merge(self, messages: list[Message], weights: list[float]) -> Message:
        stacked = {}
        for name in messages[0]:
            tensors = [message[name].detach() for message in messages]
            stacked[name] = torch.stack(tensors)  # (users, ...)
        return stacked


class PCLUser(JudgingUser):
    """θ_i = Σ_j w_ij θ_j, with w_ij = softmax_j(−perplexity of θ_j on user i's validation text).

    Everything is computed on the device. Users therefore see each other's generalists.
    """

    @torch.no_grad()
    def set_generalists(self, message: Message) -> None:
        users = len(next(iter(message.values())))
        candidates = []
        losses = []
        for j in range(users):
            candidate = {name: tensor[j] for name, tensor in message.items()}
            super().set_generalists(candidate)
            loss, _ = evaluate(self.model, self.validation_windows())
            candidates.append(candidate)
            losses.append(loss)
        perplexities = torch.tensor(losses).exp()  # (users,)
        trust = (-perplexities).softmax(0)  # (users,)
        super().set_generalists(average(candidates, trust.tolist()))


# --- HetLoRA and FlexLoRA: adapters of different ranks ---


def adapters_in(message: Message) -> list[str]:
    """Names of the adapters in a message. Each has a lora_A (r, n_in) and a lora_B (n_out, r)."""
    A = ".lora_A"
    return [name.removesuffix(A) for name in message if name.endswith(A)]


def fit(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """Cut or zero-pad a matrix to a shape."""
    rows, columns = shape
    matrix = matrix[:rows, :columns]
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def hetlora_average(messages: list[Message], weights: list[float]) -> Message:
    """HetLoRA's sparsity-weighted average (Cho et al. 2024, section 3), for each adapter:

    Ā = Σ_i p_i pad(A_i),    B̄ = Σ_i p_i pad(B_i),    p_i = w_i ‖B_i A_i‖ / Σ_j w_j ‖B_j A_j‖
    """
    means = {}
    for adapter in dict.fromkeys(name for message in messages for name in adapters_in(message)):
        A_name = f"{adapter}.lora_A"
        B_name = f"{adapter}.lora_B"
        rank = max(len(message[A_name]) for message in messages if A_name in message)
        padded = []
        p = []
        for message, weight in zip(messages, weights, strict=True):
            if A_name not in message:
                continue
            A = message[A_name]
            B = message[B_name]
            padded.append({A_name: fit(A, (rank, A.shape[1])), B_name: fit(B, (len(B), rank))})
            p.append(weight * (torch.linalg.matrix_norm(B @ A).item() + 1e-12))
        means |= average(padded, p)
    return means


class HetLoRAServer(Server):
    """Averages zero-padded factors, and cuts them to each user's ranks.

    It ignores the scales α/√r, as its paper does.
    """

    def merge(self, messages: list[Message], weights: list[float]) -> Message:
        """Ranks above those of all messages keep their values."""
        merged = {}
        for name, mean in hetlora_average(messages, weights).items():
            held = self.generalists[name]
            rows = max(held.shape[0], mean.shape[0])
            columns = max(held.shape[1], mean.shape[1])
            merged[name] = fit(held, (rows, columns)).clone()
            merged[name][: mean.shape[0], : mean.shape[1]] = mean
        return merged

    def broadcast(self, shapes: dict[str, torch.Size]) -> Message:
        return {name: fit(self.generalists[name], shape) for name, shape in shapes.items()}


def kept_rank(rank: int, gamma: float) -> int:
    """γr: the ranks that self-pruning would keep."""
    return max(1, int(gamma * rank))


def adapters_of(module: nn.Module) -> list[LoRAAdapter]:
    return [part for part in module.modules() if isinstance(part, LoRAAdapter)]


def expert_adapters_of(model: GPT) -> list[LoRAAdapter]:
    """The adapters of all feed-forward blocks, without those of attention."""
    return [adapter for block in model.blocks for adapter in adapters_of(block.moe)]


def tail_norm(adapters: list[LoRAAdapter], gamma: float) -> Tensor:
    """Σ ‖B[:, γr:]‖ ‖A[γr:, :]‖ over the adapters: the size of the ranks that pruning would cut."""
    norms = []
    for adapter in adapters:
        rank = kept_rank(len(adapter.lora_A), gamma)
        norms.append(adapter.lora_B[:, rank:].norm() * adapter.lora_A[rank:].norm())
    return sum(norms)


class HetLoRALevel(Level):
    """Adds λ times the norm of the experts' tails to the loss (Cho et al. 2024, section 3)."""

    def objective(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        _, loss = model(idx, targets)
        penalty = tail_norm(expert_adapters_of(model), self.hyper["gamma"])
        return loss, loss + self.hyper["lambda"] * penalty


class HetLoRAUser(User):
    """Self-pruning: if the tail is smaller after a round than before it, it is removed.

    This tail is of all adapters, attention's too, because all are cut to the same rank.
    """

    def local_update(self, rhythm: Rhythm) -> float:
        gamma = self.hyper["gamma"]
        adapters = adapters_of(self.model)
        before = tail_norm(adapters, gamma).item()
        loss = super().local_update(rhythm)
        if tail_norm(adapters, gamma).item() < before:
            self.prune(gamma)
        return loss

    @torch.no_grad()
    def prune(self, gamma: float) -> None:
        """Cut every adapter to the rank γr."""
        for adapter in adapters_of(self.model):
            rank = kept_rank(len(adapter.lora_A), gamma)
            self.cut(adapter.lora_A, 0, rank)
            self.cut(adapter.lora_B, 1, rank)

    def cut(self, parameter: Tensor, dim: int, rank: int) -> None:
        """Cut one dimension of a parameter, and of its moments in the optimizer."""
        parameter.data = parameter.narrow(dim, 0, rank).clone()
        moments = self.lower.optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].narrow(dim, 0, rank).clone()


def flexlora_average(messages: list[Message], weights: list[float]) -> Message:
    """FlexLoRA's average of products (Bai et al. 2024, section 3).

        W = Σ_i w_i s_i B_i A_i / Σ_i w_i = U Σ Vᵀ

    s_i = α/√r_i is the scale in user i's model. The server keeps W as B = U Σ and A = Vᵀ. Their
    first r columns and rows are the best approximation of rank r.
    """
    products = []
    for message in messages:
        product = {}
        for adapter in adapters_in(message):
            A = message[f"{adapter}.lora_A"]
            B = message[f"{adapter}.lora_B"]
            product[adapter] = lora_scale(len(A)) * B @ A  # (n_out, n_in)
        products.append(product)
    merged = {}
    for adapter, W in average(products, weights).items():
        U, singular_values, Vt = torch.linalg.svd(W, full_matrices=False)
        merged[f"{adapter}.lora_A"] = Vt
        merged[f"{adapter}.lora_B"] = U * singular_values
    return merged


class FlexLoRAServer(HetLoRAServer):
    """Averages products, and sends each user the best approximation of that user's rank.

    Users keep their optimizers' moments, as in all methods, although the factors of each round
    have a new basis.
    """

    def merge(self, messages: list[Message], weights: list[float]) -> Message:
        return flexlora_average(messages, weights)

    def broadcast(self, shapes: dict[str, torch.Size]) -> Message:
        message = super().broadcast(shapes)
        for name, tensor in message.items():
            if name.endswith(".lora_B"):
                message[name] = tensor / lora_scale(tensor.shape[1])
        return message
