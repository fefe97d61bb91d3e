"""topk_compact against what PyTorch offers.

Useful work: each kept hidden state read and written once, every score read once, position ids and indices of the kept
tokens; backward, the gradient of the kept rows read and that of all rows written. No FLOPs.

torch.topk promises nothing about ties; the scores here have none, so that all providers must agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.common import Call, Case, Provider, Row, Settings, Work, compare, exact, graph, our_name
from toprl_kernels import topk_compact

INDEX_BYTES = 8
Selected = tuple[Tensor, Tensor, Tensor]  # hidden states, position ids, indices


@dataclass(frozen=True)
class TopkCase(Case):
    """Selection of ``k`` of ``num_tokens`` hidden states of width ``hidden_size``."""

    op = "topk_compact"
    num_tokens: int
    k: int
    hidden_size: int

    @property
    def shape(self) -> str:
        return f"B{self.batch} N{self.num_tokens} K{self.k} d{self.hidden_size}"

    @property
    def keep(self) -> float:
        return self.k / self.num_tokens

    def bench(self, settings: Settings) -> list[Row]:
        device, k = settings.device, self.k
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.num_tokens)
        hidden = torch.randn(*shape, self.hidden_size, generator=generator).to(device, self.dtype)
        scores = torch.rand(shape, generator=generator).argsort(dim=1).to(device, torch.float32)  # no ties
        positions = torch.arange(self.num_tokens, device=device).expand(self.batch, -1)
        upstream = torch.ones(self.batch, k, self.hidden_size, device=device, dtype=self.dtype)

        def run(select: Callable[[Tensor], Selected]) -> Call:
            def call() -> list[Tensor]:
                leaf = hidden.detach().requires_grad_(self.backward)
                rows, *others = select(leaf)
                gradient = torch.autograd.grad(rows, leaf, upstream) if self.backward else ()
                return [rows, *others, *gradient]

            return call

        def ours(states: Tensor, backend: str | None = None) -> Selected:
            output = topk_compact(states, scores, k, position_ids=positions, backend=backend)
            assert output.position_ids is not None
            return output.hidden_states, output.position_ids, output.indices

        def plain(states: Tensor) -> Selected:
            indices = scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
            rows = states.gather(1, indices[:, :, None].expand(-1, -1, self.hidden_size))
            return rows, positions.gather(1, indices), indices

        def by_rows(states: Tensor) -> Selected:
            """The same with whole rows copied by index_select, which is faster than gather on a CPU."""
            indices = scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
            flat = indices + torch.arange(self.batch, device=device)[:, None] * self.num_tokens
            rows = states.flatten(0, 1).index_select(0, flat.flatten()).view(self.batch, k, self.hidden_size)
            return rows, positions.gather(1, indices), indices

        truth = [tensor.detach() for tensor in ours(hidden, "reference")]
        kept_bytes = upstream.numel() * self.dtype.itemsize
        moved = 2 * kept_bytes + scores.numel() * 4 + 3 * self.batch * k * INDEX_BYTES
        if self.backward:
            truth.append(torch.zeros_like(hidden).scatter_(1, truth[2][:, :, None].expand_as(upstream), upstream))
            moved += kept_bytes + hidden.numel() * self.dtype.itemsize
        providers = [
            Provider(our_name(device), run(ours), "ours"),
            Provider("torch.topk + sort + gather", run(plain)),
            Provider("torch.topk + sort + index_select", run(by_rows)),
            Provider("torch.compile of topk + sort + gather", run(graph(plain, fullgraph=True)), compiled=True),
        ]
        return compare(self, providers, lambda got: exact(got, truth), Work(0.0, moved), settings)
