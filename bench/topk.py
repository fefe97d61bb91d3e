"""topk_compact against what PyTorch offers.

Useful work of topk_compact: each kept hidden state read and written once, every score read once, position ids and
indices of the kept tokens; backward, the gradient of the kept rows read and that of all rows written. No FLOPs.

torch.topk promises nothing about ties; the scores here have none, so that all providers must agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.common import (
    LEFT_OUT,
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
from toprl_kernels import topk_compact

INDEX_BYTES = 8


@dataclass(frozen=True)
class TopkCase:
    """Selection of ``k`` of ``num_tokens`` hidden states of width ``hidden_size``."""

    num_tokens: int
    k: int
    hidden_size: int
    batch: int = 1
    mode: str = "fwd"
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def shape(self) -> str:
        return f"B{self.batch} N{self.num_tokens} K{self.k} d{self.hidden_size}"

    def label(self) -> str:
        return f"topk_compact {self.mode} {self.shape} {dtype_name(self.dtype)}"


def bench_topk(case: TopkCase, settings: Settings) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.num_tokens)
    hidden = torch.randn(*shape, case.hidden_size, generator=generator).to(settings.device, case.dtype)
    scores = torch.rand(shape, generator=generator).argsort(dim=1).to(settings.device, torch.float32)  # no ties
    positions = torch.arange(case.num_tokens, device=settings.device).expand(case.batch, -1)
    backward = case.mode != "fwd"
    upstream = torch.ones(case.batch, case.k, case.hidden_size, device=settings.device, dtype=case.dtype)

    def run(select: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Built:
        def call() -> list[Tensor]:
            leaf = hidden.detach().requires_grad_(backward)
            rows, kept_positions, indices = select(leaf)
            gradient = torch.autograd.grad(rows, leaf, upstream) if backward else ()
            return [rows, kept_positions, indices, *gradient]

        return Built(call)

    def ours(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = topk_compact(states, scores, case.k, position_ids=positions)
        assert output.position_ids is not None
        return output.hidden_states, output.position_ids, output.indices

    def plain(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = scores.topk(case.k, dim=1, sorted=False).indices.sort(dim=1).values
        rows = states.gather(1, indices[:, :, None].expand(-1, -1, case.hidden_size))
        return rows, positions.gather(1, indices), indices

    def by_rows(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with whole rows copied by index_select, which is faster than gather on a CPU."""
        indices = scores.topk(case.k, dim=1, sorted=False).indices.sort(dim=1).values
        flat = indices + torch.arange(case.batch, device=indices.device)[:, None] * case.num_tokens
        rows = states.flatten(0, 1).index_select(0, flat.flatten()).view(case.batch, case.k, case.hidden_size)
        return rows, positions.gather(1, indices), indices

    def compiled() -> Built:
        if not case.compiled:
            raise NotAvailableError(LEFT_OUT)
        return run(torch.compile(plain, dynamic=False, fullgraph=True))

    reference = topk_compact(hidden, scores, case.k, position_ids=positions, backend="reference")
    assert reference.position_ids is not None
    truth = [reference.hidden_states, reference.position_ids, reference.indices]
    if backward:
        truth.append(torch.zeros_like(hidden).scatter_(1, truth[2][:, :, None].expand_as(upstream), upstream))
    kept_bytes = case.batch * case.k * case.hidden_size * case.dtype.itemsize
    moved = 2 * kept_bytes + scores.numel() * 4 + 3 * case.batch * case.k * INDEX_BYTES
    if backward:
        moved += kept_bytes + hidden.numel() * case.dtype.itemsize
    labels = shared_labels(
        "topk_compact",
        case.mode,
        case.shape,
        case.dtype,
        case.label(),
        batch=case.batch,
        num_tokens=case.num_tokens,
        keep=case.k / case.num_tokens,
        hidden_size=case.hidden_size,
    )
    providers = [
        Provider(our_name(settings.device), lambda: run(ours), role="ours"),
        Provider("torch.topk + sort + gather", lambda: run(plain)),
        Provider("torch.topk + sort + index_select", lambda: run(by_rows)),
        Provider("torch.compile of topk + sort + gather", compiled, compiled=case.compiled),
    ]
    return compare(labels, case.dtype, providers, lambda got: exact(got, truth), Work(0.0, moved), settings)
