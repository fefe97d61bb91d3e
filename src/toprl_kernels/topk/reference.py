"""The definition of topk_compact: sort each sample's tokens in Python by the stated rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toprl_kernels.topk.output import TopkCompactOutput


def topk_compact_reference(
    hidden_states: Tensor,  # [B, N, d]
    scores: Tensor,  # [B, N]
    counts: list[int],  # k of each sample
    length: int,  # K
    *,
    position_ids: Tensor | None,
    valid_mask: Tensor | None,
    left: bool,
) -> TopkCompactOutput:
    """Higher score first, NaN after every number, then the lower index; the winners in order of index."""
    rows_hidden, rows_indices, rows_positions = [], [], []
    inverse = torch.full_like(scores, -1, dtype=torch.int64)

    def pad(row: Tensor, dim: int) -> Tensor:
        """``row`` with zeros up to the output length."""
        shape = list(row.shape)
        shape[dim] = length - row.shape[dim]
        return torch.cat([row.new_zeros(shape), row] if left else [row, row.new_zeros(shape)], dim=dim)

    for sample, values in enumerate(scores.tolist()):
        eligible = range(len(values))
        if valid_mask is not None:
            eligible = [i for i in eligible if bool(valid_mask[sample, i])]  # type: ignore[assignment]

        def rank(token: int, values: list[float] = values) -> tuple[bool, float, int]:
            score = values[token]
            return (True, 0.0, token) if math.isnan(score) else (False, -score, token)  # -0.0 == 0.0 in a tuple too

        chosen = sorted(sorted(eligible, key=rank)[: counts[sample]])
        picked = torch.tensor(chosen, dtype=torch.int64, device=scores.device)
        rows_hidden.append(pad(hidden_states[sample, picked], 0))
        rows_indices.append(pad(picked + 1, 0) - 1)
        if position_ids is not None:
            rows_positions.append(pad(position_ids[..., sample, :][..., picked], -1))  # [K] or [3, K]
        first = length - len(chosen) if left else 0
        inverse[sample, picked] = torch.arange(first, first + len(chosen), device=scores.device)
    if not rows_indices:
        indices = torch.empty(0, length, dtype=torch.int64, device=scores.device)
        hidden = hidden_states.new_empty(0, length, hidden_states.shape[2]) + 0 * hidden_states.sum()
        no_positions = None if position_ids is None else position_ids[..., :length]
        return TopkCompactOutput(hidden, indices, indices >= 0, no_positions, inverse)
    indices = torch.stack(rows_indices)
    stacked = torch.stack(rows_positions, dim=-2) if rows_positions else None
    return TopkCompactOutput(torch.stack(rows_hidden), indices, indices >= 0, stacked, inverse)
