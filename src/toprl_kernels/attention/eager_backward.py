"""Backward of eager masked attention: through the kept keys, or, for the gradient by the mask, through all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from toprl_kernels.attention.eager import (
    dense_rows,
    fold,
    gather_kept,
    grouped_scores,
    is_ordinary,
    is_small,
    mask_values,
    own_rows,
    own_scores,
    row_blocks,
    small_bias,
)

flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
LARGEST_EXPONENT = 96.0 * math.log(2.0)  # belongs to SMALLEST_MASK in eager.py
DENSE_BLOCK_BYTES = 2**22  # of the [B, H, rows, N] tile in the gradient by the mask: stays in the cache
FEWEST_ROWS = 64
DENSE_BLOCKS = 8  # at least, of a causal pass: each looks at the keys up to its last row only


def masked_attention_backward_eager(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bounded_mask_grad: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by query, key, value and keep_mask; None where ``needs`` says no."""
    dtype = lse.dtype
    offset = key.shape[2] - query.shape[2]
    if key_padding_mask is not None:  # a padding row's output is the constant 0
        grad_output = grad_output.masked_fill(~key_padding_mask[:, None, offset:, None], 0.0)
    grad_output = dense_rows(grad_output)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    if is_ordinary(query, key, keep_mask, key_padding_mask, is_causal):
        gradients = flash_attention_backward(grad_output, query, key, value, output, lse, 0.0, is_causal, scale=scale)
        return (*_wanted(gradients, (query, key, value), needs), None)
    mask = mask_values(keep_mask, key_padding_mask, dtype)
    if needs[3]:
        delta = (grad_output.to(dtype) * output.to(dtype)).sum(dim=-1)  # D_i [B, H, Nq]
        *dense, grad_mask = _dense_backward(
            grad_output, query, key, value, mask, lse, delta, is_causal, scale, bounded_mask_grad, needs
        )
        if key_padding_mask is not None:
            grad_mask = grad_mask.masked_fill(~key_padding_mask, 0.0)
        return (*_wanted(dense, (query, key, value), needs), grad_mask.to(keep_mask.dtype))
    if is_small(query, key):
        bias = small_bias(mask, query.shape[2], is_causal)
        gradients = _attend_backward(grad_output, query, key, value, output, lse, bias, scale)
    else:
        gradients = _kept_backward(grad_output, query, key, value, mask, output, lse, is_causal, scale)
        rest = 1.0 - mask[:, None, offset:]  # [B, 1, Nq]
        if bool((rest > 0).any()):
            _add_self_terms(*gradients, grad_output, query, key, value, output, lse, rest, scale)
    return (*_wanted(gradients, (query, key, value), needs), None)


