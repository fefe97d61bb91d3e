"""The definition of prune_stage, in Python lists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from toprl_kernels.topk.reference import best, slots_of


class PruneStageOutput(NamedTuple):
    """What :func:`toprl_kernels.prune_stage` returns; K is the output length, W the most scored tokens of a sample."""

    hidden_states: Tensor  # [B, K, d], zero in the padding
    indices: Tensor  # [B, K] int64, ascending, -1 in the padding
    valid_mask: Tensor  # [B, K] bool, False in the padding
    columns: Tensor  # [B, K] int64, the next stage's: rank among the kept scored tokens, -1 for the others and padding
    origins: Tensor  # [B, K] int64, index before all stages, 0 in the padding
    slots: Tensor  # [B, W] int64, where the kept scored tokens are in the output, 0 in the padding
    raster: Tensor  # [B, W] int64, their raster numbers, -1 in the padding
    listed: Tensor  # [B, W] bool, False in the padding
    position_ids: Tensor | None  # [..., B, K], 0 in the padding
    tables: tuple[Tensor, ...]  # [B, K, w] each, zero in the padding


def score_difference(scores: Tensor) -> Tensor:
    """Keep logit minus drop logit of logits [B, V, 2], in float32 at least; scores [B, V] as they are."""
    if scores.ndim == 2:
        return scores
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide[..., 0] - wide[..., 1]


# indices, valid mask, columns, origins, slots, raster, listed, position ids
Selected = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class StageCall(NamedTuple):
    """Arguments of a call, checked: what the implementations get."""

    scores: Tensor  # [B, V] or [B, V, 2]
    columns: Tensor  # [B, N]
    k: Tensor | None  # int64 [B]; None for ``limit`` of each sample
    limit: int
    length: int
    width: int
    valid_mask: Tensor | None  # [B, N]
    origins: Tensor | None  # [B, N]
    raster: Tensor  # [B, V]
    position_ids: Tensor | None  # [..., B or 1, N0]
    left: bool


def prune_stage_reference(x: StageCall) -> Selected:
    """Keep all valid tokens without a score, and the best with one."""
    scores, columns, length, width, left = x.scores, x.columns, x.length, x.width, x.left
    valid_mask, raster, origins, position_ids = x.valid_mask, x.raster, x.origins, x.position_ids
    counts = [x.limit] * len(columns) if x.k is None else x.k.tolist()
    num_tokens = columns.shape[1]
    chosen, new_columns, places, numbers = [], [], [], []
    for sample, values in enumerate(score_difference(scores).tolist()):
        column = columns[sample].tolist()
        valid = [i for i in range(num_tokens) if valid_mask is None or bool(valid_mask[sample, i])]
        by_token = [values[c] if c >= 0 else 0.0 for c in column]
        kept = best(by_token, [i for i in valid if column[i] >= 0], counts[sample])
        chosen.append(sorted(kept + [i for i in valid if column[i] < 0]))
        first = length - len(chosen[-1]) if left else 0
        new_columns.append([kept.index(i) if i in kept else -1 for i in chosen[-1]])
        places.append([first + chosen[-1].index(i) for i in kept])
        numbers.append([int(raster[sample, column[i]]) for i in kept])
    device = scores.device
    indices = slots_of(chosen, length, left, device)
    if origins is None:
        origins = torch.arange(num_tokens, device=device).expand(columns.shape)
    listed = slots_of(places, width, False, device) >= 0
    samples = torch.arange(len(columns), device=device)[:, None]
    before = origins[samples, indices.clamp(min=0)].where(indices >= 0, 0)
    positions = indices.new_empty(0)
    if position_ids is not None:
        each = position_ids.expand(*position_ids.shape[:-2], len(columns), -1)
        positions = each[..., samples, before].where(indices >= 0, 0)
    return (
        indices,
        indices >= 0,
        slots_of(new_columns, length, left, device),
        before,
        slots_of(places, width, False, device).clamp(min=0),
        slots_of(numbers, width, False, device),
        listed,
        positions,
    )
