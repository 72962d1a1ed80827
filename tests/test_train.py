"""The command line: the real command at a tiny size, what it writes, and what it refuses."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
import train
from conftest import NAMES, SCHEDULE, TINY, begun, command, refusal, run, same, state
from methods import METHODS, OWN
from model import BACKBONE, GENERALIST, GPT, ROUTER, SPECIALIST, GPTConfig
from support.files import read_lines
from support.pretrained.base import load
from support.runs import command_line, evaluation, folder
from support.runs.command_line import as_flags, parsed, run_command
from support.runs.flags import flags
from support.runs.settings import Settings
from support.server import privacy
from support.text.trigram import trigram_loss

pytestmark = pytest.mark.usefixtures("text_and_base", "no_report")

# --- what a run writes


def test_a_run_writes_its_result(capsys):
    result = run()
    files = {path.name for path in Path("run").iterdir()}
    assert files | {"page.html"} == {*folder.FILES, "lock"}
    assert result["method"] == "comigs"
    assert result["rounds"] == 3
    assert result["refused"] == 0
    assert result["tokens_seen"] == 3 * (6 + 3) * 2 * 8  # users × steps × windows × tokens
    assert [user["name"] for user in result["users"]] == list(NAMES)
    assert [user["specialists"] for user in result["users"]] == [0, 1, 3]
    for name in evaluation.MEANS:
        mean = sum(user[name] for user in result["users"]) / 3
        assert result[f"mean_{name}"] == pytest.approx(mean)
    for user in result["users"]:
        assert user["test_ppl"] < user["test_ppl_start"] == pytest.approx(257, rel=0.1)
        assert user["test_ppl_local"] != user["test_ppl"]
        assert 0 < user["generalist_share"][0] <= 1
        bits = math.log2(user["test_ppl"])
        assert user["test_bpb"] == pytest.approx(bits, rel=1e-3)  # a token is a byte
    printed = capsys.readouterr().out
    for pattern in (
        *NAMES,
        "untrained +local +averaged",
        "mean",
        "all files are in run",
        r"report: run/page\.html",
    ):
        assert re.search(pattern, printed)


def test_parameters_and_bytes_of_a_run_are_counted_by_role():
    result = run()
    (sent,) = {4 * user["parameters"]["generalist"] for user in result["users"]}  # bytes
    assert result["bytes_up"] == 3 * 3 * sent  # users × rounds
    assert result["bytes_down"] == 3 * (3 + 1) * sent  # the last average, too
    for user in result["users"]:
        S = user["specialists"]
        assert user["parameters"] == {
            "backbone": 0,
            "generalist": sent // 4,
            "specialist": S * (2 * 8 * 32 + 32 + 8),
            "router": 8 * (1 + S),
        }


def test_metrics_have_a_line_for_each_user_and_evaluation():
    result = run()
    sent = 4 * result["users"][0]["parameters"]["generalist"]
    lines = read_lines(Path("run/metrics.jsonl"))
    assert [(line["round"], line["user"]) for line in lines] == [
        (number, name) for number in (0, 2, 3) for name in NAMES
    ]
    assert [line["bytes_up"] for line in lines[::3]] == [0, 2 * sent, 3 * sent]
    assert [line["bytes_down"] for line in lines[::3]] == [0, 2 * sent, 4 * sent]


@pytest.mark.parametrize(
    ("method", "experts"),
    [("comigs", "1G 1S"), ("comigs-2g", "2G 0S"), ("fedavg", "2G 0S"), ("local", "0G 2S")],
)
def test_experts_are_counted_by_their_role(method, experts, capsys):
    user = run(f"--method {method} --specialists 1 --rounds 1")["users"][0]
    assert f"{user['generalists']}G {user['specialists']}S" == experts
    assert re.search(f"anna +{experts}", capsys.readouterr().out)


def test_the_training_loss_of_a_line_is_the_mean_over_the_rounds_steps():
    """The oracle takes the steps of the first round one by one."""
    run("--rounds 1 --local-steps 4 --router-every 9")
    again = begun("--rounds 1 --local-steps 4", out="again")
    again.evaluate_untrained(tqdm(disable=True))
    lines = read_lines(Path("run/metrics.jsonl"))[3:]
    for user, line in zip(again.users, lines, strict=True):
        losses = [user.lower.step(user.model).item() for _ in range(4)]
        assert line["train_loss"] == pytest.approx(sum(losses) / 4)


def test_a_curve_reads_a_few_windows_and_the_end_reads_everything(monkeypatch):
    """Test text only at the start and at the end."""
    sizes = []
    evaluate = evaluation.evaluate

    def watched(model, batches, gates):
        batches = list(batches)
        sizes.append(sum(targets.numel() for _, targets in batches))
        return evaluate(model, batches, gates)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    monkeypatch.setattr(evaluation, "CURVE_TOKENS", 47)
    again = begun("--rounds 2 --eval-every 1")
    again.play(tqdm(disable=True))
    valid = [len(text.valid) - 1 for text in again.texts]
    test = [len(text.test) - 1 for text in again.texts]
    end = [size for pair in zip(valid, test, strict=True) for size in pair]
    assert sizes == [*test, *[5 * 8] * 6, *end, *[5 * 8] * 3, *end]


def perplexity(model: GPT, tokens: np.ndarray) -> float:
    loss, _ = evaluation.evaluate(model, data.ordered_windows(tokens, 8))
    return math.exp(loss)


def test_two_users_are_tested_before_and_after_the_last_average_by_hand():
    """Both train for a round on copies of the models, then their generalists are averaged."""
    flags = "--users 2 --specialists 1 --rounds 1 --router-every 9"
    result = run(flags)
    again = begun(flags, out="again")
    again.evaluate_untrained(tqdm(disable=True))
    for user in again.users:
        for _ in range(2):
            user.lower.step(user.model)
    for user, text, row in zip(again.users, again.texts, result["users"], strict=True):
        assert row["test_ppl_local"] == pytest.approx(perplexity(user.model, text.test))
        assert row["valid_ppl_local"] == pytest.approx(perplexity(user.model, text.valid))
        bits = math.log2(row["test_ppl_local"]) * (len(text.test) - 1) / text.test_bytes
        assert row["test_bpb_local"] == pytest.approx(bits)
    one, two = (user.model.having(GENERALIST) for user in again.users)
    with torch.no_grad():
        for name, parameter in one.items():
            mean = (parameter + two[name]) / 2
            parameter.copy_(mean)
            two[name].copy_(mean)
    for user, text, row in zip(again.users, again.texts, result["users"], strict=True):
        assert row["test_ppl"] == pytest.approx(perplexity(user.model, text.test))
        assert row["valid_ppl"] == pytest.approx(perplexity(user.model, text.valid))


def test_an_evaluation_in_between_leaves_a_user_that_isnt_selected_as_it_is():
    """Its local perplexity at the end doesn't depend on how often all users were evaluated."""
    flags = "--participation 0.34 --rounds 3 --eval-every"  # one user in each round
    results = [run(f"{flags} {every}", out=str(every))["users"] for every in (1, 3)]
    assert results[0] == results[1]


