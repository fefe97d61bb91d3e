"""What else PyTorch offers for masked attention (Eqs. 6-7), each in the fastest form known.

Peers that take a mask or an index in a form of their own get it ready-made, and appear a second time with the cost of
making it; a mask that wants a gradient is part of the graph and always made in the call. All of them take grouped
queries: query [B, H, N, D], key and value [B, Hkv, N, D], keep_mask [B, N].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

FLOOR = 1e-30  # log(m + FLOOR) has a finite gradient at m = 0


def _is_self(length: int, device: torch.device) -> Tensor:
    return torch.eye(length, dtype=torch.bool, device=device)


def _is_past(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """Eq. 7 in a few lines of PyTorch, with the maximum over the kept keys subtracted; autograd does the rest."""
    length = query.shape[2]
    gate = torch.where(_is_self(length, query.device), 1.0, mask.float()[:, None, :])[:, None]
    if causal:
        gate = gate * _is_past(length, query.device)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[3])
    scores = scores - scores.masked_fill(gate == 0, -torch.inf).amax(dim=-1, keepdim=True).detach()
    weights = scores.clamp(max=60.0).exp() * gate
    return (weights / weights.sum(dim=-1, keepdim=True)).to(value.dtype) @ value


def float_mask(mask: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """log G as an N x N bias [B, 1, N, N]."""
    length = mask.shape[1]
    bias = (mask.float() + FLOOR).log()[:, None, :].expand(-1, length, -1)
    bias = torch.where(_is_self(length, mask.device), 0.0, bias)
    if causal:
        bias = bias.masked_fill(~_is_past(length, mask.device), -torch.inf)
    return bias[:, None].to(dtype)


def bool_mask(mask: Tensor, causal: bool) -> Tensor:
    """G > 0 as [B, 1, N, N]."""
    length = mask.shape[1]
    visible = mask[:, None, :] | _is_self(length, mask.device)
    return (visible & _is_past(length, mask.device) if causal else visible)[:, None]


def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )


# -- FlexAttention -------------------------------------------------------------------------------------------------


def hard_block_mask(mask: Tensor, causal: bool, create: Callable[..., BlockMask] = create_block_mask) -> BlockMask:
    """``i == j or keep[b, j]``, and the causal rule, as a BlockMask."""

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (i == j) | mask[b, j]
        return seen & (j <= i) if causal else seen

    return create(visible, mask.shape[0], None, mask.shape[1], mask.shape[1], device=mask.device)


def causal_block_mask(length: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, device=device)


def flex_soft(
    flex: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor, block_mask: BlockMask | None
) -> Tensor:
    """FlexAttention with log G added to the scores."""
    log_mask = (mask.float() + FLOOR).log()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == j, score, score + log_mask[b, j])

    return flex(query, key, value, score_mod=score_mod, block_mask=block_mask)


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` [B, K] of x [B, Hkv, N, D]."""
    if indices.shape[0] == 1:  # one copy of whole rows; gather goes element by element
        return x.index_select(2, indices[0])
    return x.gather(2, indices[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def flex_compacted_mask(indices: Tensor, length: int, causal: bool) -> BlockMask:
    """Which kept keys [B, K] a row sees, its own left out: that key is merged afterwards for every row."""

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        token = indices[b, j]
        return (token < i) if causal else (token != i)

    return create_block_mask(visible, indices.shape[0], None, length, indices.shape[1], device=indices.device)


def flex_compacted(
    flex: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, indices: Tensor, block_mask: BlockMask
) -> Tensor:
    """FlexAttention over the gathered kept keys, merged with the self term; its log-sum-exp is differentiable."""
    groups = query.shape[1] // key.shape[1]
    kept_key, kept_value = gather_rows(key, indices), gather_rows(value, indices)
    output, log_sum = flex(query, kept_key, kept_value, block_mask=block_mask, return_lse=True)
    self_key, self_value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    self_score = (query.float() * self_key.float()).sum(dim=-1) / math.sqrt(query.shape[3])
    share = torch.sigmoid(self_score - log_sum)[..., None]
    return (output * (1 - share) + share * self_value).to(query.dtype)
