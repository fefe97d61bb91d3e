"""The result type, shared by the implementations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopkCompactOutput(NamedTuple):
    """What :func:`toprl_kernels.topk_compact` returns; K is the output length."""

    hidden_states: Tensor  # [B, K, d], zero in the padding
    indices: Tensor  # [B, K] int64, ascending, -1 in the padding
    valid_mask: Tensor  # [B, K] bool, False in the padding
    position_ids: Tensor | None  # [B, K] or [3, B, K], 0 in the padding; None if none were given
    inverse: Tensor | None = None  # [B, N] int64, the output slot of each token, -1 if dropped; None if not asked for
