"""Masked attention kernels, forward and backward (Eqs. 6-7).

G = 1 m^T + diag(1 - m): attention with a factor m_j per key plus one self term of weight 1 - m_i per row. The main
loops therefore never test i == j and may leave out dropped keys altogether. Each row starts from its self term,

    M = s_ii,  l = 1 - m_i,  acc = (1 - m_i) V_i      (s in base 2: scale * log2(e) * q.k)

so M is finite from the beginning and nothing can become 0/0. With HARD the loops walk ``order``, the tokens with the
kept ones first in ascending order; ``kept`` is the inclusive count of kept tokens, which bounds the loop. Without it
they walk all keys and add ``bias`` = log2 m (-inf for 0, padding and the tail).

Vectors over tokens (mask, bias, order, kept, valid: [B, token_stride]; lse, delta, self_prob, self_grad:
[B * H, row_stride]) are padded past the last block and read unmasked. Matrix rows are read at clamped indices.
Rows that do not exist and padding rows carry lse = +inf, which makes every exp2(s - lse) zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from toprl_kernels._triton_common import dot, host_int

# exp2(s - lse) is cut at 2^96; mask values under 2^-96 were flushed to 0 by the caller (see eager.py)
MAX_EXPONENT = tl.constexpr(96.0)


@triton.jit
def load_rows(base, rows, stride, dims, HEAD_DIM: tl.constexpr):
    """[len(rows), len(dims)] tile; columns from HEAD_DIM on are 0."""
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def masked_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    mask_ptr, bias_ptr, order_ptr, kept_ptr, valid_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    num_heads, num_queries, num_keys, token_stride, row_stride, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HARD: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """O and the base-2 log-sum-exp of one query block of one head. Grid (query blocks, B * H)."""
    start_m = tl.program_id(0) * BLOCK_M
    batch_head = tl.program_id(1).to(tl.int64)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    offset = num_keys - num_queries
    rows = start_m + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_queries - 1)
    tokens = rows + offset
    dims = tl.arange(0, BLOCK_D)
    k_base = k_ptr + batch * stride_kb + (head // GROUPS) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // GROUPS) * stride_vh
    mask_base = mask_ptr + batch * token_stride
    bias_base = bias_ptr + batch * token_stride
    order_base = order_ptr + batch * token_stride
    kept_base = kept_ptr + batch * token_stride

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_rows, stride_qn, dims, HEAD_DIM)  # [M, D]
    k_self = load_rows(k_base, safe_rows + offset, stride_kn, dims, HEAD_DIM)  # [M, D]
    v_self = load_rows(v_base, safe_rows + offset, stride_vn, dims, HEAD_DIM)  # [M, D]
    row_max = tl.sum(q.to(tl.float32) * k_self.to(tl.float32), 1) * scale_log2  # s_ii [M]
    row_sum = 1.0 - tl.load(mask_base + tokens)  # [M]
    acc = v_self.to(tl.float32) * row_sum[:, None]  # [M, D]

    last_token = tl.minimum(start_m + BLOCK_M, num_queries) - 1 + offset
    end = num_keys
    if CAUSAL:
        end = last_token + 1
    if HARD:
        end = tl.load(kept_base + end - 1)
    for start_n in range(0, host_int(end), BLOCK_N):
        slots = start_n + tl.arange(0, BLOCK_N)
        if HARD:
            columns = tl.load(order_base + slots)
        else:
            columns = slots
        safe_columns = tl.minimum(columns, num_keys - 1)
        k = load_rows(k_base, safe_columns, stride_kn, dims, HEAD_DIM)  # [N, D]
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2  # [M, N]
        if HARD:
            s = tl.where((slots < end)[None, :], s, float("-inf"))
        else:
            s += tl.load(bias_base + slots)[None, :]
        if CAUSAL:
            s = tl.where(columns[None, :] <= tokens[:, None], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])  # [M, N]
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v = load_rows(v_base, safe_columns, stride_vn, dims, HEAD_DIM)  # [N, D]
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        row_max = new_max

    out = acc / row_sum[:, None]
    lse = row_max + tl.log2(row_sum)
    if HAS_PADDING:
        is_valid = tl.load(valid_ptr + batch * token_stride + tokens) != 0
        out = tl.where(is_valid[:, None], out, 0.0)
        lse = tl.where(is_valid, lse, float("inf"))
    in_range = rows < num_queries
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + rows.to(tl.int64)[:, None] * stride_on
    tl.store(
        out_rows + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=in_range[:, None] & (dims[None, :] < HEAD_DIM)
    )
    tl.store(lse_ptr + batch_head * row_stride + rows, lse, mask=in_range)


@triton.jit
def masked_attention_bwd_prepare_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, self_prob_ptr, self_grad_ptr, mask_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    num_heads, num_queries, num_keys, token_stride, row_stride, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Per row: D_i = dO.O, and the self term's (1 - m_i) r_i and (1 - m_i) r_i (dO.V_i - D_i).

    Grid (row_stride / BLOCK_M, B * H): also fills the rows past the last query, lse with +inf and the others with 0.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch_head = tl.program_id(1).to(tl.int64)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    in_range = rows < num_queries
    safe_rows = tl.minimum(rows, num_queries - 1)
    safe_tokens = safe_rows + (num_keys - num_queries)
    dims = tl.arange(0, BLOCK_D)
    kv_head = head // GROUPS

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_rows, stride_qn, dims, HEAD_DIM).to(tl.float32)
    k = load_rows(k_ptr + batch * stride_kb + kv_head * stride_kh, safe_tokens, stride_kn, dims, HEAD_DIM)
    v = load_rows(v_ptr + batch * stride_vb + kv_head * stride_vh, safe_tokens, stride_vn, dims, HEAD_DIM)
    out = load_rows(out_ptr + batch * stride_ob + head * stride_oh, safe_rows, stride_on, dims, HEAD_DIM)
    do = load_rows(do_ptr + batch * stride_gb + head * stride_gh, safe_rows, stride_gn, dims, HEAD_DIM).to(tl.float32)

    vector = batch_head * row_stride + rows
    lse = tl.load(lse_ptr + vector, mask=in_range, other=float("inf"))
    delta = tl.sum(do * out.to(tl.float32), 1)  # D_i [M]
    s_self = tl.sum(q * k.to(tl.float32), 1) * scale_log2
    weight = (1.0 - tl.load(mask_ptr + batch * token_stride + safe_tokens)) * tl.exp2(s_self - lse)
    dp_self = tl.sum(do * v.to(tl.float32), 1)
    tl.store(lse_ptr + vector, float("inf"), mask=rows >= num_queries)
    tl.store(delta_ptr + vector, tl.where(in_range, delta, 0.0))
    tl.store(self_prob_ptr + vector, weight)
    tl.store(self_grad_ptr + vector, weight * (dp_self - delta))


@triton.jit
def masked_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, dm_ptr, lse_ptr, delta_ptr, self_prob_ptr, self_grad_ptr,
    mask_ptr, order_ptr, kept_ptr, valid_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    num_heads, num_queries, num_keys, token_stride, row_stride, scale, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HARD: tl.constexpr, HAS_PADDING: tl.constexpr, NEED_DM: tl.constexpr,
):  # fmt: skip
    """dK, dV (contiguous [B, Hkv, N, D]) and one dm per key/value head ([B, Hkv, N]). Grid (key blocks, B * Hkv).

    One program owns its keys and loops over the queries of all heads of the group: no atomics, fixed order.
    """
    start_n = tl.program_id(0) * BLOCK_N
    batch_kv = tl.program_id(1).to(tl.int64)
    num_kv_heads = num_heads // GROUPS
    batch = batch_kv // num_kv_heads
    kv_head = batch_kv % num_kv_heads
    offset = num_keys - num_queries
    dims = tl.arange(0, BLOCK_D)
    slots = start_n + tl.arange(0, BLOCK_N)
    if HARD:
        columns = tl.load(order_ptr + batch * token_stride + slots)
    else:
        columns = slots
    safe_columns = tl.minimum(columns, num_keys - 1)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # self terms first, while nothing else is in registers
    self_rows = columns - offset
    has_row = (self_rows >= 0) & (self_rows < num_queries)
    safe_self = tl.minimum(tl.maximum(self_rows, 0), num_queries - 1)
    for group in range(GROUPS):
        head = kv_head * GROUPS + group
        vector = (batch * num_heads + head) * row_stride
        q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_self, stride_qn, dims, HEAD_DIM)
        do = load_rows(do_ptr + batch * stride_gb + head * stride_gh, safe_self, stride_gn, dims, HEAD_DIM)
        self_prob = tl.where(has_row, tl.load(self_prob_ptr + vector + safe_self), 0.0)
        self_grad = tl.where(has_row, tl.load(self_grad_ptr + vector + safe_self), 0.0)
        dv += self_prob[:, None] * do.to(tl.float32)
        dk += self_grad[:, None] * q.to(tl.float32)

    k = load_rows(k_ptr + batch * stride_kb + kv_head * stride_kh, safe_columns, stride_kn, dims, HEAD_DIM)  # [N, D]
    v = load_rows(v_ptr + batch * stride_vb + kv_head * stride_vh, safe_columns, stride_vn, dims, HEAD_DIM)  # [N, D]
    m = tl.load(mask_ptr + batch * token_stride + columns)  # [N]
    dm = tl.zeros([BLOCK_N], tl.float32)

    first_row = num_queries * 0
    if CAUSAL:  # queries before the block's first key see none of it; kept keys ascend, so the first is the smallest
        first_column = start_n
        if HARD:
            first_column = tl.load(order_ptr + batch * token_stride + start_n)
        first_row = tl.maximum(first_column - offset, 0) // BLOCK_M * BLOCK_M
    end_row = num_queries
    if HARD:  # a block of dropped keys has self terms only
        num_kept = tl.load(kept_ptr + batch * token_stride + num_keys - 1)
        end_row = tl.where(start_n < num_kept, num_queries, 0)

    for group in range(GROUPS):
        head = kv_head * GROUPS + group
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        do_base = do_ptr + batch * stride_gb + head * stride_gh
        vector = (batch * num_heads + head) * row_stride
        for start_m in range(host_int(first_row), host_int(end_row), BLOCK_M):
            rows = start_m + tl.arange(0, BLOCK_M)
            safe_rows = tl.minimum(rows, num_queries - 1)
            q = load_rows(q_base, safe_rows, stride_qn, dims, HEAD_DIM)  # [M, D]
            do = load_rows(do_base, safe_rows, stride_gn, dims, HEAD_DIM)  # [M, D]
            lse = tl.load(lse_ptr + vector + rows)
            delta = tl.load(delta_ptr + vector + rows)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2  # [M, N]
            ratio = tl.exp2(tl.minimum(s - lse[:, None], MAX_EXPONENT))  # R [M, N]
            if CAUSAL:
                ratio = tl.where(columns[None, :] <= (rows + offset)[:, None], ratio, 0.0)
            p = ratio * m[None, :]
            dv = dot(tl.trans(p.to(do.dtype)), do, dv)
            dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            x = ratio * (dp - delta[:, None])  # X [M, N]
            dk = dot(tl.trans((x * m[None, :]).to(q.dtype)), q, dk)
            if NEED_DM:  # by comparison: subtracting the self term afterwards leaves rounding where the truth is 0
                dm += tl.sum(tl.where(columns[None, :] == (rows + offset)[:, None], 0.0, x), 0)

    in_range = columns < num_keys
    out_rows = (batch_kv * num_keys + columns.to(tl.int64))[:, None] * HEAD_DIM + dims[None, :]
    out_mask = in_range[:, None] & (dims[None, :] < HEAD_DIM)
    tl.store(dk_ptr + out_rows, (dk * scale).to(dk_ptr.dtype.element_ty), mask=out_mask)
    tl.store(dv_ptr + out_rows, dv.to(dv_ptr.dtype.element_ty), mask=out_mask)
    if NEED_DM:
        if HAS_PADDING:
            dm = tl.where(tl.load(valid_ptr + batch * token_stride + columns) != 0, dm, 0.0)
        tl.store(dm_ptr + batch_kv * num_keys + columns, dm, mask=in_range)


@triton.jit
def masked_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, self_grad_ptr, mask_ptr, order_ptr, kept_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    num_heads, num_queries, num_keys, token_stride, row_stride, scale, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """dQ (contiguous [B, H, Nq, D]) of one query block of one head. Grid (query blocks, B * H)."""
    start_m = tl.program_id(0) * BLOCK_M
    batch_head = tl.program_id(1).to(tl.int64)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    offset = num_keys - num_queries
    rows = start_m + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_queries - 1)
    tokens = rows + offset
    dims = tl.arange(0, BLOCK_D)
    k_base = k_ptr + batch * stride_kb + (head // GROUPS) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // GROUPS) * stride_vh

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_rows, stride_qn, dims, HEAD_DIM)  # [M, D]
    do = load_rows(do_ptr + batch * stride_gb + head * stride_gh, safe_rows, stride_gn, dims, HEAD_DIM)  # [M, D]
    vector = batch_head * row_stride + rows
    lse = tl.load(lse_ptr + vector)
    delta = tl.load(delta_ptr + vector)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    end = num_keys
    if CAUSAL:
        end = tl.minimum(start_m + BLOCK_M, num_queries) + offset
    if HARD:
        end = tl.load(kept_ptr + batch * token_stride + end - 1)
    for start_n in range(0, host_int(end), BLOCK_N):
        slots = start_n + tl.arange(0, BLOCK_N)
        if HARD:
            columns = tl.load(order_ptr + batch * token_stride + slots)
            m = tl.where(slots < end, 1.0, 0.0)
        else:
            columns = slots
            m = tl.load(mask_ptr + batch * token_stride + slots)
        safe_columns = tl.minimum(columns, num_keys - 1)
        k = load_rows(k_base, safe_columns, stride_kn, dims, HEAD_DIM)  # [N, D]
        v = load_rows(v_base, safe_columns, stride_vn, dims, HEAD_DIM)  # [N, D]
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2  # [M, N]
        ratio = tl.exp2(tl.minimum(s - lse[:, None], MAX_EXPONENT)) * m[None, :]
        if CAUSAL:
            ratio = tl.where(columns[None, :] <= tokens[:, None], ratio, 0.0)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        x = ratio * (dp - delta[:, None])
        dq = dot(x.to(k.dtype), k, dq)

    k_self = load_rows(k_base, safe_rows + offset, stride_kn, dims, HEAD_DIM)  # [M, D]
    dq += tl.load(self_grad_ptr + vector)[:, None] * k_self.to(tl.float32)
    out_rows = dq_ptr + (batch_head * num_queries + rows.to(tl.int64))[:, None] * HEAD_DIM
    tl.store(
        out_rows + dims[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=(rows < num_queries)[:, None] & (dims[None, :] < HEAD_DIM),
    )
