"""actor_score in two kernels: h -> z1 and partial sums of its second half; z1 -> logits.

The cut is where the mean over the sample is needed. LayerNorm is folded into the first product: with W' = gamma * W1
(rounded), c1 = row sums of the rounded W' and b' = W1 beta + b1 + stage bias,

    fc1(LayerNorm(x)) = (x W'^T - mean * c1) * rstd + b'

Mean and squared deviation are merged block by block (Chan), never as E[x^2] - mean^2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels import configs
from toprl_kernels.actor.reference import LAYER_NORM_EPS, ActorCall, fold_actor_weights
from toprl_kernels.triton_common import ceil_div, dot, host_int, next_power_of_2


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def locate(
    bounds_ptr, program, num_blocks, num_tokens, num_sequences,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The sequence and block of a program, the sequence's first row and its length."""
    sequence = program // num_blocks
    block = program % num_blocks
    start = sequence.to(tl.int64) * num_tokens
    length = num_tokens + 0
    if PACKED:
        numbers = tl.arange(0, BLOCK_S)
        starts, lengths = load_bounds(bounds_ptr, numbers, num_sequences)
        blocks = (lengths + BLOCK_M - 1) // BLOCK_M
        sequence = tl.sum(((tl.cumsum(blocks, 0) <= program) & (numbers < num_sequences)).to(tl.int32), 0)
        block = program - tl.sum(tl.where(numbers < sequence, blocks, 0), 0)
        start = tl.sum(tl.where(numbers == sequence, starts, 0), 0).to(tl.int64)
        length = tl.sum(tl.where(numbers == sequence, lengths, 0), 0)  # 0 after the last sequence
    return sequence, block, start, length


@triton.jit
def load_bounds(bounds_ptr, numbers, num_sequences):
    """First token and length of all sequences of a packed batch, int32 [S]."""
    starts = tl.load(bounds_ptr + numbers, mask=numbers < num_sequences, other=0).to(tl.int32)
    ends = tl.load(bounds_ptr + numbers + 1, mask=numbers < num_sequences, other=0).to(tl.int32)
    return starts, ends - starts


@triton.jit
def actor_layer1_kernel(
    h_ptr, weight_ptr, colsum_ptr, bias_ptr, valid_ptr, index_ptr, bounds_ptr, z_ptr, partial_ptr, count_ptr,
    stride_hb, stride_hn, stride_hd,
    num_tokens, d1, num_blocks, num_sequences, eps,
    HALF: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_INDEX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """z1 of one block of tokens: its first half per token, the sum of its second half over the block.

    Grid (token blocks of all samples, feature blocks). With one feature block h is read once. An invalid token's hidden
    state is not read.
    """
    slot = tl.program_id(0)
    sequence, block, start, length = locate(
        bounds_ptr, slot, num_blocks, num_tokens, num_sequences, BLOCK_M, BLOCK_S, PACKED
    )
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < length
    features = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # rows of W'
    feature_ok = features < 2 * HALF
    counted = in_range
    if HAS_VALID:
        counted = counted & (tl.load(valid_ptr + start + rows, mask=in_range, other=0) != 0)
    tokens = rows.to(tl.int64)
    if HAS_INDEX:
        tokens = tl.load(index_ptr + start + rows, mask=in_range, other=-1)
        counted = counted & (tokens >= 0)
    if PACKED:
        h_rows = h_ptr + (start + tokens)[:, None] * stride_hn
    else:
        h_rows = h_ptr + sequence.to(tl.int64) * stride_hb + tokens[:, None] * stride_hn
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)  # sum of squared deviations from the mean so far
    center = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, host_int(d1), BLOCK_K):
        dims = first + tl.arange(0, BLOCK_K)
        dim_ok = dims < d1
        x = tl.load(h_rows + dims.to(tl.int64)[None, :] * stride_hd, mask=counted[:, None] & dim_ok[None, :], other=0.0)
        x = x.to(weight_ptr.dtype.element_ty)  # [M, K]
        w = tl.load(
            weight_ptr + features[:, None] * d1 + dims[None, :], mask=feature_ok[:, None] & dim_ok[None, :], other=0.0
        )  # [F, K]
        wide = x.to(tl.float32)
        seen = first * 1.0
        new = tl.minimum(d1 - first, BLOCK_K) * 1.0
        block_mean = tl.sum(wide, 1) / new
        if x.dtype == tl.float32:  # x W'^T - mean * c1 cancels: less is lost when x starts near 0
            center = tl.where(first == 0, block_mean, center)
            x -= center[:, None]
        acc = dot(x, tl.trans(w), acc)
        deviation = tl.where(dim_ok[None, :], wide - block_mean[:, None], 0.0)
        shift = block_mean - mean
        mean += shift * (new / (seen + new))
        squares += tl.sum(deviation * deviation, 1) + shift * shift * (seen * new / (seen + new))

    rstd = 1.0 / tl.sqrt(squares / d1 + eps)
    colsum = tl.load(colsum_ptr + features, mask=feature_ok, other=0.0)
    bias = tl.load(bias_ptr + features, mask=feature_ok, other=0.0)
    z = gelu((acc - (mean - center)[:, None] * colsum[None, :]) * rstd[:, None] + bias[None, :])  # [M, F]
    target = z_ptr + (start + rows)[:, None] * HALF + features[None, :]
    tl.store(target, z.to(z_ptr.dtype.element_ty), mask=in_range[:, None] & (features < HALF)[None, :])
    total = tl.sum(tl.where(counted[:, None], z, 0.0), 0)  # [F]
    target = partial_ptr + slot.to(tl.int64) * HALF + features - HALF
    tl.store(target, total, mask=feature_ok & (features >= HALF))
    if tl.program_id(1) == 0:
        tl.store(count_ptr + slot, tl.sum(counted.to(tl.float32), 0))


