"""The processes of one training run: one without torchrun, else torchrun's (gloo on CPU, nccl on GPU)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@contextmanager
def _named_failure() -> Iterator[None]:
    """The backends report a lost connection or their own time-out, which says little to whoever reads it."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"another process of this run died, or did not come within --ddp_timeout; its own output says why ({error})"
        ) from error


@dataclass(frozen=True)
class Ranks:
    """This process among ``size`` that train one policy.

    Every process holds the whole policy, optimizer and data order; the episodes of a rollout are dealt out in
    contiguous blocks. What all must agree on is computed from gathered or summed tensors, in rank order, so that any
    number of processes trains the same policy up to rounding.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """The block of ``total`` items that is this process's; blocks differ by at most one item."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the device of ``values``; the same bits everywhere."""
        if self.size == 1:
            return values
        total = values.clone()
        with _named_failure():
            torch.distributed.all_reduce(total)
        return total

    def gather(self, values: Tensor, total: int) -> Tensor:
        """The blocks of ``share(total)`` of all processes, put together: ``[total, ...]``."""
        if self.size == 1:
            return values
        blocks = [Ranks(rank, self.size).share(total) for rank in range(self.size)]
        longest = max(block.stop - block.start for block in blocks)
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in blocks]
        with _named_failure():
            torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: b.stop - b.start] for part, b in zip(parts, blocks, strict=True)])

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes; one that is None counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        with _named_failure():
            torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
