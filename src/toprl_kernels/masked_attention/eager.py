"""Masked attention in plain PyTorch, for CPU tensors and for whatever the kernels do not take.

A bool mask is ordinary attention with a boolean N x N mask whose diagonal is always True. A float mask needs its own
backward: autograd of ``log m`` is NaN at m = 0, where the true derivative is finite.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# A mask value below 2^-96 counts as 0, and exp(s - lse) is cut at 2^96: the two bounds meet, so that no kept key's
# probability is ever cut, and float32 cannot overflow. The Triton kernels use the same pair.
SMALLEST_MASK = 2.0**-96
LARGEST_EXPONENT = 96.0 * math.log(2.0)


def masked_attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    *,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Same contract as the public function; arguments already checked."""
    if query.numel() == 0 or key.shape[2] == 0:
        return torch.zeros_like(query) + 0 * query
    if keep_mask.dtype == torch.bool:
        return _hard(query, key, value, keep_mask, key_padding_mask, is_causal, scale)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, keep_mask))
    if not needs_gradient and query.dtype in (torch.float32, torch.float64):
        return _soft_forward(query, key, value, keep_mask, key_padding_mask, is_causal, scale)
    output: Tensor = _SoftMaskedAttention.apply(query, key, value, keep_mask, key_padding_mask, is_causal, scale)
    return output


def _token_grid(num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token numbers of the queries [Nq, 1] and of the keys [1, N]."""
    tokens = torch.arange(num_keys, device=device)
    return tokens[num_keys - num_queries :, None], tokens[None, :]


def _hard(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    rows, columns = _token_grid(num_queries, num_keys, query.device)
    seen = keep_mask if key_padding_mask is None else keep_mask & key_padding_mask
    visible = seen[:, None, :]  # [B, 1, N]
    if is_causal:
        visible = visible & (columns <= rows)
    visible = (visible | (columns == rows))[:, None]  # [B, 1, Nq, N]; the diagonal keeps every row non-empty
    return _sdpa(query, key, value, visible, key_padding_mask, scale)


def _soft_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Without a gradient: SDPA with log G. (In 16 bits log G would lose digits, as SDPA wants query's dtype.)"""
    gate, blocked = _gate(query, key, keep_mask, key_padding_mask, is_causal)
    bias = gate.log().masked_fill_(blocked, -torch.inf)[:, 0]  # [B, 1, Nq, N]
    return _sdpa(query, key, value, bias, key_padding_mask, scale)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, key_padding_mask: Tensor | None, scale: float
) -> Tensor:
    """SDPA with grouped queries under a bool or additive mask; padding rows become 0."""
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    if key_padding_mask is not None:
        output = output.masked_fill(~key_padding_mask[:, None, -query.shape[2] :, None], 0.0)
    return output


