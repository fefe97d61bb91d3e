"""The definition of compact_cache: one index expression per tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels.topk.reference import as_type, by_bytes


def compact_cache_reference(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """keys[b, h, indices[b, r]] and the same of the values, [B, Hkv, K, D]; zero where the index is -1."""
    batch = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
    head = torch.arange(keys.shape[1], device=keys.device)[None, :, None]
    is_token = (indices >= 0)[:, None, :, None]
    rows = indices.clamp(min=0)[:, None, :]
    kept = [by_bytes(cache)[batch, head, rows].where(is_token, 0) for cache in (keys, values)]
    return as_type(kept[0], keys.dtype), as_type(kept[1], values.dtype)
