"""Masked attention in Triton: forward, decoding, backward, and the launches that prepare them.

Base 2 inside: s = scale * log2(e) * q.k, so that exp2 and log2 apply; the log-sum-exp that leaves is natural.

Since G = 1 m^T + diag(1 - m), every kernel is attention with a bias log2 m_j per key plus one self term per row; no
inner loop tests i == j for it. A row starts with its self term: maximum s_ii, weight 1 - m_i. That start is finite,
hence no 0/0, and a row that sees nobody else returns its own value exactly.

The loops walk the list of a sample's keys: those with m_j > 0 ascending, then the others ascending. A dropped key costs
nothing whatever the pattern, and what a row sees is a contiguous part of the list, for causal rows and for ranges. Each
kernel has one step function, used by two loops: blocks that every row sees whole, without a comparison, and the edges.

Invisible means invisible: a pair that is not visible contributes nothing, whatever NaN or infinity it has. Score by
score a selection does that; in a product of tiles 0 * NaN is NaN, so the edges clear such rows of the tile and give the
pairs that do see them a NaN score. The main loops need none of it: there every row sees every key.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels import configs
from toprl_kernels.attention.eager import empty_output
from toprl_kernels.configs import LaunchConfig
from toprl_kernels.triton_common import ceil_div, dot, host_int, next_power_of_2

LOG2_E = math.log2(math.e)
MAX_BLOCK = 128  # every block size divides it; the padding of the vectors relies on it

# exp2(s - lse) is cut at 2^96; mask values under 2^-96 were flushed to 0 (see eager.py)
MAX_EXPONENT = tl.constexpr(96.0)
SMALLEST_MASK = tl.constexpr(2.0**-96)
# the same for kernels, which read constants of this type only
LN_2, KERNEL_LOG2_E, KERNEL_MAX_BLOCK = tl.constexpr(math.log(2)), tl.constexpr(LOG2_E), tl.constexpr(MAX_BLOCK)

# rows of the lists, int32 (floats by their bits), padded so that whole blocks can be loaded unmasked
MASK = tl.constexpr(0)  # float32 m, by token
BIAS = tl.constexpr(1)  # float32 log2 m, by slot; -inf from the number of kept tokens on
ORDER = tl.constexpr(2)  # the list: slot -> token, N past the end
BEFORE = tl.constexpr(3)  # number of kept tokens before a token; [N] is the number of all
VALID = tl.constexpr(4)  # 1 = a real token
FIRST_SEEN_BY = tl.constexpr(5)  # the first token that sees a token, and the end of those that do: with ranges only
LAST_SEEN_BY = tl.constexpr(6)
LIST_ROWS = tl.constexpr(7)

# planes of the row buffer of the backward, float32, padded likewise
LSE = tl.constexpr(0)  # base 2; +inf for rows that contribute nothing, NaN for rows that make everything they see NaN
DELTA = tl.constexpr(1)  # D_i = dO_i . O_i
SELF_PROB = tl.constexpr(2)  # (1 - m_i) exp2(s_ii - lse_i)
SELF_GRAD = tl.constexpr(3)  # that times (dO_i . V_i - D_i)
ROW_PLANES = 4


# --- tiles ---


@triton.jit
def load_rows(base, rows, stride, dims, HEAD_DIM: tl.constexpr):
    """[len(rows), len(dims)] tile; columns from HEAD_DIM on are 0."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if dims.shape[0] == HEAD_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def load_float(ptr):
    """A float32 vector stored by its bits in the int32 lists."""
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit
def finite_rows(tile):
    """The tile with non-finite rows set to 0, and a vector that is NaN for those and 0 for the others."""
    poison = tl.sum(tile.to(tl.float32) * 0.0, 1)
    return tl.where((poison == 0.0)[:, None], tile, 0.0), poison


# --- the list ---


