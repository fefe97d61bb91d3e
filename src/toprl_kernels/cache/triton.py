"""Rows of several tensors gathered in one launch, and the gather's gradient."""

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels.cache.reference import by_bytes
from toprl_kernels.configs import select
from toprl_kernels.triton_common import ceil_div, next_power_of_2

Moved = namedtuple("Moved", "source target batch head row column size")  # a tensor whose rows move


@triton.jit
def copy_rows(x, sample, head, first_row, index, rows, in_range, dims):
    """[R, D] rows, zero where the index is -1."""
    dim_ok = (dims < x.size)[None, :]
    source = x.source + sample * x.batch + head * x.head
    source = source + index[:, None] * x.row + dims.to(tl.int64)[None, :] * x.column
    tile = tl.load(source, mask=(index >= 0)[:, None] & dim_ok, other=0)
    target = x.target + first_row * x.size + rows.to(tl.int64)[:, None] * x.size + dims[None, :]
    tl.store(target, tile, mask=in_range[:, None] & dim_ok)


@triton.jit(do_not_specialize=["length"])
def topk_gather_kernel(
    first, others, indices_ptr, origins_ptr, num_heads, num_row_blocks, length, num_blocks,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out[b, h, r] = x[b, h, indices[b, r]] of several tensors, zero where the index is -1.

    The first is cut into blocks of its last dimension, the others are not; they go by ``origins`` where there are any.
    Grid (B * H * row blocks, blocks + other tensors).
    """
    matrix = tl.program_id(0) // num_row_blocks  # divided in 32 bits: in 64 it would be a call
    sample, head = (matrix // num_heads).to(tl.int64), (matrix % num_heads).to(tl.int64)
    part = tl.program_id(1)
    rows = tl.program_id(0) % num_row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = rows < length
    index = tl.load(indices_ptr + sample * length + rows, mask=in_range, other=-1)  # [R]
    out = matrix.to(tl.int64) * length
    if part < num_blocks:
        copy_rows(first, sample, head, out, index, rows, in_range, part * BLOCK_D + tl.arange(0, BLOCK_D))
    else:
        origin = index
        if origins_ptr is not None:
            origin = tl.load(origins_ptr + sample * length + rows, mask=in_range, other=0)
            origin = tl.where(index >= 0, origin, -1)
        for number in tl.static_range(len(others)):
            if part == num_blocks + number:
                copy_rows(others[number], sample, head, out, origin, rows, in_range, tl.arange(0, BLOCK_W))


@triton.jit(do_not_specialize=["length"])
def topk_scatter_kernel(
    grad_ptr, indices_ptr, out_ptr, stride_gb, stride_gh, stride_gr, stride_gd,
    num_heads, num_row_blocks, length, num_tokens, size,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, h, indices[b, r]] = grad[b, h, r]: indices are unique, so that a gather's gradient is a store.

    Out starts at 0. Grid (B * H * row blocks, blocks of the last dimension).
    """
    matrix = tl.program_id(0) // num_row_blocks  # divided in 32 bits: in 64 it would be a call
    sample, head = (matrix // num_heads).to(tl.int64), (matrix % num_heads).to(tl.int64)
    rows = tl.program_id(0) % num_row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    index = tl.load(indices_ptr + sample * length + rows, mask=rows < length, other=-1)  # [R]
    mask = (index >= 0)[:, None] & (dims < size)[None, :]
    source = grad_ptr + sample * stride_gb + head * stride_gh + rows.to(tl.int64)[:, None] * stride_gr
    tile = tl.load(source + dims.to(tl.int64)[None, :] * stride_gd, mask=mask, other=0)  # [R, D]
    tl.store(out_ptr + (matrix.to(tl.int64) * num_tokens + index)[:, None] * size + dims[None, :], tile, mask=mask)


def row_config(kernel: str, sizes: list[int], device: torch.device) -> tuple[int, int, int, int]:
    """Rows, dimensions of the first tensor and of the others, and warps of a program that moves rows."""
    config = select(kernel, size=sizes[0], dtype=torch.float32, device=device)
    block_d = min(next_power_of_2(sizes[0]), config.block_n)
    block_w = next_power_of_2(max(sizes[1:], default=1))
    return max(1, config.block_m * config.block_n // max(block_d, block_w)), block_d, block_w, config.num_warps


def _as_real(tensor: Tensor) -> Tensor:
    """Complex rows as pairs of numbers, rows of one byte as bytes."""
    return torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else by_bytes(tensor)


def gather_rows_triton(tensors: list[Tensor], indices: Tensor, origins: Tensor | None) -> list[Tensor]:
    """Same contract as :func:`gather_rows_reference`, in one launch."""
    samples, heads = tensors[0].shape[:2]
    length = indices.shape[1]
    outputs = [x.new_empty(samples, heads, length, x.shape[3]) for x in tensors]
    if samples and heads and length:
        sources, targets = [_as_real(x) for x in tensors], [_as_real(x) for x in outputs]
        sizes = [source.shape[3] for source in sources]
        rows, block_d, block_w, num_warps = row_config("topk_gather", sizes, indices.device)
        blocks, row_blocks = ceil_div(sizes[0], block_d), ceil_div(length, rows)
        first, *others = map(Moved, sources, targets, *zip(*(x.stride() for x in sources), strict=True), sizes)
        with torch.cuda.device_of(indices):
            topk_gather_kernel[(samples * heads * row_blocks, blocks + len(others))](
                first, tuple(others), indices.contiguous(), origins, heads, row_blocks, length, blocks,
                BLOCK_R=rows, BLOCK_D=block_d, BLOCK_W=block_w, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return outputs


def scatter_rows_triton(gradient: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Transpose of :func:`gather_rows_triton` for one tensor: [B, H, N, d], zero where no index points."""
    samples, heads, length, size = gradient.shape
    output = gradient.new_zeros(samples, heads, num_tokens, size)
    if gradient.numel():
        rows, block_d, _, num_warps = row_config("topk_scatter", [size], output.device)
        row_blocks = ceil_div(length, rows)
        with torch.cuda.device_of(output):
            topk_scatter_kernel[(samples * heads * row_blocks, ceil_div(size, block_d))](
                gradient, indices.contiguous(), output, *gradient.stride(), heads, row_blocks, length, num_tokens, size,
                BLOCK_R=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return output
