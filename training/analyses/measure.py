"""The jobs: what a model has, what an agent learns, and how well pruned models answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from toprl_kernels import flops
from toprl_models import Policy, RandomPolicy, Schedule, TopRLPolicy, attach
from toprl_models.families import count_visual
from training import ppo
from training.analyses import clips
from training.analyses.config import ReproduceConfig
from training.analyses.lab import Lab
from training.evaluation.methods import make_method
from training.fingerprint import digest_of
from training.tasks import Sample, Task, answer, encode, load_model, make_task
from training.trainer.data import TrainingData, training_data

Stages = Sequence[Sequence[float]]  # (layer, keep): a fraction where keep is a float, tokens where it is an int
LAST_ROWS = 5  # iterations that "at the end of training" means


@lru_cache(maxsize=1)
def _model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    return load_model(name, device, getattr(torch, dtype))


def model_of(spec: dict[str, str]) -> tuple[Any, Any]:
    """The model and processor of ``ReproduceConfig.model()``, loaded once per process."""
    return _model(spec["name"], spec["dtype"], spec["device"])


def task_of(name: str, split: str, size: int, seed: int, path: str | None) -> Task:
    """A task by name, the clips of the video analysis among them."""
    if name.startswith(clips.PREFIX):
        return clips.ClipTask(name.removeprefix(clips.PREFIX), split, size, seed)
    return make_task(name, split, size, seed, path)


# -- facts ---------------------------------------------------------------------------------------------------------


def facts(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Decoder layers, visual tokens of the first sample and sizes of the model."""
    model, processor = model_of(arguments["model"])
    task = task_of(arguments["task"], "test", 1, 0, arguments["path"])
    text = model.config.get_text_config()
    return {
        "num_layers": text.num_hidden_layers,
        "num_visual": count_visual(model, encode(processor, task, [task[0]], model.device))[0],
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
    }


def facts_of(config: ReproduceConfig, lab: Lab, task: str = "") -> dict[str, Any]:
    """``facts`` of the model with the first task, or another."""
    task = task or config.task[0]
    arguments = {"model": config.model(), "task": task, "path": config.path_of(task)}
    return lab.map(facts, [arguments], "looking at the model")[0]


def dims(found: dict[str, Any]) -> flops.ModelDims:
    """The sizes that Eq. 8 needs, of ``facts``."""
    return flops.ModelDims(found["hidden_size"], found["intermediate_size"], found["num_layers"])


def stages_for(budget: float, layers: Sequence[int], found: dict[str, Any]) -> list[list[float]]:
    """Keeps r, r^2, ... before ``layers`` that average to ``budget`` visual tokens in a model with these ``facts``."""
    schedule = Schedule.for_budget(
        budget, tuple(layers), num_visual=found["num_visual"], num_layers=found["num_layers"]
    )
    return [list(stage) for stage in schedule.stages]


# -- training ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _training_data(spec: str, task: str, size: int, seed: int, path: str | None, batch_size: int) -> TrainingData:
    model, processor = model_of(json.loads(spec))
    return training_data(model, processor, task_of(task, "train", size, seed, path), batch_size)