@triton.jit
def load_fc3(w3_ptr, outputs, chunk, HALF: tl.constexpr):
    """A tile of fc3's weight, [outputs, chunk]."""
    mask = (outputs < 2 * HALF)[:, None] & (chunk < 2 * HALF)[None, :]
    return tl.load(w3_ptr + outputs[:, None] * (2 * HALF) + chunk[None, :], mask=mask, other=0.0)


@triton.jit
def head(acc, b3_ptr, head_weight_ptr, outputs, HALF: tl.constexpr):
    """What some of fc3's outputs add to both logits, [M] each."""
    ok = outputs < 2 * HALF
    dtype = head_weight_ptr.dtype.element_ty
    z = gelu(acc + tl.load(b3_ptr + outputs, mask=ok, other=0.0).to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    keep = tl.load(head_weight_ptr + outputs, mask=ok, other=0.0).to(tl.float32)
    drop = tl.load(head_weight_ptr + 2 * HALF + outputs, mask=ok, other=0.0).to(tl.float32)
    return tl.sum(z * keep[None, :], 1), tl.sum(z * drop[None, :], 1)


@triton.jit
def actor_layers23_kernel(
    z_ptr, partial_ptr, count_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, head_weight_ptr, head_bias_ptr, bounds_ptr, out_ptr,
    num_tokens, num_blocks, num_row_blocks, num_sequences,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M1: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Logits of one block of tokens from z1. Grid (token blocks of all samples,).

    fc2's outputs are produced BLOCK_C at a time and consumed by fc3 at once, so neither matrix is held whole. Layer 1
    had blocks of BLOCK_M1 tokens.
    """
    sequence, block, start, length = locate(
        bounds_ptr, tl.program_id(0), num_row_blocks, num_tokens, num_sequences, BLOCK_M, BLOCK_S, PACKED
    )
    first_slot = sequence * num_blocks
    num_slots = num_blocks + 0
    if PACKED:
        numbers = tl.arange(0, BLOCK_S)
        _, lengths = load_bounds(bounds_ptr, numbers, num_sequences)
        blocks = (lengths + BLOCK_M1 - 1) // BLOCK_M1
        first_slot = tl.sum(tl.where(numbers < sequence, blocks, 0), 0)
        num_slots = tl.sum(tl.where(numbers == sequence, blocks, 0), 0)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < length
    features = tl.arange(0, BLOCK_HALF)
    feature_ok = features < HALF
    # fc3's outputs in two parts, so that the end needs registers for GELU of half of them
    left = tl.arange(0, BLOCK_WIDTH // 2)
    right = left + BLOCK_WIDTH // 2
    dtype = w2_ptr.dtype.element_ty

    summary = tl.zeros([BLOCK_HALF], tl.float32)
    count = tl.sum(tl.zeros([BLOCK_HALF], tl.float32), 0)
    for number in range(0, host_int(num_slots)):  # always in the same order: deterministic
        slot = (first_slot + number).to(tl.int64)
        summary += tl.load(partial_ptr + slot * HALF + features, mask=feature_ok, other=0.0)
        count += tl.load(count_ptr + slot)
    summary = summary / tl.maximum(count, 1.0)

    local = tl.load(
        z_ptr + (start + rows)[:, None] * HALF + features[None, :],
        mask=in_range[:, None] & feature_ok[None, :],
        other=0.0,
    )  # [M, HALF]
    acc_left = tl.zeros([BLOCK_M, BLOCK_WIDTH // 2], tl.float32)
    acc_right = tl.zeros([BLOCK_M, BLOCK_WIDTH // 2], tl.float32)
    for first in range(0, 2 * HALF, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        chunk_ok = chunk < 2 * HALF
        w2_rows = w2_ptr + chunk[:, None] * (2 * HALF) + features[None, :]
        tile_ok = chunk_ok[:, None] & feature_ok[None, :]
        w2_local = tl.load(w2_rows, mask=tile_ok, other=0.0)  # [C, HALF]
        w2_shared = tl.load(w2_rows + HALF, mask=tile_ok, other=0.0).to(tl.float32)  # [C, HALF]
        offset = tl.sum(w2_shared * summary[None, :], 1)
        offset += tl.load(b2_ptr + chunk, mask=chunk_ok, other=0.0).to(tl.float32)  # [C]
        z2 = gelu(dot(local, tl.trans(w2_local), tl.zeros([BLOCK_M, BLOCK_C], tl.float32)) + offset[None, :])
        z2 = z2.to(dtype)
        acc_left = dot(z2, tl.trans(load_fc3(w3_ptr, left, chunk, HALF)), acc_left)
        acc_right = dot(z2, tl.trans(load_fc3(w3_ptr, right, chunk, HALF)), acc_right)

    keep_left, drop_left = head(acc_left, b3_ptr, head_weight_ptr, left, HALF)
    keep_right, drop_right = head(acc_right, b3_ptr, head_weight_ptr, right, HALF)
    keep = keep_left + keep_right + tl.load(head_bias_ptr).to(tl.float32)
    drop = drop_left + drop_right + tl.load(head_bias_ptr + 1).to(tl.float32)
    target = out_ptr + (start + rows) * 2
    tl.store(target, keep.to(out_ptr.dtype.element_ty), mask=in_range)
    tl.store(target + 1, drop.to(out_ptr.dtype.element_ty), mask=in_range)


def actor_score_triton(x: ActorCall) -> Tensor:
    """Logits; arguments already checked, no gradient. Two launches; five more for weights that are not folded."""
    hidden_states, weights, folded, valid_mask, indices, bounds, stage = x
    dtype, device = weights.fc1_weight.dtype, hidden_states.device
    batch, _, d1 = hidden_states.shape
    num_tokens = (hidden_states if indices is None else indices).shape[1]
    width = weights.fc1_weight.shape[0]
    half = width // 2
    logits = torch.empty(batch, num_tokens, 2, dtype=dtype if folded[0] is None else torch.float32, device=device)
    if logits.numel() == 0:
        return logits

    if folded[0] is None:
        weights, *parts = fold_actor_weights(weights)
        folded = tuple(parts)
    weight, colsum, bias = folded
    layer1, layers23 = (
        configs.select(kernel, size=batch * num_tokens, dtype=dtype, device=device)
        for kernel in ("actor_layer1", "actor_layers23")
    )
    block_width = next_power_of_2(width, 32)
    block_features = max(16, block_width // layer1.splits)
    num_blocks, num_row_blocks = ceil_div(num_tokens, layer1.block_m), ceil_div(num_tokens, layers23.block_m)
    packed, sequences = bounds is not None, batch if bounds is None else len(bounds) - 1
    # every sequence may end with an incomplete block
    programs, row_programs = (
        blocks + sequences if packed else blocks * batch for blocks in (num_blocks, num_row_blocks)
    )
    z = torch.empty(batch, num_tokens, half, dtype=dtype, device=device)
    partial = torch.empty(programs, half, dtype=torch.float32, device=device)
    count = torch.empty(programs, dtype=torch.float32, device=device)
    valid = count if valid_mask is None else valid_mask.contiguous().view(torch.uint8)
    index = count if indices is None else indices.contiguous()
    ends = count if bounds is None else bounds.contiguous()
    tail = [tensor.contiguous() for tensor in weights[5:]]
    shared = dict(BLOCK_S=next_power_of_2(sequences) if packed else 1, PACKED=packed, enable_fp_fusion=True)
    with torch.cuda.device_of(hidden_states):
        actor_layer1_kernel[(programs, ceil_div(width, block_features))](
            hidden_states, weight, colsum, bias[stage], valid, index, ends, z, partial, count,  # type: ignore[index]
            *hidden_states.stride(), num_tokens, d1, num_blocks, sequences, LAYER_NORM_EPS,
            HALF=half, BLOCK_F=block_features, BLOCK_M=layer1.block_m, BLOCK_K=layer1.block_n,
            HAS_VALID=valid_mask is not None, HAS_INDEX=indices is not None, num_warps=layer1.num_warps,
            num_stages=layer1.num_stages, **shared,
        )  # fmt: skip
        actor_layers23_kernel[(row_programs,)](
            z, partial, count, *tail, ends, logits, num_tokens, num_blocks, num_row_blocks, sequences,
            HALF=half, BLOCK_HALF=next_power_of_2(half, 16), BLOCK_WIDTH=block_width,
            BLOCK_M=layers23.block_m, BLOCK_C=layers23.block_n, BLOCK_M1=layer1.block_m,
            num_warps=layers23.num_warps, num_stages=layers23.num_stages, **shared,
        )  # fmt: skip
    return logits
