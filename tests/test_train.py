"""The command line: the real command at a tiny size, what it writes, and what it refuses."""

import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
from tqdm import tqdm

import base
import data
import pretrain
import runs
import train
from data import RandomWindows
from files import write
from methods import METHODS
from model import BACKBONE, ROUTER, SPECIALIST
from settings import Settings, parse_settings
from texts import words

SHAPE = "--n-layer 1 --n-head 2 --n-embd 8".split()
SCHEDULE = ("--users 3 --specialists 0,1,3 --block-size 8 --batch-size 2 --rounds 3 --local-steps 2 --router-every 2 "
            "--router-steps 1 --warmup 1 --eval-every 2").split()
TINY = [*SHAPE, *SCHEDULE]


def run(corpus, out, *more) -> dict:
    assert train.main([*TINY, "--data", corpus, "--out", str(out), *more]) == 0
    return json.loads((out / "result.json").read_text())


def state(path) -> dict:
    return torch.load(path / "checkpoint.pt", weights_only=True)


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def test_a_run_writes_what_it_promises(corpus, tmp_path, capsys):
    result = run(corpus, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*runs.RUN_FILES, "lock"} - {
        "curves.png", "curves.svg"}
    assert (result["method"], result["seed"], result["rounds"]) == ("comigs", 0, 3)
    assert result["tokens_seen"] == 3 * (6 + 3) * 2 * 8  # users × (expert + router steps) × windows × tokens
    assert result["mean_test_ppl"] == pytest.approx(sum(user["test_ppl"] for user in result["users"]) / 3)
    assert [(user["name"], user["specialists"]) for user in result["users"]] == [("anna", 0), ("bert", 1), ("cleo", 3)]
    generalist = [user["parameters"]["generalist"] for user in result["users"]]
    assert len(set(generalist)) == 1
    assert result["bytes_up"] == 3 * 3 * 4 * generalist[0]
    assert result["bytes_down"] == 4 * 3 * 4 * generalist[0]  # the last average, too
    for user in result["users"]:
        expert = 2 * 8 * 32 + 32 + 8
        assert user["parameters"]["specialist"] == user["specialists"] * expert
        assert user["parameters"]["router"] == 8 * (1 + user["specialists"])
        assert user["parameters"]["backbone"] == 0
        assert user["test_ppl"] < user["test_ppl_start"] == pytest.approx(257, rel=0.1)
        assert user["trigram_ppl"] > 1
        assert 0 < user["generalist_share"][0] <= 1
        bytes_per_token = 1  # but for the END that comes first, which is no target
        assert user["test_bpb"] == pytest.approx(math.log2(user["test_ppl"]) / bytes_per_token, rel=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["user"]) for line in lines] == [
        (round, name) for round in (0, 2, 3) for name in ("anna", "bert", "cleo")]
    assert lines[-1]["bytes_up"] == 3 * 4 * generalist[0]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("anna", "bert", "cleo", "mean", str(tmp_path / "run")))
    assert re.search(r"\d → \d", printed)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(corpus, tmp_path):
    results = [run(corpus, tmp_path / name, "--seed", seed) for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))]
    one, two, other = (state(tmp_path / name) for name in "abc")
    one["settings"]["out"], one["seconds"] = two["settings"]["out"], two["seconds"]
    assert same(one, two)
    assert not same(one["server"]["generalists"], other["server"]["generalists"])
    assert results[0]["users"] == results[1]["users"]


def test_one_more_user_doesnt_change_another_ones_batches(corpus, tmp_path, monkeypatch):
    batches = {"few": [], "many": []}
    draw = RandomWindows.draw
    for name, users in (("few", "2"), ("many", "3")):
        def watched(stream, tokens, generator, seen=batches[name]):
            windows = draw(stream, tokens, generator)
            seen.append(windows)
            return windows
        monkeypatch.setattr(RandomWindows, "draw", watched)
        run(corpus, tmp_path / name, "--users", users, "--specialists", "1", "--rounds", "1")
    assert len(batches["few"]) == 2 * 3
    assert all(map(torch.equal, batches["few"], batches["many"]))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs != "lora"])
def test_every_method_runs_with_the_parameters_and_the_batches_of_the_others(method, corpus, tmp_path):
    result = run(corpus, tmp_path / "run", "--method", method, "--specialists", "1")
    routed, taught = METHODS[method].routed, METHODS[method].routed and ROUTER not in METHODS[method].roles
    for user in result["users"]:
        roles = user["parameters"]
        embeddings, attention, norms, expert = (257 + 8) * 8, 4 * 8 * 8 + 4 * 8, 3 * 2 * 8, 2 * 8 * 32 + 32 + 8
        assert sum(roles.values()) == embeddings + attention + norms + 2 * expert + routed * 2 * 8
        assert (roles["router"] > 0) == taught
    expert_tokens = 3 * 6 * 2 * 8
    assert result["tokens_seen"] == expert_tokens + (3 * 3 * 2 * 8 if taught else 0)
    assert (result["bytes_up"] == 0) == (method in ("local", "centralized", "comigs-2s"))


