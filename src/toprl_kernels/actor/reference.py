"""The definition of actor_score, one line per layer, looping over samples for the masked mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toprl_kernels.actor.weights import LAYER_NORM_EPS, ActorWeights


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def actor_score_reference(
    hidden_states: Tensor,  # [B, N, d1]
    stage: int,
    weights: ActorWeights,
    *,
    valid_mask: Tensor | None,  # [B, N]
) -> Tensor:  # [B, N, 2]
    """Everything in the dtype of the weights."""
    w = weights
    hidden_states = hidden_states.to(w.fc1_weight.dtype)
    half = w.fc1_weight.shape[0] // 2
    mean = hidden_states.mean(dim=-1, keepdim=True)
    variance = ((hidden_states - mean) ** 2).mean(dim=-1, keepdim=True)
    normed = (hidden_states - mean) / torch.sqrt(variance + LAYER_NORM_EPS) * w.norm_weight + w.norm_bias
    z = _gelu(normed @ w.fc1_weight.T + w.fc1_bias + w.stage_bias[stage])

    summaries = []  # the mean of the second half over the sample's valid tokens
    for sample in range(z.shape[0]):
        tokens = z[sample, :, half:]
        if valid_mask is not None:
            tokens = tokens[valid_mask[sample]]
        summaries.append(tokens.mean(dim=0) if tokens.shape[0] else tokens.sum(dim=0))
    summary = torch.stack(summaries) if summaries else z.new_zeros(0, half)
    z = torch.cat([z[..., :half], summary[:, None, :].expand(-1, z.shape[1], -1)], dim=-1)

    z = _gelu(z @ w.fc2_weight.T + w.fc2_bias)
    z = _gelu(z @ w.fc3_weight.T + w.fc3_bias)
    return z @ w.head_weight.T + w.head_bias
