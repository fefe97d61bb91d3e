"""prune_stage in two launches: selection, with all that is a number per token, and the gather of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels.configs import select
from toprl_kernels.stage.eager import Outputs
from toprl_kernels.topk.reference import by_bytes
from toprl_kernels.topk.triton import select_tokens
from toprl_kernels.triton_common import ceil_div, next_power_of_2

MAX_TABLES = 3


@triton.jit
def copy_rows(source_ptr, out_ptr, index, rows, in_range, dims, size, stride_n, stride_d):
    """[R, D] rows, zero where the index is -1."""
    dim_ok = (dims < size)[None, :]
    source = source_ptr + index[:, None] * stride_n + dims.to(tl.int64)[None, :] * stride_d
    tile = tl.load(source, mask=(index >= 0)[:, None] & dim_ok, other=0)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * size + dims[None, :], tile, mask=in_range[:, None] & dim_ok)


@triton.jit(do_not_specialize=["length"])
def stage_gather_kernel(
    hidden_ptr, table0_ptr, table1_ptr, table2_ptr, indices_ptr, origins_ptr,
    out_ptr, out0_ptr, out1_ptr, out2_ptr,
    stride_hb, stride_hn, stride_hd, stride_0b, stride_0n, stride_0d, stride_1b, stride_1n, stride_1d,
    stride_2b, stride_2n, stride_2d, length, hidden_size, size0, size1, size2, num_d_blocks,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Rows of the hidden states by index, of the tables by origin. Grid (row blocks, d blocks + tables, B)."""
    sample = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = rows < length
    index = tl.load(indices_ptr + sample * length + rows, mask=in_range, other=-1)  # [R]
    if part < num_d_blocks:
        dims = part * BLOCK_D + tl.arange(0, BLOCK_D)
        target = out_ptr + sample * length * hidden_size
        copy_rows(
            hidden_ptr + sample * stride_hb, target, index, rows, in_range, dims, hidden_size, stride_hn, stride_hd
        )
    else:
        origin = tl.load(origins_ptr + sample * length + rows, mask=in_range, other=0)
        origin = tl.where(index >= 0, origin, -1)
        columns = tl.arange(0, BLOCK_W)
        start = sample * length
        # pointers of several types need names of their own
        if part == num_d_blocks:
            source0 = table0_ptr + sample * stride_0b
            copy_rows(source0, out0_ptr + start * size0, origin, rows, in_range, columns, size0, stride_0n, stride_0d)
        elif part == num_d_blocks + 1:
            source1 = table1_ptr + sample * stride_1b
            copy_rows(source1, out1_ptr + start * size1, origin, rows, in_range, columns, size1, stride_1n, stride_1d)
        else:
            source2 = table2_ptr + sample * stride_2b
            copy_rows(source2, out2_ptr + start * size2, origin, rows, in_range, columns, size2, stride_2n, stride_2d)


def _as_real(table: Tensor) -> Tensor:
    """Complex rows as pairs of numbers, rows of one byte as bytes."""
    return torch.view_as_real(table).flatten(-2) if table.is_complex() else by_bytes(table)


def prune_stage_triton(
    hidden_states: Tensor,
    scores: Tensor,
    columns: Tensor,
    k: Tensor | None,
    limit: int,
    length: int,
    width: int,
    valid_mask: Tensor | None,
    origins: Tensor | None,
    raster: Tensor,
    position_ids: Tensor | None,
    tables: list[Tensor],
    left: bool,
) -> Outputs:
    """Same contract as :func:`prune_stage_eager`."""
    samples, num_tokens, hidden_size = hidden_states.shape
    out = select_tokens(
        scores, num_tokens, length, k=k, limit=limit, valid_mask=valid_mask, position_ids=position_ids, left=left,
        columns=columns, origins=origins, raster=raster, width=width,
    )  # fmt: skip
    hidden = hidden_states.new_empty(samples, length, hidden_size)
    gathered = [table.new_empty(samples, length, table.shape[2]) for table in tables]
    if samples and length:
        # a table of one row serves all samples, by a stride of 0
        sources = [_as_real(table.expand(samples, -1, -1)) for table in tables]
        targets = [_as_real(table) for table in gathered]
        fill = MAX_TABLES - len(tables)
        sizes = [source.shape[2] for source in sources] + [1] * fill
        strides = [stride for source in sources for stride in source.stride()] + [0, 0, 0] * fill
        config = select("topk_gather", size=hidden_size, dtype=torch.float32, device=hidden.device)
        block_d = min(next_power_of_2(hidden_size), config.block_n)
        blocks = ceil_div(hidden_size, block_d)
        with torch.cuda.device_of(hidden):
            stage_gather_kernel[(ceil_div(length, config.block_m), blocks + len(tables), samples)](
                by_bytes(hidden_states), *sources, *[hidden] * fill, out["indices"], out["origins"],
                by_bytes(hidden), *targets, *[hidden] * fill, *hidden_states.stride(), *strides,
                length, hidden_size, *sizes, blocks,
                BLOCK_R=config.block_m, BLOCK_D=block_d, BLOCK_W=next_power_of_2(max(sizes)),
                num_warps=config.num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    names = ("indices", "valid", "columns", "origins", "slots", "raster", "listed", "positions")
    indices, valid, new_columns, before, slots, numbers, listed, positions = (out[name] for name in names)
    return hidden, indices, valid, new_columns, before, slots, numbers, listed, positions, gathered
