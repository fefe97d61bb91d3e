"""Tensors that were examined before are recognized, so that a dozen of them need not be examined before every kernel.

Reading the shape, dtype and device of twelve tensors from Python takes 4 us; torch's own guards, which decide whether
compiled code still fits its inputs, take 1. They compare what the tensors are now, not who they are: a parameter whose
data was replaced in place, or whose number of dimensions changed, is another case. So is any tensor under autocast, a
transform or a dispatch mode. Whether gradients are enabled makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MAX_CASES = 8  # training and rollouts, a frozen copy, inference mode: few at a time
PLAIN = (Tensor, torch.nn.Parameter)


class KnownCases(Generic[T]):
    """Findings about lists of tensors, found again by type, dtype, device, sizes, dispatch keys and requires_grad.

    Not for traced code: ask ``torch.compiler.is_compiling()`` first.
    """

    def __init__(self) -> None:
        self._cases: tuple[tuple[Callable[..., bool], T], ...] = ()  # replaced as a whole: threads may read it

    def find(self, tensors: tuple[Tensor, ...]) -> T | None:
        """What was remembered of tensors like these; as many as then."""
        for fits, finding in self._cases:
            if fits(*tensors):
                return finding
        return None

    def remember(self, finding: T, tensors: tuple[Tensor, ...], any_size: Sequence[int] = ()) -> None:
        """Keep ``finding``; the first tensor may have other sizes in the dimensions ``any_size``."""
        if not all(type(tensor) in PLAIN for tensor in tensors):  # fake tensors and the like have sizes of their own
            return
        sizes: list[list[int | None]] = [list(tensor.shape) for tensor in tensors]
        for dimension in any_size:
            sizes[0][dimension] = None
        any_stride = [[None] * tensor.dim() for tensor in tensors]
        try:
            guards = torch._C._dynamo.guards.TensorGuards(
                *tensors,
                dynamic_dims_sizes=sizes,  # type: ignore[arg-type]  # the stub forgets that there is a list per tensor
                dynamic_dims_strides=any_stride,  # type: ignore[arg-type]
            )
        except (AttributeError, TypeError):  # private: a torch to come may not have it, and then all are examined
            return
        if guards.check(*tensors):  # never where one tensor stands twice: such lists would push out all others
            self._cases = ((guards.check, finding), *self._cases[: MAX_CASES - 1])
