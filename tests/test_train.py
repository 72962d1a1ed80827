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
from model import BACKBONE, GPT, ROUTER, SPECIALIST, GPTConfig
from support.pretrained import base as pretrained
from support.report import page
from support.runs import folder, measuring, settings
from support.runs.command_line import as_flags, parsed, run_command
from support.runs.settings import Settings
from support.server import privacy
from support.text.trigram import trigram_loss

pytestmark = pytest.mark.usefixtures("text_and_base")


def test_a_run_writes_what_it_promises(capsys):
    result = run()
    assert {path.name for path in Path("run").iterdir()} == {*folder.FILES, "lock"}
    assert (result["method"], result["seed"], result["rounds"], result["refused"]) == ("comigs", 0, 3, 0)
    assert result["tokens_seen"] == 3 * (6 + 3) * 2 * 8  # users × (expert + router steps) × windows × tokens
    assert [(user["name"], user["specialists"]) for user in result["users"]] == [*zip(NAMES, (0, 1, 3), strict=True)]
    for mean in ("valid_ppl", "test_ppl", "test_bpb"):
        assert result[f"mean_{mean}"] == pytest.approx(sum(user[mean] for user in result["users"]) / 3)
    sent, = {4 * user["parameters"]["generalist"] for user in result["users"]}  # bytes
    assert (result["bytes_up"], result["bytes_down"]) == (3 * 3 * sent, 3 * (3 + 1) * sent)  # the last average, too
    for user in result["users"]:
        assert user["parameters"] == {"backbone": 0, "generalist": sent // 4, "router": 8 * (1 + user["specialists"]),
                                      "specialist": user["specialists"] * (2 * 8 * 32 + 32 + 8)}
        assert user["test_ppl"] < user["test_ppl_start"] == pytest.approx(257, rel=0.1)
        assert 0 < user["generalist_share"][0] <= 1
        assert user["test_bpb"] == pytest.approx(math.log2(user["test_ppl"]), rel=1e-3)  # a token is a byte
    lines = page.read_lines(Path("run/metrics.jsonl"))
    assert [(line["round"], line["user"]) for line in lines] == [(n, name) for n in (0, 2, 3) for name in NAMES]
    assert [(line["bytes_up"], line["bytes_down"]) for line in lines[::3]] == [
        (0, 0), (2 * sent, 2 * sent), (3 * sent, 4 * sent)]
    printed = capsys.readouterr().out
    assert all(re.search(part, printed) for part in (*NAMES, r"\d → \d", "mean", "is in run"))


def test_users_start_with_weights_and_batches_of_their_own_which_are_the_seeds_and_stay_where_there_are_more():
    def starts(flags: str, out: str) -> list[list[torch.Tensor]]:
        users = begun(f"--specialists 1 {flags}", out=out).users  # of one size, so that shapes are the same
        return [[*user.model.having(SPECIALIST, ROUTER).values(), *(level.batches.state()[0] for level in user.levels)]
                for user in users]

    one, other = starts("--seed 0", "one"), starts("--seed 1", "other")
    assert same(one, starts("--seed 0", "again"))
    assert same(one[:2], starts("--seed 0 --users 2", "two"))
    for mine, yours in ((one[0], one[1]), (one[1], one[2]), (one[2], one[0]), *zip(one, other, strict=True)):
        assert not any(torch.equal(a, b) for a, b in zip(mine, yours, strict=True) if a.any())  # biases start at 0


def test_the_training_loss_of_a_line_is_the_mean_over_the_rounds_steps():
    """Against the steps of the first round, taken here one by one."""
    run("--rounds 1 --local-steps 4 --router-every 9")
    again = begun("--rounds 1 --local-steps 4", out="again")
    again.hand_out()
    for user, line in zip(again.users, page.read_lines(Path("run/metrics.jsonl"))[3:], strict=True):
        assert line["train_loss"] == pytest.approx(sum(user.lower.step(user.model).item() for _ in range(4)) / 4)


def test_points_of_a_curve_read_a_few_windows_and_the_end_reads_everything(monkeypatch):
    read = []
    evaluate = measuring.evaluate
    monkeypatch.setattr(measuring, "evaluate", lambda model, batches, gates: read.append(
        batches := list(batches)) or evaluate(model, batches, gates))
    monkeypatch.setattr(measuring, "GLANCE", 47)
    again = begun("--rounds 2 --eval-every 1")
    again.play(tqdm(disable=True))
    sizes = [sum(targets.numel() for _, targets in batches) for batches in read]
    valid, test = ([len(getattr(text, split)) - 1 for text in again.texts] for split in ("valid", "test"))
    assert sizes == [*test, *[5 * 8] * 9, *(size for each in zip(valid, test, strict=True) for size in each)]


