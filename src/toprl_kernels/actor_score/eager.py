"""actor_score in plain PyTorch; autograd does its backward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from toprl_kernels.actor_score.weights import LAYER_NORM_EPS, ActorWeights


def actor_score_eager(
    hidden_states: Tensor,
    stage: int,
    weights: ActorWeights,
    *,
    valid_mask: Tensor | None,
) -> Tensor:
    """Same contract as the public function; arguments already checked."""
    w = weights
    width, d1 = w.fc1_weight.shape
    half = width // 2
    x = F.layer_norm(hidden_states.to(w.fc1_weight.dtype), (d1,), w.norm_weight, w.norm_bias, LAYER_NORM_EPS)
    z = F.gelu(F.linear(x, w.fc1_weight, w.fc1_bias + w.stage_bias[stage]))
    local, shared = z[..., :half], z[..., half:]
    if valid_mask is None:
        summary = shared.sum(dim=1) / max(z.shape[1], 1)
    else:
        count = valid_mask.sum(dim=1, keepdim=True).clamp(min=1)
        summary = shared.masked_fill(~valid_mask[..., None], 0.0).sum(dim=1) / count
    # the summary is the same for all tokens of a sample, so its half of fc2 is applied once per sample
    from_summary = F.linear(summary, w.fc2_weight[:, half:], w.fc2_bias)
    z = F.gelu(F.linear(local, w.fc2_weight[:, :half]) + from_summary[:, None, :])
    z = F.gelu(F.linear(z, w.fc3_weight, w.fc3_bias))
    return F.linear(z, w.head_weight, w.head_bias)
