"""The kernel of dK, dV and dm, and its inner step."""

from __future__ import annotations

import triton
import triton.language as tl

from toprl_kernels.attention.triton_kernels import (
    BIAS,
    DELTA,
    KEPT,
    LSE,
    MASK,
    MAX_EXPONENT,
    ORDER,
    SELF_GRAD,
    SELF_PROB,
    TOKEN_ROWS,
    VALID,
    load_float,
    load_rows,
)
from toprl_kernels.triton_common import dot, host_int


@triton.jit
def key_block_step(
    q_base, do_base, vector, k, v, m, bias, columns, start_m, num_queries, offset, stride_qn, stride_gn, plane_stride,
    scale_log2, dims, dk, dv, dm,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DM: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """One block of queries for one block of keys.

    Tiles are [keys, queries]: the larger side first is what the matrix instructions want, and p and x then enter the
    second products from registers. One exponential serves everything: with NEED_DM it is R = exp2(s - lse), which the
    gradient by a mask value of 0 needs, otherwise R m_j.
    """
    rows = start_m + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_queries - 1)
    q = load_rows(q_base, safe_rows, stride_qn, dims, HEAD_DIM)  # [M, D]
    do = load_rows(do_base, safe_rows, stride_gn, dims, HEAD_DIM)  # [M, D]
    lse = tl.load(vector + LSE * plane_stride + rows)  # +inf past the last query: everything below is 0 there
    s = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) * scale_log2  # [N, M]
    if NEED_DM:
        p = tl.exp2(tl.minimum(s - lse[None, :], MAX_EXPONENT))  # R
    else:  # hard masks have the bias too: -inf behind the last kept key, and free in a fused multiply-add
        p = tl.exp2(s + bias[:, None] - lse[None, :])
    if CAUSAL:
        p = tl.where(columns[:, None] <= (rows + offset)[None, :], p, 0.0)
    if NEED_DV:
        if NEED_DM:
            dv = dot((p * m[:, None]).to(do.dtype), do, dv)
        else:
            dv = dot(p.to(do.dtype), do, dv)
    if NEED_DK or NEED_DM:
        delta = tl.load(vector + DELTA * plane_stride + rows)
        slope = dot(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) - delta[None, :]
        x = p * slope  # X [N, M], or m X without NEED_DM
        if NEED_DM:
            by_mask = x
            if BOUNDED:
                by_mask = tl.where((m == 0.0)[:, None], p / (1.0 + p) * slope, x)
            # by comparison: subtracting the self term afterwards leaves rounding where the truth is 0
            by_mask = tl.where(columns[:, None] == (rows + offset)[None, :], 0.0, by_mask)
            dm += tl.sum(by_mask, 1)
            x = x * m[:, None]
        if NEED_DK:
            dk = dot(x.to(q.dtype), q, dk)
    return dk, dv, dm


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, dm_ptr, row_ptr, token_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    num_heads, num_queries, num_keys, token_stride, row_stride, plane_stride, scale, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DM: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """dK, dV (contiguous [B, Hkv, N, D]) and one dm per key/value head ([B, Hkv, N]). Grid (key blocks, B * Hkv).

    One program owns its keys and loops over the queries of all heads of the group: no atomics, fixed order. The keys
    are a block of the list (kept ones first; a block of dropped ones has self terms only), or, for dm, of the sequence.
    """
    start_n = tl.program_id(0) * BLOCK_N
    batch_kv = tl.program_id(1).to(tl.int64)
    num_kv_heads = num_heads // GROUPS
    batch = batch_kv // num_kv_heads
    kv_head = batch_kv % num_kv_heads
    offset = num_keys - num_queries
    dims = tl.arange(0, BLOCK_D)
    slots = start_n + tl.arange(0, BLOCK_N)
    token_base = token_ptr + batch * TOKEN_ROWS * token_stride
    if NEED_DM:
        columns = slots
        end_slot = num_keys
    else:
        columns = tl.load(token_base + ORDER * token_stride + slots)
        end_slot = tl.load(token_base + KEPT * token_stride + num_keys - 1)
    safe_columns = tl.minimum(columns, num_keys - 1)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # self terms first, while nothing else is in registers
    self_rows = columns - offset
    has_row = (self_rows >= 0) & (self_rows < num_queries)
    safe_self = tl.minimum(tl.maximum(self_rows, 0), num_queries - 1)
    for group in range(GROUPS):
        head = kv_head * GROUPS + group
        vector = row_ptr + (batch * num_heads + head) * row_stride + safe_self
        if NEED_DV:
            do = load_rows(do_ptr + batch * stride_gb + head * stride_gh, safe_self, stride_gn, dims, HEAD_DIM)
            dv += tl.where(has_row, tl.load(vector + SELF_PROB * plane_stride), 0.0)[:, None] * do.to(tl.float32)
        if NEED_DK:
            q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_self, stride_qn, dims, HEAD_DIM)
            dk += tl.where(has_row, tl.load(vector + SELF_GRAD * plane_stride), 0.0)[:, None] * q.to(tl.float32)

    k = load_rows(k_ptr + batch * stride_kb + kv_head * stride_kh, safe_columns, stride_kn, dims, HEAD_DIM)  # [N, D]
    v = load_rows(v_ptr + batch * stride_vb + kv_head * stride_vh, safe_columns, stride_vn, dims, HEAD_DIM)  # [N, D]
    m = load_float(token_base + MASK * token_stride + columns)  # [N]
    bias = load_float(token_base + BIAS * token_stride + slots)  # [N]
    dm = tl.zeros([BLOCK_N], tl.float32)

    first_row = num_queries * 0
    if CAUSAL:  # rows before the first key see none of the block
        first_column = start_n
        if not NEED_DM:
            first_column = tl.load(token_base + ORDER * token_stride + start_n)
        first_row = tl.maximum(first_column - offset, 0) // BLOCK_M * BLOCK_M
    end_row = tl.where(start_n < end_slot, num_queries, 0)

    for group in range(GROUPS):
        head = kv_head * GROUPS + group
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        do_base = do_ptr + batch * stride_gb + head * stride_gh
        vector = row_ptr + (batch * num_heads + head) * row_stride
        for start_m in range(host_int(first_row), host_int(end_row), BLOCK_M):
            dk, dv, dm = key_block_step(
                q_base, do_base, vector, k, v, m, bias, columns, start_m, num_queries, offset, stride_qn, stride_gn,
                plane_stride, scale_log2, dims, dk, dv, dm, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL,
                NEED_DK, NEED_DV, NEED_DM, BOUNDED,
            )  # fmt: skip

    in_range = columns < num_keys
    out_rows = (batch_kv * num_keys + columns.to(tl.int64))[:, None] * HEAD_DIM + dims[None, :]
    out_mask = in_range[:, None] & (dims[None, :] < HEAD_DIM)
    if NEED_DK:
        tl.store(dk_ptr + out_rows, (dk * scale).to(dk_ptr.dtype.element_ty), mask=out_mask)
    if NEED_DV:
        tl.store(dv_ptr + out_rows, dv.to(dv_ptr.dtype.element_ty), mask=out_mask)
    if NEED_DM:
        if HAS_PADDING:
            dm = tl.where(tl.load(token_base + VALID * token_stride + columns) != 0, dm, 0.0)
        tl.store(dm_ptr + batch_kv * num_keys + columns, dm, mask=in_range)
