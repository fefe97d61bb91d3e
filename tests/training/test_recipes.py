"""The recipes for released models, end to end on tiny random ones of the same class and depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models import tiny_families
from tests.training.any_family import processor, write_data
from toprl_models import TopRLPolicy
from training import cli, ppo
from training.ppo import PPOConfig

RECIPES = Path(__file__).parents[2] / "training/recipes"
MODELS = {  # family and number of layers
    "llava-1.5-7b": ("llava", 32),
    "llava-next-7b": ("llava_next", 32),
    "qwen2.5-vl-7b": ("qwen2_5_vl", 28),
    "qwen3-vl-8b": ("qwen3_vl", 36),
}
# a run of seconds: what is left of the recipe are its stages, dtype, attention, rewards and way to validate
SMALL = "--task custom --metric exact_match --reward_q prob_ratio --train_size 6 --iterations 1 --rollout_size 4"
SMALLER = "--rollout_batch_size 2 --minibatch_size 2 --ppo_epochs 1 --eval_size 2 --actor_size 8"


def test_every_recipe_is_tried() -> None:
    assert {file.stem for file in RECIPES.glob("*.yaml")} == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    family, layers = MODELS[name]
    monkeypatch.setattr(tiny_families, "NUM_LAYERS", layers)
    data = write_data(tmp_path, rows=6)
    places = ["--dataset_path", str(data), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    config = cli.parse(PPOConfig, "", [str(RECIPES / f"{name}.yaml"), *SMALL.split(), *SMALLER.split(), *places])
    model = tiny_families.build_model(family).to(getattr(torch, config.dtype))
    asked = []
    monkeypatch.setattr(ppo, "load_model", lambda *given, **_: (asked.append(given), (model, processor(family)))[1])
    ppo.command(
        cli.parse(
            PPOConfig, "", [str(RECIPES / f"{name}.yaml"), *SMALL.split(), *SMALLER.split(), *places, "--dry_run"]
        )
    )
    assert "visual tokens per sample" in capsys.readouterr().out
    ppo.command(config)
    assert asked[-1][0] == config.model_name_or_path and asked[-1][2] == torch.bfloat16
    policy = TopRLPolicy.from_pretrained(tmp_path / "run/policy")
    assert policy.metadata["ppo"]["stage_layers"] == config.stage_layers
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(row["retained"]) == len(config.stage_layers)
