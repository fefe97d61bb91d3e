"""Keep-mask sampling in plain PyTorch, in terms of the logit difference; autograd does its backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def keep_mask_eager(
    logits: Tensor,
    *,
    uniform: Tensor | None,
    given: Tensor | None,
    tau: float,
    previous_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits are float32 or float64 here. See :func:`keep_mask_reference` for the arguments."""
    delta = logits[..., 0] - logits[..., 1]
    if uniform is not None:
        margin = delta + (torch.log(uniform) - torch.log1p(-uniform))
        hard = margin > 0
        soft = torch.sigmoid(margin / tau)
        keep_mask = hard.to(delta.dtype) + (soft - soft.detach())
    else:
        assert given is not None
        hard = given
        keep_mask = hard.to(delta.dtype)
    # log-sigmoid of the difference stays exact where log(softmax) rounds to log 0
    log_prob = F.logsigmoid(torch.where(hard, delta, -delta))
    # H = p log(1/p) + (1 - p) log(1/(1 - p)), each logarithm a softplus of the difference
    entropy = torch.sigmoid(delta) * F.softplus(-delta) + torch.sigmoid(-delta) * F.softplus(delta)
    if previous_mask is not None:
        dropped = ~previous_mask
        keep_mask = keep_mask.masked_fill(dropped, 0.0)
        log_prob = log_prob.masked_fill(dropped, 0.0)
        entropy = entropy.masked_fill(dropped, 0.0)
    return keep_mask, log_prob, entropy