def test_fdlora_fuses_anew_at_each_of_the_two_moments(monkeypatch):
    """With the gates of the least loss for the model that is tested."""
    fused = {}
    evaluate = evaluation.evaluate

    def watched(model, batches, gates):
        experts = model.having(GENERALIST, SPECIALIST).values()
        key = sum(p.double().sum().item() for p in experts)
        fused.setdefault(key, set()).add(tuple(gates.flatten().tolist()))
        return evaluate(model, batches, gates)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    again = begun("--method fdlora --specialists 1 --rounds 2 --users 2")
    again.play(tqdm(disable=True))
    assert len(fused) == 2 * 3  # of each user: untrained, local, averaged
    assert all(len(gates) == 1 for gates in fused.values())


def test_a_checkpoint_in_between_has_the_gates_of_its_own_models():
    flags = "--method fdlora --specialists 1 --rounds 3 --save-every 2 --eval-every 9"
    again = begun(flags)
    with pytest.raises(KeyboardInterrupt):
        again.play(tqdm(disable=True), lambda: True)
    for user, saved in zip(again.users, state()["users"], strict=True):
        user.before_evaluation()
        assert torch.equal(saved["fixed_gates"], user.fixed_gates)
        for name, parameter in user.model.having(GENERALIST).items():
            assert torch.equal(saved["parameters"][name], parameter)


