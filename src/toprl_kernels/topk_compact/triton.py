"""topk_compact in two launches: selection (one program per sample) and gather.

The k-th largest key is found two bits at a time: three candidate thresholds per step, their counts packed into one
int64 reduction. One packed prefix sum then gives every selected token its output slot.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from toprl_kernels._triton_common import ceil_div, next_power_of_2
from toprl_kernels.topk_compact.output import TopkCompactOutput

MAX_TOKENS = 16384  # the packed prefix sum holds two counts of at most 2^14 in an int32
ROWS_PER_PROGRAM = 8
MAX_BLOCK_D = 1024


@triton.jit
def topk_select_kernel(
    scores_ptr, k_ptr, valid_ptr, position_ptr, indices_ptr, out_valid_ptr, out_position_ptr,
    stride_sb, stride_sn, stride_vb, stride_vn, stride_pr, stride_pb, stride_pn,
    num_samples, num_tokens, length, k,
    BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, HAS_VALID: tl.constexpr, POSITION_ROWS: tl.constexpr,
):  # fmt: skip
    """Indices, valid mask and position ids of one sample; outputs are contiguous [B, K] (positions [P, B, K])."""
    sample = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK_N)
    in_range = tokens < num_tokens
    scores = tl.load(scores_ptr + sample * stride_sb + tokens.to(tl.int64) * stride_sn, mask=in_range, other=0.0)
    scores = scores.to(tl.float32)
    eligible = in_range
    if HAS_VALID:
        valid = tl.load(valid_ptr + sample * stride_vb + tokens.to(tl.int64) * stride_vn, mask=in_range, other=0)
        eligible = eligible & (valid != 0)

    # order-preserving unsigned keys: 0 = not eligible, 1 = NaN, then -inf ... +inf
    bits = (tl.where(scores == 0.0, 0.0, scores)).to(tl.uint32, bitcast=True)  # -0.0 becomes 0.0
    sign = bits >> 31
    keys = tl.where(sign != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000).to(tl.uint32)  # [N]
    keys = tl.where(scores != scores, 1, keys).to(tl.uint32)
    keys = tl.where(eligible, keys, 0).to(tl.uint32)

    if RAGGED:
        count = tl.load(k_ptr + sample).to(tl.int32)
    else:
        count = k
    count = tl.minimum(tl.maximum(count, 0), tl.sum(eligible.to(tl.int32), 0))

    threshold = tl.zeros([], tl.int64)  # the largest value that at least `count` keys reach
    for step in tl.static_range(16):
        reach_1 = keys >= (threshold + (1 << (30 - 2 * step))).to(tl.uint32)
        reach_2 = keys >= (threshold + (2 << (30 - 2 * step))).to(tl.uint32)
        reach_3 = keys >= (threshold + (3 << (30 - 2 * step))).to(tl.uint32)
        packed = reach_1.to(tl.int64) + (reach_2.to(tl.int64) << 20) + (reach_3.to(tl.int64) << 40)
        counts = tl.sum(packed, 0)
        digit = ((counts & 0xFFFFF) >= count).to(tl.int64)
        digit += (((counts >> 20) & 0xFFFFF) >= count).to(tl.int64)
        digit += ((counts >> 40) >= count).to(tl.int64)
        threshold += digit << (30 - 2 * step)

    above = keys > threshold.to(tl.uint32)
    equal = keys == threshold.to(tl.uint32)
    ties_taken = count - tl.sum(above.to(tl.int32), 0)
    before = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)  # inclusive, two counts in one scan
    above_before = (before >> 16) - above.to(tl.int32)
    equal_before = (before & 0xFFFF) - equal.to(tl.int32)
    chosen = above | (equal & (equal_before < ties_taken))
    slots = above_before + tl.minimum(equal_before, ties_taken)

    out = sample * length
    tail = (tokens >= count) & (tokens < length)  # slots without a token; length <= num_tokens
    tl.store(indices_ptr + out + slots, tokens.to(tl.int64), mask=chosen)
    tl.store(indices_ptr + out + tokens, tl.full([BLOCK_N], -1, tl.int64), mask=tail)
    tl.store(out_valid_ptr + out + tokens, (tokens < count).to(tl.uint8), mask=tokens < length)
    for row in tl.static_range(POSITION_ROWS):
        source = position_ptr + row * stride_pr + sample * stride_pb + tokens.to(tl.int64) * stride_pn
        target = out_position_ptr + row * num_samples.to(tl.int64) * length + out
        position = tl.load(source, mask=chosen, other=0)
        tl.store(target + slots, position, mask=chosen)
        tl.store(target + tokens, tl.zeros_like(position), mask=tail)


@triton.jit
def topk_gather_kernel(
    hidden_ptr, indices_ptr, out_ptr, stride_hb, stride_hn, stride_hd, length, hidden_size,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, r] = hidden[b, indices[b, r]], zero where the index is -1. Grid (row blocks, d blocks, B)."""
    sample = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_range = rows < length
    index = tl.load(indices_ptr + sample * length + rows, mask=in_range, other=-1)  # [R]
    dim_ok = (dims < hidden_size)[None, :]
    source = hidden_ptr + sample * stride_hb + index[:, None] * stride_hn + dims.to(tl.int64)[None, :] * stride_hd
    tile = tl.load(source, mask=(index >= 0)[:, None] & dim_ok, other=0.0)  # [R, D]
    target = out_ptr + (sample * length + rows)[:, None] * hidden_size + dims[None, :]
    tl.store(target, tile, mask=in_range[:, None] & dim_ok)


