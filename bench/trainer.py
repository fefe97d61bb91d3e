"""Where a training run's time goes, and what dropping tokens instead of masking them saves a rollout.

    python bench/run.py --suite trainer

Phases: ``training/ppo.py`` with its default settings (no validation), from its own metrics; ``seconds`` are medians
over the iterations, ``share`` is of all iterations together. "setup" is all that comes before: loading the model,
making the scenes, the unpruned model's Q of every sample.

Rollouts: the same episodes compacted and masked, in turn, for three actors: the initial one of a training run, one
that keeps half at each stage, and one that keeps little; ``ratio_to_mask`` is time masked / time compacted.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from bench.common import Report, Row, time_interleaved
from toprl_models import Schedule, TopRLPolicy, tiny
from training.ppo import PPOConfig, main
from training.rollout import Rollout, rollout
from training.tasks import make_task
from training.trainer.data import FeatureCache, TrainingData

KEEP_BIASES = {"initial": 1.5, "half": 0.0, "few": -1.5}  # of the actor's logits; 1.5 keeps .82 of a stage's tokens
PREFIX = "seconds_"  # of the phases' names in metrics.jsonl


def run(size: str, device: torch.device, report: Report) -> None:
    """One row per phase of an iteration, then one per way of rolling out."""
    iterations, train_size, budget = (20, 2048, 10.0) if size == "full" else (4, 256, 1.0)
    common = {"suite": "trainer", "threads": torch.get_num_threads()}
    for rows in (phases(iterations, train_size, device), rollouts(budget, device)):
        report.add([common | row for row in rows])


def phases(iterations: int, train_size: int, device: torch.device) -> list[Row]:
    """Setup, a whole iteration, and its phases."""
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, iterations=iterations, train_size=train_size, eval_every=0, device=str(device)
        )
        began = time.perf_counter()
        main(config)
        whole = time.perf_counter() - began
        metrics = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    names = dict.fromkeys(name for row in metrics for name in row if name.startswith(PREFIX))
    seconds = {name.removeprefix(PREFIX): [row.get(name, 0.0) for row in metrics] for name in names}
    everything = sum(map(sum, seconds.values()))
    iteration = statistics.median(row["seconds"] for row in metrics)
    rows = [
        {"part": "setup", "seconds": whole - max(sum(row["seconds"] for row in metrics), everything)},
        {"part": "iteration", "seconds": iteration, "samples_per_second": config.rollout_size / iteration},
    ]
    for name, values in seconds.items():
        rows.append({"part": name, "seconds": statistics.median(values), "share": sum(values) / everything})
    return [{"case": "default", "iterations": iterations, **row} for row in rows]


def rollouts(budget: float, device: torch.device) -> list[Row]:
    """The same episodes in both modes, ``budget`` seconds for each actor."""
    config = PPOConfig()
    model, processor = tiny.load(device=device)
    size = config.rollout_size
    task = make_task(config.task, "train", size)
    data = TrainingData(task, [task[i] for i in range(size)], torch.ones(size), FeatureCache(config.feature_cache_mb))
    schedule = Schedule(tuple((layer, 1.0) for layer in config.stage_layers))
    rows = []
    for name, keep_bias in KEEP_BIASES.items():
        torch.manual_seed(0)
        policy = TopRLPolicy(tiny.HIDDEN_SIZE, config.stage_layers, config.actor_size, keep_bias=keep_bias).to(device)

        def episodes(mode: str, policy: TopRLPolicy = policy) -> Rollout:
            inputs = data.inputs(model, processor, range(size))
            arguments = (model, processor, policy, schedule, task, data.samples, inputs)
            return rollout(*arguments, episodes=torch.arange(size), seed=0, tau=1.0, mode=mode)

        modes = {mode: partial(episodes, mode) for mode in ("compact", "mask")}
        timings = time_interleaved(modes, device, seconds=budget, min_rounds=3)
        kept = "/".join(f"{share:.2f}" for share in episodes("compact").retained.mean(0).tolist())
        for mode, timing in timings.items():
            rows.append({
                "case": f"{name} actor, keeps {kept}", "part": f"rollout {mode}", "iterations": timing.rounds,
                "seconds": timing.p50_ms / 1e3, "samples_per_second": size / timing.p50_ms * 1e3,
                "ratio_to_mask": timings["mask"].p50_ms / timing.p50_ms,
            })  # fmt: skip
    return rows