def _wanted(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    first, second, third = (
        gradient.to(tensor.dtype).contiguous() if needed and gradient is not None else None
        for gradient, tensor, needed in zip(gradients, tensors, needs, strict=False)
    )
    return first, second, third


def _kept_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the kept keys only. The merged output and log-sum-exp make an ordinary attention backward exact."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    kept = gather_kept(key, value, mask)
    grad_query = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
    grad_kept_key = torch.zeros(kept.key.shape, dtype=lse.dtype, device=query.device)
    grad_kept_value = torch.zeros_like(grad_kept_key)
    for rows, length, bias in row_blocks(kept, num_queries, num_keys, is_causal, lse.dtype):
        if length:
            parts = _attend_backward(
                grad_output[:, :, rows],
                query[:, :, rows],
                kept.key[:, :, :length],
                kept.value[:, :, :length],
                output[:, :, rows],
                lse[:, :, rows],
                bias,
                scale,
            )
            grad_query[:, :, rows] = parts[0]
            grad_kept_key[:, :, :length] += parts[1]
            grad_kept_value[:, :, :length] += parts[2]
    if not kept.gathered:
        return grad_query, grad_kept_key, grad_kept_value
    grad_key = torch.zeros(key.shape, dtype=lse.dtype, device=query.device)
    grad_value = torch.zeros_like(grad_key)
    for sample, count in enumerate(kept.counts.tolist()):
        rows_of_sample = kept.tokens[sample, :count]
        grad_key[sample].index_copy_(1, rows_of_sample, grad_kept_key[sample, :, :count])
        grad_value[sample].index_copy_(1, rows_of_sample, grad_kept_value[sample, :, :count])
    return grad_query, grad_key, grad_value


def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend` when ``output`` and ``lse`` include further terms of each row's sum."""
    if query.device.type == "cpu":
        return flash_attention_backward(
            grad_output, query, key, value, output, lse, 0.0, False, attn_mask=mask, scale=scale
        )
    num_kv_heads, dtype = key.shape[1], lse.dtype
    scores = grouped_scores(query, key, scale)
    if mask is not None:
        scores = scores + mask[:, :, None]
    weights = torch.exp(scores - lse.view(scores.shape[:-1])[..., None]).flatten(2, 3)  # P [B, Hkv, G * R, K]
    grad_rows = fold(grad_output, num_kv_heads).to(dtype)
    delta = fold((grad_output.to(dtype) * output.to(dtype)).sum(dim=-1, keepdim=True), num_kv_heads)
    grad_scores = (grad_rows @ value.to(dtype).transpose(-1, -2)).sub_(delta).mul_(weights).mul_(scale)
    grad_query = (grad_scores @ key.to(dtype)).view(query.shape)
    grad_key = grad_scores.transpose(-1, -2) @ fold(query, num_kv_heads).to(dtype)
    return grad_query, grad_key, weights.transpose(-1, -2) @ grad_rows


def _dense_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    lse: Tensor,
    delta: Tensor,
    is_causal: bool,
    scale: float,
    bounded_mask_grad: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Through all pairs, a few rows at a time: a dropped key has a gradient by its mask value.

    With R = exp(s - lse) and X = R (dO.V - D): dV_j sums R_ij G_ij dO_i, dQ and dK take X_ij G_ij, and dm_j sums X_ij
    over the rows other than j.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    offset = num_keys - num_queries
    dtype = lse.dtype
    key, value = key.to(dtype), value.to(dtype)
    scaled_query = query.to(dtype) * scale
    grad_query: list[Tensor] = []
    grad_mask = grad_key = grad_value = None
    dropped = (mask == 0)[:, None, None, None] if bounded_mask_grad else None
    block = DENSE_BLOCK_BYTES // (batch * num_heads * num_keys * lse.element_size())
    if is_causal:
        block = min(block, num_queries // DENSE_BLOCKS)
    block = max(FEWEST_ROWS, block // 16 * 16)
    for start in range(0, num_queries, block):
        rows = slice(start, min(start + block, num_queries))
        first, end = start + offset, (rows.stop + offset if is_causal else num_keys)
        own = slice(first, rows.stop + offset)  # the tokens of these rows
        gate = mask[:, None, :end].repeat(1, rows.stop - start, 1)  # G [B, R, keys]
        gate[..., own].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        gate = gate[:, None, None]
        query_rows, grad_rows = (
            fold(tensor[:, :, rows], num_kv_heads) for tensor in (scaled_query, grad_output.to(dtype))
        )  # [B, Hkv, G * R, D]
        ratio = (query_rows @ key[:, :, :end].transpose(-1, -2)).view(batch, num_kv_heads, -1, rows.stop - start, end)
        ratio = ratio.sub_(lse[:, :, rows].reshape(ratio.shape[:-1])[..., None]).clamp_(max=LARGEST_EXPONENT).exp_()
        if is_causal:
            ratio[..., own].tril_()
        if needs[2]:
            part = (ratio * gate).flatten(2, 3).transpose(-1, -2) @ grad_rows
            grad_value = _add_prefix(grad_value, part, 2, num_keys)
        x = (grad_rows @ value[:, :, :end].transpose(-1, -2)).view(ratio.shape)
        x = x.sub_(delta[:, :, rows].reshape(ratio.shape[:-1])[..., None])
        by_mask = ratio  # what d/dm of exp(P) m becomes over the row's sum
        if dropped is not None:
            by_mask = torch.where(dropped[..., :end], ratio / (1.0 + ratio), ratio)
        by_mask = (x * by_mask).sum(dim=(1, 2))  # [B, R, keys]
        by_mask[..., own].diagonal(dim1=-2, dim2=-1).zero_()  # G_ii is a constant; a subtraction would leave rounding
        grad_mask = _add_prefix(grad_mask, by_mask.sum(dim=1), 1, num_keys)
        if needs[0] or needs[1]:
            grad_scores = x.mul_(ratio).mul_(gate).flatten(2, 3)
            if needs[0]:
                part = (grad_scores @ key[:, :, :end]).mul_(scale)
                grad_query.append(part.view(batch, num_heads, rows.stop - start, head_dim))
            if needs[1]:
                grad_key = _add_prefix(grad_key, grad_scores.transpose(-1, -2) @ query_rows, 2, num_keys)
    assert grad_mask is not None
    return torch.cat(grad_query, dim=2) if grad_query else None, grad_key, grad_value, grad_mask


def _add_prefix(total: Tensor | None, part: Tensor, dim: int, length: int) -> Tensor:
    """Add ``part`` to the first entries along ``dim`` of ``total``, which is made when it is None."""
    if total is None:
        if part.shape[dim] == length:
            return part
        shape = [*part.shape]
        shape[dim] = length
        total = part.new_zeros(shape)
    total.narrow(dim, 0, part.shape[dim]).add_(part)
    return total


def _add_self_terms(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    rest: Tensor,
    scale: float,
) -> None:
    """Add the share of the diagonal that the mask does not cover; ``rest`` [B, 1, Nq] is 1 - m of the row's token."""
    batch, _, num_queries, head_dim = query.shape
    offset = key.shape[2] - num_queries
    per_group = (batch, key.shape[1], -1, num_queries, head_dim)
    grad = grad_output.to(lse.dtype)
    weight = rest * torch.exp(own_scores(query, key, scale) - lse)  # (1 - m_i) r_i [B, H, Nq]
    difference = own_rows(value, query).to(lse.dtype) - output.to(lse.dtype)
    slope = (grad * difference).sum(dim=-1).mul_(weight).mul_(scale)[..., None]  # (1 - m_i) r_i (dO.V_i - D_i)
    grad_value[:, :, offset:] += (grad * weight[..., None]).view(per_group).sum(dim=2)
    grad_query.addcmul_(own_rows(key, query).to(lse.dtype), slope)
    grad_key[:, :, offset:] += (query.to(lse.dtype) * slope).view(per_group).sum(dim=2)
