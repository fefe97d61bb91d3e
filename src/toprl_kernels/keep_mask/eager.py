"""Keep-mask sampling in plain PyTorch, in terms of the logit difference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels.keep_mask.random import token_uniform


def draw_uniform(shape: torch.Size, seed: Tensor, token_ids: Tensor | None) -> Tensor:
    """The noise of a call, [B, N] float32 in (0, 1)."""
    if token_ids is None:
        token_ids = torch.arange(shape.numel(), device=seed.device).view(shape)
    return token_uniform(seed, token_ids)


def _difference_and_margin(
    logits: Tensor, uniform: Tensor | None, seed: Tensor | None, token_ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logit difference and, unless a mask is given, the difference plus logistic noise."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    delta = logits[..., 0] - logits[..., 1]
    if seed is not None:
        uniform = draw_uniform(delta.shape, seed, token_ids).to(delta.dtype)
    if uniform is None:
        return delta, None
    return delta, delta + (torch.log(uniform) - torch.log1p(-uniform))


def keep_mask_eager(
    logits: Tensor,
    uniform: Tensor | None,
    given: Tensor | None,
    seed: Tensor | None,
    token_ids: Tensor | None,
    previous_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep mask (empty for a given one), log-probability and entropy. One of ``uniform``, ``given``, ``seed`` is set.

    Logits may have any floating dtype; see :func:`keep_mask_reference` for the other arguments.
    """
    delta, margin = _difference_and_margin(logits, uniform, seed, token_ids)
    if margin is not None:
        hard = margin > 0
        keep_mask = hard.to(delta.dtype)
    else:
        assert given is not None
        hard = given
        keep_mask = delta.new_empty(0)
    # log-sigmoid of the difference stays exact where log(softmax) rounds to log 0
    log_prob = F.logsigmoid(torch.where(hard, delta, -delta))
    # H = p log(1/p) + (1 - p) log(1/(1 - p)), each logarithm a softplus of the difference
    entropy = torch.sigmoid(delta) * F.softplus(-delta) + torch.sigmoid(-delta) * F.softplus(delta)
    if previous_mask is not None:
        dropped = ~previous_mask
        keep_mask = keep_mask.masked_fill(dropped, 0.0) if margin is not None else keep_mask
        log_prob = log_prob.masked_fill(dropped, 0.0)
        entropy = entropy.masked_fill(dropped, 0.0)
    return keep_mask, log_prob, entropy


def keep_mask_backward_eager(
    logits: Tensor,
    grad_keep_mask: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    uniform: Tensor | None,
    given: Tensor | None,
    seed: Tensor | None,
    token_ids: Tensor | None,
    previous_mask: Tensor | None,
    tau: float,
) -> Tensor:
    """Gradient of the logits, [B, N, 2]."""
    delta, margin = _difference_and_margin(logits, uniform, seed, token_ids)
    hard = given if margin is None else margin > 0
    assert hard is not None
    p_keep, p_drop = torch.sigmoid(delta), torch.sigmoid(-delta)
    total = torch.zeros_like(delta)
    if grad_log_prob is not None:  # d log p = 1 - p of what was chosen
        total = total + grad_log_prob * torch.where(hard, p_drop, -p_keep)
    if grad_entropy is not None:  # dH = -delta p (1 - p)
        total = total - grad_entropy * delta * p_keep * p_drop
    if grad_keep_mask is not None and margin is not None:  # straight through: d sigmoid(margin / tau)
        total = total + grad_keep_mask * torch.sigmoid(margin / tau) * torch.sigmoid(-margin / tau) / tau
    if previous_mask is not None:
        total = total.masked_fill(~previous_mask, 0.0)
    return torch.stack([total, -total], dim=-1).to(logits.dtype)
