"""topk_compact in two launches: selection (one program per sample) and gather.

The k-th largest key is found two bits at a time: three candidate thresholds per step, their counts packed into one
int64 reduction. One packed prefix sum then gives every selected token its output slot. Up to 4,096 tokens the keys
of a sample stay in registers; above, every step walks the scores again in chunks, and the prefix sum is carried.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels.configs import select
from toprl_kernels.triton_common import ceil_div, host_int, next_power_of_2

MAX_TOKENS = 65536  # three counts share an int64 in fields of 20 bits
MAX_REGISTER_TOKENS = 4096  # above, the keys would spill
CHUNK = 4096


@triton.jit
def load_keys(
    scores_ptr, valid_ptr, tokens, num_tokens, stride_sn, stride_vn, HAS_VALID: tl.constexpr
):  # fmt: skip
    """Order-preserving unsigned keys of one sample: 0 = not eligible, 1 = NaN, then -inf ... +inf."""
    in_range = tokens < num_tokens
    scores = tl.load(scores_ptr + tokens.to(tl.int64) * stride_sn, mask=in_range, other=0.0).to(tl.float32)
    eligible = in_range
    if HAS_VALID:
        valid = tl.load(valid_ptr + tokens.to(tl.int64) * stride_vn, mask=in_range, other=0)
        eligible = eligible & (valid != 0)
    bits = (tl.where(scores == 0.0, 0.0, scores)).to(tl.uint32, bitcast=True)  # -0.0 becomes 0.0
    keys = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000).to(tl.uint32)
    keys = tl.where(scores != scores, 1, keys).to(tl.uint32)
    return tl.where(eligible, keys, 0).to(tl.uint32)


@triton.jit
def count_reaching(keys, threshold, SHIFT: tl.constexpr):
    """Per key, whether it reaches the threshold with the two bits at SHIFT set to 1, 2, 3: three 20-bit fields."""
    reach_1 = keys >= (threshold + (1 << SHIFT)).to(tl.uint32)
    reach_2 = keys >= (threshold + (2 << SHIFT)).to(tl.uint32)
    reach_3 = keys >= (threshold + (3 << SHIFT)).to(tl.uint32)
    return reach_1.to(tl.int64) + (reach_2.to(tl.int64) << 20) + (reach_3.to(tl.int64) << 40)


@triton.jit
def raise_threshold(threshold, counts, count, SHIFT: tl.constexpr):
    """The largest of the four candidates that at least ``count`` keys reach."""
    digit = ((counts & 0xFFFFF) >= count).to(tl.int64)
    digit += (((counts >> 20) & 0xFFFFF) >= count).to(tl.int64)
    digit += ((counts >> 40) >= count).to(tl.int64)
    return threshold + (digit << SHIFT)


@triton.jit
def wanted(k_ptr, sample, num_eligible, length, RAGGED: tl.constexpr):
    """Tokens that the sample keeps."""
    count = tl.minimum(num_eligible, length)
    if RAGGED:
        count = tl.minimum(count, tl.load(k_ptr + sample).to(tl.int32))
    return count


@triton.jit
def store_selection(
    tokens, chosen, ranks, count, sample, num_samples, num_tokens, length,
    position_ptr, indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr, stride_pr, stride_pb, stride_pn,
    POSITION_ROWS: tl.constexpr, LEFT: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Write what the chosen among ``tokens`` bring, and the output slots whose number is in ``tokens``."""
    first = length - count if LEFT else 0
    slots = ranks + first
    out = sample * length
    is_slot = (tokens >= first) & (tokens < first + count)
    padding = (tokens < length) & (is_slot == 0)  # length <= num_tokens, so every slot has its turn
    tl.store(indices_ptr + out + slots, tokens.to(tl.int64), mask=chosen)
    tl.store(indices_ptr + out + tokens, tl.full(tokens.shape, -1, tl.int64), mask=padding)
    tl.store(out_valid_ptr + out + tokens, is_slot.to(tl.uint8), mask=tokens < length)
    for row in tl.static_range(POSITION_ROWS):
        source = position_ptr + row * stride_pr + sample * stride_pb + tokens.to(tl.int64) * stride_pn
        target = out_position_ptr + (sample + row * num_samples) * length
        position = tl.load(source, mask=chosen, other=0)
        tl.store(target + slots, position, mask=chosen)
        tl.store(target + tokens, tl.zeros_like(position), mask=padding)
    if INVERSE:
        slot_or_none = tl.where(chosen, slots, -1).to(tl.int64)
        tl.store(inverse_ptr + sample * num_tokens + tokens, slot_or_none, mask=tokens < num_tokens)


