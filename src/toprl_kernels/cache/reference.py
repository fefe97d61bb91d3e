"""The definition of compact_cache, and of every gather of rows: one index expression per tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def by_bytes(tensor: Tensor) -> Tensor:
    """View bool and float8 as uint8: neither kernels nor torch's indexing know all types of one byte."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`by_bytes`."""
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def gather_rows_reference(tensors: list[Tensor], indices: Tensor, origins: Tensor | None = None) -> list[Tensor]:
    """x[b, h, indices[b, r]] of each [B, H, N, d], zero where indices [B, K] is -1: [B, H, K, d].

    Where there are ``origins`` [B, K], the tensors after the first go by those.
    """
    batch = torch.arange(len(indices), device=indices.device)[:, None, None]
    gathered = []
    for number, tensor in enumerate(tensors):
        head = torch.arange(tensor.shape[1], device=tensor.device)[None, :, None]
        rows = indices if number == 0 or origins is None else origins
        kept = by_bytes(tensor)[batch, head, rows.clamp(min=0)[:, None]]
        gathered.append(as_type(kept.where((indices >= 0)[:, None, :, None], 0), tensor.dtype))
    return gathered