def _gate(
    query: Tensor, key: Tensor, keep_mask: Tensor, key_padding_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """G [B, 1, 1, Nq, N] and the disallowed pairs, broadcastable to it. The diagonal is never disallowed."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows, columns = _token_grid(query.shape[2], key.shape[2], query.device)
    is_self = columns == rows
    mask = keep_mask.detach().to(dtype)
    mask = mask.masked_fill(mask < SMALLEST_MASK, 0.0)
    gate = torch.where(is_self, torch.ones((), dtype=dtype, device=query.device), mask[:, None, :])
    blocked = ((columns > rows) if is_causal else torch.zeros_like(is_self))[None]
    if key_padding_mask is not None:
        blocked = blocked | (~key_padding_mask[:, None, :] & ~is_self)
    return gate[:, None, None], blocked[:, None, None]


class _SoftMaskedAttention(torch.autograd.Function):
    """Float masks with a gradient.

    With E = exp(P - shift), zero where disallowed: A = E G / sum(E G), and E itself (not E G) is what the gradient by
    the mask needs, so E is kept for the backward. The heads of a group are folded into the rows, never expanded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep_mask: Tensor,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        gate, blocked = _gate(query, key, keep_mask, key_padding_mask, is_causal)
        dtype = gate.dtype
        scores = _fold(query, key).to(dtype) @ key.to(dtype).transpose(-1, -2)  # [B, Hkv, H/Hkv * Nq, N]
        scores = scores.mul_(scale).view(*_grouped_shape(query, key), -1)  # [B, Hkv, H/Hkv, Nq, N]
        log_gate = gate.log().masked_fill_(blocked, -torch.inf)  # log 0 = -inf is what Eq. 7 means
        shift = (scores + log_gate).amax(dim=-1, keepdim=True)
        ratio = scores.sub_(shift).clamp_(max=LARGEST_EXPONENT).exp_().masked_fill_(blocked, 0.0)  # E
        weights = ratio * gate
        total = weights.sum(dim=-1, keepdim=True)
        output = (weights.flatten(2, 3) @ value.to(dtype)).view(*_grouped_shape(query, key), -1) / total
        if key_padding_mask is not None:
            output = output.masked_fill(~key_padding_mask[:, None, None, -query.shape[2] :, None], 0.0)
        ctx.save_for_backward(query, key, value, keep_mask, key_padding_mask, ratio, total)
        ctx.is_causal, ctx.scale = is_causal, scale
        return output.reshape(query.shape).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keep_mask, key_padding_mask, ratio, total = ctx.saved_tensors
        needs_query, needs_key, needs_value, needs_mask = ctx.needs_input_grad[:4]
        gate, _ = _gate(query, key, keep_mask, key_padding_mask, ctx.is_causal)
        dtype = gate.dtype
        grad = grad_output.to(dtype).reshape(*_grouped_shape(query, key), -1) / total  # dO over the row's sum
        if key_padding_mask is not None:
            grad = grad.masked_fill(~key_padding_mask[:, None, None, -query.shape[2] :, None], 0.0)
        grad = grad.flatten(2, 3)  # [B, Hkv, H/Hkv * Nq, D]
        weights = ratio * gate
        grad_weights = (grad @ value.to(dtype).transpose(-1, -2)).view(ratio.shape)
        delta = (weights * grad_weights).sum(dim=-1, keepdim=True) / total
        grad_gated = grad_weights.sub_(delta).mul_(ratio)  # X: what both the mask and the scores need

        grad_query = grad_key = grad_value = grad_mask = None
        if needs_mask:
            rows, columns = _token_grid(query.shape[2], key.shape[2], query.device)
            # G_ii is the constant 1. Subtracting its share afterwards would leave rounding where the truth is 0.
            others = grad_gated.sum(dim=(1, 2)).masked_fill_(rows == columns, 0.0)  # [B, Nq, N]
            grad_mask = others.sum(dim=1).to(keep_mask.dtype)
        if needs_value:
            grad_value = (weights.flatten(2, 3).transpose(-1, -2) @ grad).to(value.dtype)
        if needs_query or needs_key:
            grad_scores = grad_gated.mul_(gate).flatten(2, 3)
            if needs_query:
                grad_query = (grad_scores @ key.to(dtype)).mul_(ctx.scale).reshape(query.shape).to(query.dtype)
            if needs_key:
                rows_of_query = _fold(query, key).to(dtype)
                grad_key = (grad_scores.transpose(-1, -2) @ rows_of_query).mul_(ctx.scale).to(key.dtype)
        return grad_query, grad_key, grad_value, grad_mask, None, None, None


def _grouped_shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    """(B, Hkv, H / Hkv, Nq)."""
    return query.shape[0], key.shape[1], query.shape[1] // key.shape[1], query.shape[2]


def _fold(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, Nq, D] to [B, Hkv, H / Hkv * Nq, D]: all queries that read one key/value head."""
    return query.reshape(*_grouped_shape(query, key), query.shape[3]).flatten(2, 3)