@pytest.mark.parametrize(
    ("more", "lora"),
    [
        ("--specialists 1", False),
        ("--specialists 1 --method fdlora", False),
        ("--specialists 1 --expert mlp", True),
    ],
)
def test_results_are_those_of_the_models_in_the_checkpoint_on_all_test_text(more, lora):
    """Recomputed window by window: at the start from the same seed, at the end from the file."""
    result = run(more, lora=lora)
    saved = state()
    fresh = begun(more, "again", lora)
    fresh.evaluate_untrained(tqdm(disable=True))

    def perplexity(model: GPT, gates: torch.Tensor | None, tokens: np.ndarray) -> float:
        nats = 0.0
        for start in range(0, len(tokens) - 1, 8):
            window = torch.tensor(tokens[start : start + 9].tolist())
            logits = model(window[None, :-1], fixed_gates=gates)[0][0]
            nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
        return math.exp(nats / (len(tokens) - 1))

    rows = zip(fresh.users, fresh.texts, saved["users"], result["users"], strict=True)
    for user, text, kept, row in rows:
        start = perplexity(user.model, user.fixed_gates, text.test)
        assert row["test_ppl_start"] == pytest.approx(start, rel=1e-4)
        for name in user.shared:
            assert torch.equal(saved["server"]["generalists"][name], kept["parameters"][name])
        user.model.load_state_dict(kept["parameters"])  # all of them, and no others
        end = perplexity(user.model, kept["fixed_gates"], text.test)
        assert row["test_ppl"] == pytest.approx(end, rel=1e-4)
        assert row["trigram_ppl"] == math.exp(trigram_loss(text.train, text.test, 257))
        assert (kept["fixed_gates"] is None) == ("fdlora" not in more)
        if kept["fixed_gates"] is not None:
            share = kept["fixed_gates"][:, 0].tolist()
            assert row["generalist_share"] == pytest.approx(share)


def test_before_training_a_lora_run_has_the_perplexity_of_its_base():
    result = run("--rounds 1", lora=True)
    base = load("base.pt", 8)
    config = GPTConfig(**base.config, specialists=0, expert="lora", routed=False)
    plain = GPT(config, torch.Generator(), base.tensors)
    for user, text in zip(result["users"], begun(out="two", lora=True).texts, strict=True):
        loss, _ = evaluation.evaluate(plain, data.ordered_windows(text.test, 8))
        assert user["test_ppl_start"] == pytest.approx(math.exp(loss))


def test_gpt2_tokens_and_a_mixed_target_run_too(monkeypatch):
    """With a vocabulary made here in place of tiktoken's, of tokens up to two bytes long."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"%02d" % number for number in range(100)]
    ranks = {token: number for number, token in enumerate(tokens)}
    made = data.tiktoken.Encoding(
        "gpt2", pat_str=r"\d+|\s+|[^\s\d]+", mergeable_ranks=ranks, special_tokens={data.END: 356}
    )
    monkeypatch.setattr(data.tiktoken, "get_encoding", {"gpt2": made}.get)
    result = run("--tokenizer gpt2 --target mixed --average tokens")
    for user in result["users"]:
        bits = math.log2(user["test_ppl"])
        assert user["train_tokens"] < 0.8 * user["train_bytes"]
        assert 0.4 * bits < user["test_bpb"] < 0.7 * bits


# --- methods, users and levels


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_as_many_parameters_and_batches_as_the_others(method):
    row = METHODS[method]
    lora = row.needs == "lora" or row.needs == "both" or method == "pcl"
    result = run(f"--method {method} --specialists 1 --rounds 2", lora=lora)
    C = 16 if lora else 8
    trunk = (257 + 8) * C + 4 * C * C + 10 * C  # embeddings, attention, norms
    block = 8 * C * C + 5 * C  # a feed-forward block
    experts = 2 * block
    if lora:
        experts = block + (6 + 2 * 10) * 8 * C  # adapters of attention and of two experts
    trains_router = row.routed and ROUTER not in row.roles
    for user in result["users"]:
        assert sum(user["parameters"].values()) == trunk + experts + row.routed * 2 * C
        assert (user["parameters"]["router"] > 0) == trains_router
        assert user["test_ppl_start"] != user["test_ppl"] < math.inf
    assert result["tokens_seen"] == 3 * (4 + 2 * trains_router) * 2 * 8
    assert (result["bytes_up"] == 0) == (row.roles == OWN)


def starts(more: str, out: str) -> list[list[torch.Tensor]]:
    """Each user's private weights and generator states before the first round."""
    users = begun(f"--specialists 1 {more}", out=out).users
    found = []
    for user in users:
        weights = list(user.model.having(SPECIALIST, ROUTER).values())
        found.append([*weights, *(level.batches.state()[0] for level in user.levels)])
    return found


def test_weights_and_batches_are_the_users_own_and_follow_from_the_seed():
    """They don't depend on the number of users."""
    one = starts("--seed 0", "one")
    other = starts("--seed 1", "other")
    assert same(one, starts("--seed 0", "again"))
    assert same(one[:2], starts("--seed 0 --users 2", "two"))
    pairs = [(one[0], one[1]), (one[1], one[2]), *zip(one, other, strict=True)]
    for mine, others in pairs:
        for a, b in zip(mine, others, strict=True):
            assert not a.any() or not torch.equal(a, b)  # biases start at 0


