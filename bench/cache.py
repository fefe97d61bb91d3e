"""compact_cache against gathering by index.

Useful work: each kept key and value read and written once. No FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.common import Case, Provider, Row, Settings, Work, compare, exact, our_name
from toprl_kernels import compact_cache


@dataclass(frozen=True)
class CacheCase(Case):
    """Compaction of cached keys and values [B, Hkv, N, D] to ``k`` positions."""

    op = "compact_cache"
    num_tokens: int
    k: int
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def shape(self) -> str:
        return f"B{self.batch} Hkv{self.num_kv_heads} N{self.num_tokens} K{self.k} D{self.head_dim}"

    @property
    def keep(self) -> float:
        return self.k / self.num_tokens

    def bench(self, settings: Settings) -> list[Row]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.num_kv_heads, self.num_tokens, self.head_dim)
        keys, values = (torch.randn(*shape, generator=generator).to(settings.device, self.dtype) for _ in range(2))
        order = torch.rand(self.batch, self.num_tokens, generator=generator).argsort(dim=1)
        indices = order[:, : self.k].sort(dim=1).values.to(settings.device)  # [B, K]

        def gather() -> list[Tensor]:
            expanded = indices[:, None, :, None].expand(-1, self.num_kv_heads, -1, self.head_dim)
            return [keys.gather(2, expanded), values.gather(2, expanded)]

        def by_rows() -> list[Tensor]:
            return [keys.index_select(2, indices[0]), values.index_select(2, indices[0])]

        truth = gather()
        only = "" if self.batch == 1 else "index_select takes one list of indices for all samples: B = 1 only"
        providers = [
            Provider(our_name(settings.device), lambda: list(compact_cache(keys, values, indices)), "ours"),
            Provider("gather", gather),
            Provider("index_select", by_rows, missing=only),
        ]
        moved = 4 * indices.numel() * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return compare(self, providers, lambda got: exact(got, truth), Work(0.0, moved), settings)
