"""The reward of Eq. 5 and its variants, and the advantages: by GAE, or within groups of a sample's episodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALPHA_SCHEDULES = ("paper", "increasing_early", "constant")
REWARDS = ("dense", "terminal")
REWARD_QS = ("ratio", "prob_ratio", "metric")
REWARD_TERMS = ("both", "quality", "retention")
MAX_PROB_RATIO = 2.0


def alphas(num_stages: int, eta: float, schedule: str = "paper") -> Tensor:
    """The weight of the retention term at each stage, float32 ``[T]``.

    "paper" is Eq. 5's alpha_t = eta^(T-t): for T = 3 and eta = .95 it is .9025, .95, 1, so it is *weakest* at the
    early stage, although the text says that it "increases the incentive for pruning at earlier steps".
    "increasing_early" is eta^(t-1), which does what the text says; "constant" is 1.

    Raises:
        ValueError: unknown schedule.
    """
    steps = torch.arange(num_stages, dtype=torch.float32)
    if schedule == "paper":
        return eta ** (num_stages - 1 - steps)
    if schedule == "increasing_early":
        return eta**steps
    if schedule == "constant":
        return torch.ones(num_stages)
    raise ValueError(f"alpha_schedule={schedule!r} must be one of {ALPHA_SCHEDULES}")


def usable_samples(reward_q: str, quality: Tensor) -> Tensor:
    """Numbers of the samples that can be trained on: Q_p / Q is undefined where the unpruned model's Q is 0.

    Raises:
        ValueError: unknown reward_q.
    """
    _check_reward_q(reward_q)
    return (quality.nonzero() if reward_q == "ratio" else torch.ones_like(quality).nonzero()).flatten()


def reward_quality(reward_q: str, pruned: Tensor, unpruned: Tensor) -> Tensor:
    """r^Q of each episode, ``[B]``.

    Args:
        reward_q: "ratio" is Q_p / Q (Eq. 1); "metric" is Q_p; "prob_ratio" is the ratio of the reference answer's
            probability with and without pruning, as a geometric mean over its tokens, and at most ``MAX_PROB_RATIO``:
            where the unpruned model finds the answer all but impossible, the ratio says nothing.
        pruned, unpruned: Q_p and Q, or mean log-probabilities (``answer_log_prob``) for "prob_ratio"; ``[B]``.

    Raises:
        ValueError: unknown reward_q.
    """
    _check_reward_q(reward_q)
    if reward_q == "metric":
        return pruned
    return pruned / unpruned if reward_q == "ratio" else (pruned - unpruned).exp().clamp(max=MAX_PROB_RATIO)


def _check_reward_q(reward_q: str) -> None:
    if reward_q not in REWARD_QS:
        raise ValueError(f"reward_q={reward_q!r} must be one of {REWARD_QS}")


def retention_term(
    retained: Tensor, num_visual: Tensor, layers: Sequence[int], num_layers: int, budget: float
) -> Tensor:
    """What the rewards of an episode pay for the tokens it keeps, ``[B, T]``; differentiable.

    Without a budget (0) it is L_t / L (Eq. 5). With one it is, at every stage, how far the episode's average of tokens
    over all decoder layers is from the budget, as a share of the budget.

    Args:
        retained: L_t / L, ``[B, T]``.
        num_visual: L, ``[B]``.
        layers: before which the stages prune, of ``num_layers``.
        budget: average tokens over all layers, as ``Schedule.average_tokens`` counts them.
    """
    if not budget:
        return retained
    spans = torch.tensor([*layers, num_layers]).diff().to(retained)
    average = num_visual.to(retained) * (layers[0] + retained @ spans) / num_layers
    return ((average - budget).abs() / budget)[:, None].expand_as(retained)


def check_budget(budget: float, num_visual: int, layers: Sequence[int], num_layers: int) -> None:
    """Refuse a budget that no policy can reach.

    Args:
        num_visual: visual tokens of the sample that has most.

    Raises:
        ValueError: the message states the bounds.
    """
    floor = num_visual * layers[0] / num_layers
    if budget and not floor <= budget <= num_visual:
        raise ValueError(
            f"--budget {budget:g} is impossible with --stage_layers {' '.join(map(str, layers))}: the first "
            f"{layers[0]} of {num_layers} layers see all visual tokens (up to {num_visual}), so it lies between "
            f"{floor:g} and {num_visual}"
        )


def stage_rewards(
    quality: Tensor, retained: Tensor, alpha: Tensor, reward: str = "dense", terms: str = "both"
) -> Tensor:
    """r_t = r^Q - alpha_t * L_t / L (Eq. 5).

    Args:
        quality: r^Q of each sample, ``[B]`` (``reward_quality``).
        retained: L_t / L after each stage, ``[B, T]``, or what stands for it (``retention_term``).
        alpha: ``[T]``.
        reward: "dense" gives r^Q to every stage (the paper), "terminal" to the last one only.
        terms: "both" is Eq. 5; "quality" leaves the retention term out, "retention" leaves r^Q out (ablations).

    Returns:
        ``[B, T]``.

    Raises:
        ValueError: unknown reward or terms.
    """
    if reward not in REWARDS:
        raise ValueError(f"reward={reward!r} must be one of {REWARDS}")
    if terms not in REWARD_TERMS:
        raise ValueError(f"terms={terms!r} must be one of {REWARD_TERMS}")
    if terms == "retention":
        return -alpha * retained
    shared = quality[:, None].expand_as(retained)
    if reward == "terminal":
        shared = shared * torch.nn.functional.one_hot(torch.tensor(retained.shape[1] - 1), retained.shape[1])
    return shared if terms == "quality" else shared - alpha * retained


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of episodes of fixed length T; the last stage is terminal, so nothing is bootstrapped.

    Args:
        rewards, values: ``[B, T]``.
        gamma: discount factor (Eq. 4).
        gae_lambda: 0 is one-step temporal difference, 1 is Monte Carlo.

    Returns:
        advantages ``[B, T]`` and returns (advantages + values) ``[B, T]``.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = delta + gamma * gae_lambda * running
        advantages[:, t] = running
    return advantages, advantages + values


def group_advantages(rewards: Tensor, gamma: float, group_size: int) -> tuple[Tensor, Tensor]:
    """Discounted returns against their mean over the episodes of the same sample, at each stage.

    Args:
        rewards: ``[B, T]``, the episodes of a sample next to each other.
        gamma: discount factor (Eq. 4).
        group_size: episodes of each sample; B is a multiple of it.

    Returns:
        advantages ``[B, T]`` and returns ``[B, T]``.
    """
    returns, _ = gae(rewards, torch.zeros_like(rewards), gamma, 1.0)
    groups = returns.unflatten(0, (-1, group_size))
    return (groups - groups.mean(1, keepdim=True)).flatten(0, 1), returns
