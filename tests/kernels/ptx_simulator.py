"""Run compiled kernels without a GPU: the PTX that triton makes of a launch, executed on CPU tensors by numpy.

:func:`simulated` makes ``kernel[grid](...)`` compile for a GPU that is not there and execute the result. Each basic
block becomes a Python function over the 32 lanes of a warp; its lines bear the numbers of the PTX's lines, so that an
error names the instruction. Diverging lanes run in reverse postorder of their blocks and meet again there. Warps run
one after the other from barrier to barrier, in random order, and so do the programs of a grid.

What a GPU may do and the interpreter cannot show is an error (:class:`RaceError`), whatever the order: a byte that two
warps access without a barrier between, one of them writing; a byte of an asynchronous copy that is touched before its
group was waited for; a byte written by one program of a launch and read by another. Registers and shared memory start
as NaN. An access outside of the argument tensors is an :class:`AddressError`.

Fused multiply-adds and matrix products are computed in float64 and rounded once. Subnormal numbers are not flushed.
Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import triton

from bench.compile_report import Driver, kernel_modules
from tests.kernels.ptx_code import Kernel
from tests.kernels.ptx_machine import Launch


def flat(value: Any, kind: Any) -> list[tuple[Any, str]]:
    """The parameters of the code that an argument becomes: those of its parts for a tuple, none for a constant."""
    if isinstance(kind, tuple):
        return [each for part in zip(value, kind, strict=True) for each in flat(*part)]
    return [] if kind == "constexpr" else [(value, kind)]


launched_kernels: set[str] = set()
parsed = functools.cache(Kernel)


class Launched(NamedTuple):
    """A launch as it was made, to be repeated with other code."""

    name: str
    num_warps: int
    shared_bytes: int
    arguments: list[tuple[Any, str]]
    grid: tuple[int, int, int]

    def run(self, ptx: str, seed: int) -> None:
        kernel = parsed(self.name, ptx, self.num_warps)
        with np.errstate(all="ignore"):
            Launch(kernel, self.arguments, self.grid).run(kernel, self.shared_bytes, random.Random(seed))


@contextlib.contextmanager
def simulated(capability: int = 80, *, seed: int = 0) -> Iterator[None]:
    """Run every launch of a Triton kernel on CPU tensors from its PTX.

    Args:
        capability: of the GPU to compile for; its configurations are those that ``configs.select`` gives CPU tensors.
        seed: of the order of warps and programs.

    Raises:
        NotImplementedError: an instruction that the simulator does not know; names it.
    """
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("simulated: TRITON_INTERPRET is set; kernels are compiled only in a process without it")
    kernel_modules()
    compile_launch = triton.JITFunction.run

    @functools.wraps(compile_launch)
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_launch(self, *args, grid=grid, warmup=True, **kwargs)  # binds as a launch does
        metadata = compiled.metadata
        for scratch in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, scratch, 0):
                raise NotImplementedError(f"{metadata.name}: {scratch}")
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arguments = [each for name, kind in compiled.src.signature.items() for each in flat(values[name], kind)]
        launched_kernels.add(metadata.name)
        shape = (*grid, 1, 1)[:3]
        ptx = compiled.asm["ptx"]
        Launched(metadata.name, metadata.num_warps, metadata.shared, arguments, shape).run(ptx, seed)
        return compiled

    triton.runtime.driver.set_active(Driver(capability))
    triton.JITFunction.run = run
    # read again at each call by who decides whether kernels take CPU tensors; triton reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        triton.JITFunction.run = compile_launch
        del os.environ["TRITON_INTERPRET"]
