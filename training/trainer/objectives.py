"""The losses of actor and critic and the gradient steps over one rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toprl_models import TopRLPolicy
from training.rollout import Rollout
from training.trainer.config import PPOConfig
from training.trainer.packed import PackedRollout, Tokens, segment_sum
from training.trainer.ranks import Ranks
from training.trainer.watch import require_finite

# Of episodes (numbers within this process's share) out of a minibatch of so many: loss and statistics, each a sum over
# these episodes divided by that number
TaskLoss = Callable[[Tensor, int], tuple[Tensor, dict[str, Tensor]]]
PPO_STATISTICS = ("policy_loss", "value_loss", "entropy", "kl_k1", "kl_k3", "clip_fraction", "ratio_mean")
TASK_STATISTICS = ("answer_loss", "relaxed_retention")


class Targets(NamedTuple):
    """What the S segments (an episode at a stage each, stage by stage) of a minibatch are trained on, each ``[S]``.

    The weights make sums over all segments, of all processes, the mean over the stages of a mean over tokens
    (``token_weight``), over ratios (``ratio_weight``: of tokens, or of episodes that have any) or over episodes
    (``row_weight``).
    """

    advantage: Tensor
    returns: Tensor
    token_weight: Tensor
    ratio_weight: Tensor
    row_weight: Tensor


def normalise(advantages: Tensor) -> Tensor:
    """Zero mean and unit deviation within a minibatch ``[M, T]``, each stage by itself."""
    if len(advantages) < 2:
        return advantages
    return (advantages - advantages.mean(0)) / (advantages.std(0) + 1e-8)


def targets(advantages: Tensor, returns: Tensor, counts: Tensor, mine: Tensor, token_level: bool) -> Targets:
    """For the rows ``mine`` (bool ``[M]``) of a minibatch of M episodes over all processes; all on the host.

    Args:
        advantages, returns: ``[M, T]``.
        counts: int64 ``[M, T]``, surviving tokens before each stage acts.
        token_level: whether each token has its own ratio.
    """
    size, stages = counts.shape
    per_token = 1 / counts.sum(0).clamp(min=1) / stages
    per_row = torch.full((stages,), 1 / size / stages)
    # an episode without tokens has no action, hence no ratio
    per_ratio = per_token.expand_as(counts) if token_level else (counts > 0) / (counts > 0).sum(0).clamp(min=1) / stages
    values = (normalise(advantages), returns, per_token.expand_as(counts), per_ratio, per_row.expand_as(counts))
    return Targets(*(value[mine].T.flatten() for value in values))


def policy_loss(
    log_ratio: Tensor, lengths: Tensor, segment: Tensor, advantage: Tensor, weight: Tensor, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate over the surviving tokens of S segments.

    Args:
        log_ratio: of the recorded actions, new minus old, ``[n]``.
        lengths: int64 ``[S]``, the tokens of each segment; ``segment`` int64 ``[n]`` tells the segment of each token.
        advantage, weight: ``[S]``.

    Returns:
        The loss, and sums of its statistics with the same weights (k1 and k3 estimate KL(old || new)); ``ratio_max``
        is the largest ratio.
    """
    if config.ratio_level == "token":
        advantage, weight = advantage[segment], weight[segment]
    else:
        log_ratio = segment_sum(log_ratio, lengths)
        if config.ratio_level == "mean":
            log_ratio = log_ratio / lengths.clamp(min=1)
    log_ratio = log_ratio.clamp(-10, 10)  # exp of an outlier would be infinite
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    loss = -(torch.minimum(ratio * advantage, clipped * advantage) @ weight)
    with torch.no_grad():
        outside = ((ratio - 1).abs() > config.clip_range).to(ratio.dtype)
        sums = torch.stack([-log_ratio, ratio - 1 - log_ratio, outside, ratio]) @ weight
        statistics = dict(zip(("kl_k1", "kl_k3", "clip_fraction", "ratio_mean"), sums, strict=True))
        statistics["ratio_max"] = ratio.max() if len(ratio) else ratio.new_zeros(())
    return loss, statistics


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the squared error of each estimate; with a clip range no less than that of the clipped estimate."""
    error = (value - returns).square()
    if clip_range:
        clipped = old_value + (value - old_value).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


def ppo_loss(
    policy: TopRLPolicy, tokens: Tokens, target: Targets, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The part of a minibatch's loss that belongs to ``tokens``; its statistics and the log-ratios ``[n]``."""
    log_prob, entropy = tokens.evaluate(policy)
    log_ratio = log_prob - tokens.log_prob
    clipped, statistics = policy_loss(
        log_ratio, tokens.lengths, tokens.segment, target.advantage, target.ratio_weight, config
    )
    bonus = entropy @ target.token_weight[tokens.segment]
    loss = clipped - config.entropy_coef * bonus
    error = clipped.new_zeros(())
    if config.baseline == "critic":
        error = value_loss(tokens.values(policy), tokens.value, target.returns, config.clip_range_value)
        error = error @ target.row_weight
        loss = loss + config.value_coef * error
    return loss, statistics | {"policy_loss": clipped, "value_loss": error, "entropy": bonus}, log_ratio.detach()


