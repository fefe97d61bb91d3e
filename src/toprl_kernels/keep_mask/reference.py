"""The definition: a two-class softmax per token, and the Gumbel-max rule in its one-variable form."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Draw(NamedTuple):
    """Logits and where the decision comes from, checked: one of ``uniform``, ``given``, ``seed`` is set."""

    logits: Tensor  # [B, N, 2], any floating dtype
    uniform: Tensor | None  # [B, N], the noise
    given: Tensor | None  # [B, N] bool, the decision itself
    seed: Tensor | None  # int64 [1]
    token_ids: Tensor | None  # int64 [B, N]
    previous_mask: Tensor | None  # [B, N] bool


def keep_mask_reference(x: Draw, uniform: Tensor | None, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """(keep_mask, log_prob, entropy), each [B, N], in at least float32; ``uniform`` is the noise unless it is given.

    Keep wins when logit_keep + g_keep > logit_drop + g_drop with Gumbel noise g; the difference of two Gumbel
    variables is logistic, log u - log(1 - u). The relaxed sample is softmax((logits + g) / tau).
    """
    logits, dropped = x.logits.to(torch.promote_types(x.logits.dtype, torch.float32)), None
    if x.previous_mask is not None:
        dropped = ~x.previous_mask
        logits = logits.masked_fill(dropped[..., None], 0.0)  # whatever such a token holds, its gradient is 0
    largest = torch.finfo(logits.dtype).max  # an infinite difference would make the entropy 0 * inf
    delta = (logits[..., 0] - logits[..., 1]).clamp(-largest, largest)
    # log-sigmoid of the difference stays exact where log(softmax) rounds to log 0
    log_keep, log_drop = F.logsigmoid(delta), F.logsigmoid(-delta)
    entropy = -(log_keep.exp() * log_keep + log_drop.exp() * log_drop)
    if x.given is not None:
        hard = x.given
        keep_mask = hard.to(delta.dtype)
    else:
        assert uniform is not None
        margin = delta + torch.log(uniform) - torch.log1p(-uniform)
        hard, soft = margin > 0, torch.sigmoid(margin / tau)
        keep_mask = hard.to(soft.dtype) + (soft - soft.detach())  # bracketed: exactly 0 or 1
    results = keep_mask, torch.where(hard, log_keep, log_drop), entropy
    if dropped is None:
        return results
    keep_mask, log_prob, entropy = (part.masked_fill(dropped, 0.0) for part in results)
    return keep_mask, log_prob, entropy
