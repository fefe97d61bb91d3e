"""Calls with tensors that were examined before are recognized, so that they need not be examined before every kernel.

Reading the shape, dtype and device of four tensors from Python, and asking who has a say in the call, takes 4 us, of
twelve 8; torch's own guards, which decide whether compiled code still fits its inputs, take 0.5 and 1. They compare
what the tensors are now, not who they are: a parameter whose data was replaced in place, or whose number of dimensions
changed, is another case. So is any tensor under autocast, a transform or a dispatch mode. Whether gradients are enabled
makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toprl_kernels._library import PLAIN, is_compiling, is_plain_call
from toprl_kernels.backend import Choice, choose, names_implementation

MAX_CASES = 8  # training and rollouts, a frozen copy, inference mode, the stages of a prefill: few at a time


class Finding(NamedTuple):
    """What the tensors of a call say, whatever else is asked for."""

    op: str
    device: torch.device
    dtype: torch.dtype | None  # that decides about the definition
    obstacle: str | None  # why the kernels cannot take them
    definition_because: str | None
    automatic: Choice  # what runs where nobody names an implementation
    requires_grad: bool  # at least one that may have a gradient
    is_plain: bool  # no mode, transform or autocast has a say: all of them change the dispatch keys
    extra: Any  # what this op reads of them besides


def examined(
    op: str,
    tensors: tuple[Tensor, ...],
    *,
    requires_grad: bool,
    obstacle: str | None = None,
    dtype: torch.dtype | None = None,
    definition_because: str | None = None,
    extra: Any = None,
) -> Finding:
    """The finding about tensors that were checked; the arguments are those of :func:`toprl_kernels.backend.choose`."""
    device = tensors[0].device
    automatic = choose(op, "auto", device, obstacle, dtype=dtype, definition_because=definition_because)
    plain = is_plain_call(tensors[0])
    return Finding(op, device, dtype, obstacle, definition_because, automatic, requires_grad, plain, extra)


def choose_for(found: Finding, backend: str | None) -> Choice:
    """Which implementation runs; see :func:`toprl_kernels.backend.choose`."""
    if backend is None and not names_implementation():
        return found.automatic
    return choose(
        found.op,
        backend,
        found.device,
        found.obstacle,
        dtype=found.dtype,
        definition_because=found.definition_because,
    )


class KnownCalls:
    """Findings about lists of tensors, found again by type, dtype, device, sizes, dispatch keys and requires_grad."""

    def __init__(self) -> None:
        # replaced as a whole, since threads may read it; the latest used one first: layers come in rows
        self._cases: tuple[tuple[Callable[..., bool], Finding], ...] = ()
        self._met: object = None

    def find(self, tensors: tuple[Tensor, ...]) -> Finding | None:
        """What was remembered of tensors like these, as many as then; nothing in traced code."""
        if is_compiling():
            return None
        cases = self._cases
        for case in cases:
            if case[0](*tensors):
                if case is not cases[0]:
                    self._cases = (case, *(other for other in cases if other is not case))
                return case[1]
        return None

    def remember(self, finding: Finding, tensors: tuple[Tensor, ...], any_size: Sequence[int] = ()) -> None:
        """Keep ``finding`` from the second time in a row on; the first tensor may differ in the sizes ``any_size``.

        From the second time, because to remember costs more than to recognize saves: in decoding with one layer no
        call ever has the sizes of another.
        """
        if is_compiling() or not finding.is_plain:
            return
        if not all(type(tensor) in PLAIN for tensor in tensors):  # fake tensors and the like have sizes of their own
            return
        sizes: list[list[int | None]] = [list(tensor.shape) for tensor in tensors]
        for dimension in any_size:
            sizes[0][dimension] = None
        met, self._met = self._met, sizes
        if met != sizes or len({id(tensor) for tensor in tensors}) < len(tensors):  # guards refuse one tensor twice
            return
        any_stride = [[None] * tensor.dim() for tensor in tensors]
        try:
            guards = torch._C._dynamo.guards.TensorGuards(
                *tensors,
                dynamic_dims_sizes=sizes,  # type: ignore[arg-type]  # the stub forgets that there is a list per tensor
                dynamic_dims_strides=any_stride,  # type: ignore[arg-type]
            )
        except (AttributeError, TypeError):  # private: a torch to come may not have it, and then all are examined
            return
        self._cases = ((guards.check, finding), *self._cases[: MAX_CASES - 1])