def small_settings(corpus, *more) -> tuple[Settings, base.Base, list[data.Text]]:
    """What train.build asks for."""
    settings = parse_settings([*TINY, "--data", corpus, *more])
    return settings, train.starting_point(settings), data.load(corpus, settings.users, block_size=settings.block_size)


def test_each_level_gets_its_own_text_rate_and_schedule(corpus):
    settings, start, texts = small_settings(corpus, "--lr", "0.5", "--router-lr", "0.25", "--weight-decay", "0.125",
                                            "--top-k", "3")
    _, users = train.build(settings, start, texts)
    for user, text in zip(users, texts, strict=True):
        assert np.array_equal(user.lower.batches.texts[0], text.train)
        assert np.array_equal(user.upper.batches.texts[0], text.valid)
        for level, rate, decay, at_the_end in ((user.lower, 0.5, 0.125, 0.1), (user.upper, 0.25, 0.0, 1.0)):
            assert level.schedule.base_lrs == [rate]
            assert level.optimizer.param_groups[0]["weight_decay"] == decay
            assert level.schedule.lr_lambdas[0](settings.rounds * settings.local_steps) == pytest.approx(at_the_end)
        assert user.model.config.top_k == 3
        assert user.weight == 1
    assert not torch.equal(*(user.model.having(SPECIALIST)["blocks.0.moe.experts.1.up.weight"] for user in users[1:]))


def test_users_can_count_by_their_training_tokens(corpus):
    settings, start, texts = small_settings(corpus, "--average", "tokens")
    _, users = train.build(settings, start, texts)
    assert [user.weight for user in users] == [len(text.train) for text in texts]
    assert users[0].weight != users[2].weight


def test_experts_can_learn_from_validation_text_too_and_routers_from_training_text(corpus):
    for more, lower, upper in ((["--experts-see", "both"], ("train", "valid"), ("valid",)),
                               (["--method", "comigs-train"], ("train",), ("train",))):
        settings, start, texts = small_settings(corpus, *more)
        _, users = train.build(settings, start, texts)
        for user, text in zip(users, texts, strict=True):
            for level, splits in ((user.lower, lower), (user.upper, upper)):
                expected = np.concatenate([getattr(text, split) for split in splits])
                assert np.array_equal(level.batches.texts[0], expected)
            assert not torch.equal(next(user.lower.batches)[0], next(user.upper.batches)[0])


def test_a_device_judges_by_its_own_validation_text(corpus):
    settings, start, texts = small_settings(corpus, "--specialists", "1", "--method", "pcl")
    _, users = train.build(settings, start, texts)
    for user, text in zip(users, texts, strict=True):
        idx, targets = next(user.judge())
        expected, _ = next(data.spread_windows(text.valid, 32, settings.block_size))
        assert torch.equal(idx, expected)
        assert np.array_equal(idx[0], text.valid[:8])
        assert np.array_equal(targets[-1], text.valid[-8:])


def test_fdloras_gates_are_fused_before_a_model_is_measured(corpus, tmp_path, monkeypatch):
    fused = []
    monkeypatch.setattr(METHODS["fdlora"].user, "settle", lambda user: fused.append(user.name))
    run(corpus, tmp_path / "run", "--specialists", "1", "--method", "fdlora", "--eval-every", "3")
    assert fused == 4 * ["anna", "bert", "cleo"]  # test and validation text, at the start and at the end


def test_reported_perplexities_are_those_of_the_test_text(corpus, tmp_path):
    """Recomputed: at the start from the same seed, at the end from the checkpoint, window by window, one at a time."""
    result = run(corpus, tmp_path / "run")
    settings, start, texts = small_settings(corpus)
    server, users = train.build(settings, start, texts)
    saved = state(tmp_path / "run")

    def perplexity(model, tokens):
        losses = []
        for start in range(0, len(tokens) - 1, 8):
            window = torch.tensor(tokens[start:start + 9].tolist())
            losses += (-model(window[None, :-1])[0][0].log_softmax(-1).gather(1, window[1:, None])).flatten().tolist()
        return math.exp(sum(losses) / (len(tokens) - 1))

    for user, text, own, reported in zip(users, texts, saved["users"], result["users"], strict=True):
        server.deliver(user)
        assert reported["test_ppl_start"] == pytest.approx(perplexity(user.model, text.test), rel=1e-4)
        assert all(torch.equal(saved["server"]["generalists"][name], own["parameters"][name]) for name in user.shared)
        user.model.load_state_dict(own["parameters"])
        assert reported["test_ppl"] == pytest.approx(perplexity(user.model, text.test), rel=1e-4)
        assert reported["trigram_ppl"] == math.exp(data.trigram_loss(text.train, text.test, 257))