def check_ratio(log_ratio: Tensor, lengths: Tensor, stages: int, ranks: Ranks) -> None:
    """Before the first step the policy is the one that acted; every process raises where one of them finds otherwise.

    Raises:
        RuntimeError: some log-ratio is not 0 up to rounding.
    """
    parts = log_ratio.abs().split(lengths.view(stages, -1).sum(1).tolist())
    gaps = torch.stack([part.max() if len(part) else part.new_zeros(()) for part in parts])
    for stage, gap in enumerate(ranks.gather(gaps[None], ranks.size).amax(0).tolist()):
        if not gap < 1e-4:  # nor NaN
            raise RuntimeError(f"stage {stage}: ratio is not 1 before the first step (log gap {gap:.2e})")


def gradient_step(
    policy: TopRLPolicy, optimizer: torch.optim.Optimizer, loss: Tensor, ranks: Ranks, max_grad_norm: float
) -> Tensor:
    """One step on the sum of the ``loss`` of all processes; returns the norm of its gradient before clipping.

    Raises:
        NotFiniteError: the loss or a gradient is not finite; the weights are as they were.
    """
    optimizer.zero_grad(set_to_none=True)
    if loss.requires_grad:  # not the straight-through loss alone of no episode
        loss.backward()
    ranks.sum_gradients(list(policy.parameters()))
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    require_finite(loss=loss.detach(), gradient_norm=norm)
    optimizer.step()
    return norm


def update(
    policy: TopRLPolicy,
    optimizer: torch.optim.Optimizer,
    episodes: Rollout,
    advantages: Tensor,
    returns: Tensor,
    config: PPOConfig,
    generator: torch.Generator,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    task_loss: TaskLoss | None = None,
) -> dict[str, float]:
    """The gradient steps over one rollout of B episodes.

    With PPO there are ``config.ppo_epochs`` passes, fewer where ``config.target_kl`` is passed; the straight-through
    loss is part of the first pass, since it runs the model again. With ``--objective straight_through`` it is the only
    loss, of one pass; PPO's are measured all the same.

    Args:
        episodes: those that are this process's, ``ranks.share(B)``.
        advantages, returns: ``[B, T]`` of all processes, on the host.
        generator: of the minibatches; in the same state in all processes.
        task_loss: of the objectives straight_through and hybrid.

    Returns:
        Means over the minibatches done (``ratio_max``: the largest), the same in all processes.

    Raises:
        RuntimeError: the recorded log-probabilities are not those of ``policy``.
        NotFiniteError: a loss or gradient is not finite.
    """
    uses_ppo = config.objective != "straight_through"
    size, stages = advantages.shape
    share, device = ranks.share(size), episodes.steps[0].value.device
    packed = PackedRollout(episodes.steps)
    counts = ranks.gather(packed.counts.T.to(device), size).cpu()
    names = PPO_STATISTICS + TASK_STATISTICS * (task_loss is not None)
    totals, norm_total, largest = torch.zeros(len(names)), 0.0, 0.0
    done = epochs = 0
    while epochs < (config.ppo_epochs if uses_ppo else 1):
        # on the device until the pass ends, so that no minibatch waits for it
        sums = {name: torch.zeros((), device=device) for name in names}
        peak, norms = torch.zeros((), device=device), torch.zeros((), device=device)
        minibatches = torch.randperm(size, generator=generator).split(config.minibatch_size)
        for rows in minibatches:
            mine = (rows >= share.start) & (rows < share.stop)
            own = rows[mine] - share.start
            target = targets(advantages[rows], returns[rows], counts[rows], mine, config.ratio_level == "token")
            target = Targets(*(value.to(device, non_blocking=True) for value in target))
            tokens = packed.select(own)
            with torch.set_grad_enabled(uses_ppo):
                loss, statistics, log_ratio = ppo_loss(policy, tokens, target, config)
            if not done:
                check_ratio(log_ratio, tokens.lengths, stages, ranks)
            peak = torch.maximum(peak, statistics.pop("ratio_max"))
            if task_loss is not None and not epochs and len(own):
                relaxed, more = task_loss(own, len(rows))
                loss = loss + relaxed * config.straight_through_coef if uses_ppo else relaxed
                statistics |= more
            for name, value in statistics.items():
                sums[name] += value.detach()
            norms += gradient_step(policy, optimizer, loss, ranks, config.max_grad_norm)
            done += 1
        epochs += 1
        means = ranks.sum(torch.stack([sums[name] for name in names])).cpu() / len(minibatches)
        totals, norm_total = totals + means, norm_total + norms.item() / len(minibatches)
        largest = max(largest, ranks.gather(peak[None], ranks.size).max().item())
        if config.target_kl and means[names.index("kl_k3")] > config.target_kl:
            break
    # the straight-through loss is in the first pass alone
    result = {n: t / (1 if n in TASK_STATISTICS else epochs) for n, t in zip(names, totals.tolist(), strict=True)}
    return result | {"ratio_max": largest, "grad_norm": norm_total / epochs, "epochs": float(epochs)}
