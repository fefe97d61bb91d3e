"""The definition of actor_score, one line per layer, looping over sequences for the masked mean; and its weights."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5


class ActorWeights(NamedTuple):
    """Parameters of :func:`toprl_kernels.actor_score`; d1 = hidden size of the model, d2 = width, T = stages."""

    norm_weight: Tensor  # [d1]
    norm_bias: Tensor  # [d1]
    stage_bias: Tensor  # [T, d2]
    fc1_weight: Tensor  # [d2, d1]
    fc1_bias: Tensor  # [d2]
    fc2_weight: Tensor  # [d2, d2]
    fc2_bias: Tensor  # [d2]
    fc3_weight: Tensor  # [d2, d2]
    fc3_bias: Tensor  # [d2]
    head_weight: Tensor  # [2, d2]
    head_bias: Tensor  # [2]


class FoldedActorWeights(NamedTuple):
    """Weights prepared for inference by :func:`fold_actor_weights`: a copy, which training does not change.

    With W' = W1 * gamma, fc1(LayerNorm(x)) + stage bias = (x W'^T - mean * colsum) * rstd + bias[stage].
    """

    weights: ActorWeights  # contiguous, without gradient
    folded_weight: Tensor  # W' = W1 * gamma, rounded to the dtype of the weights, [d2, d1]
    colsum: Tensor  # float32, sums of the rows of the rounded W', [d2]
    bias: Tensor  # float32, W1 beta + b1 + stage bias, [T, d2]


@torch.no_grad()
def fold_actor_weights(weights: ActorWeights, dtype: torch.dtype | None = None) -> FoldedActorWeights:
    """Fold LayerNorm's parameters into fc1, once for many calls of :func:`toprl_kernels.actor_score`.

    Args:
        weights: what training changes; fold again afterwards.
        dtype: of the copy and so of the computation, for example that of the model (default: that of the weights).
    """
    dtype = dtype or weights.fc1_weight.dtype
    copy = ActorWeights(*(tensor.detach().to(dtype, copy=True).contiguous() for tensor in weights))
    folded = (weights.fc1_weight.float() * weights.norm_weight.float()).to(dtype).contiguous()
    bias = weights.fc1_weight.float() @ weights.norm_bias.float() + weights.fc1_bias.float()
    return FoldedActorWeights(copy, folded, folded.float().sum(dim=1), bias + weights.stage_bias.float())


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


class ActorCall(NamedTuple):
    """Arguments of a call, checked: what the implementations get."""

    hidden_states: Tensor  # [B, N, d1]
    weights: ActorWeights
    folded: tuple[Tensor | None, ...]  # the other fields of :class:`FoldedActorWeights`, or three times None
    valid_mask: Tensor | None  # [B, N or V]
    indices: Tensor | None  # [B, V]
    bounds: Tensor | None  # [S + 1], separates sequences; B = 1
    stage: int


def actor_score_reference(x: ActorCall) -> Tensor:  # [B, N or V, 2]
    """Everything in the dtype of the weights (but the logits of folded ones); an invalid token counts as zeros."""
    hidden_states, w, _, valid_mask, indices, bounds, stage = x
    hidden_states = hidden_states.to(w.fc1_weight.dtype)
    half = w.fc1_weight.shape[0] // 2
    if indices is not None:
        sample = torch.arange(len(indices), device=indices.device)[:, None]
        hidden_states = hidden_states[sample, indices.clamp(min=0)]
        valid_mask = indices >= 0 if valid_mask is None else (indices >= 0) & valid_mask
    if valid_mask is not None:
        hidden_states = torch.where(valid_mask[..., None], hidden_states, 0)
    mean = hidden_states.mean(dim=-1, keepdim=True)
    variance = ((hidden_states - mean) ** 2).mean(dim=-1, keepdim=True)
    normed = (hidden_states - mean) / torch.sqrt(variance + LAYER_NORM_EPS) * w.norm_weight + w.norm_bias
    z = _gelu(normed @ w.fc1_weight.T + w.fc1_bias + w.stage_bias[stage])

    # the mean of the second half over the valid tokens of a sequence, for each of its tokens
    ends = [0, z.shape[1]] if bounds is None else bounds.tolist()
    samples = []
    for row in range(z.shape[0]):
        parts = []
        for start, end in itertools.pairwise(ends):
            tokens = z[row, start:end, half:]
            kept = tokens if valid_mask is None else tokens[valid_mask[row, start:end]]
            mean_of_sequence = kept.mean(dim=0) if len(kept) else kept.sum(dim=0)
            parts.append(mean_of_sequence.expand(end - start, -1))
        samples.append(torch.cat(parts))
    summary = torch.stack(samples) if samples else z[..., half:]
    z = torch.cat([z[..., :half], summary], dim=-1)

    z = _gelu(z @ w.fc2_weight.T + w.fc2_bias)
    z = _gelu(z @ w.fc3_weight.T + w.fc3_bias)
    if x.folded[0] is not None:
        return z.float() @ w.head_weight.float().T + w.head_bias.float()
    return z @ w.head_weight.T + w.head_bias
