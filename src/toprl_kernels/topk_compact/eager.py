"""topk_compact in plain PyTorch: scores to order-preserving integers, a stable sort, a gather."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels.topk_compact.output import TopkCompactOutput


def ordered_keys(scores: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Integers that compare as the rule says: invalid < NaN < -inf < ... < -0.0 = 0.0 < ... < inf. [B, N].

    A float's bits, read as a signed integer, already ascend for positive numbers; for negative ones the magnitude
    bits are flipped.
    """
    if scores.dtype == torch.float64:
        bits, highest = (scores + 0.0).view(torch.int64), 2**63 - 1  # + 0.0 turns -0.0 into 0.0
    else:
        bits, highest = (scores.float() + 0.0).view(torch.int32), 2**31 - 1
    keys = torch.where(bits < 0, bits ^ highest, bits)
    keys = keys.masked_fill(scores.isnan(), -highest)
    if valid_mask is not None:
        keys = keys.masked_fill(~valid_mask, -highest - 1)
    return keys


def topk_compact_eager(
    hidden_states: Tensor,
    scores: Tensor,
    k: int | Tensor,
    length: int,
    *,
    position_ids: Tensor | None,
    valid_mask: Tensor | None,
) -> TopkCompactOutput:
    """``k`` is an int, or an int64 tensor [B] on the device of the scores; ``length`` is K."""
    num_tokens = scores.shape[1]
    order = ordered_keys(scores, valid_mask).argsort(dim=1, descending=True, stable=True)[:, :length]  # [B, K]
    ragged = isinstance(k, Tensor) or valid_mask is not None
    if ragged:
        taken: Tensor | int = k[:, None] if isinstance(k, Tensor) else k
        if valid_mask is not None:
            taken = valid_mask.sum(dim=1, keepdim=True).clamp(max=taken)  # [B, 1]
        ranks = torch.arange(length, device=scores.device)
        order = torch.where(ranks < taken, order, num_tokens)  # the tail sorts behind every token
    order = order.sort(dim=1).values
    is_token = order < num_tokens
    safe = order.clamp(max=max(num_tokens - 1, 0)) if ragged else order

    samples, _, hidden_size = hidden_states.shape
    rows = safe + torch.arange(samples, device=scores.device)[:, None] * num_tokens
    # whole rows of the flattened batch: index_select copies them, gather would go element by element
    hidden = hidden_states.reshape(-1, hidden_size).index_select(0, rows.flatten()).view(samples, length, hidden_size)
    positions = None
    if position_ids is not None:
        positions = position_ids.gather(-1, safe if position_ids.ndim == 2 else safe.expand(3, -1, -1))
    if ragged:
        hidden = hidden.masked_fill(~is_token[:, :, None], 0)
        positions = None if positions is None else positions.masked_fill(~is_token, 0)
        order = order.masked_fill(~is_token, -1)
    return TopkCompactOutput(hidden, order, is_token, positions)
