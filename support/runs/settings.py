"""Everything that determines a run: one dataclass, from which the command line is derived.

python train.py --help
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import BUILTIN_TRAIN_KB, DataConfig
from federated import Server
from methods import METHODS, OWN
from model import GENERALIST
from support.pretrained.base import NAMES
from support.runs.flags import check_values, flags, refuse, setting
from support.text.sources import BUILTIN, TABLES

SCRATCH = dict(n_layer=3, n_head=4, n_embd=128)  # the shape of a model without a base

# Defaults for a small model (from scratch, or lab.pretrain's), and for a language model.
SMALL_MODEL = dict(
    batch_size=8,
    block_size=64,
    lr=6e-3,
    warmup=100,
    router_steps=5,
    rounds=64,
    eval_every=8,
    save_every=16,
)
LANGUAGE_MODEL = dict(
    batch_size=2,
    block_size=128,
    lr=2e-3,
    warmup=20,
    router_steps=10,
    rounds=10,
    eval_every=1,
    save_every=5,
)


@dataclass
class Training:
    """The settings of any training. Raises BadInput."""

    batch_size: int | None = setting(None, "windows in a batch", int, low=1, high=1_000_000)
    block_size: int | None = setting(None, "tokens in a window", int, low=1, high=1_000_000)
    lr: float | None = setting(None, "the experts' highest learning rate", float, above=0)
    warmup: int | None = setting(
        None, "steps until the highest learning rate; at most a fifth of all steps", int, low=0
    )
    weight_decay: float = setting(
        0.1, "AdamW's weight decay; none for biases, norms and embeddings", float, low=0
    )
    n_layer: int | None = setting(
        None, "layers (default: 3, or those of the base)", int, low=1, high=1000
    )
    n_head: int | None = setting(
        None, "attention heads (default: 4, or those of the base)", int, low=1
    )
    n_embd: int | None = setting(
        None, "channels (default: 128, or those of the base)", int, low=1, high=1_000_000
    )
    seed: int = setting(0, "the seed of all random numbers", int, low=0)
    device: str = setting("cpu", "cpu, cuda, cuda:1, mps, ...")
    compile: bool = setting(False, "compile the models with torch.compile", bool)
    overwrite: bool = setting(False, "delete an earlier run in the folder", bool)

    def __post_init__(self):
        defaults = LANGUAGE_MODEL if self.starts_from_language_model else SMALL_MODEL
        for name in flags(type(self)):
            if getattr(self, name) is None and name in defaults:
                setattr(self, name, defaults[name])
        check_values(self)

    @property
    def starts_from_language_model(self) -> bool:
        return False


def all_hyper() -> str:
    """A sentence that lists all methods' hyper-parameters."""
    parts = []
    for name, method in METHODS.items():
        if method.hyper:
            values = ",".join(f"{key}={value}" for key, value in method.hyper.items())
            parts.append(f"{values} of {name}")
    return "; ".join(parts)