def train(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One agent; gives its folder below the work folder and the last rows of its log."""
    name = f"{arguments['ppo']['task'].replace('/', '-')}_seed{arguments['ppo']['seed']}_{digest_of(arguments)}"
    output = folder / "policies" / name
    config = ppo.PPOConfig(output_dir=str(output), resume="auto", **arguments["ppo"])
    data = _training_data(
        json.dumps(arguments["model"]),
        config.task,
        config.train_size,
        config.seed,
        arguments["path"],
        config.rollout_size,
    )
    ppo.main(config, data)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][-LAST_ROWS:]
    last = torch.tensor([[row["reward"], row["accuracy"], *row["retained"]] for row in rows]).mean(0).tolist()
    return {
        "policy": f"policies/{name}/policy",
        "reward": last[0],
        "accuracy": last[1],
        "retained": last[2:],
        "usable": rows[-1]["usable"],
    }


def training(config: ReproduceConfig, task: str, seed: int, layers: Sequence[int], **flags: Any) -> dict[str, Any]:
    """Arguments of ``train``: the agent that every analysis shares, unless ``flags`` of training/ppo.py differ."""
    return {
        "model": config.model(),
        "path": config.path_of(task),
        "ppo": {
            "model_name_or_path": config.model_name_or_path,
            "task": task,
            "seed": seed,
            "stage_layers": list(layers),
            "iterations": config.iterations,
            "train_size": config.train_size,
            "actor_size": config.actor_size,
            "device": config.device,
            "eval_every": 0,  # what is evaluated, and how, is the analysis's
            **flags,
        },
    }


# -- answering -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _batches(
    spec: str, task: str, size: int, path: str | None, batch_size: int
) -> tuple[Task, list[tuple[list[Sample], dict[str, torch.Tensor]]]]:
    _, processor = model_of(json.loads(spec))
    made = task_of(task, "test", size, 0, path)
    samples = [made[i] for i in range(len(made))]
    parts = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    return made, [(part, encode(processor, made, part, "cpu")) for part in parts]


def evaluate(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Every one of ``arguments["runs"]`` over the test samples of a task.

    A run is {"name", "method", "stages", "policy" (below the work folder), "seed"}; method "full" prunes nothing.

    Returns:
        By name: the score of each sample, tokens averaged over layers and samples, and tokens kept by each stage.
    """
    model, processor = model_of(arguments["model"])
    task, batches = _batches(
        json.dumps(arguments["model"]),
        arguments["task"],
        arguments["size"],
        arguments["path"],
        arguments["batch_size"],
    )
    return {run["name"]: _answer_all(run, model, processor, task, batches, folder) for run in arguments["runs"]}


def _policy(run: dict[str, Any], model: Any, folder: Path) -> Policy | None:
    if run["method"] == "random":
        return RandomPolicy(run["seed"])
    trained = TopRLPolicy.from_pretrained(folder / run["policy"]).to(model.device).eval() if run["policy"] else None
    layers = [int(layer) for layer, _ in run["stages"]]
    return make_method(run["method"], model, seed=run["seed"], policy=trained, layers=layers)


def _answer_all(
    run: dict[str, Any], model: Any, processor: Any, task: Task, batches: Sequence[Any], folder: Path
) -> dict[str, Any]:
    policy = _policy(run, model, folder)
    schedule = Schedule(tuple((int(layer), keep) for layer, keep in run["stages"])) if policy else None
    num_layers = model.config.get_text_config().num_hidden_layers
    scores: list[float] = []
    averages: list[float] = []
    kept: list[Sequence[int]] = []
    attached = attach(model, policy, schedule=schedule) if policy and schedule else nullcontext()
    with attached as pruner:
        for samples, inputs in batches:
            here = {name: value.to(model.device) for name, value in inputs.items()}
            _, quality = answer(model, processor, task, samples, here)
            scores += [round(score, 4) for score in quality.tolist()]
            totals = count_visual(model, here)
            counts = [()] * len(samples) if pruner is None else zip(*(s.counts for s in pruner.trace), strict=True)
            for total, mine in zip(totals, counts, strict=True):
                stages = [] if schedule is None else list(zip(schedule.layers, mine, strict=True))
                averages.append(flops.average_tokens(total, stages, num_layers))
                kept.append(mine)
    return {
        "scores": [int(score) if score == int(score) else score for score in scores],
        "average_tokens": sum(averages) / len(averages),
        "kept": torch.tensor(kept, dtype=torch.float64).mean(0).tolist(),
    }


def answering(
    config: ReproduceConfig, task: str, runs: Sequence[dict[str, Any]], size: int | None = None
) -> dict[str, Any]:
    """Arguments of ``evaluate``."""
    return {
        "model": config.model(),
        "task": task,
        "path": config.path_of(task),
        "size": size or config.size,
        "batch_size": config.batch_size,
        "runs": list(runs),
    }


def one_run(name: str, method: str = "full", stages: Stages = (), policy: str = "", seed: int = 0) -> dict[str, Any]:
    """One of the runs of ``evaluate``."""
    return {"name": name, "method": method, "stages": [list(one) for one in stages], "policy": policy, "seed": seed}
