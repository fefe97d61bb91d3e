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
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    if key_padding_mask is not None:
        output = output.masked_fill(~key_padding_mask[:, None, num_keys - num_queries :, None], 0.0)
    return output


class _SoftMaskedAttention(torch.autograd.Function):
    """Float masks. The scores matrix is materialised once per direction, grouped heads are never expanded."""

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
        scores, gate, blocked, row_is_padding = _scores(query, key, keep_mask, key_padding_mask, is_causal, scale)
        logits = (scores + gate.log()).masked_fill_(blocked, -torch.inf)  # log 0 = -inf is what Eq. 7 means
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        probabilities = torch.exp(logits - lse)
        output = torch.einsum("bkgij,bkjd->bkgid", probabilities, value.to(scores.dtype)).reshape(query.shape)
        if row_is_padding is not None:
            output = output.masked_fill(row_is_padding[:, None, :, None], 0.0)
        ctx.save_for_backward(query, key, value, keep_mask, key_padding_mask, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
        return output.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, keep_mask, key_padding_mask, lse = ctx.saved_tensors
        needs_query, needs_key, needs_value, needs_mask = ctx.needs_input_grad[:4]
        scores, gate, blocked, row_is_padding = _scores(
            query, key, keep_mask, key_padding_mask, ctx.is_causal, ctx.scale
        )
        grouped = scores.shape[:4]  # [B, Hkv, H / Hkv, Nq]
        grad = grad_output.to(scores.dtype).reshape(*grouped, -1)
        if row_is_padding is not None:
            grad = grad.masked_fill(row_is_padding[:, None, None, :, None], 0.0)

        # R = exp(P) / sum(exp(P) G): one exponential gives the probabilities (times G) and the mask's gradient
        ratio = torch.exp((scores - lse).clamp_(max=LARGEST_EXPONENT)).masked_fill_(blocked, 0.0)
        probabilities = ratio * gate
        grad_probabilities = torch.einsum("bkgid,bkjd->bkgij", grad, value.to(scores.dtype))
        delta = (probabilities * grad_probabilities).sum(dim=-1, keepdim=True)
        grad_gated = ratio * (grad_probabilities - delta)  # X

        grad_query = grad_key = grad_value = grad_mask = None
        if needs_value:
            grad_value = torch.einsum("bkgij,bkgid->bkjd", probabilities, grad).to(value.dtype)
        if needs_query or needs_key:
            grad_scores = grad_gated * gate * ctx.scale
            if needs_query:
                grad_query = torch.einsum("bkgij,bkjd->bkgid", grad_scores, key.to(scores.dtype))
                grad_query = grad_query.reshape(query.shape).to(query.dtype)
            if needs_key:
                rows = query.to(scores.dtype).reshape(grad.shape)
                grad_key = torch.einsum("bkgij,bkgid->bkjd", grad_scores, rows).to(key.dtype)
        if needs_mask:
            row_tokens, columns = _token_grid(query.shape[2], key.shape[2], query.device)
            # G_ii is the constant 1. Subtracting its share afterwards would leave rounding where the truth is 0.
            others = grad_gated.masked_fill(row_tokens == columns, 0.0)
            grad_mask = others.sum(dim=(1, 2, 3)).to(keep_mask.dtype)
        return grad_query, grad_key, grad_value, grad_mask, None, None, None


def _scores(
    query: Tensor,
    key: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scores P [B, Hkv, H/Hkv, Nq, N], gate G [B, 1, 1, Nq, N], disallowed pairs (broadcast to it), padding rows."""
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows, columns = _token_grid(num_queries, num_keys, query.device)
    is_self = columns == rows

    grouped = query.to(dtype).reshape(batch, num_kv_heads, num_heads // num_kv_heads, num_queries, head_dim)
    scores = torch.einsum("bkgid,bkjd->bkgij", grouped, key.to(dtype)) * scale

    mask = keep_mask.to(dtype)
    mask = mask.masked_fill(mask < SMALLEST_MASK, 0.0)
    gate = torch.where(is_self, torch.ones((), dtype=dtype, device=query.device), mask[:, None, :])

    blocked = (columns > rows) if is_causal else torch.zeros_like(is_self)
    row_is_padding = None
    if key_padding_mask is not None:
        row_is_padding = ~key_padding_mask[:, num_keys - num_queries :]
        blocked = blocked | (~key_padding_mask[:, None, :] & ~is_self)  # the diagonal stays: no empty row, no NaN
    while blocked.ndim < 3:
        blocked = blocked[None]
    return scores, gate[:, None, None], blocked[:, None, None], row_is_padding
