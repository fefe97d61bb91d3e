"""How good the policy is on samples that it does not train on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toprl_models import Policy, Schedule, TopRLPolicy, attach
from training.rewards import alphas, retention_term, reward_quality, stage_rewards, usable_samples
from training.rollout import ArgmaxPolicy
from training.tasks import Task, answer, device_of, make_task
from training.tasks.benchmarks import BENCHMARKS
from training.trainer.config import PPOConfig
from training.trainer.data import TrainingData
from training.trainer.ranks import Ranks

ENOUGH = 0.9  # share of the unpruned model's accuracy below which the arg-max agent counts as collapsed
MAX_SHARE = 5  # a fifth of the training samples is the most that is split off


def validation_task(config: PPOConfig) -> Task | None:
    """--eval_size samples of the validation split of --task; None where it has none.

    The split that results are reported on never is one. Its samples do not depend on --seed, so that the curves of
    several seeds compare.
    """
    names = ["validation"]  # scenes, own data
    if config.task in BENCHMARKS:
        splits = BENCHMARKS[config.task].splits
        names = [name for name in ("validation", "val") if name in splits and splits[name] != splits["test"]]
    if not names or Path(config.dataset_path or ".").is_file():
        return None
    try:
        return make_task(config.task, names[0], config.eval_size, **_data_options(config))
    except FileNotFoundError:  # a local folder without that split
        return None


def tasks_of(config: PPOConfig) -> tuple[Task, Task | None]:
    """Make the task to train on and the one to validate on; None where samples are split off the former."""
    train = make_task(config.task, "train", config.train_size, seed=config.seed, **_data_options(config))
    return train, validation_task(config) if config.eval_every else None


def _data_options(config: PPOConfig) -> dict[str, Any]:
    return {name: value for name in ("dataset_path", "metric") if (value := getattr(config, name))}


def split_off(data: TrainingData, size: int) -> tuple[TrainingData, TrainingData]:
    """The training samples, and ``size`` of them (at most a fifth) that are kept apart, spread evenly over ``data``.

    Raises:
        ValueError: fewer than five samples.
    """
    number = len(data.samples)
    size = min(size, number // MAX_SHARE)
    if size < 1:
        raise ValueError(f"{number} training samples are too few to hold some out; use more, or --eval_every 0")
    held_out = [(2 * i + 1) * number // (2 * size) for i in range(size)]
    return _part(data, sorted({*range(number)} - {*held_out})), _part(data, held_out)


def _part(data: TrainingData, rows: list[int]) -> TrainingData:
    return replace(data, samples=[data.samples[row] for row in rows], quality=data.quality[rows])


def standing(row: dict[str, Any]) -> tuple[bool, float]:
    """Rank a validation: those that answer nearly as well as the unpruned model first, then by reward.

    Reward alone may stay the same while accuracy is given up for fewer tokens.
    """
    return row["accuracy"] >= ENOUGH * row["full_accuracy"], row["reward"]


def topk_schedule(config: PPOConfig) -> Schedule:
    """The shares of --eval_keep; by default 1/8 of the tokens, and half of that at each further stage."""
    keep = config.eval_keep or [0.5 ** (stage + 3) for stage in range(len(config.stage_layers))]
    return Schedule(tuple((layer, float(share)) for layer, share in zip(config.stage_layers, keep, strict=True)))


def validate(
    model: Any,
    processor: Any,
    policy: TopRLPolicy,
    schedule: Schedule,
    data: TrainingData,
    config: PPOConfig,
    ranks: Ranks,
) -> dict[str, Any]:
    """Accuracy and cost of the policy on held-out samples, with and without a budget; nothing is drawn.

    Returns:
        ``reward``: sum over the stages of Eq. 5 when the agent takes its more likely action for every token, mean over
        the samples that the unpruned model answers; ``accuracy`` (Q_p over all samples) and ``retained`` (per stage) of
        the same; ``topk_accuracy`` and ``topk_retained`` with the budget of ``topk_schedule``; ``full_accuracy`` (Q of
        the unpruned model), ``seconds``.

    Raises:
        ValueError: the unpruned model answers none of the samples.
    """
    began = time.perf_counter()
    # Q_p / Q needs right answers of the unpruned model; prob_ratio is for data where there may be none
    reward_q = "ratio" if config.reward_q == "ratio" else "metric"
    usable = usable_samples(reward_q, data.quality)
    if not len(usable):
        raise ValueError(
            f"--eval_size {config.eval_size}: the unpruned model answers none of the {len(data.samples)} held-out "
            "samples, so that Q_p / Q is undefined; take more, --reward_q prob_ratio, or --eval_every 0"
        )
    quality, retained, num_visual = _answer(model, processor, ArgmaxPolicy(policy), schedule, data, config, ranks)
    topk_quality, topk_retained, _ = _answer(model, processor, policy, topk_schedule(config), data, config, ranks)
    num_layers = model.config.get_text_config().num_hidden_layers
    share = reward_quality(reward_q, quality[usable], data.quality[usable])
    term = retention_term(retained[usable], num_visual[usable], config.stage_layers, num_layers, config.budget)
    alpha = alphas(len(config.stage_layers), config.eta, config.alpha_schedule)
    rewards = stage_rewards(share, term, alpha, config.reward, config.reward_terms)
    return {
        "reward": rewards.sum(1).mean().item(),
        "accuracy": quality.mean().item(),
        "retained": retained.mean(0).tolist(),
        "topk_accuracy": topk_quality.mean().item(),
        "topk_retained": topk_retained.mean(0).tolist(),
        "full_accuracy": data.quality.mean().item(),
        "seconds": time.perf_counter() - began,
    }


def _answer(
    model: Any,
    processor: Any,
    policy: Policy,
    schedule: Schedule,
    data: TrainingData,
    config: PPOConfig,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Q_p ``[n]``, L_t / L ``[n, T]`` and L ``[n]`` of all samples, on the host; each process answers its share."""
    number = len(data.samples)
    mine = list(range(number))[ranks.share(number)]
    batch_size = config.rollout_batch_size or -(-config.rollout_size // ranks.size)
    parts = [torch.zeros(0, 2 + len(config.stage_layers))]
    for first in range(0, len(mine), batch_size):
        rows = mine[first : first + batch_size]
        inputs = data.inputs(model, processor, rows)
        with attach(model, policy, schedule=schedule, mode=config.rollout) as pruner:  # type: ignore[arg-type]
            _, quality = answer(model, processor, data.task, [data.samples[i] for i in rows], inputs)
            counts = torch.tensor([stage.counts for stage in pruner.trace], dtype=torch.float32).T
            num_visual = torch.tensor(pruner.trace[0].num_visual)[:, None]
        parts.append(torch.cat([quality[:, None], counts / num_visual, num_visual], 1))
    table = ranks.gather(torch.cat(parts).to(device_of(model)), number).cpu()
    return table[:, 0], table[:, 1:-1], table[:, -1]
