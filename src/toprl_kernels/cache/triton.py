"""compact_cache in one launch for both tensors, by the gather of topk_compact."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels.topk.triton import gather_heads, scatter_heads


def compact_cache_triton(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`compact_cache_eager`."""
    new_keys, new_values = gather_heads([keys, values], indices)
    return new_keys, new_values


def compact_cache_backward_triton(
    indices: Tensor, grad_keys: Tensor | None, grad_values: Tensor | None, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`compact_cache_backward_eager`."""
    keys, values = (
        torch.empty(0, device=indices.device) if gradient is None else scatter_heads(gradient, indices, num_tokens)
        for gradient in (grad_keys, grad_values)
    )
    return keys, values
