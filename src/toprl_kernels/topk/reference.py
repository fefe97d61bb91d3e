"""The definition of topk_compact: sort each sample's tokens in Python by the stated rule."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TopkCompactOutput(NamedTuple):
    """What :func:`toprl_kernels.topk_compact` returns; K is the output length.

    Of a variable-length batch the leading dimension B is missing and K counts the rows of all sequences.
    """

    hidden_states: Tensor  # [B, K, d], zero in the padding
    indices: Tensor  # [B, K] int64, ascending, -1 in the padding
    valid_mask: Tensor  # [B, K] bool, False in the padding
    position_ids: Tensor | None  # [B, K] or [3, B, K], 0 in the padding; None if none were given
    inverse: Tensor | None = None  # [B, N] int64, the output slot of each token, -1 if dropped; None if not asked for
    cu_seqlens: Tensor | None = None  # [S + 1], where each sequence begins in the output; None without cu_seqlens


Selected = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # indices, valid mask, positions, inverse map, cu_seqlens


class Selection(NamedTuple):
    """Arguments of a call, checked: what the implementations get."""

    scores: Tensor  # [B, N]
    k: Tensor | None  # int64 [B], or [B, S] with segments; None for ``limit`` tokens of each
    limit: int
    length: int  # K
    valid_mask: Tensor | None  # [B, N]
    position_ids: Tensor | None  # [B, N] or [3, B, N]
    segments: Tensor | None  # int64 [B, N], or, ``packed``, cu_seqlens [S + 1] with B = 1
    packed: bool
    longest: int  # tokens of the longest sequence of a packed batch; the kernels need it
    threshold: float | None
    left: bool
    inverse: bool


def best(scores: list[float], tokens: list[int], count: int) -> list[int]:
    """Choose the ``count`` best of ``tokens``: higher score first, NaN after every number, then the lower index."""

    def rank(token: int) -> tuple[bool, float, int]:
        score = scores[token]
        return (True, 0.0, token) if math.isnan(score) else (False, -score, token)  # -0.0 == 0.0 in a tuple too

    return sorted(sorted(tokens, key=rank)[: max(count, 0)])


def slots_of(chosen: list[list[int]], length: int, left: bool, device: torch.device) -> Tensor:
    """Indices of the chosen tokens, -1 in the padding: [B, K]."""
    padding = [[-1] * (length - len(tokens)) for tokens in chosen]
    rows = [pad + tokens if left else tokens + pad for tokens, pad in zip(chosen, padding, strict=True)]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(chosen), length)


def reaching(scores: Tensor, valid_mask: Tensor | None, threshold: float | None) -> Tensor | None:
    """Say which tokens are eligible: valid, and with a score that reaches the threshold; None for all."""
    if threshold is None:
        return valid_mask
    reaches = (scores if scores.dtype == torch.float64 else scores.float()) >= threshold
    return reaches if valid_mask is None else reaches & valid_mask


def topk_compact_reference(x: Selection) -> Selected:
    """In each segment the best tokens; the first K of a sample in order of index."""
    scores, segments, length, left = x.scores, x.segments, x.length, x.left
    valid_mask, ends = reaching(scores, x.valid_mask, x.threshold), [0]
    if x.packed and segments is not None:
        ends = segments.tolist()
        segments = torch.tensor([[sum(end <= token for end in ends[1:]) for token in range(scores.shape[1])]])
    per_sample = max(len(ends) - 1, 1)
    counts = [[x.limit] * per_sample] * len(scores)
    if x.k is not None:
        counts = (x.k[:, None] if x.k.ndim == 1 else x.k).tolist()
    chosen = []
    inverse = torch.full_like(scores, -1, dtype=torch.int64)
    for sample, values in enumerate(scores.tolist()):
        segment_of = [0] * len(values) if segments is None else segments[sample].tolist()
        eligible = [i for i in range(len(values)) if valid_mask is None or bool(valid_mask[sample, i])]
        kept: list[int] = []
        for segment, count in enumerate(counts[sample]):
            kept += best(values, [token for token in eligible if segment_of[token] == segment], count)
        chosen.append(sorted(kept)[:length])
        first = length - len(chosen[-1]) if left else 0
        for slot, token in enumerate(chosen[-1]):
            inverse[sample, token] = first + slot
    indices = slots_of(chosen, length, left, scores.device)
    positions = indices.new_empty(0)
    if x.position_ids is not None:
        samples = torch.arange(len(indices), device=indices.device)[:, None]
        positions = x.position_ids[..., samples, indices.clamp(min=0)].where(indices >= 0, 0)
    kept = [token for tokens in chosen for token in tokens]
    bounds = torch.tensor([sum(token < end for token in kept) for end in ends], device=scores.device)
    return indices, indices >= 0, positions, inverse, bounds
