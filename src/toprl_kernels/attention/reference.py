"""The definition of masked attention, Eqs. 6-7, in plain PyTorch. Run it in float64 and it is the tests' oracle."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class AttentionCall(NamedTuple):
    """Arguments of a call, checked; those in the middle are an :class:`toprl_kernels.AttentionPlan`."""

    query: Tensor  # [B, H, Nq, D]
    key: Tensor  # [B, Hkv, N, D]
    value: Tensor  # [B, Hkv, N, Dv]
    keep_mask: Tensor  # [B, N]
    key_padding_mask: Tensor | None  # [B, N] bool, True = valid
    ranges: Tensor | None  # int32 [B, N, 2]: token i sees tokens j with ranges[b, i, 0] <= j < ranges[b, i, 1]
    lists: Tensor | None  # of the kernels: kept tokens in order, their numbers, their logarithms
    is_causal: bool  # says nothing where there are ranges
    scale: float


def masked_attention_reference(x: AttentionCall, bounded_mask_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Compute Eq. 7 as printed, plus padding and visible ranges: output [B, H, Nq, Dv] and log-sum-exp [B, H, Nq].

    Differentiable in query, key, value and a floating keep_mask. An invisible pair contributes nothing, whatever
    stands in its tokens: numbers that are not finite are taken out before the products and make exactly those results
    NaN that depend on them.
    """
    query, key, value, mask = x.query, x.key, x.value, x.keep_mask.to(x.query.dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    allowed, is_self = allowed_pairs(mask, x.key_padding_mask, x.ranges, x.is_causal, query.shape[2])
    visible = allowed & (is_self | (mask > 0)[:, None, None])  # [B, 1, Nq, N]

    is_bad_query, is_bad_key, is_bad_value = (~tensor.isfinite().all(dim=-1) for tensor in (query, key, value))
    is_bad_key = is_bad_key | is_bad_value
    is_bad_row = (visible & (is_bad_query[..., None] | is_bad_key[:, :, None])).any(dim=-1)
    output, lse = attend(
        query.masked_fill(is_bad_query[..., None], 0),
        key.masked_fill(is_bad_key[..., None], 0),
        value.masked_fill(is_bad_key[..., None], 0),
        mask,
        allowed,
        is_self,
        x.scale,
        bounded_mask_grad,
    )
    output = _NotFinite.apply(output, query, key, value, mask, visible, allowed & ~is_self, is_bad_row)
    return output, lse.masked_fill(is_bad_row, torch.nan)


def allowed_pairs(
    mask: Tensor, key_padding_mask: Tensor | None, ranges: Tensor | None, is_causal: bool, num_queries: int
) -> tuple[Tensor, Tensor]:
    """Say which pairs padding, causality and ranges allow, [B or 1, 1, Nq, N], and which are i == j, [Nq, N]."""
    num_keys = mask.shape[1]
    # query i is the token i + N - Nq, so "i == j" and "causal" are said in token numbers
    tokens = torch.arange(num_keys, device=mask.device)
    rows = tokens[num_keys - num_queries :, None]
    allowed = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=mask.device)
    if ranges is not None:
        low, high = ranges[:, None, num_keys - num_queries :, :, None].unbind(3)
        allowed = (low <= tokens) & (tokens < high)
    elif is_causal:
        allowed = allowed & (tokens <= rows)
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :] & key_padding_mask[:, None, -num_queries:, None]
    return allowed, tokens == rows


def attend(
    query: Tensor,  # [B, H, R, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    mask: Tensor,  # [B, N]
    allowed: Tensor,  # [B or 1, 1, R, N]
    is_self: Tensor,  # [R, N]
    scale: float,
    bounded_mask_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Compute Eq. 7 for some rows: output [B, H, R, Dv] and natural log-sum-exp [B, H, R]; 0 and inf for padding."""
    gate = torch.where(is_self, torch.ones_like(mask)[:, None, :], mask[:, None, :])[:, None]  # G, Eq. 6: [B, 1, R, N]
    is_row = (allowed & is_self).any(dim=-1, keepdim=True)  # False for padding, which sees nothing: its output is 0
    scores = scale * (query @ key.transpose(-1, -2))  # P: [B, H, R, N]
    # A shift per row cancels in Eq. 7. It is taken over the keys that count, so the sum below is at least 1.
    counts = (allowed & (gate > 0)) | (is_self & ~is_row)
    shift = scores.detach().masked_fill(~counts, -torch.inf).amax(dim=-1, keepdim=True)
    # Where G = 0 the exponent may be large; the bound keeps inf * 0 out of the gradient.
    largest = 700.0 if query.dtype == torch.float64 else 96 * math.log(2.0)
    largest = min(largest, math.log(torch.finfo(query.dtype).max) - 0.1)  # float16 ends at exp(11)
    exponential = torch.exp((scores - shift).clamp(max=largest)).masked_fill(~(allowed | counts), 0.0)
    if bounded_mask_grad:
        # d/dm of exp(P) m is exp(P) / sum = R; a factor that autograd does not see makes it R / (1 + R)
        total = (exponential * gate).detach().sum(dim=-1, keepdim=True)
        gate = torch.where(gate == 0, gate * (total / (total + exponential.detach())), gate)
    numerator = exponential * gate  # exp(P) G
    total = numerator.sum(dim=-1, keepdim=True)
    output = (numerator / total @ value).masked_fill(~is_row, 0.0)  # A V, Eq. 7
    return output, (shift + total.log()).detach().masked_fill(~is_row, torch.inf).squeeze(-1)


class _NotFinite(torch.autograd.Function):
    """Make rows NaN that see a number which is not finite, and gradients NaN that depend on such rows.

    A row without a gradient sends none, NaN or not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,  # [B, H, Nq, Dv]
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        visible: Tensor,  # [B, 1, Nq, N]
        differs: Tensor,  # [B, 1, Nq, N], pairs i != j that would be visible if m_j were larger
        is_bad_row: Tensor,  # [B, H, Nq]
    ) -> Tensor:
        return output.masked_fill(is_bad_row[..., None], torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, visible, differs, is_bad_row = ctx.saved_tensors
        gradient = gradients[0]
        is_nan = (gradient != 0).any(dim=-1) & (is_bad_row | ~gradient.isfinite().all(dim=-1))  # [B, H, Nq]
        is_nan = is_nan & visible.any(dim=-1)  # padding rows do not depend on anything
        by_key = (visible & is_nan[..., None]).any(dim=-2)[..., None]  # [B, H, N, 1]
        by_mask = (differs & is_nan[..., None]).flatten(1, 2).any(dim=1)  # [B, N]
        targets = ((query, is_nan[..., None]), (key, by_key), (value, by_key), (mask, by_mask))
        poison = (torch.zeros_like(tensor).masked_fill(where, torch.nan) for tensor, where in targets)
        return (gradient.masked_fill((is_nan | is_bad_row)[..., None], 0), *poison, None, None, None)
