"""The PPO loop on the embedded model: losses by hand, equal rollouts, resuming, learning."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from toprl_models import Schedule, TopRLPolicy, tiny
from training import ppo
from training.evaluate import evaluate
from training.evaluation.config import EvaluateConfig
from training.ppo import PPOConfig, command, main
from training.rollout import rollout
from training.tasks import encode, make_task
from training.trainer import data

LAYERS = [1, 2, 3]


@pytest.fixture(scope="module")
def model_and_processor():
    return tiny.load()


def small(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path),
        "iterations": 4,
        "rollout_size": 16,
        "minibatch_size": 8,
        "ppo_epochs": 2,
        "train_size": 32,
        "actor_size": 16,
        "save_every": 2,
        "eval_every": 0,
        "device": "cpu",
    }
    return PPOConfig(**(values | changes))


def weights(folder):
    return TopRLPolicy.from_pretrained(folder).state_dict()


def test_masked_and_compacted_rollouts_are_the_same_episode(model_and_processor):
    model, processor = model_and_processor
    torch.manual_seed(0)
    policy = TopRLPolicy(tiny.HIDDEN_SIZE, LAYERS, 16, keep_bias=0.0)
    task = make_task("mixed", "train", 12)
    samples = [task[i] for i in range(12)]
    schedule = Schedule(tuple((layer, 1.0) for layer in LAYERS))
    episodes = {}
    for mode in ("compact", "mask"):
        episodes[mode] = rollout(
            model,
            processor,
            policy,
            schedule,
            task,
            samples,
            encode(processor, task, samples, "cpu"),
            episodes=torch.arange(12),
            seed=1,
            tau=1.0,
            mode=mode,
        )
    compact, mask = episodes["compact"], episodes["mask"]
    assert compact.answers == mask.answers
    assert torch.equal(compact.retained, mask.retained)
    for short, full in zip(compact.steps, mask.steps, strict=True):
        for row in range(12):
            here, there = short.valid_mask[row], full.valid_mask[row]
            assert torch.equal(short.keep_mask[row, here], full.keep_mask[row, there])
            for name in ("hidden_states", "log_prob"):
                a, b = getattr(short, name)[row, here], getattr(full, name)[row, there]
                torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(short.value, full.value, atol=1e-4, rtol=1e-4)
    assert (compact.retained[:, -1] < 0.5).all()


def test_two_runs_of_one_seed_are_bitwise_equal(tmp_path):
    first, second = main(small(tmp_path / "a")), main(small(tmp_path / "b"))
    a, b = weights(first), weights(second)
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = weights(main(small(tmp_path / "c", seed=1)))
    assert any(not torch.equal(a[name], other[name]) for name in a)


@pytest.mark.parametrize(
    "flags",
    [
        {"objective": "straight_through"},
        {"objective": "hybrid", "budget": 20.0},
        {"baseline": "group", "group_size": 4, "reward_q": "prob_ratio"},
        {"reward_q": "metric", "ratio_level": "joint", "rollout_batch_size": 5, "rollout": "mask"},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_other_objectives_and_rewards(flags, tmp_path):
    """Each trains, to other weights than the default, and two runs are bitwise equal."""
    changes = flags | {"iterations": 2}
    first, second, plain = (
        weights(main(small(tmp_path / name, **these)))
        for name, these in (("a", changes), ("b", changes), ("c", {"iterations": 2}))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["reward"]) for row in rows)


def test_an_impossible_budget_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--budget 5 is impossible with --stage_layers 1 2 3"):
        main(small(tmp_path, budget=5.0))


@pytest.mark.parametrize("layers", [[1, 2, 6], [2, 2], [-1, 2]])
def test_stages_are_checked_before_data_are_read(layers, tmp_path, monkeypatch):
    monkeypatch.setattr("training.trainer.validation.make_task", lambda *_, **__: pytest.fail("data were read"))
    asked = " ".join(map(str, layers))
    with pytest.raises(ValueError, match=f"--stage_layers {asked}: the model has 6 layers, so stages .* from 0 to 5"):
        main(small(tmp_path / "out", stage_layers=layers))
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(tmp_path, monkeypatch):
    whole = weights(main(small(tmp_path / "whole")))
    config = small(tmp_path / "cut")
    real, calls = ppo.rollout, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(ppo, "rollout", dies)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    monkeypatch.setattr(ppo, "rollout", real)
    assert len((tmp_path / "cut/metrics.jsonl").read_text().splitlines()) == 3
    resumed = weights(main(dataclasses.replace(config, resume="auto")))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = [json.loads(r) for r in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in rows] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="gamma"):
        main(dataclasses.replace(config, resume="auto", gamma=0.5))


def test_a_wrong_ratio_is_noticed(tmp_path, monkeypatch):
    """If the recorded log-probabilities are not those of the acting policy, the update stops."""
    real = ppo.rollout

    def shifted(*args, **kwargs):
        episodes = real(*args, **kwargs)
        episodes.steps[1].log_prob = episodes.steps[1].log_prob + 0.1 * episodes.steps[1].valid_mask
        return episodes

    monkeypatch.setattr(ppo, "rollout", shifted)
    with pytest.raises(RuntimeError, match="stage 1: ratio is not 1"):
        main(small(tmp_path))


def test_a_task_the_model_cannot_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "unpruned_quality", lambda *a: torch.zeros(32))
    with pytest.raises(RuntimeError, match="answers none of 32 samples"):
        main(small(tmp_path))


@pytest.mark.parametrize(("flag", "value"), [("iterations", 0), ("gamma", 1.5), ("tau_end", 2.0), ("rollout_size", -1)])
def test_bad_flags(flag, value):
    with pytest.raises(ValueError, match=flag):
        PPOConfig(**{flag: value})


@pytest.mark.slow
def test_it_learns_to_find_the_digit(tmp_path):
    """A short run on ocr prunes most tokens and keeps the answers."""
    main(PPOConfig(output_dir=str(tmp_path), iterations=15, rollout_size=64, train_size=256, device="cpu"))
    rows = [json.loads(r) for r in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.5
    assert rows[-1]["retained"][-1] < 0.3 < rows[0]["retained"][-1]
    assert rows[-1]["accuracy"] > 0.8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_on_own_data(own_data, tmp_path, dtype):
    changes = {"task": "custom", "dataset_path": own_data, "metric": "exact_match", "iterations": 2, "dtype": dtype}
    folder = main(small(tmp_path / "run", train_size=24, **changes))
    policy = TopRLPolicy.from_pretrained(folder)
    assert policy.metadata["task"] == "custom" and policy.head.weight.dtype == torch.float32
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["usable"] > 0.5
    scenes = main(small(tmp_path / "scenes", train_size=24, iterations=2, dtype=dtype))
    if dtype == "float32":  # the same pictures and questions under another name: the same training
        assert all(torch.equal(one, weights(scenes)[name]) for name, one in policy.state_dict().items())


def test_a_policy_remembers_its_task_but_no_place_of_this_machine(own_data, tmp_path):
    """Nothing but --policy is needed where the run's folder is still there and its data have a test split."""
    shutil.copy(own_data, tmp_path / "test.jsonl")
    given = {"task": "custom", "dataset_path": str(tmp_path), "metric": "exact_match", "iterations": 1}
    folder = main(small(tmp_path / "run", train_size=16, **given))
    assert str(tmp_path) not in (folder / "config.json").read_text()
    metadata = TopRLPolicy.from_pretrained(folder).metadata
    assert metadata["metric"] == "exact_match" and metadata["data"]["name"] == tmp_path.name
    config = EvaluateConfig(policy=[str(folder)], method=["toprl"], keep=[8, 4, 2], limit=8, device="cpu")
    results = evaluate(config)
    assert results["tasks"]["custom"]["n"] == 8 and results["tasks"]["custom"]["metric"] == "exact_match"
    folder.rename(tmp_path / "published")
    config = EvaluateConfig(policy=[str(tmp_path / "published")], method=["toprl"], keep=[8, 4, 2], limit=8)
    with pytest.raises(ValueError, match=f"it was trained on {tmp_path.name}; name test data: --dataset_path"):
        evaluate(config)


