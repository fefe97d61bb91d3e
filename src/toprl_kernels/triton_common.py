"""What all kernels share. Importing this module imports triton; only the ops' ``triton.py`` modules do that."""

from __future__ import annotations

import triton
import triton.language as tl

from toprl_kernels.dispatch import interpreting

# The interpreter multiplies bfloat16 as raw integers, so kernels widen the operands of a dot there. It has numpy add up
# the products, in an order that hangs on the machine and on which operand comes first: in float32, the scores of a
# backward differ from those of its forward. A GPU adds up both in the same order, and float64 rounds both alike.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def host_int(x):
    """A loop bound, to be used inside ``range(...)`` itself (an assignment would turn it into a tensor again).

    Triton 3.6's interpreter cannot turn a one-element array into an int under numpy >= 2.4.
    """
    if INTERPRETED:
        return int(x.handle.data.item())
    return x


@triton.jit
def dot(a, b, acc):
    """a @ b + acc with float32 accumulation and no TF32 rounding of float32 operands."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def next_power_of_2(n: int, at_least: int = 1) -> int:
    return max(at_least, 1 << max(n - 1, 0).bit_length())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
