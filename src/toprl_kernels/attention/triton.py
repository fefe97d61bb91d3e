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
from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels import configs
from toprl_kernels.attention.eager import empty_output
from toprl_kernels.attention.reference import AttentionCall
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


# --- what kernels and their functions get ---

# Constants S, M and W: heads per key/value head, head dims, and those padded to a power of two; which pairs see each
# other, whether the mask is soft, whether the loops read gathered keys; the gradients of a pass over the keys
Sizes = namedtuple("Sizes", "GROUPS HEAD_DIM VALUE_DIM BLOCK_D BLOCK_DV")
Modes = namedtuple("Modes", "CAUSAL RANGES SOFT COMPACT", defaults=[False])
Wanted = namedtuple("Wanted", "DK DV DM BOUNDED", defaults=[False])
Counts = namedtuple("Counts", "heads queries keys")  # made in the kernels: do_not_specialize reaches no fields
Heads = namedtuple("Heads", "ptr batch head row")  # a tensor [B, H, N, D], dense in its last dimension, and its strides
Lists = namedtuple("Lists", "ptr stride")  # of all samples, or of one; length of a row
Planes = namedtuple("Planes", "ptr head plane")  # the row buffer, or the part of a head; strides
# For the loops over keys: rows of the head, the sample's lists and ranges, the tokens [M] of the queries, and the slots
# (low, inner_low, inner_high, high) as ``list_blocks`` has them
Walk = namedtuple("Walk", "key value lists bounds num_keys tokens slots scale_log2")
# For the loops over queries: keys [N, D] of the list from slot ``start`` on, their m and log2 m
Block = namedtuple("Block", "start k v m bias lists num_kept scale_log2")


# --- tiles ---


@triton.jit
def head_of(x, batch, head):
    """The rows of a head: address and stride."""
    return x.ptr + batch * x.batch + head * x.head, x.row


@triton.jit
def dense(ptr, WIDTH: tl.constexpr):
    """The same for rows without gaps. (The compiler takes no field of a constant into a tuple.)"""
    return ptr, WIDTH


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def load_rows(x, rows, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """[len(rows), BLOCK] tile of the rows of a head; columns from DIM on are 0."""
    base, stride = x
    dims = tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if BLOCK == DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)


@triton.jit
def store_rows(x, rows, is_wanted, tile, DIM: tl.constexpr):
    """Write those rows of a tile that are wanted, up to column DIM."""
    base, stride = x
    dims = tl.arange(0, tile.shape[1])
    pointers = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=is_wanted[:, None] & (dims[None, :] < DIM))


@triton.jit
def row_dot(a, b):
    """The products of the rows of two tiles."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def finite_rows(tile):
    """The tile with non-finite rows set to 0, and a vector that is NaN for those and 0 for the others."""
    poison = tl.sum(tile.to(tl.float32) * 0.0, 1)
    return tl.where((poison == 0.0)[:, None], tile, 0.0), poison


# --- the list ---


@triton.jit
def lists_of(lists, batch):
    return Lists(lists.ptr + batch * LIST_ROWS * lists.stride, lists.stride)


@triton.jit
def listed(lists, ROW: tl.constexpr, index):
    """Entries of a row of a sample's lists."""
    entries = tl.load(lists.ptr + ROW * lists.stride + index)
    if ROW <= BIAS:
        entries = entries.to(tl.float32, bitcast=True)
    return entries


@triton.jit
def enlist(lists, ROW: tl.constexpr, index, entries):
    """Write entries of a row of a sample's lists, as far as it reaches."""
    if ROW <= BIAS:
        entries = entries.to(tl.int32, bitcast=True)
    tl.store(lists.ptr + ROW * lists.stride + index, entries, mask=index < lists.stride)