def test_a_file_that_could_not_be_written_whole_leaves_the_old_one(tmp_path):
    (tmp_path / "file").write_text("old")

    def half(path):
        path.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file", half)
    assert (tmp_path / "file").read_text() == "old"


def test_a_run_that_diverges_ends_in_one_line(corpus, tmp_path, capsys):
    for lr in ("300", "1e30"):
        assert train.main([*TINY, "--data", corpus, "--out", str(tmp_path / lr), "--lr", lr]) == 2
        assert "take a smaller one" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_holds_each_users_model_and_the_average(corpus, tmp_path):
    run(corpus, tmp_path / "run")
    saved = state(tmp_path / "run")
    assert saved["round"] == 3
    for user, specialists in zip(saved["users"], (0, 1, 3), strict=True):
        assert user["parameters"].keys() >= saved["server"]["generalists"].keys() - {
            name for name in saved["server"]["generalists"] if "experts" in name}
        assert len(user["parameters"].keys() - saved["server"]["generalists"].keys()) == 4 * specialists + 1


def test_gpt2_tokens_and_a_mixed_target_run_too(corpus, tmp_path, monkeypatch):
    """With a table made here in the place of tiktoken's, of tokens up to two bytes long."""
    pairs = [bytes([a, b]) for a in b"0123456789" for b in b"0123456789"]
    ranks = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + pairs)}
    made = data.tiktoken.Encoding("gpt2", pat_str=r"\d+|\s+|[^\s\d]+", mergeable_ranks=ranks,
                                   special_tokens={"<|endoftext|>": len(ranks)})
    monkeypatch.setattr(data.tiktoken, "get_encoding", {"gpt2": made}.get)
    result = run(corpus, tmp_path / "run", "--tokenizer", "gpt2", "--target", "mixed", "--average", "tokens")
    for user in result["users"]:
        assert user["train_tokens"] < 0.8 * user["train_bytes"]
        assert math.log2(user["test_ppl"]) * 0.4 < user["test_bpb"] < math.log2(user["test_ppl"]) * 0.7


