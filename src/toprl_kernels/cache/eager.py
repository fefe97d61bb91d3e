"""Rows gathered by index in plain PyTorch, and the gather's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels.cache.reference import as_type, by_bytes, gather_rows_reference


def gather_rows_eager(tensors: list[Tensor], indices: Tensor, origins: Tensor | None) -> list[Tensor]:
    """Same contract as :func:`gather_rows_reference`."""
    padding: Tensor | None = indices < 0
    if not indices.is_cuda and not bool((indices < 0).any()):  # looking would make a GPU wait
        padding = None
    first, *others = tensors
    after = indices if origins is None else origins
    return [_gather(first, indices, padding), *(_gather(tensor, after, padding) for tensor in others)]


def _gather(tensor: Tensor, indices: Tensor, padding: Tensor | None) -> Tensor:
    samples, heads, _, size = tensor.shape
    # [B, H, N, d], its transpose [B, N, H, d] and slices of either are rows of one matrix: index_select copies whole
    # rows, an index expression goes element by element
    moved = by_bytes(tensor)
    if not moved.numel() or moved.stride(3) != 1 or any(stride % size for stride in moved.stride()[:3]):
        return gather_rows_reference([tensor], indices if padding is None else indices.masked_fill(padding, -1))[0]
    strides = [stride // size for stride in moved.stride()[:3]]
    num_rows = 1 + sum(stride * (n - 1) for stride, n in zip(strides, moved.shape[:3], strict=True))
    rows = (indices if padding is None else indices.masked_fill(padding, 0))[:, None] * strides[2]  # [B, 1, K]
    if samples > 1:
        rows = rows + torch.arange(samples, device=rows.device)[:, None, None] * strides[0]
    if heads > 1:
        rows = rows + torch.arange(heads, device=rows.device)[:, None] * strides[1]
    output = moved.as_strided((num_rows, size), (size, 1)).index_select(0, rows.flatten())
    output = output.view(samples, heads, indices.shape[1], size)
    return as_type(output if padding is None else output.masked_fill_(padding[:, None, :, None], 0), tensor.dtype)


def scatter_rows_eager(gradient: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Transpose of the gather of one tensor: [B, H, N, d], zero where no index points; indices are unique."""
    samples, heads, _, size = gradient.shape
    total = samples * heads * num_tokens
    matrices = torch.arange(samples * heads, device=indices.device).view(samples, heads, 1)
    rows = torch.where(indices[:, None] < 0, total, matrices * num_tokens + indices[:, None])  # the last takes padding
    output = gradient.new_zeros(total + 1, size)
    output.index_copy_(0, rows.flatten(), gradient.reshape(-1, size))
    return output[:total].view(samples, heads, num_tokens, size)
