"""compact_cache in one launch for both tensors, by the gather of topk_compact."""

from __future__ import annotations

from torch import Tensor

from toprl_kernels.topk.triton import gather_heads


def compact_cache_triton(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`compact_cache_eager`."""
    new_keys, new_values = gather_heads([keys, values], indices)
    return new_keys, new_values