@triton.jit
def topk_scatter_kernel(
    grad_ptr, indices_ptr, out_ptr, stride_gb, stride_gr, stride_gd, length, num_tokens, hidden_size,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, indices[b, r]] = grad[b, r]: indices are unique, so the gather's gradient is a store. out starts at 0."""
    sample = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    index = tl.load(indices_ptr + sample * length + rows, mask=rows < length, other=-1)  # [R]
    mask = (index >= 0)[:, None] & (dims < hidden_size)[None, :]
    source = grad_ptr + sample * stride_gb + rows.to(tl.int64)[:, None] * stride_gr
    tile = tl.load(source + dims.to(tl.int64)[None, :] * stride_gd, mask=mask, other=0.0)  # [R, D]
    tl.store(out_ptr + (sample * num_tokens + index)[:, None] * hidden_size + dims[None, :], tile, mask=mask)


def _row_grid(samples: int, length: int, hidden_size: int) -> tuple[tuple[int, int, int], int]:
    block_d = min(next_power_of_2(hidden_size), MAX_BLOCK_D)
    return (ceil_div(length, ROWS_PER_PROGRAM), ceil_div(hidden_size, block_d), samples), block_d


def select_warps(num_tokens: int) -> int:
    """Warps of the selection kernel: it keeps all keys of a sample in registers."""
    return 4 if num_tokens <= 1024 else 8 if num_tokens <= 4096 else 32


def topk_compact_triton(
    hidden_states: Tensor,
    scores: Tensor,
    k: int | Tensor,
    length: int,
    *,
    position_ids: Tensor | None,
    valid_mask: Tensor | None,
) -> TopkCompactOutput:
    """Same contract as :func:`topk_compact_eager`."""
    samples, num_tokens = scores.shape
    device = scores.device
    indices = torch.empty(samples, length, dtype=torch.int64, device=device)
    out_valid = torch.empty(samples, length, dtype=torch.uint8, device=device)
    out_positions = None
    if position_ids is not None:
        out_positions = position_ids.new_empty(*position_ids.shape[:-1], length)
    if samples and length:
        positions = position_ids if position_ids is None or position_ids.ndim == 3 else position_ids[None]
        valid = scores if valid_mask is None else valid_mask.view(torch.uint8)
        with torch.cuda.device_of(scores):
            topk_select_kernel[(samples,)](
                scores.detach(), k if isinstance(k, Tensor) else indices, valid,
                indices if positions is None else positions, indices, out_valid,
                indices if out_positions is None else out_positions,
                *scores.stride(), *valid.stride(), *((0, 0, 0) if positions is None else positions.stride()),
                samples, num_tokens, length, 0 if isinstance(k, Tensor) else k,
                BLOCK_N=next_power_of_2(num_tokens, 16), RAGGED=isinstance(k, Tensor),
                HAS_VALID=valid_mask is not None, POSITION_ROWS=0 if positions is None else positions.shape[0],
                num_warps=select_warps(num_tokens),
            )  # fmt: skip
    hidden: Tensor = _Gather.apply(hidden_states, indices)
    return TopkCompactOutput(hidden, indices, out_valid.view(torch.bool), out_positions)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, indices: Tensor) -> Tensor:
        samples, _, hidden_size = hidden_states.shape
        length = indices.shape[1]
        output = hidden_states.new_empty(samples, length, hidden_size)
        if output.numel():
            grid, block_d = _row_grid(samples, length, hidden_size)
            with torch.cuda.device_of(output):
                topk_gather_kernel[grid](
                    hidden_states, indices, output, *hidden_states.stride(), length, hidden_size,
                    BLOCK_R=ROWS_PER_PROGRAM, BLOCK_D=block_d, num_warps=8,
                )  # fmt: skip
        ctx.save_for_backward(indices)
        ctx.input_shape = hidden_states.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        samples, num_tokens, hidden_size = ctx.input_shape
        grad = grad_output.new_zeros(ctx.input_shape)
        if grad_output.numel():
            length = indices.shape[1]
            grid, block_d = _row_grid(samples, length, hidden_size)
            with torch.cuda.device_of(grad):
                topk_scatter_kernel[grid](
                    grad_output, indices, grad, *grad_output.stride(), length, num_tokens, hidden_size,
                    BLOCK_R=ROWS_PER_PROGRAM, BLOCK_D=block_d, num_warps=8,
                )  # fmt: skip
        return grad, None