@triton.jit(do_not_specialize=["length"])
def topk_select_kernel(
    scores_ptr, k_ptr, valid_ptr, position_ptr, indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr,
    stride_sb, stride_sn, stride_vb, stride_vn, stride_pr, stride_pb, stride_pn,
    num_samples, num_tokens, length,
    BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, HAS_VALID: tl.constexpr, POSITION_ROWS: tl.constexpr,
    LEFT: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """All of a sample's keys in registers. Outputs are contiguous [B, K] (positions [P, B, K], inverse [B, N])."""
    sample = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK_N)
    keys = load_keys(
        scores_ptr + sample * stride_sb, valid_ptr + sample * stride_vb, tokens, num_tokens, stride_sn, stride_vn,
        HAS_VALID,
    )  # fmt: skip  # [N]
    count = wanted(k_ptr, sample, tl.sum((keys != 0).to(tl.int32), 0), length, RAGGED)

    threshold = tl.zeros([], tl.int64)
    for step in tl.static_range(16):
        counts = tl.sum(count_reaching(keys, threshold, 30 - 2 * step), 0)
        threshold = raise_threshold(threshold, counts, count, 30 - 2 * step)

    above = keys > threshold.to(tl.uint32)
    equal = keys == threshold.to(tl.uint32)
    ties_taken = count - tl.sum(above.to(tl.int32), 0)
    before = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)  # inclusive, two counts in one scan
    above_before = (before >> 16) - above.to(tl.int32)
    equal_before = (before & 0xFFFF) - equal.to(tl.int32)
    chosen = above | (equal & (equal_before < ties_taken))
    store_selection(
        tokens, chosen, above_before + tl.minimum(equal_before, ties_taken), count, sample, num_samples, num_tokens,
        length, position_ptr, indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr,
        stride_pr, stride_pb, stride_pn, POSITION_ROWS, LEFT, INVERSE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def topk_select_chunked_kernel(
    scores_ptr, k_ptr, valid_ptr, position_ptr, indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr,
    stride_sb, stride_sn, stride_vb, stride_vn, stride_pr, stride_pb, stride_pn,
    num_samples, num_tokens, length,
    BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, HAS_VALID: tl.constexpr, POSITION_ROWS: tl.constexpr,
    LEFT: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The same for any number of tokens: each step reads the sample again, BLOCK_N tokens at a time."""
    sample = tl.program_id(0).to(tl.int64)
    scores_ptr += sample * stride_sb
    valid_ptr += sample * stride_vb
    tokens = tl.arange(0, BLOCK_N)

    eligible = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, host_int(num_tokens), BLOCK_N):
        keys = load_keys(scores_ptr, valid_ptr, start + tokens, num_tokens, stride_sn, stride_vn, HAS_VALID)
        eligible += (keys != 0).to(tl.int32)
    count = wanted(k_ptr, sample, tl.sum(eligible, 0), length, RAGGED)

    threshold = tl.zeros([], tl.int64)
    for step in tl.static_range(16):
        packed = tl.zeros([BLOCK_N], tl.int64)
        for start in range(0, host_int(num_tokens), BLOCK_N):
            keys = load_keys(scores_ptr, valid_ptr, start + tokens, num_tokens, stride_sn, stride_vn, HAS_VALID)
            packed += count_reaching(keys, threshold, 30 - 2 * step)
        threshold = raise_threshold(threshold, tl.sum(packed, 0), count, 30 - 2 * step)

    num_above = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, host_int(num_tokens), BLOCK_N):
        keys = load_keys(scores_ptr, valid_ptr, start + tokens, num_tokens, stride_sn, stride_vn, HAS_VALID)
        num_above += (keys > threshold.to(tl.uint32)).to(tl.int32)
    ties_taken = count - tl.sum(num_above, 0)

    above_seen = tl.zeros([], tl.int32)  # in earlier chunks
    equal_seen = tl.zeros([], tl.int32)
    for start in range(0, host_int(num_tokens), BLOCK_N):
        keys = load_keys(scores_ptr, valid_ptr, start + tokens, num_tokens, stride_sn, stride_vn, HAS_VALID)
        above = keys > threshold.to(tl.uint32)
        equal = keys == threshold.to(tl.uint32)
        pair = (above.to(tl.int32) << 16) + equal.to(tl.int32)
        before = tl.cumsum(pair, 0) - pair  # exclusive
        above_before = above_seen + (before >> 16)
        equal_before = equal_seen + (before & 0xFFFF)
        chosen = above | (equal & (equal_before < ties_taken))
        store_selection(
            start + tokens, chosen, above_before + tl.minimum(equal_before, ties_taken), count, sample, num_samples,
            num_tokens, length, position_ptr, indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr,
            stride_pr, stride_pb, stride_pn, POSITION_ROWS, LEFT, INVERSE,
        )  # fmt: skip
        in_chunk = tl.sum(pair, 0)
        above_seen += in_chunk >> 16
        equal_seen += in_chunk & 0xFFFF


@triton.jit(do_not_specialize=["length"])
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
    tile = tl.load(source, mask=(index >= 0)[:, None] & dim_ok, other=0)  # [R, D]
    target = out_ptr + (sample * length + rows)[:, None] * hidden_size + dims[None, :]
    tl.store(target, tile, mask=in_range[:, None] & dim_ok)


@triton.jit(do_not_specialize=["length"])
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
    tile = tl.load(source + dims.to(tl.int64)[None, :] * stride_gd, mask=mask, other=0)  # [R, D]
    tl.store(out_ptr + (sample * num_tokens + index)[:, None] * hidden_size + dims[None, :], tile, mask=mask)


def select_config(num_tokens: int, device: torch.device) -> tuple[bool, int, int]:
    """Whether the selection runs in chunks, its block size and its warps."""
    chunked = num_tokens > MAX_REGISTER_TOKENS
    kernel = "topk_select_chunked" if chunked else "topk_select"
    config = select(kernel, size=num_tokens, dtype=torch.float32, device=device)
    return chunked, config.block_n if chunked else next_power_of_2(num_tokens, 16), config.num_warps


def _row_grid(
    kernel: str, samples: int, length: int, hidden_size: int, device: torch.device
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and constants of a kernel that moves rows."""
    config = select(kernel, size=hidden_size, dtype=torch.float32, device=device)
    block_d = min(next_power_of_2(hidden_size), config.block_n)
    grid = (ceil_div(length, config.block_m), ceil_div(hidden_size, block_d), samples)
    return grid, dict(BLOCK_R=config.block_m, BLOCK_D=block_d, num_warps=config.num_warps)


def _launchable(tensor: Tensor) -> Tensor:
    """Bool tensors as bytes: a kernel has no one-byte booleans."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def gather_rows(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """hidden_states[b, indices[b, r]], [B, K, d]; zero where the index is -1."""
    samples, _, hidden_size = hidden_states.shape
    length = indices.shape[1]
    output = hidden_states.new_empty(samples, length, hidden_size)
    if output.numel():
        grid, constants = _row_grid("topk_gather", samples, length, hidden_size, output.device)
        with torch.cuda.device_of(output):
            topk_gather_kernel[grid](
                _launchable(hidden_states), indices, _launchable(output), *hidden_states.stride(),
                length, hidden_size, **constants, enable_fp_fusion=True,
            )  # fmt: skip
    return output


def topk_compact_triton(
    hidden_states: Tensor,
    scores: Tensor,
    k: Tensor | None,
    length: int,
    valid_mask: Tensor | None,
    position_ids: Tensor | None,
    left: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same contract as :func:`topk_compact_eager`."""
    samples, num_tokens = scores.shape
    device = scores.device
    indices = torch.empty(samples, length, dtype=torch.int64, device=device)
    out_valid = torch.empty(samples, length, dtype=torch.bool, device=device)
    out_positions = indices.new_empty(0)
    if position_ids is not None:
        out_positions = position_ids.new_empty(*position_ids.shape[:-1], length)
    slots = indices.new_empty((samples, num_tokens) if inverse else 0)
    if samples and num_tokens and (length or inverse):
        positions = position_ids if position_ids is None or position_ids.ndim == 3 else position_ids[None]
        valid = scores if valid_mask is None else valid_mask.view(torch.uint8)
        chunked, block, num_warps = select_config(num_tokens, scores.device)
        kernel = topk_select_chunked_kernel if chunked else topk_select_kernel
        with torch.cuda.device_of(scores):
            kernel[(samples,)](
                scores, indices if k is None else k.contiguous(), valid, indices if positions is None else positions,
                indices, out_valid.view(torch.uint8), out_positions, slots,
                *scores.stride(), *valid.stride(), *((0, 0, 0) if positions is None else positions.stride()),
                samples, num_tokens, length,
                BLOCK_N=block, RAGGED=k is not None, HAS_VALID=valid_mask is not None,
                POSITION_ROWS=0 if positions is None else positions.shape[0], LEFT=left, INVERSE=inverse,
                num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return gather_rows(hidden_states, indices), indices, out_valid, out_positions, slots


def topk_compact_backward_triton(gradient: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Same contract as :func:`topk_compact_backward_eager`."""
    samples, length, hidden_size = gradient.shape
    output = gradient.new_zeros(samples, num_tokens, hidden_size)
    if gradient.numel():
        grid, constants = _row_grid("topk_scatter", samples, length, hidden_size, output.device)
        with torch.cuda.device_of(output):
            topk_scatter_kernel[grid](
                gradient, indices.contiguous(), output, *gradient.stride(), length, num_tokens, hidden_size,
                **constants, enable_fp_fusion=True,
            )  # fmt: skip
    return output
