"""prune_stage in plain PyTorch."""

from __future__ import annotations

import torch

from toprl_kernels.stage.reference import Selected, StageCall, score_difference
from toprl_kernels.topk.eager import compact_flags, gather_positions, select_ragged, unique_keys


def prune_stage_eager(x: StageCall) -> Selected:
    """Position ids are empty when there are none."""
    columns, length, width, origins, position_ids = x.columns, x.length, x.width, x.origins, x.position_ids
    samples = len(columns)
    stays, scored = columns < 0, columns >= 0
    if x.valid_mask is not None:
        stays, scored = stays & x.valid_mask, scored & x.valid_mask
    by_token = score_difference(x.scores)
    if by_token.shape[1]:
        by_token = by_token.gather(1, columns.clamp(min=0))
    else:
        by_token = by_token.new_zeros(columns.shape)
    keys = unique_keys(by_token, scored).masked_fill_(stays, 2**63 - 1)
    taken = scored.sum(dim=1, keepdim=True).clamp(max=x.limit)
    taken = taken if x.k is None else taken.minimum(x.k[:, None])
    indices = select_ragged(keys, taken + stays.sum(dim=1, keepdim=True), length, x.left)

    valid, safe = indices >= 0, indices.clamp(min=0)
    column = columns.gather(1, safe).masked_fill_(~valid, -1)
    scored = column >= 0
    places = compact_flags(scored, min(width, length), left=False)
    places = torch.nn.functional.pad(places, (0, width - places.shape[1]), value=-1)
    listed, slots = places >= 0, places.clamp(min=0)
    numbers = slots.new_empty(slots.shape)
    if width:
        numbers = x.raster.gather(1, column.gather(1, slots).clamp(min=0)).masked_fill_(~listed, -1)
    before = safe if origins is None else origins.gather(1, safe)
    before = before.masked_fill(~valid, 0)
    positions = indices.new_empty(0)
    if position_ids is not None:
        each = position_ids.expand(*position_ids.shape[:-2], samples, -1)
        positions = gather_positions(each, before.masked_fill(~valid, -1))
    return indices, valid, torch.where(scored, scored.cumsum(1) - 1, -1), before, slots, numbers, listed, positions
