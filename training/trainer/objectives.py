"""The losses of actor and critic and the gradient steps over one rollout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toprl_models import TopRLPolicy
from training.rollout import Rollout, evaluate_actions
from training.trainer.config import PPOConfig


def normalise(advantages: Tensor) -> Tensor:
    """Zero mean and unit deviation within a minibatch of one stage."""
    if len(advantages) < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, valid: Tensor, advantage: Tensor, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate over the surviving tokens of one stage.

    Args:
        log_prob, old_log_prob: ``[B, V]``, 0 where a token was dropped before.
        valid: bool ``[B, V]``.
        advantage: ``[B]``.

    Returns:
        The loss and its statistics (clip fraction, k1 and k3 estimates of KL(old || new), largest ratio).
    """
    weight = valid.float()
    tokens = weight.sum(1)
    log_ratio = (log_prob - old_log_prob) * weight
    if config.ratio_level == "token":
        advantage = advantage[:, None].expand_as(log_ratio)
    else:
        log_ratio = log_ratio.sum(1)
        if config.ratio_level == "mean":
            log_ratio = log_ratio / tokens.clamp(min=1)
        weight = (tokens > 0).float()
    log_ratio = log_ratio.clamp(-10, 10)  # exp of an outlier would be infinite
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    total = weight.sum().clamp(min=1)
    with torch.no_grad():
        statistics = {
            "clip_fraction": (((ratio - 1).abs() > config.clip_range) * weight).sum() / total,
            "kl_k1": -(log_ratio * weight).sum() / total,
            "kl_k3": ((ratio - 1 - log_ratio) * weight).sum() / total,
            "ratio_max": (ratio * weight).max() if weight.numel() else ratio.new_tensor(1.0),
        }
    return -(surrogate * weight).sum() / total, statistics


def update(
    policy: TopRLPolicy,
    optimizer: torch.optim.Optimizer,
    episodes: Rollout,
    advantages: Tensor,
    returns: Tensor,
    config: PPOConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """PPO epochs over one rollout; returns the mean of each statistic over the minibatches done."""
    size = len(episodes.quality)
    sums: dict[str, float] = {}
    done, epochs_done, first = 0, 0, True
    for _ in range(config.ppo_epochs):
        kl = 0.0
        for rows in torch.randperm(size, generator=generator).split(config.minibatch_size):
            losses, statistics = [], []
            for stage, step in enumerate(episodes.steps):
                batch = step.select(rows.to(step.value.device))
                log_prob, entropy, value = evaluate_actions(policy, batch, stage)
                if first and not torch.allclose(log_prob, batch.log_prob, atol=1e-4):
                    gap = (log_prob - batch.log_prob).abs().max().item()
                    raise RuntimeError(f"stage {stage}: ratio is not 1 before the first step (log gap {gap:.2e})")
                advantage = normalise(advantages[rows, stage]).to(value.device)
                loss, one = policy_loss(log_prob, batch.log_prob, batch.valid_mask, advantage, config)
                value_loss = 0.5 * (value - returns[rows, stage].to(value.device)).square().mean()
                bonus = entropy.sum() / batch.valid_mask.sum().clamp(min=1)
                losses.append(loss + config.value_coef * value_loss - config.entropy_coef * bonus)
                statistics.append({**one, "policy_loss": loss, "value_loss": value_loss, "entropy": bonus})
            first = False
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).mean().backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()
            for name in statistics[0]:
                values = [float(s[name].detach()) for s in statistics]
                mean = max(values) if name == "ratio_max" else sum(values) / len(values)
                sums[name] = sums.get(name, 0.0) + mean
                kl += mean / max(1, size / config.minibatch_size) if name == "kl_k3" else 0.0
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + float(norm)
            done += 1
        epochs_done += 1
        if config.target_kl and kl > config.target_kl:
            break
    return {name: total / done for name, total in sums.items()} | {"epochs": float(epochs_done)}
