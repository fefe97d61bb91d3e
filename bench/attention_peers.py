"""What else PyTorch offers for masked attention (Eqs. 6-7), each in the fastest form found.

Peers that take a mask or an index in a form of their own get it ready-made, and appear a second time with the cost of
making it; a mask that wants a gradient is part of the graph and always made in the call. All of them take grouped
queries: query [B, H, N, D], key and value [B, Hkv, N, D], keep_mask [B, N].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

ROW_BLOCK = 512  # query rows that share one prefix of the kept keys
FLOOR = 1e-30  # log(m + FLOOR) has a finite gradient at m = 0


def _is_self(length: int, device: torch.device) -> Tensor:
    return torch.eye(length, dtype=torch.bool, device=device)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """Eq. 7 in a few lines of PyTorch, with the maximum over the kept keys subtracted; autograd does the rest."""
    length = query.shape[2]
    gate = torch.where(_is_self(length, query.device), 1.0, mask.float()[:, None, :])[:, None]
    if causal:
        gate = gate * torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
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
        bias = bias.masked_fill(~torch.ones(length, length, dtype=torch.bool, device=mask.device).tril(), -torch.inf)
    return bias[:, None].to(dtype)


def bool_mask(mask: Tensor, causal: bool) -> Tensor:
    """G > 0 as [B, 1, N, N]."""
    length = mask.shape[1]
    visible = mask[:, None, :] | _is_self(length, mask.device)
    if causal:
        visible = visible & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return visible[:, None]


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
    compiled: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    block_mask: BlockMask | None,
) -> Tensor:
    """FlexAttention with log G added to the scores."""
    log_mask = (mask.float() + FLOOR).log()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == j, score, score + log_mask[b, j])

    return compiled(
        query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=query.shape[1] != key.shape[1]
    )


# -- attention over the kept keys, merged with the self term ---------------------------------------------------------


class RowBlock(NamedTuple):
    """Query rows first..last-1 see ``keys`` kept keys, less those that ``bias`` hides."""

    first: int
    last: int
    keys: int
    bias: Tensor | None  # [B, 1, rows, keys] in query's dtype; None where every row sees all of them
    empty: Tensor | None  # [B, 1, rows], rows that see no kept key; None where there are none


class Compaction(NamedTuple):
    """The kept keys of a hard mask, prepared for :func:`compacted_attention`."""

    indices: Tensor  # [B, K], ascending; K is a multiple of 8, the tail repeats the last token and no row sees it
    is_kept: Tensor  # [B, N]
    blocks: list[RowBlock]


def compaction_of(mask: Tensor, causal: bool, dtype: torch.dtype) -> Compaction:
    """``mask`` [B, N] bool keeps the same number of tokens, at least one, in every sample."""
    batch, length = mask.shape
    indices = mask.nonzero()[:, 1].view(batch, -1)  # [B, K]
    num_kept = indices.shape[1]
    # the memory-efficient backend wants bias rows that start at multiples of 16 bytes
    padded = indices[:, torch.arange((num_kept + 7) // 8 * 8, device=mask.device).clamp(max=num_kept - 1)]
    real = torch.arange(padded.shape[1], device=mask.device) < num_kept
    blocks = []
    for first in range(0, length, ROW_BLOCK) if causal else (0,):
        last = min(first + ROW_BLOCK, length) if causal else length
        rows = torch.arange(first, last, device=mask.device)
        visible = real.expand(batch, last - first, -1)
        if causal:
            visible = visible & (padded[:, None, :] <= rows[:, None])
        keys = (int(visible.any(dim=1).sum(dim=1).max()) + 7) // 8 * 8
        visible = visible[:, None, :, :keys]  # [B, 1, rows, keys]
        bias = None if bool(visible.all()) else torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -math.inf)
        empty = ~visible.any(dim=-1)
        blocks.append(RowBlock(first, last, keys, bias, empty if bool(empty.any()) else None))
    return Compaction(padded, mask, blocks)


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` [B, K] of x [B, Hkv, N, D]."""
    if indices.shape[0] == 1:  # one copy of whole rows; gather goes element by element
        return x.index_select(2, indices[0])
    return x.gather(2, indices[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def compacted_attention(query: Tensor, key: Tensor, value: Tensor, kept: Compaction) -> Tensor:
    """Attention over the gathered kept keys, and each dropped row's own key added by log-sum-exp. Forward only."""
    groups = query.shape[1] // key.shape[1]
    kept_key, kept_value = (
        gather_rows(x, kept.indices).repeat_interleave(groups, dim=1) for x in (key, value)
    )  # [B, H, K, D]
    own_key, own_value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    own_score = (query.float() * own_key.float()).sum(dim=-1) / math.sqrt(query.shape[3])  # [B, H, N]
    own_score = own_score.masked_fill(kept.is_kept[:, None], -math.inf)  # a kept row has its own key already
    outputs = []
    for first, last, keys, bias, empty in kept.blocks:
        own, rows = own_score[:, :, first:last], own_value[:, :, first:last]
        if keys == 0:
            outputs.append(rows)
            continue
        part, part_sum = _forward(query[:, :, first:last], kept_key[:, :, :keys], kept_value[:, :, :keys], bias)
        if empty is not None:  # aten reports a log-sum-exp of 0 for a row without keys
            part_sum = part_sum.masked_fill(empty, -math.inf)
            part = part.masked_fill(empty[..., None], 0.0)
        total = torch.logaddexp(part_sum, own)
        weight = (own - total).exp()[..., None]
        outputs.append((part * (part_sum - total).exp()[..., None] + weight * rows).to(query.dtype))
    return torch.cat(outputs, dim=2)


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [B, H, rows] of attention with an additive bias."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)
    if bias is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    bias = bias.expand(-1, query.shape[1], -1, -1)
    output, log_sum = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[:2]
    return output, log_sum[:, :, : query.shape[2]]


def flex_compacted_mask(kept: Compaction, length: int, causal: bool) -> BlockMask:
    """Which kept keys a row sees, its own left out: that one is merged afterwards for every row."""
    indices = kept.indices
    real = int(kept.is_kept[0].sum())

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        token = indices[b, j]
        return (j < real) & ((token < i) if causal else (token != i))

    return create_block_mask(visible, indices.shape[0], None, length, indices.shape[1], device=indices.device)


def flex_compacted(
    compiled: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, kept: Compaction, block_mask: BlockMask
) -> Tensor:
    """FlexAttention over the gathered kept keys, merged with the self term; its log-sum-exp is differentiable."""
    groups = query.shape[1] // key.shape[1]
    kept_key, kept_value = gather_rows(key, kept.indices), gather_rows(value, kept.indices)
    output, log_sum = compiled(
        query, kept_key, kept_value, block_mask=block_mask, enable_gqa=groups > 1, return_lse=True
    )
    own_key, own_value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    own_score = (query.float() * own_key.float()).sum(dim=-1) / math.sqrt(query.shape[3])
    share = torch.sigmoid(own_score - log_sum)[..., None]
    return (output * (1 - share) + share * own_value).to(query.dtype)
