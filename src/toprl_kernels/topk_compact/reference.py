"""The definition of topk_compact: sort each sample's tokens in Python by the stated rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toprl_kernels.topk_compact.output import TopkCompactOutput


def topk_compact_reference(
    hidden_states: Tensor,  # [B, N, d]
    scores: Tensor,  # [B, N]
    counts: list[int],  # k of each sample
    length: int,  # K
    *,
    position_ids: Tensor | None,
    valid_mask: Tensor | None,
) -> TopkCompactOutput:
    """Higher score first, NaN after every number, then the lower index; the winners in order of index."""
    rows_hidden, rows_indices, rows_positions = [], [], []
    for sample, values in enumerate(scores.tolist()):
        eligible = range(len(values))
        if valid_mask is not None:
            eligible = [i for i in eligible if bool(valid_mask[sample, i])]  # type: ignore[assignment]

        def rank(token: int, values: list[float] = values) -> tuple[bool, float, int]:
            score = values[token]
            return (True, 0.0, token) if math.isnan(score) else (False, -score, token)  # -0.0 == 0.0 in a tuple too

        chosen = sorted(sorted(eligible, key=rank)[: counts[sample]])
        padding = length - len(chosen)
        picked = torch.tensor(chosen, dtype=torch.int64, device=scores.device)
        zeros = hidden_states.new_zeros(padding, hidden_states.shape[2])
        rows_hidden.append(torch.cat([hidden_states[sample, picked], zeros]))
        rows_indices.append(torch.cat([picked, picked.new_full((padding,), -1)]))
        if position_ids is not None:
            positions = position_ids[..., sample, :][..., picked]  # [k] or [3, k]
            rows_positions.append(torch.cat([positions, positions.new_zeros(*positions.shape[:-1], padding)], dim=-1))
    if not rows_indices:
        indices = torch.empty(0, length, dtype=torch.int64, device=scores.device)
        hidden = hidden_states.new_empty(0, length, hidden_states.shape[2]) + 0 * hidden_states.sum()
        no_positions = None if position_ids is None else position_ids[..., :length]
        return TopkCompactOutput(hidden, indices, indices >= 0, no_positions)
    indices = torch.stack(rows_indices)
    stacked = torch.stack(rows_positions, dim=-2) if rows_positions else None
    return TopkCompactOutput(torch.stack(rows_hidden), indices, indices >= 0, stacked)
