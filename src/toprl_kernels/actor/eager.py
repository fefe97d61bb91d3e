"""actor_score in plain PyTorch, which autograd can record."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels.actor.reference import LAYER_NORM_EPS, ActorCall, ActorWeights

# LayerNorm's output is consumed at once; in pieces of about this size it stays in recycled, partly cached memory of the
# CPU. Smaller pieces make smaller products.
CPU_PIECE_BYTES = 8 << 20


def actor_score_eager(x: ActorCall) -> Tensor:
    """Logits [B, N, 2], float32 for folded weights."""
    hidden_states, w, _, valid_mask, indices, bounds, stage = x
    if indices is not None:
        is_token = indices >= 0
        valid_mask = is_token if valid_mask is None else valid_mask & is_token
        sample = torch.arange(len(indices), device=indices.device)[:, None]
        hidden_states = hidden_states[sample, indices.clamp(min=0)]
    first = F.gelu(_layer1(hidden_states, valid_mask, w, w.fc1_bias + w.stage_bias[stage]))
    local, shared = first.chunk(2, dim=-1)
    by_local, by_summary = w.fc2_weight.chunk(2, dim=1)
    # the summary is the same for all tokens of a sequence, so its half of fc2 is applied once per sequence
    if bounds is None:
        summary = F.linear(_masked_mean(shared, valid_mask), by_summary, w.fc2_bias)
    else:
        summary = F.linear(_means(shared[0], valid_mask, bounds), by_summary, w.fc2_bias)
        tokens = torch.arange(shared.shape[1], device=bounds.device)
        summary = summary[torch.searchsorted(bounds[1:], tokens, right=True).clamp_(max=len(bounds) - 2)]
    second = F.gelu(F.linear(local, by_local) + summary)
    third = F.gelu(F.linear(second, w.fc3_weight, w.fc3_bias))
    if x.folded[0] is not None:
        return F.linear(third.float(), w.head_weight.float(), w.head_bias.float())
    return F.linear(third, w.head_weight, w.head_bias)


def _layer1(hidden_states: Tensor, valid_mask: Tensor | None, w: ActorWeights, bias: Tensor) -> Tensor:
    """fc1(LayerNorm(h)) + stage bias, [B, N, d2]; ``bias`` [d2] is the sum of both. Invalid tokens count as zeros."""
    rows = hidden_states.flatten(0, 1)
    is_token = None if valid_mask is None else valid_mask.reshape(-1, 1)
    number = 1
    if hidden_states.is_cpu and not torch.is_grad_enabled():
        number = max(1, hidden_states.numel() * w.fc1_weight.element_size() // CPU_PIECE_BYTES)
    length = max(1, -(-len(rows) // number))
    pieces = []
    for start in range(0, max(len(rows), 1), length):
        inputs = rows[start : start + length].to(w.fc1_weight.dtype)
        if is_token is not None:
            inputs = inputs.masked_fill(~is_token[start : start + length], 0)
        normed = F.layer_norm(inputs, inputs.shape[-1:], w.norm_weight, w.norm_bias, LAYER_NORM_EPS)
        pieces.append(F.linear(normed, w.fc1_weight, bias))
    first = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return first.view(*hidden_states.shape[:2], len(w.fc1_weight))


def _masked_mean(z: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens, [B, 1, d2/2]."""
    if valid_mask is None:
        return z.mean(dim=1, keepdim=True) if z.shape[1] else z.sum(dim=1, keepdim=True)
    total = z.masked_fill(~valid_mask[..., None], 0.0).sum(dim=1, keepdim=True)
    return total / valid_mask.sum(dim=1, keepdim=True).clamp(min=1)[..., None]


def _means(z: Tensor, valid_mask: Tensor | None, bounds: Tensor) -> Tensor:
    """Mean of z [N, d2/2] over the valid tokens of each sequence, [S, d2/2]; NaN stays in its sequence."""
    counts = bounds.diff()
    if valid_mask is not None:
        z = z.masked_fill(~valid_mask[0, :, None], 0.0)
        counts = F.pad(valid_mask[0].cumsum(0), (1, 0))[bounds].diff()
    total = torch.segment_reduce(z.float(), "sum", offsets=bounds, axis=0, initial=0)
    return (total / counts.clamp(min=1)[:, None]).to(z.dtype)