@pytest.mark.parametrize(
    ("more", "expert_text", "router_text", "steps"),
    [
        ("--top-k 3", ("train",), "valid", 6),
        ("--experts-see both", ("train", "valid"), "valid", 6),
        ("--method comigs-train --average tokens", ("train",), "train", 6),
        ("--participation 0.34 --rounds 6", ("train",), "valid", 4),
    ],
)  # selected twice, probably
def test_each_level_gets_its_text_rate_and_schedule(more, expert_text, router_text, steps):
    rates = "--lr 0.5 --router-lr 0.25 --weight-decay 0.125 --router-decay 0.0625"
    ready = begun(f"{rates} {more}")
    for user, text in zip(ready.users, ready.texts, strict=True):
        expected = np.concatenate([getattr(text, split) for split in expert_text])
        assert np.array_equal(user.lower.batches.texts[0], expected)
        assert np.array_equal(user.upper.batches.texts[0], getattr(text, router_text))
        assert not torch.equal(next(user.lower.batches)[0], next(user.upper.batches)[0])
        assert user.lower.schedule.base_lrs == [0.5, 0.5]  # with and without weight decay
        assert user.upper.schedule.base_lrs == [0.25, 0.25]
        assert user.lower.optimizer.param_groups[0]["weight_decay"] == 0.125
        assert user.upper.optimizer.param_groups[0]["weight_decay"] == 0.0625
        factor = user.lower.schedule.lr_lambdas[0]
        assert factor(steps) == pytest.approx(0.1)
        assert factor(steps - 1) > 0.11
        assert user.upper.schedule.lr_lambdas[0](steps) == 1.0
        assert user.weight == (len(text.train) if "tokens" in more else 1)
        assert user.model.config.top_k == (3 if "top-k" in more else 2)


def test_a_judging_user_gets_windows_of_its_validation_text():
    ready = begun("--method fdlora --specialists 1")
    for user, text in zip(ready.users, ready.texts, strict=True):
        idx, _ = next(user.validation_windows())
        expected, _ = next(data.spread_windows(text.valid, type(user).n_windows, 8))
        assert torch.equal(idx, expected)


def test_frozen_weights_are_the_same_objects_in_all_users_and_keep_their_bits():
    """FFA-LoRA's A, too, which is frozen at its random start."""
    ready = begun("--method ffa-lora --specialists 1", lora=True)
    one, *others = (user.model.having(BACKBONE) for user in ready.users)
    before = {name: parameter.clone() for name, parameter in one.items()}
    assert sum(name.endswith("lora_A") for name in one) == 2 + 2 * 2  # attention, two experts
    ready.play(tqdm(disable=True))
    for name, parameter in one.items():
        assert all(other[name] is parameter for other in others)
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_clients_are_sampled_anew_in_each_round_and_the_same_again():
    settings = parsed("--users 3 --participation 0.67 --drop-rate 0.5".split())
    rounds = [train.sample_clients(settings, number) for number in range(1, 200)]
    assert {tuple(selected) for selected, _ in rounds} == {(0, 1), (1, 2), (0, 2)}
    dropped = [len(dropped) for _, dropped in rounds]
    assert set(dropped) == {0, 1, 2}
    assert sum(dropped) / 398 == pytest.approx(0.5, abs=0.1)
    assert rounds == [train.sample_clients(settings, number) for number in range(1, 200)]


# --- folders and bad input


def test_a_folder_that_holds_a_run_is_kept_unless_overwritten(capsys):
    run()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert "--overwrite" in refusal(capsys, command())
    for wrong in ("--lr nan", "--train-kb 99"):
        assert wrong in refusal(capsys, command(f"--overwrite {wrong}"))
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert run("--overwrite --seed 1")["seed"] == 1
    assert len(read_lines(Path("run/metrics.jsonl"))) == 9


def test_without_out_every_run_gets_a_new_folder():
    for out in ("out/comigs-text-3users-seed0", "out/comigs-text-3users-seed0-2"):
        assert train.main([*TINY, "--data", "text"]) == 0
        assert Path(out, "result.json").exists()


