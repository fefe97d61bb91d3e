"""compact_cache in plain PyTorch, by the gather of topk_compact."""

from __future__ import annotations

from torch import Tensor

from toprl_kernels.topk.eager import gather_heads


def compact_cache_eager(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    padded = keys.device.type != "cpu" or bool((indices < 0).any())  # looking would make a GPU wait
    return gather_heads(keys, indices, padded), gather_heads(values, indices, padded)