@triton.jit(do_not_specialize=["num_tokens", "search_steps"])
def masked_attention_lists_kernel(
    mask_ptr, valid_ptr, range_ptr, list_ptr, stride_mb, stride_mn, stride_vb, stride_vn,
    num_tokens, list_stride, search_steps, HAS_PADDING: tl.constexpr, RANGES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The per-token vectors of one sample. Grid (B,). Two passes: the list's second half needs the number kept."""
    batch = tl.program_id(0).to(tl.int64)
    out = list_ptr + batch * LIST_ROWS * list_stride
    mask_base, valid_base = mask_ptr + batch * stride_mb, valid_ptr + batch * stride_vb
    lanes = tl.arange(0, BLOCK_T)
    num_kept = tl.sum(tl.zeros([BLOCK_T], tl.int32), 0)
    for start in range(0, host_int(num_tokens), BLOCK_T):
        m, _ = load_mask(mask_base, valid_base, start + lanes, stride_mn, stride_vn, num_tokens, HAS_PADDING)
        num_kept += tl.sum((m > 0).to(tl.int32), 0)
    before = tl.sum(tl.zeros([BLOCK_T], tl.int32), 0)
    for start in range(0, host_int(list_stride), BLOCK_T):
        tokens = start + lanes
        in_buffer = tokens < list_stride
        m, valid = load_mask(mask_base, valid_base, tokens, stride_mn, stride_vn, num_tokens, HAS_PADDING)
        is_kept = m > 0
        count = before + tl.cumsum(is_kept.to(tl.int32), 0)
        before += tl.sum(is_kept.to(tl.int32), 0)
        slot = tl.where(is_kept, count - 1, num_kept + tokens - count)  # a permutation; the identity from N on
        bias = tl.where(is_kept, tl.log2(tl.where(is_kept, m, 1.0)), float("-inf"))
        tl.store(out + MASK * list_stride + tokens, m.to(tl.int32, bitcast=True), mask=in_buffer)
        tl.store(out + BEFORE * list_stride + tokens, count - is_kept.to(tl.int32), mask=in_buffer)
        tl.store(out + BIAS * list_stride + slot, bias.to(tl.int32, bitcast=True), mask=in_buffer)
        tl.store(out + ORDER * list_stride + slot, tl.minimum(tokens, num_tokens), mask=in_buffer)
        tl.store(out + VALID * list_stride + tokens, valid.to(tl.int32), mask=in_buffer)
        if RANGES:
            bounds = range_ptr + batch * num_tokens * 2
            # the first row that sees key j is the first whose end is above j; the last, before the first that starts so
            first = first_above(bounds + 1, tokens, num_tokens, search_steps)
            last = first_above(bounds, tokens, num_tokens, search_steps)
        else:
            first = tokens * 0
            last = first
        tl.store(out + FIRST_SEEN_BY * list_stride + tokens, first, mask=in_buffer)
        tl.store(out + LAST_SEEN_BY * list_stride + tokens, last, mask=in_buffer)


@triton.jit
def load_mask(mask_base, valid_base, tokens, stride_mn, stride_vn, num_tokens, HAS_PADDING: tl.constexpr):
    """m in float32, 0 for padding, past the end and below 2^-96; and which tokens are real."""
    in_range = tokens < num_tokens
    m = tl.load(mask_base + tokens.to(tl.int64) * stride_mn, mask=in_range, other=0.0).to(tl.float32)
    valid = in_range
    if HAS_PADDING:
        valid = tl.load(valid_base + tokens.to(tl.int64) * stride_vn, mask=in_range, other=0) != 0
    return tl.where(valid & (m >= SMALLEST_MASK), m, 0.0), valid


@triton.jit
def first_above(bound_ptr, values, num_tokens, search_steps):
    """For each value the first token whose bound (every second number, ascending) is above it, else N."""
    low = values * 0
    high = low + num_tokens
    for _ in range(host_int(search_steps)):
        middle = (low + high) // 2
        is_open = low < high
        bound = tl.load(bound_ptr + middle.to(tl.int64) * 2, mask=is_open, other=0)
        is_above = bound > values
        low = tl.where(is_open & (bound <= values), middle + 1, low)
        high = tl.where(is_open & is_above, middle, high)
    return low


@triton.jit
def clamped(ptr, num_tokens):
    """A bound of a range, which nobody checked, as an index that can be read."""
    return tl.minimum(tl.maximum(tl.load(ptr), 0), num_tokens)


@triton.jit
def list_blocks(
    before, bounds, first, last, num_keys, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr
):
    """Slots [low, high) that some of the tokens first..last see; whole blocks [inner_low, inner_high) that all see."""
    if RANGES:
        low = tl.load(before + clamped(bounds + 2 * first.to(tl.int64), num_keys))
        inner_low = tl.load(before + clamped(bounds + 2 * last.to(tl.int64), num_keys))
        inner_high = tl.load(before + clamped(bounds + 2 * first.to(tl.int64) + 1, num_keys))
        high = tl.load(before + clamped(bounds + 2 * last.to(tl.int64) + 1, num_keys))
    elif CAUSAL:
        inner_high = tl.load(before + first + 1)
        high = tl.load(before + last + 1)
        low = high * 0
        inner_low = low
    else:
        high = tl.load(before + num_keys)
        inner_high = high
        low = high * 0
        inner_low = low
    low = low // BLOCK_N * BLOCK_N
    inner_high = tl.maximum(inner_high // BLOCK_N * BLOCK_N, low)
    inner_low = tl.minimum((inner_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N, inner_high)
    return low, inner_low, inner_high, high


@triton.jit
def edge_start(n, low, inner_low, inner_high, BLOCK: tl.constexpr):
    """Where the edge block at distance n starts: those before inner_low come first, then those from inner_high on."""
    return tl.multiple_of(tl.where(n < inner_low - low, low + n, inner_high + n - (inner_low - low)), BLOCK)


@triton.jit(do_not_specialize=["num_keys"])
def masked_attention_compact_kernel(
    k_ptr, v_ptr, kc_ptr, vc_ptr, list_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, num_kv_heads, num_keys, list_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Kept keys and values in the order of the list, padded to blocks and to BLOCK_D. Grid (B * Hkv * blocks,)."""
    num_blocks = list_stride // BLOCK_N
    slots = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    batch_kv = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = batch_kv // num_kv_heads
    kv_head = batch_kv % num_kv_heads
    lists = list_ptr + batch * LIST_ROWS * list_stride
    num_kept = tl.load(lists + BEFORE * list_stride + num_keys)
    is_kept = (slots < num_kept)[:, None]
    needed = (slots < num_kept + KERNEL_MAX_BLOCK)[:, None]  # zeros up to the end of the last block
    rows = tl.load(lists + ORDER * list_stride + slots).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    value_dims = tl.arange(0, BLOCK_DV)[None, :]
    out = (batch_kv * list_stride + slots)[:, None]
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    k = tl.load(k_base + rows * stride_kn + dims, mask=is_kept & (dims < HEAD_DIM), other=0.0)
    v = tl.load(v_base + rows * stride_vn + value_dims, mask=is_kept & (value_dims < VALUE_DIM), other=0.0)
    tl.store(kc_ptr + out * BLOCK_D + dims, k, mask=needed & (dims < BLOCK_D))
    tl.store(vc_ptr + out * BLOCK_DV + value_dims, v, mask=needed & (value_dims < BLOCK_DV))


# --- forward ---


@triton.jit
def visible_pairs(slots, columns, high, tokens, bounds, CAUSAL: tl.constexpr, RANGES: tl.constexpr):
    """Which rows [M] see which keys of an edge block [N]."""
    visible = (slots < high)[None, :]
    if CAUSAL:
        visible = visible & (columns[None, :] <= tokens[:, None])
    if RANGES:  # read here rather than held in registers through the main loop
        low = tl.load(bounds + 2 * tokens.to(tl.int64))[:, None]
        visible = visible & (columns[None, :] >= low)
        visible = visible & (columns[None, :] < tl.load(bounds + 2 * tokens.to(tl.int64) + 1)[:, None])
    return visible


@triton.jit
def key_rows(order, slots, num_keys, COMPACT: tl.constexpr, EDGE: tl.constexpr):
    """The tokens of the slots, and the rows to read for them."""
    columns = slots
    if EDGE or not COMPACT:
        columns = tl.load(order + slots)
    rows = columns
    if COMPACT:
        rows = slots
    elif EDGE:
        rows = tl.minimum(columns, num_keys - 1)
    return columns, rows


@triton.jit
def loop_operands(
    k_base, v_base, kc_ptr, vc_ptr, stride_kn, stride_vn, batch_kv, list_stride,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """Keys and values that the loops of one head read, and the strides of their rows."""
    if COMPACT:
        rows = batch_kv * list_stride
        return kc_ptr + rows * BLOCK_D, vc_ptr + rows * BLOCK_DV, BLOCK_D, BLOCK_DV
    else:
        return k_base, v_base, stride_kn, stride_vn


@triton.jit
def forward_step(
    q, k_base, v_base, lists, list_stride, start_n, high, tokens, bounds, num_keys, stride_kn, stride_vn,
    scale_log2, dims, value_dims, acc, row_max, row_sum,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFT: tl.constexpr, COMPACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over one block of the list. The maximum is that of raw scores; the scale is in the exponent."""
    slots = start_n + tl.arange(0, BLOCK_N)
    columns, rows = key_rows(lists + ORDER * list_stride, slots, num_keys, COMPACT, EDGE)
    k = load_rows(k_base, rows, stride_kn, dims, HEAD_DIM)  # [N, D]
    s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))  # [M, N]
    v = load_rows(v_base, rows, stride_vn, value_dims, VALUE_DIM)  # [N, Dv]
    if EDGE:
        v, poison = finite_rows(v)
        visible = visible_pairs(slots, columns, high, tokens, bounds, CAUSAL, RANGES)
        s = tl.where(visible, s + poison[None, :], float("-inf"))
    if SOFT:
        s = s * scale_log2 + load_float(lists + BIAS * list_stride + slots)[None, :]
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_max, row_sum


@triton.jit
def attend(
    q, k_base, v_base, lists, list_stride, tokens, bounds, low, inner_low, inner_high, high,
    num_keys, stride_kn, stride_vn, scale_log2, dims, value_dims, acc, row_max, row_sum,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFT: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """Online softmax over slots [low, high)."""
    for start_n in range(host_int(inner_low), host_int(inner_high), BLOCK_N):
        acc, row_max, row_sum = forward_step(
            q, k_base, v_base, lists, list_stride, start_n, high, tokens, bounds, num_keys, stride_kn,
            stride_vn, scale_log2, dims, value_dims, acc, row_max, row_sum,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, CAUSAL, RANGES, SOFT, COMPACT, False,
        )  # fmt: skip
    edges = inner_low - low + tl.maximum(high - inner_high, 0)
    for n in range(0, host_int(edges), BLOCK_N):
        acc, row_max, row_sum = forward_step(
            q, k_base, v_base, lists, list_stride, edge_start(n, low, inner_low, inner_high, BLOCK_N), high, tokens,
            bounds, num_keys, stride_kn, stride_vn, scale_log2, dims, value_dims, acc, row_max, row_sum,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, CAUSAL, RANGES, SOFT, COMPACT, True,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, kc_ptr, vc_ptr, out_ptr, lse_ptr, list_ptr, range_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, num_heads, num_queries, num_keys, list_stride, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFT: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """O and the log-sum-exp [B, H, Nq] of one query block of one head. Grid (B * H * query blocks,).

    With COMPACT the loops read kc and vc [B, Hkv, list_stride, BLOCK_D], else k and v through the list.
    """
    num_blocks = (num_queries + BLOCK_M - 1) // BLOCK_M
    # the last rows of a causal sequence have the most work: they start first
    start_m = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    kv_head = head // GROUPS
    offset = num_keys - num_queries
    rows = start_m + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_queries - 1)
    tokens = safe_rows + offset
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    lists = list_ptr + batch * LIST_ROWS * list_stride
    bounds = range_ptr + batch * num_keys * 2

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_rows, stride_qn, dims, HEAD_DIM)  # [M, D]
    k_self = load_rows(k_base, tokens, stride_kn, dims, HEAD_DIM)  # [M, D]
    v_self = load_rows(v_base, tokens, stride_vn, value_dims, VALUE_DIM)  # [M, Dv]
    row_max = tl.sum(q.to(tl.float32) * k_self.to(tl.float32), 1) * scale_log2  # s_ii [M]
    row_sum = 1.0 - load_float(lists + MASK * list_stride + tokens)  # [M]
    acc = v_self.to(tl.float32) * row_sum[:, None]  # [M, Dv]

    last_token = tl.minimum(start_m + BLOCK_M, num_queries) - 1 + offset
    low, inner_low, inner_high, high = list_blocks(
        lists + BEFORE * list_stride, bounds, start_m + offset, last_token, num_keys, BLOCK_N, CAUSAL, RANGES
    )
    k_loop, v_loop, stride_k, stride_v = loop_operands(
        k_base, v_base, kc_ptr, vc_ptr, stride_kn, stride_vn, batch * (num_heads // GROUPS) + kv_head, list_stride,
        BLOCK_D, BLOCK_DV, COMPACT,
    )  # fmt: skip
    acc, row_max, row_sum = attend(
        q, k_loop, v_loop, lists, list_stride, tokens, bounds, low, inner_low, inner_high, high, num_keys, stride_k,
        stride_v, scale_log2, dims, value_dims, acc, row_max, row_sum, BLOCK_D if COMPACT else HEAD_DIM,
        BLOCK_DV if COMPACT else VALUE_DIM, BLOCK_M, BLOCK_N, CAUSAL, RANGES, SOFT, COMPACT,
    )  # fmt: skip

    is_valid = tl.load(lists + VALID * list_stride + tokens) != 0
    out = tl.where(is_valid[:, None], acc / row_sum[:, None], 0.0)
    lse = tl.where(is_valid, (row_max + tl.log2(row_sum)) * LN_2, float("inf"))
    in_range = rows < num_queries
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + rows.to(tl.int64)[:, None] * stride_on
    out_mask = in_range[:, None] & (value_dims[None, :] < VALUE_DIM)
    tl.store(out_rows + value_dims[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
    tl.store(lse_ptr + batch_head * num_queries + rows, lse, mask=in_range)


# --- decoding: few queries, keys split over programs ---

NOTHING_YET = tl.constexpr(-1e30)  # maximum of a part that sees no key: finite, so that no -inf - -inf arises


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, list_ptr, range_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_heads, num_queries, num_keys, list_stride, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """All rows of a group's heads against one part of the keys, without self terms. Grid (B * Hkv * SPLITS,).

    Writes acc [B, H, Nq, SPLITS, Dv] and, for each, (maximum, sum) [B, H, Nq, 2, SPLITS].
    """
    split = tl.program_id(0) % SPLITS
    batch_kv = (tl.program_id(0) // SPLITS).to(tl.int64)
    num_kv_heads = num_heads // GROUPS
    batch = batch_kv // num_kv_heads
    kv_head = batch_kv % num_kv_heads
    offset = num_keys - num_queries
    packed = tl.arange(0, BLOCK_M)
    in_range = packed < GROUPS * num_queries
    safe = tl.minimum(packed, GROUPS * num_queries - 1)
    heads = kv_head * GROUPS + safe // num_queries
    tokens = safe % num_queries + offset
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    lists = list_ptr + batch * LIST_ROWS * list_stride
    bounds = range_ptr + batch * num_keys * 2
    q_rows = (
        q_ptr + batch * stride_qb + heads[:, None] * stride_qh + (tokens - offset).to(tl.int64)[:, None] * stride_qn
    )
    q = tl.load(q_rows + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)  # [M, D]

    first_token = num_keys - num_queries
    low, inner_low, inner_high, high = list_blocks(
        lists + BEFORE * list_stride, bounds, first_token, num_keys - 1, num_keys, BLOCK_N, CAUSAL, RANGES
    )
    length = (tl.maximum(high - low, 0) + SPLITS * BLOCK_N - 1) // (SPLITS * BLOCK_N) * BLOCK_N
    low += split * length
    high = tl.minimum(high, low + length)
    inner_low = tl.minimum(tl.maximum(inner_low, low), low + length)
    inner_high = tl.minimum(tl.maximum(inner_high, inner_low), low + length)
    acc, row_max, row_sum = attend(
        q, k_ptr + batch * stride_kb + kv_head * stride_kh, v_ptr + batch * stride_vb + kv_head * stride_vh,
        lists, list_stride, tokens, bounds, low, inner_low, inner_high, high, num_keys, stride_kn,
        stride_vn, scale_log2, dims, value_dims, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        tl.zeros([BLOCK_M], tl.float32) + NOTHING_YET, tl.zeros([BLOCK_M], tl.float32),
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, CAUSAL, RANGES, SOFT, False,
    )  # fmt: skip
    rows = (batch * num_heads + heads) * num_queries + tokens - offset
    parts = part_ptr + (rows * SPLITS + split)[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(parts, acc, mask=in_range[:, None] & (value_dims[None, :] < VALUE_DIM))
    tl.store(part_lse_ptr + rows * 2 * SPLITS + split, row_max, mask=in_range)
    tl.store(part_lse_ptr + rows * 2 * SPLITS + SPLITS + split, row_sum, mask=in_range)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_merge_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, out_ptr, lse_ptr, list_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, num_heads, num_queries, num_keys, list_stride, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of one row and its self term. Grid (B * H * Nq,)."""
    row = tl.program_id(0).to(tl.int64)
    query = row % num_queries
    head = row // num_queries % num_heads
    batch = row // num_queries // num_heads
    token = query + num_keys - num_queries
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    splits = tl.arange(0, SPLITS)
    lists = list_ptr + batch * LIST_ROWS * list_stride
    k_self = k_ptr + batch * stride_kb + head // GROUPS * stride_kh + token * stride_kn + dims
    v_self = v_ptr + batch * stride_vb + head // GROUPS * stride_vh + token * stride_vn + value_dims
    q = tl.load(
        q_ptr + batch * stride_qb + head * stride_qh + query * stride_qn + dims, mask=dims < HEAD_DIM, other=0.0
    )
    k = tl.load(k_self, mask=dims < HEAD_DIM, other=0.0)
    v = tl.load(v_self, mask=value_dims < VALUE_DIM, other=0.0).to(tl.float32)
    s_self = tl.sum(q.to(tl.float32) * k.to(tl.float32), 0) * scale_log2
    rest = 1.0 - load_float(lists + MASK * list_stride + token)

    maxima = tl.load(part_lse_ptr + row * 2 * SPLITS + splits)
    sums = tl.load(part_lse_ptr + row * 2 * SPLITS + SPLITS + splits)
    row_max = tl.maximum(s_self, tl.max(maxima, 0))
    weights = tl.exp2(maxima - row_max)  # [SPLITS]
    self_weight = rest * tl.exp2(s_self - row_max)
    row_sum = self_weight + tl.sum(weights * sums, 0)
    parts = tl.load(
        part_ptr + (row * SPLITS + splits)[:, None] * VALUE_DIM + value_dims[None, :],
        mask=(value_dims < VALUE_DIM)[None, :], other=0.0,
    )  # fmt: skip
    acc = self_weight * v + tl.sum(weights[:, None] * parts, 0)
    is_valid = tl.load(lists + VALID * list_stride + token) != 0
    out = tl.where(is_valid, acc / row_sum, 0.0)
    lse = tl.where(is_valid, (row_max + tl.log2(row_sum)) * LN_2, float("inf"))
    out_row = out_ptr + batch * stride_ob + head * stride_oh + query * stride_on + value_dims
    tl.store(out_row, out.to(out_ptr.dtype.element_ty), mask=value_dims < VALUE_DIM)
    tl.store(lse_ptr + row, lse)


# --- backward ---


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_bwd_prepare_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, row_ptr, qc_ptr, doc_ptr, list_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    num_heads, num_queries, num_keys, list_stride, row_stride, plane_stride, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """The row buffer, padding included, and clean q and dO for dK/dV. Grid (B * H * row_stride / BLOCK_M,).

    Padding rows, rows whose dO is 0 and rows past the end are dead: lse +inf. A live row with something that is not
    finite gets lse NaN, which every key that it sees receives. Both are 0 in the copies [B * H, row_stride, BLOCK_D]:
    no product of tiles meets anything that is not finite, and the loops of dK/dV load whole aligned blocks.
    """
    num_blocks = row_stride // BLOCK_M
    rows = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    kv_head = head // GROUPS
    in_range = rows < num_queries
    safe_rows = tl.minimum(rows, num_queries - 1)
    tokens = safe_rows + (num_keys - num_queries)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    lists = list_ptr + batch * LIST_ROWS * list_stride

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_rows, stride_qn, dims, HEAD_DIM)
    k = load_rows(k_ptr + batch * stride_kb + kv_head * stride_kh, tokens, stride_kn, dims, HEAD_DIM)
    v = load_rows(v_ptr + batch * stride_vb + kv_head * stride_vh, tokens, stride_vn, value_dims, VALUE_DIM)
    out = load_rows(out_ptr + batch * stride_ob + head * stride_oh, safe_rows, stride_on, value_dims, VALUE_DIM)
    do = load_rows(do_ptr + batch * stride_gb + head * stride_gh, safe_rows, stride_gn, value_dims, VALUE_DIM)

    is_valid = tl.load(lists + VALID * list_stride + tokens) != 0
    is_live = in_range & is_valid & (tl.sum((do != 0.0).to(tl.int32), 1) > 0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)  # D_i [M]
    poison = tl.sum(q.to(tl.float32) * 0.0, 1) + tl.sum(do.to(tl.float32) * 0.0, 1) + delta * 0.0
    lse = tl.load(lse_ptr + batch_head * num_queries + safe_rows) * KERNEL_LOG2_E + poison
    is_clean = is_live & (poison == 0.0)
    delta = tl.where(is_clean, delta, 0.0)
    s_self = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale_log2
    rest = 1.0 - load_float(lists + MASK * list_stride + tokens)
    weight = tl.where(is_live, rest * tl.exp2(s_self - lse), 0.0)
    dp_self = tl.sum(do.to(tl.float32) * v.to(tl.float32), 1)
    vector = row_ptr + batch_head * row_stride + rows
    tl.store(vector + LSE * plane_stride, tl.where(is_live, lse, float("inf")))
    tl.store(vector + DELTA * plane_stride, delta)
    tl.store(vector + SELF_PROB * plane_stride, weight)
    tl.store(vector + SELF_GRAD * plane_stride, tl.where(is_live, weight * (dp_self - delta), 0.0))
    if COPY:
        out_rows = (batch_head * row_stride + rows)[:, None]
        tl.store(qc_ptr + out_rows * BLOCK_D + dims[None, :], tl.where(is_clean[:, None], q, 0.0))
        tl.store(doc_ptr + out_rows * BLOCK_DV + value_dims[None, :], tl.where(is_clean[:, None], do, 0.0))


@triton.jit
def query_gradient_step(
    q, do, lse, delta, k_base, v_base, lists, list_stride, start_n, high, tokens, bounds, num_keys,
    stride_kn, stride_vn, scale_log2, dims, value_dims, dq,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFT: tl.constexpr, COMPACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dQ of one block of the list."""
    slots = start_n + tl.arange(0, BLOCK_N)
    columns, rows = key_rows(lists + ORDER * list_stride, slots, num_keys, COMPACT, EDGE)
    k = load_rows(k_base, rows, stride_kn, dims, HEAD_DIM)  # [N, D]
    v = load_rows(v_base, rows, stride_vn, value_dims, VALUE_DIM)  # [N, Dv]
    if EDGE:
        k, poison = finite_rows(k)
    s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2  # [M, N]
    if SOFT:
        s += load_float(lists + BIAS * list_stride + slots)[None, :]
    dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    x = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])  # m_j X_ij
    if EDGE:
        visible = visible_pairs(slots, columns, high, tokens, bounds, CAUSAL, RANGES)
        x = tl.where(visible, x + poison[None, :], 0.0)
    return dot(x.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, kc_ptr, vc_ptr, do_ptr, dq_ptr, row_ptr, list_ptr, range_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    num_heads, num_queries, num_keys, list_stride, row_stride, plane_stride, scale, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFT: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """dQ (contiguous [B, H, Nq, D]) of one query block of one head. Grid (B * H * query blocks,)."""
    num_blocks = (num_queries + BLOCK_M - 1) // BLOCK_M
    start_m = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    kv_head = head // GROUPS
    offset = num_keys - num_queries
    rows = start_m + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_queries - 1)
    tokens = safe_rows + offset
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    lists = list_ptr + batch * LIST_ROWS * list_stride
    bounds = range_ptr + batch * num_keys * 2

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_rows, stride_qn, dims, HEAD_DIM)  # [M, D]
    do = load_rows(do_ptr + batch * stride_gb + head * stride_gh, safe_rows, stride_gn, value_dims, VALUE_DIM)
    vector = row_ptr + batch_head * row_stride + rows
    lse = tl.load(vector + LSE * plane_stride)
    delta = tl.load(vector + DELTA * plane_stride)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last_token = tl.minimum(start_m + BLOCK_M, num_queries) - 1 + offset
    low, inner_low, inner_high, high = list_blocks(
        lists + BEFORE * list_stride, bounds, start_m + offset, last_token, num_keys, BLOCK_N, CAUSAL, RANGES
    )
    k_loop, v_loop, stride_k, stride_v = loop_operands(
        k_base, v_base, kc_ptr, vc_ptr, stride_kn, stride_vn, batch * (num_heads // GROUPS) + kv_head, list_stride,
        BLOCK_D, BLOCK_DV, COMPACT,
    )  # fmt: skip
    LOOP_DIM: tl.constexpr = BLOCK_D if COMPACT else HEAD_DIM
    LOOP_VALUE_DIM: tl.constexpr = BLOCK_DV if COMPACT else VALUE_DIM
    for start_n in range(host_int(inner_low), host_int(inner_high), BLOCK_N):
        dq = query_gradient_step(
            q, do, lse, delta, k_loop, v_loop, lists, list_stride, start_n, high, tokens, bounds, num_keys, stride_k,
            stride_v, scale_log2, dims, value_dims, dq, LOOP_DIM, LOOP_VALUE_DIM, BLOCK_M, BLOCK_N, CAUSAL, RANGES,
            SOFT, COMPACT, False,
        )  # fmt: skip
    edges = inner_low - low + tl.maximum(high - inner_high, 0)
    for n in range(0, host_int(edges), BLOCK_N):
        start_n = edge_start(n, low, inner_low, inner_high, BLOCK_N)
        dq = query_gradient_step(
            q, do, lse, delta, k_loop, v_loop, lists, list_stride, start_n, high, tokens, bounds, num_keys, stride_k,
            stride_v, scale_log2, dims, value_dims, dq, LOOP_DIM, LOOP_VALUE_DIM, BLOCK_M, BLOCK_N, CAUSAL, RANGES,
            SOFT, COMPACT, True,
        )  # fmt: skip
    k_self = load_rows(k_base, tokens, stride_kn, dims, HEAD_DIM)  # [M, D]
    dq += tl.load(vector + SELF_GRAD * plane_stride)[:, None] * k_self.to(tl.float32)
    dq = tl.where((lse == float("inf"))[:, None], 0.0, dq * scale)
    out_rows = dq_ptr + (batch_head * num_queries + rows.to(tl.int64))[:, None] * HEAD_DIM
    out_mask = (rows < num_queries)[:, None] & (dims[None, :] < HEAD_DIM)
    tl.store(out_rows + dims[None, :], dq.to(dq_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def rows_that_see(lists, list_stride, columns, offset, num_queries, CAUSAL: tl.constexpr, RANGES: tl.constexpr):
    """The interval of rows that see each key; a later one for a later key."""
    if RANGES:
        seen_from = tl.load(lists + FIRST_SEEN_BY * list_stride + columns) - offset
        seen_to = tl.load(lists + LAST_SEEN_BY * list_stride + columns) - offset
    elif CAUSAL:
        seen_from = columns - offset
        seen_to = columns * 0 + num_queries
    else:
        seen_from = columns * 0
        seen_to = seen_from + num_queries
    return seen_from, seen_to


@triton.jit
def key_gradient_step(
    qc_base, doc_base, vector, k, v, m, bias, lists, list_stride, start_n, num_kept, start_m, num_queries, num_keys,
    plane_stride, scale_log2, dims, value_dims, dk, dv, dm,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFT: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DM: tl.constexpr, BOUNDED: tl.constexpr,
    EDGE: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One block of queries for one block of keys.

    Tiles are [keys, queries]: the larger side first is what the matrix instructions want, and p and x then enter the
    second products from registers. One exponential serves everything: with NEED_DM it is R = exp2(s - lse), which the
    gradient with respect to a mask value of 0 needs, otherwise R m_j. Without PRODUCTS all keys are dropped ones.
    """
    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(qc_base, rows, BLOCK_D, dims, BLOCK_D)  # [M, D]
    do = load_rows(doc_base, rows, BLOCK_DV, value_dims, BLOCK_DV)  # [M, Dv]
    lse = tl.load(vector + LSE * plane_stride + rows)  # +inf past the last query: everything below is 0 there
    s = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))  # [N, M]
    exponent = s * scale_log2 - lse[None, :]
    if NEED_DM:
        if EDGE or not PRODUCTS:  # of a kept key R <= 1 / m <= 2^96
            exponent = tl.minimum(exponent, MAX_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
    elif SOFT:
        exponent += bias[:, None]
    p = tl.exp2(exponent)
    # what only comparisons need is read again rather than held in registers through all loops
    offset = num_keys - num_queries
    slots = start_n + tl.arange(0, BLOCK_N)
    is_kept = (slots < num_kept)[:, None]
    if EDGE or (NEED_DM and not CAUSAL):
        columns = tl.load(lists + ORDER * list_stride + slots)
        is_self = columns[:, None] == (rows + offset)[None, :]
    if EDGE:
        columns = tl.minimum(columns, num_keys - 1)
        seen_from, seen_to = rows_that_see(lists, list_stride, columns, offset, num_queries, CAUSAL, RANGES)
        visible = (rows[None, :] >= seen_from[:, None]) & (rows[None, :] < seen_to[:, None])
        if not NEED_DM:
            visible = visible & is_kept
        p = tl.where(visible, p, 0.0)
    if NEED_DV and PRODUCTS:
        p_seen = p
        if NEED_DM:
            p_seen = p * m[:, None]
            if EDGE:  # R may be NaN where m = 0
                p_seen = tl.where(is_kept, p_seen, 0.0)
        dv = dot(p_seen.to(do.dtype), do, dv)
    if NEED_DK or NEED_DM:
        delta = tl.load(vector + DELTA * plane_stride + rows)
        slope = dot(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) - delta[None, :]
        x = p * slope  # X [N, M], or m X without NEED_DM
        if NEED_DM:
            by_mask = x
            if BOUNDED and not PRODUCTS:
                by_mask = p / (1.0 + p) * slope
            elif BOUNDED and EDGE:
                by_mask = tl.where(is_kept, x, p / (1.0 + p) * slope)
            if EDGE or not CAUSAL:
                # by comparison: subtracting the self term afterwards leaves rounding where the truth is 0
                by_mask = tl.where(is_self, 0.0, by_mask)
            dm += tl.sum(by_mask, 1)
            if PRODUCTS:
                x = x * m[:, None]
                if EDGE:
                    x = tl.where(is_kept, x, 0.0)
        if NEED_DK and PRODUCTS:
            dk = dot(x.to(q.dtype), q, dk)
    return dk, dv, dm


@triton.jit
def self_gradients(
    qc_ptr, doc_ptr, row_ptr, first_head, columns, offset, num_queries, row_stride, plane_stride, dims, value_dims,
    dk, dv, heads, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
):  # fmt: skip
    """Add the self terms of the keys ``columns`` over the first ``heads`` heads of the group."""
    self_rows = columns - offset
    has_row = (self_rows >= 0) & (self_rows < num_queries)
    rows = tl.minimum(tl.maximum(self_rows, 0), num_queries - 1)
    for group in range(host_int(heads)):
        head_rows = (first_head + group) * row_stride
        vector = row_ptr + head_rows + rows
        if NEED_DV:
            do = load_rows(doc_ptr + head_rows * BLOCK_DV, rows, BLOCK_DV, value_dims, BLOCK_DV)
            dv += tl.where(has_row, tl.load(vector + SELF_PROB * plane_stride), 0.0)[:, None] * do.to(tl.float32)
        if NEED_DK:
            q = load_rows(qc_ptr + head_rows * BLOCK_D, rows, BLOCK_D, dims, BLOCK_D)
            dk += tl.where(has_row, tl.load(vector + SELF_GRAD * plane_stride), 0.0)[:, None] * q.to(tl.float32)
    return dk, dv


@triton.jit
def store_key_gradients(
    dk_ptr, dv_ptr, dk, dv, batch_kv, columns, num_keys, scale, dims, value_dims,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
):  # fmt: skip
    """Rows ``columns`` of the contiguous gradients [B, Hkv, N, D]."""
    rows = (batch_kv * num_keys + columns.to(tl.int64))[:, None]
    in_range = (columns < num_keys)[:, None]
    if NEED_DK:
        dk_rows = dk_ptr + rows * HEAD_DIM + dims[None, :]
        tl.store(dk_rows, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_range & (dims[None, :] < HEAD_DIM))
    if NEED_DV:
        dv_rows = dv_ptr + rows * VALUE_DIM + value_dims[None, :]
        tl.store(dv_rows, dv.to(dv_ptr.dtype.element_ty), mask=in_range & (value_dims[None, :] < VALUE_DIM))


MAX_SPLITS = tl.constexpr(8)  # of a key block: what they save must pay for writing and reading their float32 parts


@triton.jit
def split_of(num_places, num_kept, num_blocks, BLOCK_N: tl.constexpr, NEED_DM: tl.constexpr):
    """Number of key blocks that have queries to loop over, and of programs for each."""
    if NEED_DM:
        busy = num_blocks
    else:
        busy = (num_kept + BLOCK_N - 1) // BLOCK_N
    return busy, tl.minimum(num_places // tl.maximum(busy, 1), MAX_SPLITS)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "num_places"])
def masked_attention_bwd_dkdv_kernel(
    k_ptr, v_ptr, qc_ptr, doc_ptr, dk_ptr, dv_ptr, dm_ptr, dk_part_ptr, dv_part_ptr, row_ptr, list_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_heads, num_queries, num_keys, num_places, list_stride, row_stride, plane_stride, scale, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFT: tl.constexpr, SPLIT: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DM: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """dK, dV of one block of the list, and dm [B, Hkv, splits, N]. Grid (B * Hkv * num_places,).

    A program owns its keys and loops over the queries of all heads of the group: no atomics, fixed order. A block of
    dropped keys has self terms only, and, for dm, a loop without the two products of dK and dV.

    With SPLIT, as many programs share a key block as there are for one (see ``split_of``): each takes a contiguous part
    of the row blocks of all heads. Parts are added by the finish kernel, in their order.
    """
    # comparisons and the mask gradient need registers, which half as many rows have
    EDGE_M: tl.constexpr = BLOCK_M // 2 if NEED_DM and BLOCK_M > 16 else BLOCK_M
    place = tl.program_id(0) % num_places
    batch_kv = (tl.program_id(0) // num_places).to(tl.int64)
    num_kv_heads = num_heads // GROUPS
    batch = batch_kv // num_kv_heads
    kv_head = batch_kv % num_kv_heads
    lists = list_ptr + batch * LIST_ROWS * list_stride
    num_kept = tl.load(lists + BEFORE * list_stride + num_keys)
    if SPLIT:
        busy, splits = split_of(num_places, num_kept, (num_keys + BLOCK_N - 1) // BLOCK_N, BLOCK_N, NEED_DM)
        block = place // tl.maximum(splits, 1)
        part = place % tl.maximum(splits, 1)
        if block >= busy:
            return
    else:
        block = place
        part = place * 0
        splits = place * 0 + 1
    start_n = block * BLOCK_N
    slots = start_n + tl.arange(0, BLOCK_N)
    columns = tl.load(lists + ORDER * list_stride + slots)
    safe_columns = tl.minimum(columns, num_keys - 1)
    offset = num_keys - num_queries
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    first_head = batch * num_heads + kv_head * GROUPS

    # self terms first, while nothing else is in registers
    dk, dv = self_gradients(
        qc_ptr, doc_ptr, row_ptr, first_head, columns, offset, num_queries, row_stride, plane_stride, dims, value_dims,
        tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32),
        tl.where(part == 0, GROUPS, 0), BLOCK_D, BLOCK_DV, NEED_DK, NEED_DV,
    )  # fmt: skip
    dm = tl.zeros([BLOCK_N], tl.float32)
    k = load_rows(k_ptr + batch * stride_kb + kv_head * stride_kh, safe_columns, stride_kn, dims, HEAD_DIM)  # [N, D]
    v = load_rows(v_ptr + batch * stride_vb + kv_head * stride_vh, safe_columns, stride_vn, value_dims, VALUE_DIM)
    m = load_float(lists + MASK * list_stride + safe_columns)  # [N]
    bias = load_float(lists + BIAS * list_stride + slots)  # [N]
    is_wanted = columns < num_keys
    if not NEED_DM:
        is_wanted = slots < num_kept
    seen_from, seen_to = rows_that_see(lists, list_stride, safe_columns, offset, num_queries, CAUSAL, RANGES)
    low = tl.maximum(tl.min(tl.where(is_wanted, seen_from, num_queries), 0), 0) // BLOCK_M * BLOCK_M
    high = tl.max(tl.where(is_wanted, seen_to, 0), 0)
    # one row more than sees all: the last key's row itself must be at an edge, for dm
    inner_low = tl.maximum(tl.max(tl.where(is_wanted, seen_from, 0), 0) + 1, 0)
    inner_high = tl.min(tl.where(is_wanted, seen_to, num_queries), 0)
    if not CAUSAL and not RANGES:
        inner_low = inner_low * 0
    if NEED_DM:
        is_mixed = (start_n < num_kept) & (start_n + BLOCK_N > num_kept)
    else:
        is_mixed = start_n + BLOCK_N > num_kept
    # rows past the last query are 0 in the copies: the last block is whole
    high = (high + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    inner_high = tl.where(inner_high >= num_queries, high, inner_high // BLOCK_M * BLOCK_M)
    inner_high = tl.where(is_mixed, low, tl.minimum(tl.maximum(inner_high, low), tl.maximum(high, low)))
    inner_low = tl.minimum((inner_low + BLOCK_M - 1) // BLOCK_M * BLOCK_M, inner_high)
    blocks = tl.maximum(high - low, 0) // BLOCK_M  # of one head; none for a block of dropped keys without dm
    share = (GROUPS * blocks + splits - 1) // splits

    for group in range(GROUPS):
        head_rows = (first_head + group) * row_stride
        qc_base = qc_ptr + head_rows * BLOCK_D
        doc_base = doc_ptr + head_rows * BLOCK_DV
        vector = row_ptr + head_rows
        # this program's part of the head's rows [low, high), cut into whole and edge blocks
        begin = low + tl.minimum(tl.maximum(part * share - group * blocks, 0), blocks) * BLOCK_M
        end = low + tl.minimum(tl.maximum((part + 1) * share - group * blocks, 0), blocks) * BLOCK_M
        inner_begin = tl.minimum(tl.maximum(inner_low, begin), end)
        inner_end = tl.minimum(tl.maximum(inner_high, inner_begin), end)
        products_end = inner_end
        if NEED_DM:
            products_end = tl.where(start_n < num_kept, inner_end, inner_begin)
        for start_m in range(host_int(inner_begin), host_int(products_end), BLOCK_M):
            dk, dv, dm = key_gradient_step(
                qc_base, doc_base, vector, k, v, m, bias, lists, list_stride, start_n, num_kept, start_m, num_queries,
                num_keys, plane_stride, scale_log2, dims, value_dims, dk, dv, dm, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                CAUSAL, RANGES, SOFT, NEED_DK, NEED_DV, NEED_DM, BOUNDED, False, True,
            )  # fmt: skip
        if NEED_DM:
            for start_m in range(host_int(products_end), host_int(inner_end), BLOCK_M):
                dk, dv, dm = key_gradient_step(
                    qc_base, doc_base, vector, k, v, m, bias, lists, list_stride, start_n, num_kept, start_m,
                    num_queries, num_keys, plane_stride, scale_log2, dims, value_dims, dk, dv, dm, BLOCK_D, BLOCK_DV,
                    BLOCK_M, BLOCK_N, CAUSAL, RANGES, SOFT, NEED_DK, NEED_DV, NEED_DM, BOUNDED, False, False,
                )  # fmt: skip
        for n in range(0, host_int(inner_begin - begin + end - inner_end), EDGE_M):
            start_m = edge_start(n, begin, inner_begin, inner_end, EDGE_M)
            dk, dv, dm = key_gradient_step(
                qc_base, doc_base, vector, k, v, m, bias, lists, list_stride, start_n, num_kept, start_m, num_queries,
                num_keys, plane_stride, scale_log2, dims, value_dims, dk, dv, dm, BLOCK_D, BLOCK_DV, EDGE_M, BLOCK_N,
                CAUSAL, RANGES, SOFT, NEED_DK, NEED_DV, NEED_DM, BOUNDED, True, True,
            )  # fmt: skip

    if NEED_DM:
        is_valid = tl.load(lists + VALID * list_stride + columns) != 0
        dm_rows = dm_ptr + (batch_kv * splits + part) * num_keys + columns
        tl.store(dm_rows, tl.where(is_valid, dm, 0.0), mask=columns < num_keys)
    is_part = False
    if SPLIT:
        is_part = splits > 1
    if is_part:
        rows = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        if NEED_DK:
            tl.store(dk_part_ptr + rows * BLOCK_D + dims[None, :], dk)
        if NEED_DV:
            tl.store(dv_part_ptr + rows * BLOCK_DV + value_dims[None, :], dv)
    else:
        store_key_gradients(
            dk_ptr, dv_ptr, dk, dv, batch_kv, columns, num_keys, scale, dims, value_dims, HEAD_DIM, VALUE_DIM,
            NEED_DK, NEED_DV,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "num_places"])
def masked_attention_bwd_finish_kernel(
    qc_ptr, doc_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr, row_ptr, list_ptr,
    num_heads, num_queries, num_keys, num_places, list_stride, row_stride, plane_stride, scale,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    NEED_DM: tl.constexpr,
):  # fmt: skip
    """What SPLIT left over: sums of parts, and blocks of dropped keys. Grid (programs of ROWS keys,)."""
    num_blocks = (num_keys + BLOCK_N - 1) // BLOCK_N
    pieces = num_blocks * (BLOCK_N // ROWS)
    block = tl.program_id(0) % pieces // (BLOCK_N // ROWS)
    lanes = tl.program_id(0) % (BLOCK_N // ROWS) * ROWS + tl.arange(0, ROWS)
    batch_kv = (tl.program_id(0) // pieces).to(tl.int64)
    num_kv_heads = num_heads // GROUPS
    batch = batch_kv // num_kv_heads
    lists = list_ptr + batch * LIST_ROWS * list_stride
    num_kept = tl.load(lists + BEFORE * list_stride + num_keys)
    busy, splits = split_of(num_places, num_kept, num_blocks, BLOCK_N, NEED_DM)
    is_busy = block < busy
    if is_busy & (splits == 1):
        return
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    columns = tl.load(lists + ORDER * list_stride + block * BLOCK_N + lanes)
    dk, dv = self_gradients(
        qc_ptr, doc_ptr, row_ptr, batch * num_heads + batch_kv % num_kv_heads * GROUPS, columns, num_keys - num_queries,
        num_queries, row_stride, plane_stride, dims, value_dims, tl.zeros([ROWS, BLOCK_D], tl.float32),
        tl.zeros([ROWS, BLOCK_DV], tl.float32), tl.where(is_busy, 0, GROUPS), BLOCK_D, BLOCK_DV, NEED_DK, NEED_DV,
    )  # fmt: skip
    for part in range(host_int(tl.where(is_busy, splits, 0))):
        rows = ((batch_kv * num_places + block * splits + part) * BLOCK_N + lanes)[:, None]
        if NEED_DK:
            dk += tl.load(dk_part_ptr + rows * BLOCK_D + dims[None, :])
        if NEED_DV:
            dv += tl.load(dv_part_ptr + rows * BLOCK_DV + value_dims[None, :])
    store_key_gradients(
        dk_ptr, dv_ptr, dk, dv, batch_kv, columns, num_keys, scale, dims, value_dims, HEAD_DIM, VALUE_DIM,
        NEED_DK, NEED_DV,
    )  # fmt: skip


# --- launches ---


def lists_shape(batch: int, num_tokens: int) -> tuple[int, int, int]:
    """Return the shape of the lists of a mask [B, N]."""
    # blocks of keys end at most at the next multiple of MAX_BLOCK, blocks of queries start up to N - 1 tokens in
    return batch, LIST_ROWS.value, (-(-num_tokens // MAX_BLOCK) + 1) * MAX_BLOCK


def make_lists(keep_mask: Tensor, key_padding_mask: Tensor | None, ranges: Tensor | None) -> Tensor:
    """Build the key list of a mask and what goes with it, [B, 7, list_stride] int32: one launch, no synchronisation.

    Args:
        keep_mask: [B, N], bool or floating.
        key_padding_mask: [B, N] bool, True = a real token, or None.
        ranges: [B, N, 2] int32, the interval of keys of each token, or None.
    """
    batch, num_tokens = keep_mask.shape
    lists = torch.empty(lists_shape(batch, num_tokens), dtype=torch.int32, device=keep_mask.device)
    list_stride = lists.shape[2]
    mask = keep_mask.view(torch.uint8) if keep_mask.dtype == torch.bool else keep_mask
    valid = mask if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    bounds = lists if ranges is None else ranges.contiguous()
    config = configs.select("masked_attention_lists", size=num_tokens, dtype=torch.float32, device=lists.device)
    with torch.cuda.device_of(lists):
        masked_attention_lists_kernel[(batch,)](
            mask, valid, bounds, lists, *mask.stride(), *valid.stride(), num_tokens, list_stride,
            num_tokens.bit_length(), HAS_PADDING=key_padding_mask is not None, RANGES=ranges is not None,
            BLOCK_T=config.block_n, **_options(config),
        )  # fmt: skip
    return lists


def _options(config: LaunchConfig) -> dict[str, Any]:
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    head_dim, value_dim = query.shape[3], value.shape[3]
    return dict(
        GROUPS=query.shape[1] // key.shape[1],
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=next_power_of_2(head_dim, 16),
        BLOCK_DV=next_power_of_2(value_dim, 16),
    )


def _select(kernel: str, query: Tensor, value: Tensor) -> LaunchConfig:
    size = max(query.shape[3], value.shape[3])
    return configs.select(f"masked_attention_{kernel}", size=size, dtype=query.dtype, device=query.device)


def _compacted(key: Tensor, value: Tensor, lists: Tensor, num_queries: int, sizes: dict[str, int]) -> list[Tensor]:
    """Kept keys and values gathered in the order of the list, where that pays or strides forbid wide loads; else []."""
    config = configs.select(
        "masked_attention_compact", size=num_queries * sizes["GROUPS"], dtype=key.dtype, device=key.device
    )
    if config.block_n == 0 and all(_is_aligned(tensor) for tensor in (key, value)):
        return []
    block_n = config.block_n or 32
    batch, num_kv_heads, num_keys, _ = key.shape
    list_stride = lists.shape[2]
    copies = [key.new_empty(batch, num_kv_heads, list_stride, sizes[name]) for name in ("BLOCK_D", "BLOCK_DV")]
    names = ("HEAD_DIM", "VALUE_DIM", "BLOCK_D", "BLOCK_DV")
    masked_attention_compact_kernel[(batch * num_kv_heads * (list_stride // block_n),)](
        key, value, *copies, lists, *key.stride()[:3], *value.stride()[:3], num_kv_heads, num_keys, list_stride,
        BLOCK_N=block_n, **{name: sizes[name] for name in names}, **_options(config),
    )  # fmt: skip
    return copies


def _is_aligned(tensor: Tensor) -> bool:
    """Whether rows can be loaded 16 bytes at a time; the compiler asks for strides that are multiples of 16."""
    return tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in tensor.stride()[:3])


def dense_rows(tensor: Tensor) -> Tensor:
    """Any strides but those of the head dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _is_decoding(query: Tensor, key: Tensor) -> bool:
    return query.shape[2] * (query.shape[1] // key.shape[1]) <= 16


def masked_attention_forward_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    ranges: Tensor | None,
    lists: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, Dv] laid out like the query, and the log-sum-exp [B, H, Nq], +inf for padding rows."""
    if scale < 0:
        query, scale = -query, -scale
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    lists = make_lists(keep_mask, key_padding_mask, ranges) if lists is None else lists
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    output = empty_output(query, value)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    bounds = lists if ranges is None else ranges.contiguous()
    inputs = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    numbers = (num_heads, num_queries, num_keys, lists.shape[2], max(scale * LOG2_E, 1e-30))
    sizes = _sizes(query, key, value)
    modes = dict(CAUSAL=is_causal and ranges is None, RANGES=ranges is not None, SOFT=keep_mask.dtype != torch.bool)
    with torch.cuda.device_of(query):
        if _is_decoding(query, key):
            config = _select("decode", query, value)
            splits = _num_splits(batch * key.shape[1], ceil_div(num_keys, 2 * config.block_n), query.device)
            parts = torch.empty(*query.shape[:3], splits, value.shape[3], dtype=torch.float32, device=query.device)
            part_lse = torch.empty(*query.shape[:3], 2, splits, dtype=torch.float32, device=query.device)
            masked_attention_decode_kernel[(batch * key.shape[1] * splits,)](
                query, key, value, parts, part_lse, lists, bounds, *inputs, *numbers,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLITS=splits, **modes, **sizes, **_options(config),
            )  # fmt: skip
            config = _select("merge", query, value)
            masked_attention_merge_kernel[(batch * num_heads * num_queries,)](
                query, key, value, parts, part_lse, output, lse, lists, *inputs, *output.stride()[:3], *numbers,
                SPLITS=splits, **sizes, **_options(config),
            )  # fmt: skip
            return output, lse
        compact = _compacted(key, value, lists, num_queries, sizes)
        config = _select("fwd_compact" if compact else "fwd", query, value)
        masked_attention_fwd_kernel[(batch * num_heads * ceil_div(num_queries, config.block_m),)](
            query, key, value, *(compact or (key, value)), output, lse, lists, bounds,
            *inputs, *output.stride()[:3], *numbers, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            COMPACT=bool(compact), **modes, **sizes, **_options(config),
        )  # fmt: skip
    return output, lse


def _num_splits(programs: int, most: int, device: torch.device) -> int:
    """A power of two: programs per multiprocessor up to two, at most 64 and at most ``most``."""
    wanted = min(2 * configs.multiprocessors(device) // programs, most, 64)
    return 1 << max(wanted.bit_length() - 1, 0)


def masked_attention_backward_triton(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    ranges: Tensor | None,
    lists: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bounded_mask_grad: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to query, key, value and keep_mask; None where ``needs`` says no."""
    if scale < 0:
        arguments = (key, value, keep_mask, key_padding_mask, ranges, lists, output, lse, is_causal, -scale)
        mirrored = masked_attention_backward_triton(grad_output, -query, *arguments, bounded_mask_grad, needs)
        return (None if mirrored[0] is None else -mirrored[0], *mirrored[1:])
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    grad_output, output, lse = dense_rows(grad_output), dense_rows(output), lse.contiguous()
    lists = make_lists(keep_mask, key_padding_mask, ranges) if lists is None else lists
    needs_query, needs_key, needs_value, needs_mask = needs
    needs_keys = needs_key or needs_value or needs_mask
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    device = query.device
    row_stride = ceil_div(num_queries, MAX_BLOCK) * MAX_BLOCK
    rows = torch.empty(ROW_PLANES, batch * num_heads, row_stride, dtype=torch.float32, device=device)
    key_strides = (*key.stride()[:3], *value.stride()[:3])
    inputs = (*query.stride()[:3], *key_strides)
    sizes = _sizes(query, key, value)
    scale_log2 = max(scale * LOG2_E, 1e-30)
    buffers = (lists.shape[2], row_stride, rows.stride(0))
    clean = [query, grad_output]
    if needs_keys:
        clean = [query.new_empty(batch * num_heads, row_stride, sizes[name]) for name in ("BLOCK_D", "BLOCK_DV")]
    bounds = lists if ranges is None else ranges.contiguous()
    modes = dict(CAUSAL=is_causal and ranges is None, RANGES=ranges is not None, SOFT=keep_mask.dtype != torch.bool)
    grad_query = grad_key = grad_value = grad_mask = None
    with torch.cuda.device_of(query):
        config = _select("bwd_prepare", query, value)
        masked_attention_bwd_prepare_kernel[(batch * num_heads * (row_stride // config.block_m),)](
            query, key, value, output, grad_output, lse, rows, *clean, lists,
            *inputs, *output.stride()[:3], *grad_output.stride()[:3], num_heads, num_queries, num_keys, *buffers,
            scale_log2, BLOCK_M=config.block_m, COPY=needs_keys, **sizes, **_options(config),
        )  # fmt: skip
        if needs_keys:
            config = _select("bwd_dkdv", query, value)
            if needs_key:
                grad_key = torch.empty(key.shape, dtype=key.dtype, device=device)
            if needs_value:
                grad_value = torch.empty(value.shape, dtype=value.dtype, device=device)
            blocks = ceil_div(num_keys, config.block_n)
            places, is_split = _num_places(blocks, batch * num_kv_heads, needs_mask, device)
            by_head = rows  # not written unless wanted
            if needs_mask:
                by_head = rows.new_empty(batch, num_kv_heads, places // blocks, num_keys)
            parts = [rows, rows]
            if is_split:
                parts = [
                    rows.new_empty(batch * num_kv_heads, places, config.block_n, sizes[name]) if needed else rows
                    for name, needed in (("BLOCK_D", needs_key), ("BLOCK_DV", needs_value))
                ]
            gradients = [rows if gradient is None else gradient for gradient in (grad_key, grad_value)]
            counts = (num_heads, num_queries, num_keys, places)
            # two wide accumulators do not fit into the registers: dV first, then dK, with dm where that fits too
            passes = [(needs_key, needs_value, needs_mask)]
            if max(sizes["BLOCK_D"], sizes["BLOCK_DV"]) > 256:
                passes = [(False, needs_value, False), (needs_key, False, False), (False, False, needs_mask)]
            elif max(sizes["BLOCK_D"], sizes["BLOCK_DV"]) > 128:
                passes = [(False, needs_value, False), (needs_key, False, needs_mask)]
            for with_key, with_value, with_mask in filter(any, passes):
                wanted = dict(NEED_DK=with_key, NEED_DV=with_value)
                masked_attention_bwd_dkdv_kernel[(batch * num_kv_heads * places,)](
                    key, value, *clean, *gradients, by_head, *parts, rows, lists, *key_strides, *counts, *buffers,
                    scale, scale_log2, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=is_split,
                    NEED_DM=with_mask, BOUNDED=bounded_mask_grad and with_mask,
                    **modes, **wanted, **sizes, **_options(config),
                )  # fmt: skip
                if is_split and (with_key or with_value):
                    finish = _select("bwd_finish", query, value)
                    pieces = blocks * (config.block_n // finish.block_n)
                    masked_attention_bwd_finish_kernel[(batch * num_kv_heads * pieces,)](
                        *clean, *gradients, *parts, rows, lists, *counts, *buffers, scale, NEED_DM=with_mask,
                        BLOCK_N=config.block_n, ROWS=finish.block_n, **wanted, **sizes, **_options(finish),
                    )  # fmt: skip
            if needs_mask:
                grad_mask = by_head.sum(dim=(1, 2)).to(keep_mask.dtype)
        if needs_query:
            compact = _compacted(key, value, lists, num_queries, sizes)
            config = _select("bwd_dq_compact" if compact else "bwd_dq", query, value)
            grad_query = torch.empty(query.shape, dtype=query.dtype, device=device)
            masked_attention_bwd_dq_kernel[(batch * num_heads * ceil_div(num_queries, config.block_m),)](
                query, key, value, *(compact or (key, value)), grad_output, grad_query, rows, lists, bounds,
                *inputs, *grad_output.stride()[:3], num_heads, num_queries, num_keys, *buffers, scale, scale_log2,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, COMPACT=bool(compact), **modes, **sizes,
                **_options(config),
            )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_mask


def _num_places(blocks: int, batch_kv: int, needs_mask: bool, device: torch.device) -> tuple[int, bool]:
    """Programs of dK/dV per key/value head, and whether several may share a key block.

    How many key blocks have work is known on the device only. Where the kept ones may be too few for the chip, the
    programs of the others help them; where all together are too few, there are more.
    """
    wanted = configs.multiprocessors(device)
    extra = min(ceil_div(wanted, blocks * batch_kv), MAX_SPLITS.value)
    return blocks * extra, extra > 1 or (not needs_mask and blocks * batch_kv < 4 * wanted)
