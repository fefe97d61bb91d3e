"""Evaluation: budgets, true token counts, what the script writes."""

from __future__ import annotations

import json

import pytest
import torch

from toprl_models import RandomPolicy, Schedule, TopRLPolicy, tiny
from toprl_models.policy import model_signature
from training.evaluate import EvaluateConfig, evaluate, main, make_schedule, run_method
from training.tasks import encode, exact_match, make_task


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    model, _ = tiny.load()
    policy = TopRLPolicy(
        tiny.HIDDEN_SIZE, [1, 2, 3], 16, model_signature(model), metadata={"task": "ocr", "model": "tiny"}
    )
    policy.save_pretrained(folder)
    return str(folder)


def test_evaluation_of_every_method(policy_folder, tmp_path, capsys):
    output = tmp_path / "result.json"
    main(
        EvaluateConfig(
            policy=[policy_folder],
            keep=[8, 4, 2],
            size=24,
            controls=2,
            random_seeds=2,
            output=str(output),
            device="cpu",
        )
    )
    result = json.loads(output.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["full", "toprl", "fastv", "pyramiddrop", "random", "untrained"]
    assert rows["full"]["average_tokens"] == 64
    expected = (64 + 8 + 4 + 3 * 2) / 6
    assert result["schedule"]["average_tokens"] == pytest.approx(expected)
    for name in ("toprl", "fastv", "pyramiddrop", "random", "untrained"):
        assert rows[name]["average_tokens"] == pytest.approx(expected)
    assert len(rows["random"]["accuracy"]) == 2
    # all baselines prune to two tokens: the model cannot do as well as with all of them on this many samples
    assert rows["full"]["accuracy"][0] > rows["random"]["accuracy"][0] + 0.3
    assert "average tokens" in capsys.readouterr().out


def test_average_tokens_count_what_was_kept():
    model, processor = tiny.load()
    task = make_task("ocr", "test", 5)
    result = run_method(
        model, processor, task, [task[i] for i in range(5)], RandomPolicy(), Schedule(((2, 10), (4, 0))), batch_size=2
    )
    assert result.average_tokens == pytest.approx((2 * 64 + 2 * 10) / 6)
    assert result.retained == pytest.approx([10 / 64, 0])
    assert len(result.answers) == 5


def test_budget_or_keep(policy_folder):
    layers = (1, 2, 3)
    by_budget = make_schedule(EvaluateConfig(policy=[policy_folder], budget=16), layers, 64, 6)
    assert by_budget.average_tokens(64, 6) == pytest.approx(16, abs=0.5)
    for config in (EvaluateConfig(policy=["x"]), EvaluateConfig(policy=["x"], keep=[8, 4, 2], budget=16)):
        with pytest.raises(ValueError, match="either --keep"):
            make_schedule(config, layers, 64, 6)
    with pytest.raises(ValueError, match="3 numbers"):
        make_schedule(EvaluateConfig(policy=["x"], keep=[8, 4]), layers, 64, 6)
    with pytest.raises(ValueError, match="impossible"):
        make_schedule(EvaluateConfig(policy=["x"], budget=5), layers, 64, 6)


def test_a_policy_without_a_task_needs_one(tmp_path):
    TopRLPolicy(tiny.HIDDEN_SIZE, [1], 16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--task is needed"):
        evaluate(EvaluateConfig(policy=[str(tmp_path)], keep=[4]))


def test_unknown_task_lists_the_known():
    with pytest.raises(ValueError, match="ocr, shape, colour"):
        make_task("textvqa", "test", 4)
    with pytest.raises(ValueError, match="split='dev'"):
        make_task("ocr", "dev", 4)


def test_exact_match():
    assert exact_match(" Yes. ", "yes") == 1.0
    assert exact_match("yes", "no") == 0.0
    assert exact_match("", "no") == 0.0


def test_encode_pads_on_the_left():
    _, processor = tiny.load()
    task = make_task("mixed", "train", 6)
    inputs = encode(processor, task, [task[i] for i in range(6)], "cpu")
    mask = inputs["attention_mask"]
    assert (mask[:, -1] == 1).all()
    assert (mask.diff(dim=1) >= 0).all()
    assert ((inputs["input_ids"] == processor.image_token_id).sum(1) == tiny.NUM_VISUAL_TOKENS).all()
