"""compact_cache in plain PyTorch, by the gather of topk_compact."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels.topk.eager import gather_heads, scatter_heads


def compact_cache_eager(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    padded = keys.device.type != "cpu" or bool((indices < 0).any())  # looking would make a GPU wait
    return gather_heads(keys, indices, padded), gather_heads(values, indices, padded)


def compact_cache_backward_eager(
    indices: Tensor, grad_keys: Tensor | None, grad_values: Tensor | None, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """A gradient that is not asked for is None in the arguments and empty in the result."""
    keys, values = (
        torch.empty(0, device=indices.device) if gradient is None else scatter_heads(gradient, indices, num_tokens)
        for gradient in (grad_keys, grad_values)
    )
    return keys, values
