"""The reward of Eq. 5 and the advantages of generalised advantage estimation (GAE)."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA_SCHEDULES = ("paper", "increasing_early", "constant")
REWARDS = ("dense", "terminal")
REWARD_TERMS = ("both", "quality", "retention")


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


def stage_rewards(
    quality: Tensor, retained: Tensor, alpha: Tensor, reward: str = "dense", terms: str = "both"
) -> Tensor:
    """r_t = r^Q - alpha_t * L_t / L (Eq. 5).

    Args:
        quality: r^Q = Q_p / Q of each sample, ``[B]``.
        retained: L_t / L after each stage, ``[B, T]``.
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