def test_a_bases_loss_is_computed_once_and_is_that_of_the_base_without_a_mixture(monkeypatch):
    first = run("--rounds 1", "one", lora=True)
    base = pretrained.load("base.pt", 8)
    plain = GPT(GPTConfig(**base.config, specialists=0, expert="lora", routed=False), torch.Generator(), base.tensors)
    for user, text in zip(first["users"], begun("", out="two", lora=True).texts, strict=True):
        loss, _ = measuring.evaluate(plain, data.ordered_windows(text.test, 8, batch_size=7))
        assert user["test_ppl_start"] == pytest.approx(math.exp(loss))
    monkeypatch.setattr(measuring, "evaluate", None)
    again = begun("--method local --specialists 2", out="three", lora=True)
    assert [math.exp(measuring.untrained(again.settings, again.base, *each)) for each in again.tested] == [
        user["test_ppl_start"] for user in first["users"]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_the_parameters_and_the_batches_of_the_others(method):
    row = METHODS[method]
    taught = row.routed and ROUTER not in row.roles
    for lora in (True,) if row.needs == "lora" else (False, True):
        result, C = run(f"--method {method} --specialists 1 --rounds 2", str(lora), lora), 16 if lora else 8
        plain, block = (257 + 8) * C + 4 * C * C + 10 * C, 8 * C * C + 5 * C  # embeddings, attention, norms; and an MLP
        experts = block + (6 + 2 * 10) * 8 * C if lora else 2 * block  # changes of attention, and of two experts
        for user in result["users"]:
            assert sum(user["parameters"].values()) == plain + experts + row.routed * 2 * C
            assert (user["parameters"]["router"] > 0) == taught
            assert user["test_ppl_start"] != user["test_ppl"] < math.inf
        assert result["tokens_seen"] == 3 * (4 + 2 * taught) * 2 * 8
        assert (result["bytes_up"] == 0) == (row.roles == OWN)


@pytest.mark.parametrize(("flags", "lower", "upper", "steps"), [
    ("--top-k 3", ("train",), "valid", 3 * 2), ("--experts-see both", ("train", "valid"), "valid", 3 * 2),
    ("--method comigs-train --average tokens", ("train",), "train", 3 * 2),
    ("--participation 0.34 --rounds 6", ("train",), "valid", 2 * 2)])  # a user may expect to be called twice
def test_each_level_gets_its_own_text_rate_and_schedule(flags, lower, upper, steps):
    ready = begun(f"--lr 0.5 --router-lr 0.25 --weight-decay 0.125 {flags}")
    for user, text in zip(ready.users, ready.texts, strict=True):
        assert np.array_equal(user.lower.batches.texts[0], np.concatenate([getattr(text, name) for name in lower]))
        assert np.array_equal(user.upper.batches.texts[0], getattr(text, upper))
        assert not torch.equal(next(user.lower.batches)[0], next(user.upper.batches)[0])
        for level, rate, decay, end in ((user.lower, 0.5, 0.125, 0.1), (user.upper, 0.25, 0.0, 1.0)):
            factor = level.schedule.lr_lambdas[0]
            assert (level.schedule.base_lrs, level.optimizer.param_groups[0]["weight_decay"]) == ([rate], decay)
            assert factor(steps) == pytest.approx(end)
            assert factor(steps - 1) > 1.1 * end or level is user.upper
        assert torch.equal(next(user.judge())[0], next(data.spread_windows(text.valid, train.JUDGED, 8))[0])
        assert (user.weight, user.model.config.top_k) == (
            len(text.train) if "tokens" in flags else 1, 3 if "top-k" in flags else 2)


@pytest.mark.parametrize(("flags", "lora"), [
    ("--specialists 1", False), ("--specialists 1 --method fdlora", False), ("--specialists 1 --expert mlp", True)])
def test_reported_numbers_are_those_of_the_models_in_the_checkpoint_on_all_of_the_test_text(flags, lora):
    """Recomputed: at the start from the same seed, at the end from the checkpoint, window by window."""
    result, saved, fresh = run(flags, lora=lora), state(), begun(flags, "again", lora)
    fresh.hand_out()

    def perplexity(model: GPT, gates: torch.Tensor | None, tokens: np.ndarray) -> float:
        windows = [torch.tensor(tokens[start:start + 9].tolist()) for start in range(0, len(tokens) - 1, 8)]
        nats = sum(F.cross_entropy(model(window[None, :-1], gates=gates)[0][0], window[1:], reduction="sum").item()
                   for window in windows)
        return math.exp(nats / (len(tokens) - 1))

    for user, text, own, told in zip(fresh.users, fresh.texts, saved["users"], result["users"], strict=True):
        assert told["test_ppl_start"] == pytest.approx(perplexity(user.model, user.gates, text.test), rel=1e-4)
        assert all(torch.equal(saved["server"]["generalists"][name], own["parameters"][name]) for name in user.shared)
        user.model.load_state_dict(own["parameters"])  # all of them, and no others
        assert told["test_ppl"] == pytest.approx(perplexity(user.model, own["gates"], text.test), rel=1e-4)
        assert told["trigram_ppl"] == math.exp(trigram_loss(text.train, text.test, 257))
        assert own["gates"] is None or told["generalist_share"] == pytest.approx(own["gates"][:, 0].tolist())
        assert (own["gates"] is None) == ("fdlora" not in flags)


def test_gpt2_tokens_and_a_mixed_target_run_too(monkeypatch):
    """With a table made here in the place of tiktoken's, of tokens up to two bytes long."""
    tokens = [bytes([a]) for a in range(256)] + [b"%02d" % number for number in range(100)]
    made = data.tiktoken.Encoding("gpt2", pat_str=r"\d+|\s+|[^\s\d]+", special_tokens={data.END: 356},
                                  mergeable_ranks={token: number for number, token in enumerate(tokens)})
    monkeypatch.setattr(data.tiktoken, "get_encoding", {"gpt2": made}.get)
    for user in run("--tokenizer gpt2 --target mixed --average tokens")["users"]:
        assert user["train_tokens"] < 0.8 * user["train_bytes"]
        assert math.log2(user["test_ppl"]) * 0.4 < user["test_bpb"] < math.log2(user["test_ppl"]) * 0.7


def test_who_is_called_and_who_vanishes_is_drawn_anew_each_round_and_the_same_again():
    settings = parsed("--users 3 --participation 0.67 --drop-rate 0.5".split())
    rounds = [train.drawn(settings, number) for number in range(1, 200)]
    assert {tuple(called) for called, _ in rounds} == {(0, 1), (1, 2), (0, 2)}
    numbers = [len(lost) for _, lost in rounds]
    assert ({*numbers}, sum(numbers) / 398) == ({0, 1, 2}, pytest.approx(0.5, abs=0.1))
    assert rounds == [train.drawn(settings, number) for number in range(1, 200)]


def test_what_is_frozen_is_the_same_object_in_all_users_and_keeps_its_bits_through_a_run():
    """FFA-LoRA's A, too, which is frozen at its random start: else averaging B alone would make no sense."""
    ready = begun("--method ffa-lora --specialists 1", lora=True)
    one, *others = (user.model.having(BACKBONE) for user in ready.users)
    before = {name: parameter.clone() for name, parameter in one.items()}
    assert sum(name.endswith(".A") for name in one) == 2 + 2 * 2  # attention's and two experts' changes
    ready.play(tqdm(disable=True))
    assert all(other.keys() == one.keys() and all(other[name] is one[name] for name in one) for other in others)
    assert all(torch.equal(one[name], before[name]) and one[name].grad is None for name in one)


def test_a_folder_that_holds_a_run_is_kept_unless_told_and_without_out_every_run_gets_a_new_one(capsys):
    run()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert "--overwrite" in refusal(capsys, command())
    for wrong in ("--lr nan", "--train-kb 99"):
        assert wrong in refusal(capsys, command(f"--overwrite {wrong}"))
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert run("--overwrite --seed 1")["seed"] == 1
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 9
    for out in ("out/comigs-text-3users-seed0", "out/comigs-text-3users-seed0-2"):
        assert train.main([*TINY, "--data", "text"]) == 0
        assert Path(out, "result.json").exists()


@pytest.mark.parametrize("flags", ["--lr 1e30", "--method flexlora", "--method pcl", "--method fdlora",
                                   "--clip-update 1e9 --dp-noise 1e12"])
def test_a_run_that_diverges_ends_in_one_line(flags, capsys):
    lora = "--specialists 1 --lr 1e30" if "--method" in flags else ""
    assert train.main(command(f"{lora} {flags}", lora=bool(lora))) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match("train.py: --(lr|dp-noise) .* has grown to .*; take a smaller one$", last)


WRONG = """
    --users 0; --users two; --users; --users 100000000000; --users 9 --specialists 1; --user 2; more; --generalists 0
    --specialists 1,2; --specialists 1,,2; --specialists 1001; --n-head 3; --n-layer 1000000000; --method nonsense
    --data nowhere; --source x; --user-field who; --train-kb nan; --train-kb 1.5,2.5; --train-kb 1000; --lr inf
    --block-size 4000; --lr 0.0; --valid-kb 99; --lr fast; --weight-decay -0.1; --rounds 1e3; --participation 1.1
    --drop-rate 1.0; --device nonsense; --device cuda:99; --out x/y; --resume; --dp-noise 1.0
    --expert lora; --dp-noise 1.0 --clip-update 1 --average tokens; --method pcl --specialists 1 --clip-update 1
    --method hetlora; --method pcl; --method fdlora; --init-from nowhere; --n-embd 16 --init-from base.pt
    --init-from base.pt --n-head 4; --init-from base.pt --block-size 17; --init-from base.pt --tokenizer gpt2
    --method comigs --init-from base.pt --expert lora --lora-rank 1,2,4
"""


@pytest.mark.parametrize("wrong", [case.strip() for case in WRONG.strip().replace("\n", ";").split(";")])
def test_bad_input_is_one_line_with_flag_value_and_remedy_and_status_2(wrong, capsys):
    Path("x").write_text("a file")
    before, start = sorted(Path().rglob("*")), SCHEDULE if "--init-from" in wrong else " ".join(TINY)
    line = refusal(capsys, f"{start} --data text --out run {wrong}".split())
    assert " ".join(wrong.split()[:2]) in line
    assert re.match("train.py: .*; [a-z-]", line)
    assert sorted(Path().rglob("*")) == before


def test_settings_say_nothing_about_this_machine_and_stand_in_messages_as_flags(monkeypatch):
    """A run can be read where its device isn't."""
    monkeypatch.setenv("WORLD_SIZE", "99")
    assert Settings(device="cuda:99", init_from="elsewhere.pt").device == "cuda:99"
    assert as_flags("`train_kb` 0: not with `user_field`; it's_so") == "--train-kb 0: not with --user-field; it's_so"


@pytest.mark.parametrize("work", [lambda: torch.empty(10 ** 15), lambda: torch.empty(2 ** 62, 8),
                                  lambda: bytes(2 ** 62), lambda: Path("no/file").read_text()])
def test_a_lack_of_memory_or_of_a_file_is_one_line(work, capsys):
    line = refusal(capsys, [], lambda _: run_command("train.py", work, ""))
    assert re.match("train.py: (there isn't enough memory .*; take a smaller|no/file: .*; check the disk)", line)


@pytest.mark.parametrize("work", [lambda: torch.zeros(1).expand(2).add_(1), lambda: {}["x"]])
def test_mistakes_in_the_program_are_tracebacks(work):
    with pytest.raises((RuntimeError, KeyError), match="refers to a single memory location|x"):
        run_command("train.py", work, "")


def test_help_explains_every_flag_once_under_one_of_the_headings(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert re.findall(r"^([a-z ]+):$", printed, re.M) == ["options", *settings.GROUPS]
    for name, flag in settings.flags(Settings).items():
        assert flag.help
        assert len(re.findall(rf"^  --{name.replace('_', '-')}\b", printed, re.M)) == 1
    assert "(default: comigs)" in printed


@pytest.mark.parametrize(("flags", "why"), [("", None), ("--drop-rate 0.5", "an answer is missing from an average")])
def test_a_run_with_noise_says_what_it_guarantees_and_nothing_if_an_answer_is_missing(flags, why, capsys):
    pytest.importorskip("dp_accounting", reason="dp-accounting isn't installed")
    told = run(f"--clip-update 1 --dp-noise 2 {flags}")["privacy"]
    assert told["delta"] == pytest.approx(3 ** -1.1)
    assert told["why"] == why
    assert told["epsilon"] == (None if why else privacy.epsilon(2, 3, 3, 3, told["delta"]))
    assert (f"privacy: no ε ({why})" if why else "worth little") in capsys.readouterr().out
