"""compact_cache in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels.topk.reference import as_type, by_bytes


def gather_heads(cache: Tensor, indices: Tensor) -> Tensor:
    """cache[b, h, indices[b, r]], [B, Hkv, K, D] contiguous; zero where the index is -1."""
    dtype, cache = cache.dtype, by_bytes(cache)
    samples, heads, _, size = cache.shape
    batch = torch.arange(samples, device=cache.device)[:, None, None]
    head = torch.arange(heads, device=cache.device)[None, :, None]
    padded = cache.device.type != "cpu" or bool((indices < 0).any())  # looking would make a GPU wait
    safe = (indices.clamp(min=0) if padded else indices)[:, None, :]  # [B, 1, K]
    if cache.numel() and cache.stride(3) == 1 and all(stride % size == 0 for stride in cache.stride()[:3]):
        # [B, Hkv, N, D], its transpose [B, N, Hkv, D] and slices of either are rows of one matrix: index_select
        # copies whole rows, an index expression goes element by element
        strides = [stride // size for stride in cache.stride()[:3]]
        num_rows = 1 + sum(stride * (n - 1) for stride, n in zip(strides, cache.shape[:3], strict=True))
        rows = batch * strides[0] + head * strides[1] + safe * strides[2]
        flat = cache.as_strided((num_rows, size), (size, 1))
        output = flat.index_select(0, rows.flatten()).view(samples, heads, indices.shape[1], size)
    else:
        output = cache[batch, head, safe]
    output = output.masked_fill_((indices < 0)[:, None, :, None], 0) if padded else output
    return as_type(output, dtype)


def compact_cache_eager(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return gather_heads(keys, indices), gather_heads(values, indices)


def scatter_heads(gradient: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Transpose of :func:`gather_heads`: [B, Hkv, N, D], zero where no index points; a sample's indices are unique."""
    samples, heads, _, size = gradient.shape
    total = samples * heads * num_tokens
    matrices = torch.arange(samples * heads, device=indices.device).view(samples, heads, 1)
    rows = torch.where(indices[:, None] < 0, total, matrices * num_tokens + indices[:, None])  # the last takes padding
    output = gradient.new_zeros(total + 1, size)
    output.index_copy_(0, rows.flatten(), gradient.reshape(-1, size))
    return output[:total].view(samples, heads, num_tokens, size)


def compact_cache_backward_eager(
    indices: Tensor, grad_keys: Tensor | None, grad_values: Tensor | None, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """A gradient that is not asked for is None in the arguments and empty in the result."""
    keys, values = (
        torch.empty(0, device=indices.device) if gradient is None else scatter_heads(gradient, indices, num_tokens)
        for gradient in (grad_keys, grad_values)
    )
    return keys, values
