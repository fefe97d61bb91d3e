"""What the plug-in for lmms-eval reads from --model_args, without lmms-eval (tests/lmms_eval/ has the rest)."""

from __future__ import annotations

import copy
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.models.tiny_families import HIDDEN_SIZE, build_model
from toprl_models import FastV, Schedule, TopRLPolicy, tiny
from toprl_models.integrations.lmms_eval import PruningArguments, trained_parts
from toprl_models.methods import OneShot
from toprl_models.methods.toprl import model_signature
from toprl_models.registry import schedule_for

ROOT = Path(__file__).parents[2]


def test_our_arguments_are_taken_and_the_others_left():
    arguments = {"method": "fastv", "budget": 192, "stages": "2:8:16", "device_map": "cuda", "batch_size": 1}
    taken = PruningArguments.take_from(arguments)
    assert taken == PruningArguments(method="fastv", budget=192.0, stages=(2, 8, 16))
    assert arguments == {"device_map": "cuda", "batch_size": 1}
    # lmms-eval makes numbers of what looks like one
    arguments = {"policy": "runs/ocr/policy", "budget": 14.5, "stages": 2, "num_visual": 64, "mode": "compact"}
    taken = PruningArguments.take_from(arguments)
    assert taken == PruningArguments("toprl", 14.5, policy="runs/ocr/policy", stages=(2,), num_visual=64)
    assert not arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 8}, "method is missing: give method=NAME"),
        ({"method": "fastvv", "budget": 8}, "method=fastvv: method 'fastvv' is unknown; known methods: toprl, fastv, "),
        ({"method": "toprl", "budget": 8}, "method=toprl needs a trained policy: policy=FOLDER_OR_HUB_ID"),
        ({"method": "oneshot", "budget": 8}, "method=oneshot needs a trained policy: policy=FOLDER_OR_HUB_ID"),
        ({"method": "fastv", "policy": "x", "budget": 8}, "policy=x: method=fastv takes no policy"),
        ({"method": "fastv"}, "budget is missing; give visual tokens averaged"),
        ({"method": "fastv", "budget": "all"}, "budget=all is not a positive number"),
        ({"method": "fastv", "budget": 0}, "budget=0 is not a positive number"),
        ({"method": "fastv", "budget": True}, "budget=True is not a positive number"),
        ({"method": "fastv", "budget": float("nan")}, "budget=nan is not a positive number"),
        ({"method": "fastv", "budget": 8, "stages": "2;8"}, "stages=2;8: must be .* as in stages=2:8:16"),
        ({"method": "fastv", "budget": 8, "stages": "8:2"}, "stages=8:2: must be .* ascending"),
        ({"method": "fastv", "budget": 8, "stages": 2.5}, "stages=2.5: must be"),
        ({"method": "fastv", "budget": 8, "num_visual": 5.5}, "num_visual=5.5 is not a positive whole number"),
        ({"method": "fastv", "budget": 8, "num_visual": 0}, "num_visual=0 is not a positive whole number"),
        ({"method": "fastv", "budget": 8, "mode": "mask"}, "mode=mask: .* leave mode out"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningArguments.take_from(arguments)


def test_the_schedule_is_that_of_the_method():
    config = tiny.load()[0].config
    policy, schedule = PruningArguments("fastv", 16).prepare(config)
    assert isinstance(policy, FastV) and schedule == schedule_for("fastv", 16, num_visual=64, num_layers=6)
    assert schedule.average_tokens(64, 6) == pytest.approx(16, abs=0.5)
    _, schedule = PruningArguments("fastv", 16, stages=(1, 2, 3)).prepare(config)
    assert schedule == Schedule.for_budget(16, (1, 2, 3), num_visual=64, num_layers=6)


def test_models_whose_images_differ_keep_a_share():
    config = build_model("qwen2_5_vl").config
    _, schedule = PruningArguments("fastv", 192, num_visual=576).prepare(config)
    assert schedule.average_tokens(100, 6) == pytest.approx(100 / 3, abs=0.5)
    with pytest.raises(ValueError, match=r"budget=192: .* qwen2_5_vl model; say what the budget is out of"):
        PruningArguments("fastv", 192).prepare(config)


def test_numbers_that_authors_state_are_shares():
    config = copy.deepcopy(tiny.load()[0].config)
    config.text_config.num_hidden_layers = 32
    _, schedule = PruningArguments("sparsevlm", 192, num_visual=576).prepare(config)
    assert schedule.layers == (3, 7, 16)
    assert schedule.counts(576) == (300, 200, 110) and schedule.counts(2880) == (1500, 1000, 550)


def test_a_trained_policy_brings_its_stages(tmp_path):
    model = build_model("llava")
    torch.manual_seed(0)
    TopRLPolicy(HIDDEN_SIZE, [2, 4], 16, model_signature(model)).save_pretrained(tmp_path)
    arguments = PruningArguments("toprl", 8, policy=str(tmp_path))
    policy, schedule = arguments.prepare(model.config)
    assert isinstance(policy, TopRLPolicy) and not policy.training
    assert schedule.layers == (2, 4) and schedule.average_tokens(16, 6) == pytest.approx(8, abs=0.5)
    with pytest.raises(ValueError, match="trained for hidden_size=64, but the model has 128"):
        PruningArguments("toprl", 32, policy=str(tmp_path)).prepare(tiny.load()[0].config)
    oneshot, schedule = PruningArguments("oneshot", 8, policy=str(tmp_path), stages=(2,)).prepare(model.config)
    assert isinstance(oneshot, OneShot) and oneshot.layer == 2 and schedule.layers == (2,)


def test_classes_in_files_and_compositions(tmp_path):
    model = build_model("llava")
    (tmp_path / "my_file.py").write_text("from toprl_models import RandomPolicy\nclass Mine(RandomPolicy): pass\n")
    name = f"{tmp_path}/my_file.py:Mine"
    arguments = {"method": f"divprune+{name}", "budget": 8}
    policy, schedule = PruningArguments.take_from(arguments).prepare(model.config)
    assert [type(part).__name__ for part in policy.policies] == ["DivPrune", "Mine"]
    assert schedule.layers == (0, 1) and schedule.average_tokens(16, 6) == pytest.approx(8, abs=0.5)
    policy, schedule = PruningArguments(name, 8, stages=(1, 4)).prepare(model.config)
    assert type(policy).__name__ == "Mine" and schedule.layers == (1, 4)
    with pytest.raises(ValueError, match=r"method=.*my_file\.py has no Yours"):
        PruningArguments.take_from({"method": f"{tmp_path}/my_file.py:Yours", "budget": 8})


def test_trained_parts_take_the_policy(tmp_path):
    model = build_model("llava")
    TopRLPolicy(HIDDEN_SIZE, [1, 4], 16, model_signature(model)).save_pretrained(tmp_path)
    given = {"method": "random+toprl+oneshot", "budget": 8, "policy": str(tmp_path), "stages": "1:4:5"}
    policy, schedule = PruningArguments.take_from(given).prepare(model.config)
    assert schedule.layers == (1, 4, 5) and len(trained_parts(policy)) == 2
    assert trained_parts(policy)[0] is policy.policies[1] and trained_parts(policy)[1] is policy.policies[2].policy
    arguments = PruningArguments("random+toprl", 8, policy=str(tmp_path))
    assert arguments.prepare(model.config)[1].layers == (1, 4)  # those that it was trained for
    with pytest.raises(ValueError, match=r"method=random\+toprl needs a trained policy"):
        PruningArguments.take_from({"method": "random+toprl", "budget": 8})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PruningArguments("fastv", 3), r"budget=3, stages=1: .* lies between .* and 64"),
        (PruningArguments("fastv", 65, stages=(1, 2)), r"budget=65, stages=1:2: .* lies between .* and 64"),
        (PruningArguments("fastv", 16, stages=(2, 9)), r"stages=2:9: .*stage at layer 9.* layers 0\.\.5"),
        (PruningArguments("toprl", 16, policy="no/such/folder"), "policy=no/such/folder: give a folder"),
    ],
)
def test_what_does_not_fit_the_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        arguments.prepare(tiny.load()[0].config)


def test_the_entry_point_names_what_is_there():
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, name = group["toprl"].partition(":")
    assert callable(getattr(import_module(module), name))
