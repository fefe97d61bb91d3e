"""The definition: a two-class softmax per token, and the Gumbel-max rule in its one-variable form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Draw(NamedTuple):
    """Logits and where the decision comes from, checked: one of ``uniform``, ``given``, ``seed`` is set."""

    logits: Tensor  # [B, N, 2], any floating dtype
    uniform: Tensor | None  # [B, N], the noise
    given: Tensor | None  # [B, N] bool, the decision itself
    seed: Tensor | None  # int64 [1]
    token_ids: Tensor | None  # int64 [B, N]
    previous_mask: Tensor | None  # [B, N] bool


def keep_mask_reference(x: Draw, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """(keep_mask, log_prob, entropy), each [B, N].

    Keep wins when logit_keep + g_keep > logit_drop + g_drop with Gumbel noise g; the difference of two Gumbel
    variables is logistic, log u - log(1 - u). The relaxed sample is softmax((logits + g) / tau).
    """
    logits, uniform, previous_mask = x.logits, x.uniform, x.previous_mask
    log_probs = torch.log_softmax(logits, dim=-1).clamp(min=torch.finfo(logits.dtype).min)  # 0 * -inf is NaN
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    if uniform is not None:
        noise = torch.log(uniform) - torch.log1p(-uniform)
        margin = logits[..., 0] - logits[..., 1] + noise
        hard = margin > 0
        soft = torch.sigmoid(margin / tau)
        keep_mask = hard.to(soft.dtype) + (soft - soft.detach())  # bracketed: exactly 0 or 1
    else:
        assert x.given is not None
        hard = x.given
        keep_mask = hard.to(logits.dtype)
    log_prob = torch.where(hard, log_probs[..., 0], log_probs[..., 1])
    if previous_mask is not None:
        zero = torch.zeros_like(log_prob)
        keep_mask = torch.where(previous_mask, keep_mask, zero)
        log_prob = torch.where(previous_mask, log_prob, zero)
        entropy = torch.where(previous_mask, entropy, zero)
    return keep_mask, log_prob, entropy