@dataclass
class Settings(Training):
    """Run one method, from its settings to its table. A single value applies to all users.

    Raises BadInput.
    """

    users: int = setting(4, "number of users", int, low=1, high=100_000)
    specialists: tuple[int, ...] = setting(
        (1,),
        "specialist experts in a layer: one number for all users, or one for each",
        int,
        low=0,
        high=1000,
        many=True,
    )
    generalists: int = setting(1, "generalist experts in a layer", int, low=0, high=1000)
    top_k: int = setting(
        2,
        "experts per token, at most a user's number of experts; all of them, if the method has no "
        "router or weighs kinds of experts",
        int,
        low=1,
    )
    method: str = setting("comigs", f"a row of methods.py: {', '.join(METHODS)}", choices=METHODS)
    set: str | None = setting(
        None, f"hyper-parameters of the method (default: those of its row): {all_hyper()}"
    )
    expert: str = setting(
        "mlp",
        "mlp: feed-forward blocks; lora: LoRA adapters on the base's blocks, which are frozen",
        choices=("mlp", "lora"),
    )
    lora_rank: tuple[int, ...] = setting(
        (8,),
        "rank of the adapters; most methods that average adapters need the same rank for all users",
        int,
        low=1,
        high=10_000,
        many=True,
    )
    init_from: str = setting(
        "scratch",
        f"the initial weights: scratch, {', '.join(NAMES)}, a .gguf, or a "
        "file from lab/pretrain.py",
    )
    dtype: str = setting(
        "auto",
        "type of the frozen weights and of the computation on them; auto: bfloat16 on a "
        "language model, if the processor supports it",
        choices=("auto", "float32", "bfloat16"),
    )
    data: str = setting(
        "builtin",
        f"{', '.join(BUILTIN)}, a folder with a NAME.txt or a NAME/ for each user, or a "
        ".csv or .jsonl file",
    )
    user_field: str | None = setting(
        None, "the field of a table that holds a row's user (default: user)"
    )
    text_field: str | None = setting(
        None, "the field of a table that holds a row's text (default: text)"
    )
    short_users: str = setting(
        "refuse", "what to do about users with too little text", choices=("refuse", "leave-out")
    )
    target: str = setting(
        "own",
        "validation and test text: from the user's source, or an even mix of all users' text",
        choices=("own", "mixed"),
    )
    train_kb: tuple[float, ...] | None = setting(
        None,
        f"training text in kB (default: {BUILTIN_TRAIN_KB} of builtin text, else all)",
        float,
        low=0.001,
        high=1e9,
        many=True,
    )
    valid_kb: tuple[float, ...] | None = setting(
        None,
        "kB from the beginning of the validation text (default: all of it)",
        float,
        low=0.001,
        high=1e9,
        many=True,
    )
    tokenizer: str | None = setting(
        None, "bytes, gpt2, smollm2 or a .gguf (default: bytes, or the base's)"
    )
    experts_see: str = setting(
        "train",
        "the text that trains experts: training text, or training and validation text",
        choices=("train", "both"),
    )
    router_lr: float | None = setting(
        None,
        "the routers' learning rate (default: --lr; five times --lr on a language model)",
        float,
        above=0,
    )
    router_decay: float = setting(0.0, "the routers' weight decay", float, low=0)
    router_every: int = setting(30, "expert steps between two turns of the router", int, low=1)
    router_steps: int | None = setting(None, "router steps in each turn", int, low=0)
    rounds: int | None = setting(None, "communication rounds", int, low=1)
    local_steps: int = setting(10, "expert steps per user and round", int, low=1)
    average: str = setting(
        "uniform",
        "a user's weight in the average: the same for all, or its training tokens",
        choices=("uniform", "tokens"),
    )
    participation: float = setting(
        1.0, "fraction of users selected in a round", float, above=0, high=1
    )
    drop_rate: float = setting(
        0.0, "probability that a selected user disappears before it uploads", float, low=0, below=1
    )
    clip_update: float | None = setting(
        None, "maximum norm of an update; updates with a larger norm are clipped", float, above=0
    )
    dp_noise: float = setting(
        0.0, "noise on the average, in multiples of --clip-update / number of uploads", float, low=0
    )
    eval_every: int | None = setting(
        None, "rounds between two evaluations on validation text", int, low=1
    )
    save_every: int | None = setting(None, "rounds between two checkpoints", int, low=1)
    out: str | None = setting(None, "folder of the run (default: a new one under out/)")
    resume: bool = setting(
        False, "continue the run in --out from its checkpoint, with its settings", bool
    )

    def __post_init__(self):
        super().__post_init__()
        for name, flag in flags(Settings).items():
            value = getattr(self, name)
            if flag.many and value is not None:
                setattr(self, name, one_per_user(name, value, self.users))
        check_start(self)
        check_text(self)
        check_noise(self)
        check_method(self)
        if self.resume and self.overwrite:
            refuse("overwrite", True, "not together with `resume`", "leave one of them out")

    @property
    def starts_from_language_model(self) -> bool:
        """Whether the base is a pretrained language model; lab.pretrain's .pt doesn't count."""
        return self.init_from != "scratch" and Path(self.init_from).suffix != ".pt"

    @property
    def hyper(self) -> dict[str, float]:
        """The method's hyper-parameters: its row's values, or those of `set`."""
        return METHODS[self.method].hyper | parse_hyper(self.set)

    @property
    def data_config(self) -> DataConfig:
        """The settings of the users' text."""
        return DataConfig(
            data=self.data,
            users=self.users,
            train_kb=self.train_kb,
            valid_kb=self.valid_kb,
            target=self.target,
            short_users=self.short_users,
            user_field=self.user_field,
            text_field=self.text_field,
            block_size=self.block_size,
        )

    @property
    def router_rate(self) -> float:
        """The routers' learning rate."""
        if self.router_lr is not None:
            return self.router_lr
        return 5 * self.lr if self.starts_from_language_model else self.lr

    @property
    def title(self) -> str:
        """One line that describes the run."""
        method = METHODS[self.method]
        text = Path(self.data).resolve().name
        base = Path(self.init_from).name
        router = f"{self.top_k} for each token" if method.routed else "no router"
        if method.by_kind:
            router = "a weight for each kind and token"
        return (
            f"{self.method}: {method.summary}. Text: {text}, target: {self.target}. "
            f"Base: {base}. Experts: {self.expert}, {router}. "
            f"{self.rounds} rounds of {self.local_steps} steps, seed {self.seed}."
        )