@triton.jit(do_not_specialize=["stride_mb", "stride_mn", "stride_vb", "stride_vn", "num_tokens", "search_steps"])
def masked_attention_lists_kernel(
    mask_ptr, valid_ptr, range_ptr, all_lists, stride_mb, stride_mn, stride_vb, stride_vn,
    num_tokens, search_steps, HAS_PADDING: tl.constexpr, RANGES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The per-token vectors of one sample. Grid (B,). Two passes: the list's second half needs the number kept."""
    batch = tl.program_id(0).to(tl.int64)
    lists = lists_of(all_lists, batch)
    mask_base, valid_base = mask_ptr + batch * stride_mb, valid_ptr + batch * stride_vb
    lanes = tl.arange(0, BLOCK_T)
    num_kept = tl.sum(tl.zeros([BLOCK_T], tl.int32), 0)
    for start in range(0, host_int(num_tokens), BLOCK_T):
        m, _ = load_mask(mask_base, valid_base, start + lanes, stride_mn, stride_vn, num_tokens, HAS_PADDING)
        num_kept += tl.sum((m > 0).to(tl.int32), 0)
    before = tl.sum(tl.zeros([BLOCK_T], tl.int32), 0)
    for start in range(0, host_int(lists.stride), BLOCK_T):
        tokens = start + lanes
        m, valid = load_mask(mask_base, valid_base, tokens, stride_mn, stride_vn, num_tokens, HAS_PADDING)
        is_kept = m > 0
        count = before + tl.cumsum(is_kept.to(tl.int32), 0)
        before += tl.sum(is_kept.to(tl.int32), 0)
        slot = tl.where(is_kept, count - 1, num_kept + tokens - count)  # a permutation; the identity from N on
        enlist(lists, MASK, tokens, m)
        enlist(lists, BEFORE, tokens, count - is_kept.to(tl.int32))
        enlist(lists, BIAS, slot, tl.where(is_kept, tl.log2(tl.where(is_kept, m, 1.0)), float("-inf")))
        enlist(lists, ORDER, slot, tl.minimum(tokens, num_tokens))
        enlist(lists, VALID, tokens, valid.to(tl.int32))
        first, last = tokens * 0, tokens * 0
        if RANGES:
            bounds = range_ptr + batch * num_tokens * 2
            # the first row that sees key j is the first whose end is above j; the last, before the first that starts so
            first = first_above(bounds + 1, tokens, num_tokens, search_steps)
            last = first_above(bounds, tokens, num_tokens, search_steps)
        enlist(lists, FIRST_SEEN_BY, tokens, first)
        enlist(lists, LAST_SEEN_BY, tokens, last)


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
def list_blocks(lists, bounds, first, last, num_keys, BLOCK_N: tl.constexpr, M: tl.constexpr):
    """Slots [low, high) that some of the tokens first..last see; whole blocks [inner_low, inner_high) that all see."""
    before = lists.ptr + BEFORE * lists.stride
    if M.RANGES:
        low = tl.load(before + clamped(bounds + 2 * first.to(tl.int64), num_keys))
        inner_low = tl.load(before + clamped(bounds + 2 * last.to(tl.int64), num_keys))
        inner_high = tl.load(before + clamped(bounds + 2 * first.to(tl.int64) + 1, num_keys))
        high = tl.load(before + clamped(bounds + 2 * last.to(tl.int64) + 1, num_keys))
    elif M.CAUSAL:
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
    key, value, kc_ptr, vc_ptr, all_lists, num_kv_heads, num_keys, S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Kept keys and values in the order of the list, padded to blocks and to BLOCK_D. Grid (B * Hkv * blocks,)."""
    num_blocks = all_lists.stride // BLOCK_N
    slots = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    batch_kv = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = batch_kv // num_kv_heads
    kv_head = batch_kv % num_kv_heads
    lists = lists_of(all_lists, batch)
    num_kept = listed(lists, BEFORE, num_keys)
    is_kept = (slots < num_kept)[:, None]
    needed = slots < num_kept + KERNEL_MAX_BLOCK  # zeros up to the end of the last block
    rows = listed(lists, ORDER, slots).to(tl.int64)[:, None]
    dims = tl.arange(0, S.BLOCK_D)[None, :]
    value_dims = tl.arange(0, S.BLOCK_DV)[None, :]
    k_base, stride_k = head_of(key, batch, kv_head)
    v_base, stride_v = head_of(value, batch, kv_head)
    k = tl.load(k_base + rows * stride_k + dims, mask=is_kept & (dims < S.HEAD_DIM), other=0.0)
    v = tl.load(v_base + rows * stride_v + value_dims, mask=is_kept & (value_dims < S.VALUE_DIM), other=0.0)
    out = batch_kv * all_lists.stride + slots
    store_rows(dense(kc_ptr, S.BLOCK_D), out, needed, k, S.BLOCK_D)
    store_rows(dense(vc_ptr, S.BLOCK_DV), out, needed, v, S.BLOCK_DV)


# --- forward ---


@triton.jit
def query_block(
    k_loop, v_loop, lists, range_ptr, counts, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """A program's sample, head and rows [M], and its walk. Rows past the last query stand for it."""
    num_blocks = (counts.queries + BLOCK_M - 1) // BLOCK_M
    # the last rows of a causal sequence have the most work: they start first
    start_m = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = batch_head // counts.heads
    head = batch_head % counts.heads
    offset = counts.keys - counts.queries
    rows = start_m + tl.arange(0, BLOCK_M)
    own_lists = lists_of(lists, batch)
    bounds = range_ptr + batch * counts.keys * 2
    last_token = tl.minimum(start_m + BLOCK_M, counts.queries) - 1 + offset
    slots = list_blocks(own_lists, bounds, start_m + offset, last_token, counts.keys, BLOCK_N, M)
    key, value = head_of(k_loop, batch, head // S.GROUPS), head_of(v_loop, batch, head // S.GROUPS)
    tokens = tl.minimum(rows, counts.queries - 1) + offset
    return batch, head, rows, Walk(key, value, own_lists, bounds, counts.keys, tokens, slots, scale_log2)


@triton.jit
def load_block(walk, start_n, S: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr):
    """Slots of a block of the list, their tokens (at edges only, if gathered), and their rows of keys and values."""
    slots = start_n + tl.arange(0, BLOCK_N)
    columns = slots
    if EDGE or not M.COMPACT:
        columns = listed(walk.lists, ORDER, slots)
    rows = columns
    if M.COMPACT:
        rows = slots
    elif EDGE:
        rows = tl.minimum(columns, walk.num_keys - 1)
    k = load_rows(walk.key, rows, S.BLOCK_D, S.BLOCK_D if M.COMPACT else S.HEAD_DIM)  # [N, D]
    v = load_rows(walk.value, rows, S.BLOCK_DV, S.BLOCK_DV if M.COMPACT else S.VALUE_DIM)  # [N, Dv]
    return slots, columns, k, v


@triton.jit
def visible_pairs(walk, slots, columns, M: tl.constexpr):
    """Which rows [M] see which keys of an edge block [N]."""
    visible = (slots < walk.slots[3])[None, :]
    if M.CAUSAL:
        visible = visible & (columns[None, :] <= walk.tokens[:, None])
    if M.RANGES:  # read here rather than held in registers through the main loop
        bounds = walk.bounds + 2 * walk.tokens.to(tl.int64)
        visible = visible & (columns[None, :] >= tl.load(bounds)[:, None])
        visible = visible & (columns[None, :] < tl.load(bounds + 1)[:, None])
    return visible


@triton.jit
def forward_step(walk, q, start_n, state, S: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr):
    """Online softmax over one block of the list. The maximum is that of raw scores; the scale is in the exponent."""
    acc, row_max, row_sum = state
    slots, columns, k, v = load_block(walk, start_n, S, M, BLOCK_N, EDGE)
    s = dot(q, tl.trans(k), zeros(q.shape[0], BLOCK_N))  # [M, N]
    if EDGE:
        v, poison = finite_rows(v)
        s = tl.where(visible_pairs(walk, slots, columns, M), s + poison[None, :], float("-inf"))
    if M.SOFT:
        s = s * walk.scale_log2 + listed(walk.lists, BIAS, slots)[None, :]
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(s, 1) * walk.scale_log2)
        p = tl.exp2(s * walk.scale_log2 - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    return dot(p.to(v.dtype), v, acc * shrink[:, None]), new_max, row_sum


@triton.jit
def attend(walk, q, state, S: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Online softmax over all slots of the walk: accumulator, maximum, sum."""
    low, inner_low, inner_high, high = walk.slots
    for start_n in range(host_int(inner_low), host_int(inner_high), BLOCK_N):
        state = forward_step(walk, q, start_n, state, S, M, BLOCK_N, False)
    edges = inner_low - low + tl.maximum(high - inner_high, 0)
    for n in range(0, host_int(edges), BLOCK_N):
        start_n = edge_start(n, low, inner_low, inner_high, BLOCK_N)
        state = forward_step(walk, q, start_n, state, S, M, BLOCK_N, True)
    return state


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_fwd_kernel(
    query, key, value, k_loop, v_loop, output, lse_ptr, lists, range_ptr, num_heads, num_queries, num_keys, scale_log2,
    S: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O and the log-sum-exp [B, H, Nq] of one query block of one head. Grid (B * H * query blocks,).

    The loops read k_loop and v_loop: with COMPACT gathered keys [B, Hkv, list_stride, BLOCK_D], else key and value
    through the list.
    """
    counts = Counts(num_heads, num_queries, num_keys)
    batch, head, rows, walk = query_block(k_loop, v_loop, lists, range_ptr, counts, scale_log2, BLOCK_M, BLOCK_N, S, M)
    tokens, lists = walk.tokens, walk.lists
    kv_head = head // S.GROUPS
    safe_rows = tl.minimum(rows, counts.queries - 1)
    q = load_rows(head_of(query, batch, head), safe_rows, S.BLOCK_D, S.HEAD_DIM)  # [M, D]
    k_self = load_rows(head_of(key, batch, kv_head), tokens, S.BLOCK_D, S.HEAD_DIM)  # [M, D]
    v_self = load_rows(head_of(value, batch, kv_head), tokens, S.BLOCK_DV, S.VALUE_DIM)  # [M, Dv]
    row_max = row_dot(q, k_self) * scale_log2  # s_ii [M]
    row_sum = 1.0 - listed(lists, MASK, tokens)  # [M]
    acc = v_self.to(tl.float32) * row_sum[:, None]  # [M, Dv]
    acc, row_max, row_sum = attend(walk, q, (acc, row_max, row_sum), S, M, BLOCK_N)

    is_valid = listed(lists, VALID, tokens) != 0
    out = tl.where(is_valid[:, None], acc / row_sum[:, None], 0.0)
    lse = tl.where(is_valid, (row_max + tl.log2(row_sum)) * LN_2, float("inf"))
    in_range = rows < counts.queries
    store_rows(head_of(output, batch, head), rows, in_range, out, S.VALUE_DIM)
    tl.store(lse_ptr + (batch * counts.heads + head) * counts.queries + rows, lse, mask=in_range)


# --- decoding: few queries, keys split over programs ---

NOTHING_YET = tl.constexpr(-1e30)  # maximum of a part that sees no key: finite, so that no -inf - -inf arises


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_decode_kernel(
    query, key, value, part_ptr, part_lse_ptr, lists, range_ptr, num_heads, num_queries, num_keys, scale_log2,
    S: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """All rows of a group's heads against one part of the keys, without self terms. Grid (B * Hkv * SPLITS,).

    Writes acc [B, H, Nq, SPLITS, Dv] and, for each, (maximum, sum) [B, H, Nq, 2, SPLITS].
    """
    counts = Counts(num_heads, num_queries, num_keys)
    split = tl.program_id(0) % SPLITS
    batch_kv = (tl.program_id(0) // SPLITS).to(tl.int64)
    num_kv_heads = counts.heads // S.GROUPS
    batch = batch_kv // num_kv_heads
    kv_head = batch_kv % num_kv_heads
    packed = tl.arange(0, BLOCK_M)
    in_range = packed < S.GROUPS * counts.queries
    safe = tl.minimum(packed, S.GROUPS * counts.queries - 1)
    heads = kv_head * S.GROUPS + safe // counts.queries
    queries = safe % counts.queries
    dims = tl.arange(0, S.BLOCK_D)[None, :]
    q_rows = query.ptr + batch * query.batch + heads[:, None] * query.head + queries.to(tl.int64)[:, None] * query.row
    q = tl.load(q_rows + dims, mask=dims < S.HEAD_DIM, other=0.0)  # [M, D]

    own_lists = lists_of(lists, batch)
    bounds = range_ptr + batch * counts.keys * 2
    offset = counts.keys - counts.queries
    low, inner_low, inner_high, high = list_blocks(own_lists, bounds, offset, counts.keys - 1, counts.keys, BLOCK_N, M)
    length = (tl.maximum(high - low, 0) + SPLITS * BLOCK_N - 1) // (SPLITS * BLOCK_N) * BLOCK_N
    low += split * length
    high = tl.minimum(high, low + length)
    inner_low = tl.minimum(tl.maximum(inner_low, low), low + length)
    inner_high = tl.minimum(tl.maximum(inner_high, inner_low), low + length)
    walk = Walk(
        head_of(key, batch, kv_head), head_of(value, batch, kv_head), own_lists, bounds, counts.keys, queries + offset,
        (low, inner_low, inner_high, high), scale_log2,
    )  # fmt: skip
    nothing = tl.zeros([BLOCK_M], tl.float32)
    start = (zeros(BLOCK_M, S.BLOCK_DV), nothing + NOTHING_YET, nothing)
    acc, row_max, row_sum = attend(walk, q, start, S, M, BLOCK_N)
    rows = (batch * counts.heads + heads) * counts.queries + queries
    store_rows(dense(part_ptr, S.VALUE_DIM), rows * SPLITS + split, in_range, acc, S.VALUE_DIM)
    tl.store(part_lse_ptr + rows * 2 * SPLITS + split, row_max, mask=in_range)
    tl.store(part_lse_ptr + rows * 2 * SPLITS + SPLITS + split, row_sum, mask=in_range)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_merge_kernel(
    query, key, value, part_ptr, part_lse_ptr, output, lse_ptr, lists, num_heads, num_queries, num_keys, scale_log2,
    S: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of one row and its self term. Grid (B * H * Nq,)."""
    counts = Counts(num_heads, num_queries, num_keys)
    row = tl.program_id(0).to(tl.int64)
    index = row % counts.queries
    head = row // counts.queries % counts.heads
    batch = row // counts.queries // counts.heads
    token = index + counts.keys - counts.queries
    dims = tl.arange(0, S.BLOCK_D)
    value_dims = tl.arange(0, S.BLOCK_DV)
    splits = tl.arange(0, SPLITS)
    own_lists = lists_of(lists, batch)
    q_base, stride_q = head_of(query, batch, head)
    k_base, stride_k = head_of(key, batch, head // S.GROUPS)
    v_base, stride_v = head_of(value, batch, head // S.GROUPS)
    out_base, stride_out = head_of(output, batch, head)
    is_value = value_dims < S.VALUE_DIM
    q = tl.load(q_base + index * stride_q + dims, mask=dims < S.HEAD_DIM, other=0.0)
    k = tl.load(k_base + token * stride_k + dims, mask=dims < S.HEAD_DIM, other=0.0)
    v = tl.load(v_base + token * stride_v + value_dims, mask=is_value, other=0.0).to(tl.float32)
    s_self = tl.sum(q.to(tl.float32) * k.to(tl.float32), 0) * scale_log2
    rest = 1.0 - listed(own_lists, MASK, token)

    maxima = tl.load(part_lse_ptr + row * 2 * SPLITS + splits)
    sums = tl.load(part_lse_ptr + row * 2 * SPLITS + SPLITS + splits)
    row_max = tl.maximum(s_self, tl.max(maxima, 0))
    weights = tl.exp2(maxima - row_max)  # [SPLITS]
    self_weight = rest * tl.exp2(s_self - row_max)
    row_sum = self_weight + tl.sum(weights * sums, 0)
    parts = load_rows(dense(part_ptr, S.VALUE_DIM), row * SPLITS + splits, S.BLOCK_DV, S.VALUE_DIM)
    acc = self_weight * v + tl.sum(weights[:, None] * parts, 0)
    is_valid = listed(own_lists, VALID, token) != 0
    out = tl.where(is_valid, acc / row_sum, 0.0)
    lse = tl.where(is_valid, (row_max + tl.log2(row_sum)) * LN_2, float("inf"))
    tl.store(out_base + index * stride_out + value_dims, out.to(out_base.dtype.element_ty), mask=is_value)
    tl.store(lse_ptr + row, lse)


# --- backward ---


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_bwd_prepare_kernel(
    query, key, value, output, gradient, lse_ptr, planes, qc_ptr, doc_ptr, lists, num_heads, num_queries, num_keys,
    scale_log2, S: tl.constexpr, BLOCK_M: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """The row buffer, padding included, and clean q and dO for dK/dV. Grid (B * H * row_stride / BLOCK_M,).

    Padding rows, rows whose dO is 0 and rows past the end are dead: lse +inf. A live row with something that is not
    finite gets lse NaN, which every key that it sees receives. Both are 0 in the copies [B * H, row_stride, BLOCK_D]:
    no product of tiles meets anything that is not finite, and the loops of dK/dV load whole aligned blocks.
    """
    counts = Counts(num_heads, num_queries, num_keys)
    num_blocks = planes.head // BLOCK_M
    rows = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = batch_head // counts.heads
    head = batch_head % counts.heads
    kv_head = head // S.GROUPS
    in_range = rows < counts.queries
    safe_rows = tl.minimum(rows, counts.queries - 1)
    tokens = safe_rows + (counts.keys - counts.queries)
    own_lists = lists_of(lists, batch)

    q = load_rows(head_of(query, batch, head), safe_rows, S.BLOCK_D, S.HEAD_DIM)
    k = load_rows(head_of(key, batch, kv_head), tokens, S.BLOCK_D, S.HEAD_DIM)
    v = load_rows(head_of(value, batch, kv_head), tokens, S.BLOCK_DV, S.VALUE_DIM)
    out = load_rows(head_of(output, batch, head), safe_rows, S.BLOCK_DV, S.VALUE_DIM)
    do = load_rows(head_of(gradient, batch, head), safe_rows, S.BLOCK_DV, S.VALUE_DIM)

    is_valid = listed(own_lists, VALID, tokens) != 0
    is_live = in_range & is_valid & (tl.sum((do != 0.0).to(tl.int32), 1) > 0)
    delta = row_dot(do, out)  # D_i [M]
    poison = tl.sum(q.to(tl.float32) * 0.0, 1) + tl.sum(do.to(tl.float32) * 0.0, 1) + delta * 0.0
    lse = tl.load(lse_ptr + batch_head * counts.queries + safe_rows) * KERNEL_LOG2_E + poison
    is_clean = is_live & (poison == 0.0)
    delta = tl.where(is_clean, delta, 0.0)
    rest = 1.0 - listed(own_lists, MASK, tokens)
    weight = tl.where(is_live, rest * tl.exp2(row_dot(q, k) * scale_log2 - lse), 0.0)
    vector = planes.ptr + batch_head * planes.head + rows
    tl.store(vector + LSE * planes.plane, tl.where(is_live, lse, float("inf")))
    tl.store(vector + DELTA * planes.plane, delta)
    tl.store(vector + SELF_PROB * planes.plane, weight)
    tl.store(vector + SELF_GRAD * planes.plane, tl.where(is_live, weight * (row_dot(do, v) - delta), 0.0))
    if COPY:
        out_rows = batch_head * planes.head + rows
        everywhere = rows >= 0
        store_rows(dense(qc_ptr, S.BLOCK_D), out_rows, everywhere, tl.where(is_clean[:, None], q, 0.0), S.BLOCK_D)
        store_rows(dense(doc_ptr, S.BLOCK_DV), out_rows, everywhere, tl.where(is_clean[:, None], do, 0.0), S.BLOCK_DV)


@triton.jit
def query_gradient_step(
    walk, q, do, lse, delta, start_n, dq,
    S: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dQ of one block of the list."""
    slots, columns, k, v = load_block(walk, start_n, S, M, BLOCK_N, EDGE)
    if EDGE:
        k, poison = finite_rows(k)
    s = dot(q, tl.trans(k), zeros(q.shape[0], BLOCK_N)) * walk.scale_log2  # [M, N]
    if M.SOFT:
        s += listed(walk.lists, BIAS, slots)[None, :]
    dp = dot(do, tl.trans(v), zeros(q.shape[0], BLOCK_N))
    x = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])  # m_j X_ij
    if EDGE:
        x = tl.where(visible_pairs(walk, slots, columns, M), x + poison[None, :], 0.0)
    return dot(x.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_bwd_dq_kernel(
    query, key, k_loop, v_loop, gradient, dq_ptr, planes, lists, range_ptr, num_heads, num_queries, num_keys,
    scale, scale_log2, S: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ (contiguous [B, H, Nq, D]) of one query block of one head. Grid (B * H * query blocks,)."""
    counts = Counts(num_heads, num_queries, num_keys)
    batch, head, rows, walk = query_block(k_loop, v_loop, lists, range_ptr, counts, scale_log2, BLOCK_M, BLOCK_N, S, M)
    batch_head = batch * counts.heads + head
    safe_rows = tl.minimum(rows, counts.queries - 1)
    q = load_rows(head_of(query, batch, head), safe_rows, S.BLOCK_D, S.HEAD_DIM)  # [M, D]
    do = load_rows(head_of(gradient, batch, head), safe_rows, S.BLOCK_DV, S.VALUE_DIM)
    vector = planes.ptr + batch_head * planes.head + rows
    lse = tl.load(vector + LSE * planes.plane)
    delta = tl.load(vector + DELTA * planes.plane)
    dq = zeros(BLOCK_M, S.BLOCK_D)
    low, inner_low, inner_high, high = walk.slots
    for start_n in range(host_int(inner_low), host_int(inner_high), BLOCK_N):
        dq = query_gradient_step(walk, q, do, lse, delta, start_n, dq, S, M, BLOCK_N, False)
    edges = inner_low - low + tl.maximum(high - inner_high, 0)
    for n in range(0, host_int(edges), BLOCK_N):
        start_n = edge_start(n, low, inner_low, inner_high, BLOCK_N)
        dq = query_gradient_step(walk, q, do, lse, delta, start_n, dq, S, M, BLOCK_N, True)
    k_self = load_rows(head_of(key, batch, head // S.GROUPS), walk.tokens, S.BLOCK_D, S.HEAD_DIM)  # [M, D]
    dq += tl.load(vector + SELF_GRAD * planes.plane)[:, None] * k_self.to(tl.float32)
    dq = tl.where((lse == float("inf"))[:, None], 0.0, dq * scale)
    out = dense(dq_ptr + batch_head * counts.queries * S.HEAD_DIM, S.HEAD_DIM)
    store_rows(out, rows, rows < counts.queries, dq, S.HEAD_DIM)


@triton.jit
def rows_that_see(lists, columns, counts, M: tl.constexpr):
    """The interval of rows that see each key; a later one for a later key."""
    offset = counts.keys - counts.queries
    if M.RANGES:
        seen_from = listed(lists, FIRST_SEEN_BY, columns) - offset
        seen_to = listed(lists, LAST_SEEN_BY, columns) - offset
    elif M.CAUSAL:
        seen_from = columns - offset
        seen_to = columns * 0 + counts.queries
    else:
        seen_from = columns * 0
        seen_to = seen_from + counts.queries
    return seen_from, seen_to


@triton.jit
def key_gradient_step(
    block, clean, planes, counts, start_m, state, BLOCK_M: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    W: tl.constexpr, EDGE: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One block of queries of a head for one block of keys.

    Tiles are [keys, queries]: the larger side first is what the matrix instructions want, and p and x then enter the
    second products from registers. One exponential serves everything: with W.DM it is R = exp2(s - lse), which the
    gradient with respect to a mask value of 0 needs, otherwise R m_j. Without PRODUCTS all keys are dropped ones.
    """
    dk, dv, dm = state
    BLOCK_N: tl.constexpr = block.k.shape[0]
    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(dense(clean[0], S.BLOCK_D), rows, S.BLOCK_D, S.BLOCK_D)  # [M, D]
    do = load_rows(dense(clean[1], S.BLOCK_DV), rows, S.BLOCK_DV, S.BLOCK_DV)  # [M, Dv]
    lse = tl.load(planes.ptr + LSE * planes.plane + rows)  # +inf past the last query: everything below is 0 there
    s = dot(block.k, tl.trans(q), zeros(BLOCK_N, BLOCK_M))  # [N, M]
    exponent = s * block.scale_log2 - lse[None, :]
    if W.DM:
        if EDGE or not PRODUCTS:  # of a kept key R <= 1 / m <= 2^96
            exponent = tl.minimum(exponent, MAX_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
    elif M.SOFT:
        exponent += block.bias[:, None]
    p = tl.exp2(exponent)
    # what only comparisons need is read again rather than held in registers through all loops
    slots = block.start + tl.arange(0, BLOCK_N)
    is_kept = (slots < block.num_kept)[:, None]
    if EDGE or (W.DM and not M.CAUSAL):
        columns = listed(block.lists, ORDER, slots)
        is_self = columns[:, None] == (rows + (counts.keys - counts.queries))[None, :]
    if EDGE:
        seen_from, seen_to = rows_that_see(block.lists, tl.minimum(columns, counts.keys - 1), counts, M)
        visible = (rows[None, :] >= seen_from[:, None]) & (rows[None, :] < seen_to[:, None])
        if not W.DM:
            visible = visible & is_kept
        p = tl.where(visible, p, 0.0)
    if W.DV and PRODUCTS:
        p_seen = p
        if W.DM:
            p_seen = p * block.m[:, None]
            if EDGE:  # R may be NaN where m = 0
                p_seen = tl.where(is_kept, p_seen, 0.0)
        dv = dot(p_seen.to(do.dtype), do, dv)
    if W.DK or W.DM:
        delta = tl.load(planes.ptr + DELTA * planes.plane + rows)
        slope = dot(block.v, tl.trans(do), zeros(BLOCK_N, BLOCK_M)) - delta[None, :]
        x = p * slope  # X [N, M], or m X without W.DM
        if W.DM:
            by_mask = x
            if W.BOUNDED and not PRODUCTS:
                by_mask = p / (1.0 + p) * slope
            elif W.BOUNDED and EDGE:
                by_mask = tl.where(is_kept, x, p / (1.0 + p) * slope)
            if EDGE or not M.CAUSAL:
                # by comparison: subtracting the self term afterwards leaves rounding where the truth is 0
                by_mask = tl.where(is_self, 0.0, by_mask)
            dm += tl.sum(by_mask, 1)
            if PRODUCTS:
                x = x * block.m[:, None]
                if EDGE:
                    x = tl.where(is_kept, x, 0.0)
        if W.DK and PRODUCTS:
            dk = dot(x.to(q.dtype), q, dk)
    return dk, dv, dm


@triton.jit
def self_gradients(qc_ptr, doc_ptr, planes, first_head, columns, counts, heads, S: tl.constexpr, W: tl.constexpr):
    """The self terms of the keys ``columns`` over the first ``heads`` heads of the group: float32 dK and dV."""
    dk = zeros(columns.shape[0], S.BLOCK_D)
    dv = zeros(columns.shape[0], S.BLOCK_DV)
    self_rows = columns - (counts.keys - counts.queries)
    has_row = (self_rows >= 0) & (self_rows < counts.queries)
    rows = tl.minimum(tl.maximum(self_rows, 0), counts.queries - 1)
    for group in range(host_int(heads)):
        head_rows = (first_head + group) * planes.head
        vector = planes.ptr + head_rows + rows
        if W.DV:
            do = load_rows(dense(doc_ptr + head_rows * S.BLOCK_DV, S.BLOCK_DV), rows, S.BLOCK_DV, S.BLOCK_DV)
            dv += tl.where(has_row, tl.load(vector + SELF_PROB * planes.plane), 0.0)[:, None] * do.to(tl.float32)
        if W.DK:
            q = load_rows(dense(qc_ptr + head_rows * S.BLOCK_D, S.BLOCK_D), rows, S.BLOCK_D, S.BLOCK_D)
            dk += tl.where(has_row, tl.load(vector + SELF_GRAD * planes.plane), 0.0)[:, None] * q.to(tl.float32)
    return dk, dv


@triton.jit
def store_key_gradients(dk_ptr, dv_ptr, dk, dv, batch_kv, columns, num_keys, scale, S: tl.constexpr, W: tl.constexpr):
    """Rows ``columns`` of the contiguous gradients [B, Hkv, N, D]."""
    rows, in_range = batch_kv * num_keys + columns, columns < num_keys
    if W.DK:
        store_rows(dense(dk_ptr, S.HEAD_DIM), rows, in_range, dk * scale, S.HEAD_DIM)
    if W.DV:
        store_rows(dense(dv_ptr, S.VALUE_DIM), rows, in_range, dv, S.VALUE_DIM)


MAX_SPLITS = tl.constexpr(8)  # of a key block: what they save must pay for writing and reading their float32 parts


@triton.jit
def split_of(num_places, num_kept, num_blocks, BLOCK_N: tl.constexpr, W: tl.constexpr):
    """Number of key blocks that have queries to loop over, and of programs for each."""
    if W.DM:
        busy = num_blocks
    else:
        busy = (num_kept + BLOCK_N - 1) // BLOCK_N
    return busy, tl.minimum(num_places // tl.maximum(busy, 1), MAX_SPLITS)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "num_places"])
def masked_attention_bwd_dkdv_kernel(
    key, value, qc_ptr, doc_ptr, dk_ptr, dv_ptr, dm_ptr, dk_part_ptr, dv_part_ptr, planes, all_lists,
    num_heads, num_queries, num_keys, num_places, scale, scale_log2, S: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dK, dV of one block of the list, and dm [B, Hkv, splits, N]. Grid (B * Hkv * num_places,).

    A program owns its keys and loops over the queries of all heads of the group: no atomics, fixed order. A block of
    dropped keys has self terms only, and, for dm, a loop without the two products of dK and dV.

    With SPLIT, as many programs share a key block as there are for one (see ``split_of``): each takes a contiguous part
    of the row blocks of all heads. Parts are added by the finish kernel, in their order.
    """
    counts = Counts(num_heads, num_queries, num_keys)
    # comparisons and the mask gradient need registers, which half as many rows have
    EDGE_M: tl.constexpr = BLOCK_M // 2 if W.DM and BLOCK_M > 16 else BLOCK_M
    place = tl.program_id(0) % num_places
    batch_kv = (tl.program_id(0) // num_places).to(tl.int64)
    num_kv_heads = counts.heads // S.GROUPS
    batch = batch_kv // num_kv_heads
    kv_head = batch_kv % num_kv_heads
    lists = lists_of(all_lists, batch)
    num_kept = listed(lists, BEFORE, counts.keys)
    if SPLIT:
        busy, splits = split_of(num_places, num_kept, (counts.keys + BLOCK_N - 1) // BLOCK_N, BLOCK_N, W)
        number = place // tl.maximum(splits, 1)
        part = place % tl.maximum(splits, 1)
        if number >= busy:
            return
    else:
        number = place
        part = place * 0
        splits = place * 0 + 1
    start_n = number * BLOCK_N
    slots = start_n + tl.arange(0, BLOCK_N)
    columns = listed(lists, ORDER, slots)
    safe_columns = tl.minimum(columns, counts.keys - 1)
    first_head = batch * counts.heads + kv_head * S.GROUPS

    # self terms first, while nothing else is in registers
    own_heads = tl.where(part == 0, S.GROUPS, 0)
    dk, dv = self_gradients(qc_ptr, doc_ptr, planes, first_head, columns, counts, own_heads, S, W)
    state = (dk, dv, tl.zeros([BLOCK_N], tl.float32))
    k = load_rows(head_of(key, batch, kv_head), safe_columns, S.BLOCK_D, S.HEAD_DIM)  # [N, D]
    v = load_rows(head_of(value, batch, kv_head), safe_columns, S.BLOCK_DV, S.VALUE_DIM)
    m, bias = listed(lists, MASK, safe_columns), listed(lists, BIAS, slots)  # [N]
    block = Block(start_n, k, v, m, bias, lists, num_kept, scale_log2)
    is_wanted = columns < counts.keys
    if not W.DM:
        is_wanted = slots < num_kept
    seen_from, seen_to = rows_that_see(lists, safe_columns, counts, M)
    low = tl.maximum(tl.min(tl.where(is_wanted, seen_from, counts.queries), 0), 0) // BLOCK_M * BLOCK_M
    high = tl.max(tl.where(is_wanted, seen_to, 0), 0)
    # one row more than sees all: the last key's row itself must be at an edge, for dm
    inner_low = tl.maximum(tl.max(tl.where(is_wanted, seen_from, 0), 0) + 1, 0)
    inner_high = tl.min(tl.where(is_wanted, seen_to, counts.queries), 0)
    if not M.CAUSAL and not M.RANGES:
        inner_low = inner_low * 0
    if W.DM:
        is_mixed = (start_n < num_kept) & (start_n + BLOCK_N > num_kept)
    else:
        is_mixed = start_n + BLOCK_N > num_kept
    # rows past the last query are 0 in the copies: the last block is whole
    high = (high + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    inner_high = tl.where(inner_high >= counts.queries, high, inner_high // BLOCK_M * BLOCK_M)
    inner_high = tl.where(is_mixed, low, tl.minimum(tl.maximum(inner_high, low), tl.maximum(high, low)))
    inner_low = tl.minimum((inner_low + BLOCK_M - 1) // BLOCK_M * BLOCK_M, inner_high)
    blocks = tl.maximum(high - low, 0) // BLOCK_M  # of one head; none for a block of dropped keys without dm
    share = (S.GROUPS * blocks + splits - 1) // splits

    for group in range(S.GROUPS):
        head_rows = (first_head + group) * planes.head
        clean = (qc_ptr + head_rows * S.BLOCK_D, doc_ptr + head_rows * S.BLOCK_DV)
        own = Planes(planes.ptr + head_rows, 0, planes.plane)
        # this program's part of the head's rows [low, high), cut into whole and edge blocks
        begin = low + tl.minimum(tl.maximum(part * share - group * blocks, 0), blocks) * BLOCK_M
        end = low + tl.minimum(tl.maximum((part + 1) * share - group * blocks, 0), blocks) * BLOCK_M
        inner_begin = tl.minimum(tl.maximum(inner_low, begin), end)
        inner_end = tl.minimum(tl.maximum(inner_high, inner_begin), end)
        products_end = inner_end
        if W.DM:
            products_end = tl.where(start_n < num_kept, inner_end, inner_begin)
        for start_m in range(host_int(inner_begin), host_int(products_end), BLOCK_M):
            state = key_gradient_step(block, clean, own, counts, start_m, state, BLOCK_M, S, M, W, False, True)
        if W.DM:
            for start_m in range(host_int(products_end), host_int(inner_end), BLOCK_M):
                state = key_gradient_step(block, clean, own, counts, start_m, state, BLOCK_M, S, M, W, False, False)
        for n in range(0, host_int(inner_begin - begin + end - inner_end), EDGE_M):
            start_m = edge_start(n, begin, inner_begin, inner_end, EDGE_M)
            state = key_gradient_step(block, clean, own, counts, start_m, state, EDGE_M, S, M, W, True, True)

    dk, dv, dm = state
    if W.DM:
        is_valid = listed(lists, VALID, columns) != 0
        dm_rows = dm_ptr + (batch_kv * splits + part) * counts.keys + columns
        tl.store(dm_rows, tl.where(is_valid, dm, 0.0), mask=columns < counts.keys)
    is_part = False
    if SPLIT:
        is_part = splits > 1
    if is_part:
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        if W.DK:
            store_rows(dense(dk_part_ptr, S.BLOCK_D), rows, slots >= 0, dk, S.BLOCK_D)
        if W.DV:
            store_rows(dense(dv_part_ptr, S.BLOCK_DV), rows, slots >= 0, dv, S.BLOCK_DV)
    else:
        store_key_gradients(dk_ptr, dv_ptr, dk, dv, batch_kv, columns, counts.keys, scale, S, W)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "num_places"])
def masked_attention_bwd_finish_kernel(
    qc_ptr, doc_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr, planes, all_lists,
    num_heads, num_queries, num_keys, num_places, scale,
    S: tl.constexpr, W: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What SPLIT left over: sums of parts, and blocks of dropped keys. Grid (programs of ROWS keys,)."""
    counts = Counts(num_heads, num_queries, num_keys)
    num_blocks = (counts.keys + BLOCK_N - 1) // BLOCK_N
    pieces = num_blocks * (BLOCK_N // ROWS)
    block = tl.program_id(0) % pieces // (BLOCK_N // ROWS)
    lanes = tl.program_id(0) % (BLOCK_N // ROWS) * ROWS + tl.arange(0, ROWS)
    batch_kv = (tl.program_id(0) // pieces).to(tl.int64)
    num_kv_heads = counts.heads // S.GROUPS
    batch = batch_kv // num_kv_heads
    lists = lists_of(all_lists, batch)
    num_kept = listed(lists, BEFORE, counts.keys)
    busy, splits = split_of(num_places, num_kept, num_blocks, BLOCK_N, W)
    is_busy = block < busy
    if is_busy & (splits == 1):
        return
    columns = listed(lists, ORDER, block * BLOCK_N + lanes)
    first_head = batch * counts.heads + batch_kv % num_kv_heads * S.GROUPS
    heads = tl.where(is_busy, 0, S.GROUPS)
    dk, dv = self_gradients(qc_ptr, doc_ptr, planes, first_head, columns, counts, heads, S, W)
    for part in range(host_int(tl.where(is_busy, splits, 0))):
        rows = (batch_kv * num_places + block * splits + part) * BLOCK_N + lanes
        if W.DK:
            dk += load_rows(dense(dk_part_ptr, S.BLOCK_D), rows, S.BLOCK_D, S.BLOCK_D)
        if W.DV:
            dv += load_rows(dense(dv_part_ptr, S.BLOCK_DV), rows, S.BLOCK_DV, S.BLOCK_DV)
    store_key_gradients(dk_ptr, dv_ptr, dk, dv, batch_kv, columns, counts.keys, scale, S, W)


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
    mask = keep_mask.view(torch.uint8) if keep_mask.dtype == torch.bool else keep_mask
    valid = mask if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    bounds = lists if ranges is None else ranges.contiguous()
    config = configs.select("masked_attention_lists", size=num_tokens, dtype=torch.float32, device=lists.device)
    with torch.cuda.device_of(lists):
        masked_attention_lists_kernel[(batch,)](
            mask, valid, bounds, Lists(lists, lists.shape[2]), *mask.stride(), *valid.stride(), num_tokens,
            num_tokens.bit_length(), HAS_PADDING=key_padding_mask is not None, RANGES=ranges is not None,
            BLOCK_T=config.block_n, **_options(config),
        )  # fmt: skip
    return lists


def _options(config: LaunchConfig) -> dict[str, Any]:
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)


def _heads(tensor: Tensor) -> Heads:
    return Heads(tensor, *tensor.stride()[:3])


class _Prepared:
    """What the launches of a call share. The scale is not negative."""

    def __init__(self, x: AttentionCall) -> None:
        self.query, self.key, self.value = dense_rows(x.query), dense_rows(x.key), dense_rows(x.value)
        lists = make_lists(x.keep_mask, x.key_padding_mask, x.ranges) if x.lists is None else x.lists
        self.lists = Lists(lists, lists.shape[2])
        self.bounds = lists if x.ranges is None else x.ranges.contiguous()
        self.batch, num_heads, num_queries, head_dim = x.query.shape
        self.num_kv_heads, num_keys, value_dim = x.value.shape[1:]
        self.counts = Counts(num_heads, num_queries, num_keys)
        self.scale_log2 = max(x.scale * LOG2_E, 1e-30)
        blocks = next_power_of_2(head_dim, 16), next_power_of_2(value_dim, 16)
        self.sizes = Sizes(num_heads // self.num_kv_heads, head_dim, value_dim, *blocks)
        self.modes = Modes(x.is_causal and x.ranges is None, x.ranges is not None, x.keep_mask.dtype != torch.bool)
        self.inputs = _heads(self.query), _heads(self.key), _heads(self.value)

    def select(self, kernel: str) -> LaunchConfig:
        size = max(self.sizes.HEAD_DIM, self.sizes.VALUE_DIM)
        return configs.select(f"masked_attention_{kernel}", size=size, dtype=self.query.dtype, device=self.query.device)

    def loop_operands(self) -> tuple[Heads, Heads, Modes]:
        """Keys and values for the loops: gathered in the order of the list, where that pays or strides forbid wide
        loads, else as they are."""
        size, device = self.counts.queries * self.sizes.GROUPS, self.query.device
        config = configs.select("masked_attention_compact", size=size, dtype=self.key.dtype, device=device)
        if config.block_n == 0 and all(_is_aligned(tensor) for tensor in (self.key, self.value)):
            return *self.inputs[1:], self.modes
        block_n, stride = config.block_n or 32, self.lists.stride
        copies = [self.key.new_empty(self.batch, self.num_kv_heads, stride, width) for width in self.sizes[3:]]
        masked_attention_compact_kernel[(self.batch * self.num_kv_heads * (stride // block_n),)](
            *self.inputs[1:], *copies, self.lists, self.num_kv_heads, self.counts.keys,
            S=self.sizes._replace(GROUPS=1), BLOCK_N=block_n, **_options(config),
        )  # fmt: skip
        # their row strides are constants of the kernels
        keys, values = (_heads(copy)._replace(row=tl.constexpr(copy.stride(2))) for copy in copies)
        return keys, values, self.modes._replace(COMPACT=True)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether rows can be loaded 16 bytes at a time; the compiler asks for strides that are multiples of 16."""
    return tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in tensor.stride()[:3])


def dense_rows(tensor: Tensor) -> Tensor:
    """Any strides but those of the head dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def masked_attention_forward_triton(x: AttentionCall, return_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, Dv] laid out like the query, and the log-sum-exp [B, H, Nq], +inf for padding rows.

    The backward needs the log-sum-exp, whether it was asked for or not.
    """
    if x.scale < 0:
        x = x._replace(query=-x.query, scale=-x.scale)
    call, device = _Prepared(x), x.query.device
    num_heads, num_queries, num_keys = call.counts
    output = empty_output(call.query, call.value)
    lse = torch.empty(x.query.shape[:3], dtype=torch.float32, device=device)
    shared = (call.lists, call.bounds, *call.counts, call.scale_log2)
    with torch.cuda.device_of(x.query):
        if num_queries * call.sizes.GROUPS <= 16:  # decoding
            config, batch_kv = call.select("decode"), call.batch * call.num_kv_heads
            splits = _num_splits(batch_kv, ceil_div(num_keys, 2 * config.block_n), device)
            parts = lse.new_empty(*lse.shape, splits, call.sizes.VALUE_DIM)
            part_lse = lse.new_empty(*lse.shape, 2, splits)
            masked_attention_decode_kernel[(batch_kv * splits,)](
                *call.inputs, parts, part_lse, *shared, S=call.sizes, M=call.modes,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLITS=splits, **_options(config),
            )  # fmt: skip
            masked_attention_merge_kernel[(lse.numel(),)](
                *call.inputs, parts, part_lse, _heads(output), lse, call.lists, *call.counts, call.scale_log2,
                S=call.sizes, SPLITS=splits, **_options(call.select("merge")),
            )  # fmt: skip
            return output, lse
        *loop, modes = call.loop_operands()
        config = call.select("fwd_compact" if modes.COMPACT else "fwd")
        masked_attention_fwd_kernel[(call.batch * num_heads * ceil_div(num_queries, config.block_m),)](
            *call.inputs, *loop, _heads(output), lse, *shared, S=call.sizes, M=modes,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **_options(config),
        )  # fmt: skip
    return output, lse


def _num_splits(programs: int, most: int, device: torch.device) -> int:
    """A power of two: programs per multiprocessor up to two, at most 64 and at most ``most``."""
    wanted = min(2 * configs.multiprocessors(device) // programs, most, 64)
    return 1 << max(wanted.bit_length() - 1, 0)


def masked_attention_backward_triton(
    grad_output: Tensor, output: Tensor, lse: Tensor, x: AttentionCall, bounded_mask_grad: bool, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients with respect to query, key, value and keep_mask; None where ``needs`` says no."""
    if x.scale < 0:
        mirrored = x._replace(query=-x.query, scale=-x.scale)
        first, *others = masked_attention_backward_triton(grad_output, output, lse, mirrored, bounded_mask_grad, needs)
        return [None if first is None else -first, *others]
    call, device = _Prepared(x), x.query.device
    grad_output, output, lse = dense_rows(grad_output), dense_rows(output), lse.contiguous()
    needs_query, needs_key, needs_value, needs_mask = needs
    needs_keys = needs_key or needs_value or needs_mask
    num_heads, num_queries, num_keys = call.counts
    batch_heads, batch_kv = call.batch * num_heads, call.batch * call.num_kv_heads
    widths = call.sizes.BLOCK_D, call.sizes.BLOCK_DV
    row_stride = ceil_div(num_queries, MAX_BLOCK) * MAX_BLOCK
    rows = torch.empty(ROW_PLANES, batch_heads, row_stride, dtype=torch.float32, device=device)
    planes = Planes(rows, row_stride, rows.stride(0))
    clean = [call.query, grad_output]  # not written unless wanted
    if needs_keys:
        clean = [call.query.new_empty(batch_heads, row_stride, width) for width in widths]
    gradients: list[Tensor | None] = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if needed else None
        for tensor, needed in zip((x.query, x.key, x.value), needs[:3], strict=True)
    ]
    grad_mask = None
    with torch.cuda.device_of(x.query):
        config = call.select("bwd_prepare")
        masked_attention_bwd_prepare_kernel[(batch_heads * (row_stride // config.block_m),)](
            *call.inputs, _heads(output), _heads(grad_output), lse, planes, *clean, call.lists, *call.counts,
            call.scale_log2, S=call.sizes, BLOCK_M=config.block_m, COPY=needs_keys, **_options(config),
        )  # fmt: skip
        if needs_keys:
            config = call.select("bwd_dkdv")
            blocks = ceil_div(num_keys, config.block_n)
            places, is_split = _num_places(blocks, batch_kv, needs_mask, device)
            by_head = rows  # not written unless wanted, nor are the others
            if needs_mask:
                by_head = rows.new_empty(call.batch, call.num_kv_heads, places // blocks, num_keys)
            parts = [
                rows.new_empty(batch_kv, places, config.block_n, width) if is_split and needed else rows
                for width, needed in zip(widths, needs[1:3], strict=True)
            ]
            targets = [rows if gradient is None else gradient for gradient in gradients[1:]]
            # two wide accumulators do not fit into the registers: dV first, then dK, with dm where that fits too
            passes = [Wanted(needs_key, needs_value, needs_mask)]
            if max(widths) > 256:
                passes = [Wanted(False, needs_value, False), Wanted(needs_key, False, False)]
                passes.append(Wanted(False, False, needs_mask))
            elif max(widths) > 128:
                passes = [Wanted(False, needs_value, False), Wanted(needs_key, False, needs_mask)]
            for wanted in filter(any, passes):
                masked_attention_bwd_dkdv_kernel[(batch_kv * places,)](
                    *call.inputs[1:], *clean, *targets, by_head, *parts, planes, call.lists, *call.counts, places,
                    x.scale, call.scale_log2, S=call.sizes, M=call.modes,
                    W=wanted._replace(BOUNDED=bounded_mask_grad and wanted.DM),
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=is_split, **_options(config),
                )  # fmt: skip
                if is_split and (wanted.DK or wanted.DV):
                    finish = call.select("bwd_finish")
                    pieces = blocks * (config.block_n // finish.block_n)
                    masked_attention_bwd_finish_kernel[(batch_kv * pieces,)](
                        *clean, *targets, *parts, planes, call.lists, *call.counts, places, x.scale,
                        S=call.sizes, W=wanted, BLOCK_N=config.block_n, ROWS=finish.block_n, **_options(finish),
                    )  # fmt: skip
            if needs_mask:
                grad_mask = by_head.sum(dim=(1, 2)).to(x.keep_mask.dtype)
        if needs_query:
            *loop, modes = call.loop_operands()
            config = call.select("bwd_dq_compact" if modes.COMPACT else "bwd_dq")
            masked_attention_bwd_dq_kernel[(batch_heads * ceil_div(num_queries, config.block_m),)](
                *call.inputs[:2], *loop, _heads(grad_output), gradients[0], planes, call.lists, call.bounds,
                *call.counts, x.scale, call.scale_log2, S=call.sizes, M=modes,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, **_options(config),
            )  # fmt: skip
    return [*gradients, grad_mask]


def _num_places(blocks: int, batch_kv: int, needs_mask: bool, device: torch.device) -> tuple[int, bool]:
    """Programs of dK/dV per key/value head, and whether several may share a key block.

    How many key blocks have work is known on the device only. Where the kept ones may be too few for the chip, the
    programs of the others help them; where all together are too few, there are more.
    """
    wanted = configs.multiprocessors(device)
    extra = min(ceil_div(wanted, blocks * batch_kv), MAX_SPLITS.value)
    return blocks * extra, extra > 1 or (not needs_mask and blocks * batch_kv < 4 * wanted)
