"""What to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from toprl_kernels.ahead_of_time import Case, Select, Work
from toprl_kernels.cache import triton as kernels

BATCH, HEADS, KEPT, HEAD_DIM = 8, 8, 192, 128
UNIT_STRIDES = ("stride_kd", "stride_vd")


def cases(select: Select) -> Iterator[Case]:
    """Out of place, in place, and the gradient, for 16-bit keys and values of 128 dimensions."""
    pointers = {"_": "bf16", "indices_ptr": "i64"}
    problem, moved = f"B{BATCH} H{HEADS} K{KEPT} D{HEAD_DIM}", 2.0 * 2 * 2 * BATCH * HEADS * KEPT * HEAD_DIM
    for name, function in (
        ("compact_cache", kernels.compact_cache_kernel),
        ("compact_cache_bwd", kernels.compact_cache_bwd_kernel),
        ("compact_cache_inplace", kernels.compact_cache_inplace_kernel),
    ):
        config = select(name, HEAD_DIM, torch.bfloat16)
        constants: dict[str, Any] = dict(NEED_KEYS=True, NEED_VALUES=True)
        width = kernels.MAX_INPLACE_BLOCK_D if name == "compact_cache_inplace" else HEAD_DIM
        rows = config.block_n // width
        constants |= dict(BLOCK_R=rows, BLOCK_D=width, BLOCK_KD=width, BLOCK_VD=width)
        if name == "compact_cache_inplace":  # a program moves all rows
            programs = 2 * BATCH * HEADS * (HEAD_DIM // width)
        else:
            programs = 2 * BATCH * HEADS * -(-KEPT // rows)
        work = Work(problem, programs=programs, dram_bytes=moved)
        yield Case(name, "bf16", function, pointers, constants, config, unit_strides=UNIT_STRIDES, work=work)