def one_per_user(name: str, values: list | tuple, users: int) -> tuple:
    """One value per user, from one per user or a single one for all. Raises BadInput."""
    if len(values) == 1:
        return tuple(values) * users
    if len(values) != users:
        refuse(
            name,
            values,
            f"{len(values)} numbers for {users} users",
            "expected one number, or one per user",
        )
    return tuple(values)


def parse_hyper(text: str | None) -> dict[str, float]:
    """parse_hyper("lambda=0.1,gamma=0.9") -> {"lambda": 0.1, "gamma": 0.9}. Raises BadInput."""
    hyper = {}
    for part in text.split(",") if text else []:
        try:
            name, number = part.split("=")
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            refuse(
                "set", text, "invalid", "expected names and numbers, such as lambda=0.1,gamma=0.9"
            )
        hyper[name.strip()] = value
    return hyper


def plain(settings: Training) -> dict[str, Any]:
    """Settings by name, with JSON's types only."""
    return json.loads(json.dumps(asdict(settings)))


# --- incompatible settings; each check raises BadInput ---


def check_start(settings: Settings) -> None:
    """Experts and the base."""
    scratch = settings.init_from == "scratch"
    if settings.generalists + min(settings.specialists) == 0:
        refuse(
            "generalists",
            0,
            "a user with `specialists` 0 has no expert",
            "use at least 1 of either",
        )
    if settings.expert == "lora" and scratch:
        refuse(
            "expert",
            "lora",
            "needs a base, and `init_from` scratch has none",
            "use `init_from` smollm2, or a file",
        )
    if settings.expert != "lora" and settings.dtype == "bfloat16":
        refuse(
            "dtype",
            "bfloat16",
            "is for frozen weights, and there are none",
            "use `expert` lora, or leave it out",
        )
    if settings.n_layer and not scratch:
        refuse("n_layer", settings.n_layer, "the base has its own", "leave it out")
    if settings.n_embd and not scratch:
        refuse("n_embd", settings.n_embd, "the base has its own", "leave it out")


def check_text(settings: Settings) -> None:
    """Fields of a table."""
    if Path(settings.data).suffix in TABLES:
        return
    for name in ("user_field", "text_field"):
        value = getattr(settings, name)
        if value is not None:
            refuse(name, value, f"`data` {settings.data} isn't a table", "leave it out")


def check_noise(settings: Settings) -> None:
    """Differential privacy."""
    noise = settings.dp_noise
    if not noise:
        return
    if settings.clip_update is None:
        refuse("dp_noise", noise, "needs clipped updates", "add `clip_update`")
    if settings.average != "uniform":
        refuse("dp_noise", noise, "needs equal weights", "use `average` uniform")
    if settings.target == "mixed":
        refuse(
            "dp_noise",
            noise,
            "doesn't hide text that trains other users' routers",
            "use `target` own",
        )
    if settings.users == 1:
        refuse("dp_noise", noise, "hides a user among others", "use `users` 2 or more")


def check_method(settings: Settings) -> None:
    """The needs and limits of the method's row."""
    name = settings.method
    method = METHODS[name]
    unknown = settings.hyper.keys() - method.hyper.keys()
    if unknown:
        remedy = f"it has {', '.join(method.hyper)}" if method.hyper else "leave it out"
        refuse("set", settings.set, f"`method` {name} has no {', '.join(sorted(unknown))}", remedy)
    lora = settings.expert == "lora"
    sizes_differ = len(set(settings.specialists)) > 1
    ranks_differ = len(set(settings.lora_rank)) > 1
    if method.needs == "lora" and not lora:
        refuse("method", name, "needs LoRA adapters", "use `expert` lora, and a base")
    if method.needs == "both" and min(settings.generalists, *settings.specialists) == 0:
        refuse("method", name, "needs both kinds of experts", "use at least 1 of each")
    if method.sizes == "nothing" and sizes_differ:
        refuse("method", name, "needs users of the same size", "use one number of `specialists`")
    if method.sizes != "ranks" and lora and ranks_differ:
        refuse("method", name, "averages the users' adapters", "use one `lora_rank` for all")
    if settings.clip_update is not None and not method.clippable:
        refuse("method", name, "has no updates to clip", "leave `clip_update` out")
    if settings.dp_noise and method.server is not Server:
        refuse("method", name, "has a server of its own", "leave `dp_noise` out")
    if settings.dp_noise and method.roles == OWN:
        refuse("method", name, "averages nothing", "leave `dp_noise` out")
    if settings.dp_noise and GENERALIST in method.roles.values() and sizes_differ:
        refuse(
            "method",
            name,
            "averages experts that not all users have",
            "with `dp_noise` use one number of `specialists` for all",
        )
