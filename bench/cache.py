"""compact_cache against gathering by index.

Useful work: each kept key and value read and written once. No FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.common import (
    Built,
    NotAvailableError,
    Provider,
    Row,
    Settings,
    Work,
    compare,
    dtype_name,
    exact,
    our_name,
    shared_labels,
)
from toprl_kernels import compact_cache


@dataclass(frozen=True)
class CacheCase:
    """Compaction of cached keys and values [B, Hkv, N, D] to ``k`` positions."""

    num_tokens: int
    k: int
    batch: int = 1
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return f"B{self.batch} Hkv{self.num_kv_heads} N{self.num_tokens} K{self.k} D{self.head_dim}"

    def label(self) -> str:
        return f"compact_cache {self.shape} {dtype_name(self.dtype)}"


def bench_cache(case: CacheCase, settings: Settings) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.num_kv_heads, case.num_tokens, case.head_dim)
    keys, values = (torch.randn(*shape, generator=generator).to(settings.device, case.dtype) for _ in range(2))
    order = torch.rand(case.batch, case.num_tokens, generator=generator).argsort(dim=1)
    indices = order[:, : case.k].sort(dim=1).values.to(settings.device)  # [B, K]

    def gather() -> list[Tensor]:
        expanded = indices[:, None, :, None].expand(-1, case.num_kv_heads, -1, case.head_dim)
        return [keys.gather(2, expanded), values.gather(2, expanded)]

    def by_rows() -> Built:
        if case.batch > 1:
            raise NotAvailableError("index_select takes one list of indices for all samples: B = 1 only")
        return Built(lambda: [keys.index_select(2, indices[0]), values.index_select(2, indices[0])])

    truth = gather()
    labels = shared_labels(
        "compact_cache",
        "fwd",
        case.shape,
        case.dtype,
        case.label(),
        batch=case.batch,
        num_tokens=case.num_tokens,
        keep=case.k / case.num_tokens,
    )
    providers = [
        Provider(our_name(settings.device), lambda: Built(lambda: list(compact_cache(keys, values, indices))), "ours"),
        Provider("gather", lambda: Built(gather)),
        Provider("index_select", by_rows),
    ]
    moved = 4 * indices.numel() * case.num_kv_heads * case.head_dim * case.dtype.itemsize
    with torch.no_grad():
        return compare(labels, case.dtype, providers, lambda got: exact(got, truth), Work(0.0, moved), settings)
