"""What to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from toprl_kernels.ahead_of_time import Case, Select, Work
from toprl_kernels.topk import triton as kernels

IN_REGISTERS = (1024, 2048, 4096)
CHUNKED = 65536
BATCH, KEPT, HIDDEN_SIZE = 8, 192, 4096


def cases(select: Select) -> Iterator[Case]:
    """Selection with every option on, in each size bucket; the gather of 16-bit rows and its gradient."""
    pointers = {"_": "i64", "scores_ptr": "fp32", "valid_ptr": "u8", "out_valid_ptr": "u8"}
    options: dict[str, Any] = dict(RAGGED=True, HAS_VALID=True, POSITION_ROWS=3, LEFT=True, INVERSE=True)
    for tokens in (*IN_REGISTERS, CHUNKED):
        if tokens == CHUNKED:
            name, function = "topk_select_chunked", kernels.topk_select_chunked_kernel
        else:
            name, function = "topk_select", kernels.topk_select_kernel
        config = select(name, tokens, torch.float32)
        work = Work(f"B{BATCH} N{tokens}", programs=BATCH, dram_bytes=BATCH * tokens * (5.0 + 2 * 24))
        yield Case(
            name, f"N={tokens}", function, pointers, options | {"BLOCK_N": config.block_n}, config,
            unit_strides=("stride_sn", "stride_vn", "stride_pn"), extended=tokens == 2048, work=work,
        )  # fmt: skip
    for name, function in (("topk_gather", kernels.topk_gather_kernel), ("topk_scatter", kernels.topk_scatter_kernel)):
        config = select(name, HIDDEN_SIZE, torch.bfloat16)
        constants = dict(BLOCK_R=config.block_m, BLOCK_D=config.block_n)
        blocks = -(-KEPT // config.block_m) * -(-HIDDEN_SIZE // config.block_n)
        problem = f"B{BATCH} K{KEPT} d{HIDDEN_SIZE}"
        work = Work(problem, programs=BATCH * blocks, dram_bytes=2.0 * 2 * BATCH * KEPT * HIDDEN_SIZE)
        yield Case(
            name, "bf16", function, {"_": "bf16", "indices_ptr": "i64"}, constants, config,
            unit_strides=("stride_hd", "stride_gd"), work=work,
        )  # fmt: skip