def test_the_file_trained_on_is_no_test_data(own_data, tmp_path):
    given = {"task": "custom", "dataset_path": own_data, "metric": "exact_match", "iterations": 1}
    folder = main(small(tmp_path / "run", train_size=16, **given))
    with pytest.raises(ValueError, match=r"train.jsonl is what it was trained on; name test data: --dataset_path"):
        evaluate(EvaluateConfig(policy=[str(folder)], method=["toprl"], keep=[8, 4, 2], device="cpu"))


def test_right_answers_are_not_needed_for_their_probability(own_data, tmp_path):
    """The unpruned model is wrong on every sample."""
    rows = [json.loads(line) | {"answer": "three"} for line in Path(own_data).read_text().splitlines()]
    Path(own_data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"task": "custom", "dataset_path": own_data, "metric": "exact_match", "iterations": 1, "eval_every": 1}
    main(small(tmp_path / "run", train_size=24, reward_q="prob_ratio", **given))
    with pytest.raises(RuntimeError, match=r"answers none of .*take --reward_q prob_ratio"):
        main(small(tmp_path / "ratio", train_size=24, **given))


def test_a_dry_run_reads_everything_and_writes_nothing(own_data, tmp_path, capsys):
    given = {"task": "custom", "dataset_path": own_data, "metric": "exact_match", "iterations": 8, "dry_run": True}
    command(small(tmp_path / "run", train_size=24, **given))
    shown = capsys.readouterr().out
    assert "training: 24 samples; visual tokens per sample: p5 64, p50 64, p95 64" in shown
    assert "8 iterations of" in shown and "peak memory" in shown and not (tmp_path / "run").exists()
    (tmp_path / "23.png").write_text("no image")
    with pytest.raises(ValueError, match="row 23: column 'image' is not a readable image"):
        command(small(tmp_path / "run", train_size=24, **given))


def test_a_log_gets_a_line_per_iteration(tmp_path, capsys):
    main(small(tmp_path, iterations=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ocr ")]
    assert [line.split(":")[0] for line in lines] == ["ocr 1/2", "ocr 2/2"]
    assert "reward" in lines[0] and "kept" in lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "custom"}, "custom: needs dataset_path"),
        ({"dataset_path": "data"}, "ocr: dataset_path='data' has no meaning"),
        ({"dtype": "int8"}, "--dtype int8 must be one of float32"),
    ],
)
def test_data_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(small(tmp_path, **changes))