@pytest.mark.parametrize(
    "more",
    [
        "--lr 1e30",
        "--method flexlora",
        "--method pcl",
        "--method fdlora",
        "--clip-update 1e9 --dp-noise 1e12",
    ],
)
def test_a_run_that_diverges_ends_in_one_line(more, capsys):
    lora = "--method" in more
    if lora:
        more += " --specialists 1 --lr 1e30"
    assert train.main(command(more, lora=lora)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match("train.py: --(lr|dp-noise) .* has grown to .*; use a smaller one$", last)


WRONG = """
--users 0
--users two
--users
--users 9 --specialists 1
--user 2
more
--generalists 0
--specialists 1,2
--specialists 1,,2
--specialists 1001
--n-head 3
--method nonsense
--data nowhere
--user-field who
--train-kb nan
--train-kb 1.5,2.5
--train-kb 1000
--lr inf
--lr 0.0
--block-size 4000
--valid-kb 99
--weight-decay -0.1
--rounds 1e3
--participation 1.1
--drop-rate 1.0
--device nonsense
--out x/y
--resume
--dp-noise 1.0
--dp-noise 1.0 --clip-update 1 --average tokens
--expert lora
--method pcl --specialists 1 --clip-update 1
--method hetlora
--method fdlora
--router-decay -1
--init-from nowhere
--n-embd 16 --init-from base.pt
--init-from base.pt --n-head 4
--init-from base.pt --block-size 17
--init-from base.pt --tokenizer gpt2
--method comigs --init-from base.pt --expert lora --lora-rank 1,2,4
"""


@pytest.mark.parametrize("wrong", WRONG.strip().splitlines())
def test_bad_input_is_one_line_with_flag_value_and_remedy_and_status_2(wrong, capsys):
    Path("x").write_text("a file")
    before = sorted(Path().rglob("*"))
    start = SCHEDULE if "--init-from" in wrong else " ".join(TINY)
    line = refusal(capsys, f"{start} --data text --out run {wrong}".split())
    assert " ".join(wrong.split()[:2]) in line
    assert re.match("train.py: .*; [a-z-]", line)
    assert sorted(Path().rglob("*")) == before


def test_a_value_that_isnt_allowed_is_reported_with_the_values_that_are(capsys):
    expected = "train.py: --lr nan: invalid; expected a number above 0"
    assert refusal(capsys, command("--lr nan")) == expected


def test_settings_dont_depend_on_this_machine(monkeypatch):
    """A run can be read where its device isn't."""
    monkeypatch.setenv("WORLD_SIZE", "99")
    assert Settings(device="cuda:99", init_from="elsewhere.pt").device == "cuda:99"


def test_settings_in_messages_become_flags():
    message = "`train_kb` 0: not with `user_field`; it's_so"
    assert as_flags(message) == "--train-kb 0: not with --user-field; it's_so"


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(10**15),
        lambda: torch.empty(2**62, 8),
        lambda: bytes(2**62),
        lambda: Path("no/file").read_text(),
    ],
)
def test_a_lack_of_memory_or_of_a_file_is_one_line(work, capsys):
    line = refusal(capsys, [], lambda _: run_command("train.py", work, ""))
    assert re.match("train.py: (out of memory; use a smaller|no/file: .*; check the disk)", line)


@pytest.mark.parametrize("work", [lambda: torch.zeros(1).expand(2).add_(1), lambda: {}["x"]])
def test_mistakes_in_the_program_are_tracebacks(work):
    with pytest.raises((RuntimeError, KeyError), match="refers to a single memory location|x"):
        run_command("train.py", work, "")


def test_help_explains_every_flag_once_under_one_of_the_headings(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    headings = re.findall(r"^([a-z ]+):$", printed, re.MULTILINE)
    assert headings == ["options", *command_line.GROUPS]
    for name, flag in flags(Settings).items():
        assert flag.help
        option = name.replace("_", "-")
        assert len(re.findall(rf"^  --{option}\b", printed, re.MULTILINE)) == 1
    assert "(default: comigs)" in printed


@pytest.mark.parametrize(
    ("more", "why"), [("", None), ("--drop-rate 0.5", "an upload is missing from an average")]
)
def test_a_run_with_noise_reports_its_guarantee(more, why, capsys):
    pytest.importorskip("dp_accounting", reason="dp-accounting isn't installed")
    guarantee = run(f"--clip-update 1 --dp-noise 2 {more}")["privacy"]
    assert guarantee["delta"] == pytest.approx(3**-1.1)
    assert guarantee["why"] == why
    expected = None if why else privacy.epsilon(2, 3, 3, 3, guarantee["delta"])
    assert guarantee["epsilon"] == expected
    assert (f"privacy: no ε ({why})" if why else "ε = ") in capsys.readouterr().out


def test_roles_of_experts_decide_what_is_shared():
    """Of fedavg all experts, of local none."""
    fedavg = begun("--method fedavg --specialists 1").users[0].model
    local = begun("--method local --specialists 1", out="two").users[0].model
    assert set(fedavg.having(GENERALIST)) == set(fedavg.roles)
    assert set(local.having(SPECIALIST)) == set(local.roles)