def test_a_folder_that_holds_a_run_is_refused_and_kept_unless_told(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    again = [*TINY, "--data", corpus, "--out", str(tmp_path / "run")]
    assert train.main(again) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert train.main([*again, "--overwrite", "--lr", "nan"]) == 2
    assert train.main([*again, "--overwrite", "--train-kb", "99"]) == 2
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert train.main([*again, "--overwrite", "--seed", "1"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["seed"] == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 9


def test_without_out_every_run_gets_a_new_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main([*TINY, "--data", corpus, "--rounds", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("comigs*")) == [
        "comigs-text-3users-seed0", "comigs-text-3users-seed0-2"]


WRONG = """
    --users 0; --users -1; --users two; --users 1.5; --users; --users 9 --specialists 1; --user 2
    --specialists -1; --specialists 1,2; --specialists 1,,2; --specialists x
    --generalists -1; --generalists 0 --specialists 0; --top-k 0
    --method nonsense; --average median; --tokenizer words; --target theirs; --data nowhere
    --train-kb 0; --train-kb 1,2; --train-kb nan; --train-kb 1000
    --rounds 0; --local-steps 0; --router-every 0; --router-steps -1; --eval-every 0; --warmup -1
    --batch-size 0; --block-size 0; --block-size 4000
    --lr 0; --lr -1; --lr nan; --lr inf; --lr fast; --router-lr nan; --weight-decay -0.1; --weight-decay nan
    --n-layer 0; --n-head 3; --n-head 0; --n-embd 0; --n-embd 9; --seed x; --seed -1
    --device nonsense; --device cuda:99; --device meta; --device hpu; --nonsense 1; more
    --users 100000000000; --rounds 1e3
    --method hetlora; --method ffa-lora; --method pcl; --method fdlora; --experts-see nothing
    --expert lora; --expert nonsense; --lora-rank 0; --lora-rank 1,2; --lora-rank x; --init-from nowhere
    --participation 0; --participation 1.1; --participation nan; --drop-rate 1; --drop-rate -0.1; --drop-rate inf
    --clip-update 0; --clip-update nan; --dp-noise -1; --dp-noise 1; --clip-update 1 --method pcl --specialists 1
    --dp-noise 1 --clip-update 1 --method fedavg; --dp-noise 1 --clip-update 1 --average tokens
    --resume; --resume --overwrite; --source x; --user-field who
    --text-field what; --short-users maybe; --n-layer 1000000000; --specialists 10000; --batch-size 10000000000
    --n-embd 1000000 --n-head 1
"""


@pytest.mark.parametrize("wrong", [case.strip() for case in WRONG.strip().replace("\n", ";").split(";")])
def test_bad_input_is_one_line_with_flag_and_remedy_and_status_2(wrong, corpus, tmp_path, capsys):
    flags = [*TINY, "--data", corpus, "--out", str(tmp_path / "run"), *wrong.split()]
    assert train.main(flags) == 2
    printed = capsys.readouterr()
    line, = printed.err.splitlines()
    assert wrong.split()[0] in line
    assert ";" in line
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file_is_one_line_too(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below", "x" * 300):
        assert train.main([*TINY, "--data", corpus, "--out", str(tmp_path / out)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    printed = capsys.readouterr().out
    assert "--specialists LIST" in printed
    assert "(default: comigs)" in printed


# --- from a pretrained base ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A base as pretrain.py makes it, from three dozen made-up documents that are like the users' only in part."""
    letters = str.maketrans("01234567", "abcdefgh")
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "public", lambda: (words(i, 2500).translate(letters) for i in range(36)))
        flags = "--steps 60 --n-layer 2 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --lr 1e-2"
        assert pretrain.main([*flags.split(), "--out", str(folder)]) == 0
    return folder / "base.pt"


def from_base(pretrained, corpus, out, *more) -> dict:
    flags = [*SCHEDULE, "--init-from", str(pretrained), "--data", corpus, "--out", str(out), *more]
    assert train.main(flags) == 0
    return json.loads((out / "result.json").read_text())


def test_the_whole_path_offline(pretrained, corpus, tmp_path, capsys):
    """pretrain.py, then train.py with low-rank experts: starts better than random, learns, sends only factors."""
    result = from_base(pretrained, corpus, tmp_path / "run", "--expert", "lora", "--lora-rank", "2", "--lr", "1e-2")
    attention, expert, V, T, L, C = 6 * 16 * 2, 10 * 16 * 2, 257, 8, 2, 16
    for user, specialists in zip(result["users"], (0, 1, 3), strict=True):
        assert user["parameters"] == {
            "backbone": (V + T) * C + 2 * C + L * (12 * C * C + 13 * C), "generalist": L * (attention + expert),
            "specialist": specialists * L * expert, "router": L * C * (1 + specialists)}
        assert user["test_ppl"] < user["test_ppl_start"]
    assert result["bytes_up"] == 3 * 3 * 4 * L * (attention + expert)
    saved = state(tmp_path / "run")
    assert saved["base"] == {"name": str(pretrained), "sha256": hashlib.sha256(pretrained.read_bytes()).hexdigest(),
                             "tokenizer": "bytes"}
    for user, reported in zip(saved["users"], result["users"], strict=True):
        learned = sum(count for role, count in reported["parameters"].items() if role != "backbone")
        assert sum(tensor.numel() for tensor in user["parameters"].values()) == learned


def test_the_backbone_is_the_same_object_in_all_users_and_keeps_its_bits_through_a_run(pretrained, corpus, tmp_path):
    settings = parse_settings([*SCHEDULE, "--init-from", str(pretrained), "--data", corpus, "--expert", "lora",
                               "--out", str(tmp_path / "run")])
    run = train.Run(settings)
    backbones = [user.model.having(BACKBONE) for user in run.users]
    assert len({tuple(map(id, backbone.values())) for backbone in backbones}) == 1
    before = {name: parameter.clone() for name, parameter in backbones[0].items()}
    run.play(tqdm(disable=True))
    for user in run.users:
        assert [*map(id, user.model.having(BACKBONE).values())] == [*map(id, backbones[0].values())]
        learning = {id(p) for level in (user.lower, user.upper) for p in level.parameters}
        assert not learning & set(map(id, backbones[0].values()))
    assert all(torch.equal(backbones[0][name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in backbones[0].values())


def test_whole_blocks_can_start_from_a_base_too_and_then_learn_apart(pretrained, corpus, tmp_path):
    settings = parse_settings([*SCHEDULE, "--init-from", str(pretrained), "--data", corpus, "--lr", "1e-2",
                               "--out", str(tmp_path / "run")])
    run = train.Run(settings)
    cleo = run.users[2].model.having(SPECIALIST)
    one, two = (cleo[f"blocks.0.moe.experts.{e}.up.weight"] for e in (1, 2))
    assert torch.equal(one, two)
    result = run.play(tqdm(disable=True))
    assert not torch.equal(one, two)
    assert all(user["test_ppl"] < user["test_ppl_start"] for user in result["users"])
    assert not any(user["parameters"]["backbone"] for user in result["users"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_low_rank_experts(method, pretrained, corpus, tmp_path):
    result = from_base(pretrained, corpus, tmp_path, "--expert", "lora", "--method", method, "--specialists", "1")
    expert, attention, router = 10 * 16 * 8, 6 * 16 * 8, METHODS[method].routed * 16 * 2
    for user in result["users"]:
        assert math.isfinite(user["test_ppl"])
        assert user["test_ppl"] != user["test_ppl_start"]
        changed = sum(user["parameters"].values()) - ((257 + 8) * 16 + 2 * 16 + 2 * (12 * 16 * 16 + 13 * 16))
        assert changed == 2 * (attention + 2 * expert + router) or method == "hetlora"  # whose ranks prune themselves


@pytest.mark.parametrize("method", ["flexlora", "hetlora", "pcl", "fdlora"])
def test_low_rank_changes_that_diverge_end_in_one_line_too(method, pretrained, corpus, tmp_path, capsys):
    flags = [*SCHEDULE, "--init-from", str(pretrained), "--data", corpus, "--out", str(tmp_path / "run"), "--expert",
             "lora", "--specialists", "1", "--method", method, "--lr", "1e30"]
    assert train.main(flags) == 2
    assert "take a smaller one" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_frozen_at_its_random_start_is_the_same_for_all_users(pretrained, corpus, tmp_path):
    """Else averaging FFA-LoRA's B alone would make no sense."""
    settings = parse_settings([*SCHEDULE, "--init-from", str(pretrained), "--data", corpus, "--expert", "lora",
                               "--method", "ffa-lora", "--out", str(tmp_path / "run")])
    users = train.Run(settings).users
    one, two = (user.model.having(BACKBONE) for user in users[1:])
    frozen = [name for name in one if name.endswith(".A")]
    assert len(frozen) == 2 * (2 + 2 * 2)  # layers × (attention's and two experts' changes)
    assert all(two[name] is one[name] for name in frozen)


def test_ranks_may_differ_where_nothing_is_averaged(pretrained, corpus, tmp_path, capsys):
    lora = ["--expert", "lora", "--lora-rank", "1,2,4"]
    result = from_base(pretrained, corpus, tmp_path / "run", *lora, "--method", "local", "--specialists", "1")
    sizes = [user["parameters"]["specialist"] for user in result["users"]]
    assert sizes == [sizes[0], 2 * sizes[0], 4 * sizes[0]]
    flags = [*SCHEDULE, "--init-from", str(pretrained), "--data", corpus, "--out", str(tmp_path / "no"), *lora]
    assert train.main(flags) == 2
    assert "--lora-rank 1,2,4: --method comigs averages" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("wrong", ["--n-layer 2", "--n-embd 16", "--n-head 4", "--block-size 17", "--tokenizer gpt2"])
def test_what_a_base_decides_cant_be_asked_for(wrong, pretrained, corpus, tmp_path, capsys):
    flags = [*SCHEDULE, "--init-from", str(pretrained), "--data", corpus, "--out", str(tmp_path / "run")]
    assert train.main([*flags, *wrong.split()]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "--init-from" in line
    assert ";" in line
    assert not (tmp_path / "run").exists()


def test_a_diverged_base_isnt_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "public", lambda: (words(i, 2500) for i in range(36)))
    flags = "--steps 12 --n-layer 1 --n-head 2 --n-embd 8 --block-size 8 --lr 1e9 --warmup 0"
    assert pretrain.main([*flags.split(), "--out", str(tmp_path)]) == 2
    assert "--lr 1000000000.0" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_base_isnt_replaced_unless_told(pretrained, capsys):
    before = pretrained.read_bytes()
    assert pretrain.main(["--out", str(pretrained.parent)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert pretrained.read_bytes() == before
    assert pretrain.main(["--out", str(pretrained)]) == 2  # a file: noticed before the work, not after it
    assert pretrain.main(["--steps", "0"]) == 2
    assert pretrain.main(["--n-embd", "9"]) == 2
    assert pretrain.main(["--users", "4"]) == 2
