"""The kernels of masked attention. Base 2 throughout: s = scale * log2(e) * q.k, so that exp2 and log2 apply.

Since G = 1 m^T + diag(1 - m), every kernel is attention with a bias log2 m_j per key plus one self term per row; no
inner loop tests i == j for it. A row starts with its self term: maximum s_ii, weight 1 - m_i. That start is finite,
hence no 0/0, and a row that sees nobody else returns its own value exactly.

The inner loops walk the ascending list of keys with m_j > 0 (indirect row loads), so a dropped key costs nothing
whatever the pattern, and the visible part of the list is a prefix of it for every causal row. The only loop over all
keys is that of the gradient by the mask, which is not 0 at m_j = 0. Padding keys have m = 0; rows past the last query
read as 0.

Lengths and the number of heads are not specialised: no code depends on their being 1 or a multiple of 16, and every
new length would compile again.

Per-token vectors come from ``masked_attention_tokens_kernel`` as one int32 buffer [B, 5, token_stride] (floats by their
bits), per-row vectors from the prepare kernel as one float32 buffer [4, B * H, row_stride]; both are padded so that
whole blocks can be loaded unmasked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from toprl_kernels.triton_common import dot, host_int

# exp2(s - lse) is cut at 2^96; mask values under 2^-96 were flushed to 0 (see eager.py)
MAX_EXPONENT = tl.constexpr(96.0)
SMALLEST_MASK = tl.constexpr(2.0**-96)

# rows of the token buffer
MASK = tl.constexpr(0)  # float32 m, by token
BIAS = tl.constexpr(1)  # float32 log2 m, by place in the list; -inf from the number of kept tokens on
ORDER = tl.constexpr(2)  # int32 the list: kept tokens ascending, then the others ascending, then N
KEPT = tl.constexpr(3)  # int32 number of kept tokens up to and including a token
VALID = tl.constexpr(4)  # int32 1 = a real token; written only where there is padding
TOKEN_ROWS = tl.constexpr(5)

# planes of the row buffer
LSE = tl.constexpr(0)  # +inf past the last query
DELTA = tl.constexpr(1)  # D_i = dO_i . O_i
SELF_PROB = tl.constexpr(2)  # (1 - m_i) exp2(s_ii - lse_i)
SELF_GRAD = tl.constexpr(3)  # that times (dO_i . V_i - D_i)


@triton.jit
def load_rows(base, rows, stride, dims, HEAD_DIM: tl.constexpr):
    """[len(rows), len(dims)] tile; columns from HEAD_DIM on are 0."""
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def load_float(ptr):
    """A float32 vector stored by its bits in the int32 token buffer."""
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_tokens"])
def masked_attention_tokens_kernel(
    mask_ptr, valid_ptr, token_ptr, stride_mb, stride_mn, stride_vb, stride_vn, num_tokens, token_stride,
    HAS_PADDING: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The per-token vectors of one sample. Grid (B,). Two passes: the list's second half needs the number kept."""
    batch = tl.program_id(0).to(tl.int64)
    out = token_ptr + batch * TOKEN_ROWS * token_stride
    lanes = tl.arange(0, BLOCK_T)
    num_kept = tl.sum(tl.zeros([BLOCK_T], tl.int32), 0)
    for start in range(0, host_int(num_tokens), BLOCK_T):
        tokens = start + lanes
        m, _ = load_mask(
            mask_ptr + batch * stride_mb, valid_ptr + batch * stride_vb, tokens, stride_mn, stride_vn, num_tokens,
            HAS_PADDING,
        )  # fmt: skip
        num_kept += tl.sum((m > 0).to(tl.int32), 0)
    before = tl.sum(tl.zeros([BLOCK_T], tl.int32), 0)
    for start in range(0, host_int(token_stride), BLOCK_T):
        tokens = start + lanes
        in_buffer = tokens < token_stride
        m, valid = load_mask(
            mask_ptr + batch * stride_mb, valid_ptr + batch * stride_vb, tokens, stride_mn, stride_vn, num_tokens,
            HAS_PADDING,
        )  # fmt: skip
        is_kept = m > 0
        count = before + tl.cumsum(is_kept.to(tl.int32), 0)
        before += tl.sum(is_kept.to(tl.int32), 0)
        place = tl.where(is_kept, count - 1, num_kept + tokens - count)  # a permutation; the identity from N on
        bias = tl.where(is_kept, tl.log2(tl.where(is_kept, m, 1.0)), float("-inf"))
        tl.store(out + MASK * token_stride + tokens, m.to(tl.int32, bitcast=True), mask=in_buffer)
        tl.store(out + KEPT * token_stride + tokens, count, mask=in_buffer)
        tl.store(out + BIAS * token_stride + place, bias.to(tl.int32, bitcast=True), mask=in_buffer)
        tl.store(out + ORDER * token_stride + place, tl.minimum(tokens, num_tokens), mask=in_buffer)
        if HAS_PADDING:
            tl.store(out + VALID * token_stride + tokens, valid.to(tl.int32), mask=in_buffer)


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
def scores_of(
    q, k_base, order_ptr, bias_ptr, start_n, end, tokens, num_keys, stride_kn, scale_log2, dims,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SOFT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """s_ij + log2 m_j [M, N] for one block of the list, -inf where not visible; and the keys' rows and tile."""
    slots = start_n + tl.arange(0, BLOCK_N)
    columns = tl.load(order_ptr + slots)
    if MASKED:
        rows = tl.minimum(columns, num_keys - 1)
    else:
        rows = columns
    k = load_rows(k_base, rows, stride_kn, dims, HEAD_DIM)  # [N, D]
    s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2
    if SOFT:
        s += load_float(bias_ptr + slots)[None, :]
    if MASKED:
        visible = (slots < end)[None, :]
        if CAUSAL:
            visible = visible & (columns[None, :] <= tokens[:, None])
        s = tl.where(visible, s, float("-inf"))
    return s, k, rows


@triton.jit
def visible_range(kept_ptr, first_token, last_token, num_keys, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Of the list: up to where whole blocks are visible to every row, and up to where anything is to some row."""
    if CAUSAL:
        full = tl.load(kept_ptr + first_token)
        end = tl.load(kept_ptr + last_token)
    else:
        end = tl.load(kept_ptr + num_keys - 1)
        full = end
    return full // BLOCK_N * BLOCK_N, end


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, token_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    num_heads, num_queries, num_keys, token_stride, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SOFT: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """O and the base-2 log-sum-exp [B, H, Nq] of one query block of one head. Grid (query blocks, B * H)."""
    # the last rows of a causal sequence have the most work: they start first
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
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
    token_base = token_ptr + batch * TOKEN_ROWS * token_stride
    order = token_base + ORDER * token_stride
    bias = token_base + BIAS * token_stride

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_rows, stride_qn, dims, HEAD_DIM)  # [M, D]
    k_self = load_rows(k_base, safe_rows + offset, stride_kn, dims, HEAD_DIM)  # [M, D]
    v_self = load_rows(v_base, safe_rows + offset, stride_vn, dims, HEAD_DIM)  # [M, D]
    row_max = tl.sum(q.to(tl.float32) * k_self.to(tl.float32), 1) * scale_log2  # s_ii [M]
    row_sum = 1.0 - load_float(token_base + MASK * token_stride + tokens)  # [M]
    acc = v_self.to(tl.float32) * row_sum[:, None]  # [M, D]

    last_token = tl.minimum(start_m + BLOCK_M, num_queries) - 1 + offset
    full, end = visible_range(token_base + KEPT * token_stride, start_m + offset, last_token, num_keys, BLOCK_N, CAUSAL)
    for start_n in range(0, host_int(full), BLOCK_N):
        s, _, columns = scores_of(
            q, k_base, order, bias, start_n, end, tokens, num_keys, stride_kn, scale_log2, dims,
            HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, SOFT, False,
        )  # fmt: skip
        v = load_rows(v_base, columns, stride_vn, dims, HEAD_DIM)  # [N, D]
        acc, row_max, row_sum = online_softmax(s, v, acc, row_max, row_sum)
    for start_n in range(host_int(full), host_int(end), BLOCK_N):
        s, _, columns = scores_of(
            q, k_base, order, bias, start_n, end, tokens, num_keys, stride_kn, scale_log2, dims,
            HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, SOFT, True,
        )  # fmt: skip
        v = load_rows(v_base, columns, stride_vn, dims, HEAD_DIM)  # [N, D]
        acc, row_max, row_sum = online_softmax(s, v, acc, row_max, row_sum)

    out = acc / row_sum[:, None]
    lse = row_max + tl.log2(row_sum)
    if HAS_PADDING:
        is_valid = tl.load(token_base + VALID * token_stride + tokens) != 0
        out = tl.where(is_valid[:, None], out, 0.0)
        lse = tl.where(is_valid, lse, float("inf"))
    in_range = rows < num_queries
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + rows.to(tl.int64)[:, None] * stride_on
    tl.store(
        out_rows + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=in_range[:, None] & (dims[None, :] < HEAD_DIM)
    )
    tl.store(lse_ptr + batch_head * num_queries + rows, lse, mask=in_range)


@triton.jit
def online_softmax(s, v, acc, row_max, row_sum):
    """Take the block s [M, N], v [N, D] into the running sums."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    p = tl.exp2(s - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_bwd_prepare_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, row_ptr, token_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    num_heads, num_queries, num_keys, token_stride, row_stride, plane_stride, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The row buffer, its padding included. Grid (row_stride / BLOCK_M, B * H)."""
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

    lse = tl.load(lse_ptr + batch_head * num_queries + rows, mask=in_range, other=float("inf"))
    delta = tl.sum(do * out.to(tl.float32), 1)  # D_i [M]
    s_self = tl.sum(q * k.to(tl.float32), 1) * scale_log2
    rest = 1.0 - load_float(token_ptr + (batch * TOKEN_ROWS + MASK) * token_stride + safe_tokens)
    weight = rest * tl.exp2(s_self - lse)
    dp_self = tl.sum(do * v.to(tl.float32), 1)
    vector = row_ptr + batch_head * row_stride + rows
    tl.store(vector + LSE * plane_stride, lse)
    tl.store(vector + DELTA * plane_stride, tl.where(in_range, delta, 0.0))
    tl.store(vector + SELF_PROB * plane_stride, weight)
    tl.store(vector + SELF_GRAD * plane_stride, weight * (dp_self - delta))


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def masked_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, row_ptr, token_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    num_heads, num_queries, num_keys, token_stride, row_stride, plane_stride, scale, scale_log2,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """dQ (contiguous [B, H, Nq, D]) of one query block of one head. Grid (query blocks, B * H)."""
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
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
    token_base = token_ptr + batch * TOKEN_ROWS * token_stride
    order = token_base + ORDER * token_stride
    bias = token_base + BIAS * token_stride

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, safe_rows, stride_qn, dims, HEAD_DIM)  # [M, D]
    do = load_rows(do_ptr + batch * stride_gb + head * stride_gh, safe_rows, stride_gn, dims, HEAD_DIM)  # [M, D]
    vector = row_ptr + batch_head * row_stride + rows
    lse = tl.load(vector + LSE * plane_stride)
    delta = tl.load(vector + DELTA * plane_stride)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    last_token = tl.minimum(start_m + BLOCK_M, num_queries) - 1 + offset
    full, end = visible_range(token_base + KEPT * token_stride, start_m + offset, last_token, num_keys, BLOCK_N, CAUSAL)
    for start_n in range(0, host_int(full), BLOCK_N):
        s, k, columns = scores_of(
            q, k_base, order, bias, start_n, end, tokens, num_keys, stride_kn, scale_log2, dims,
            HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, SOFT, False,
        )  # fmt: skip
        v = load_rows(v_base, columns, stride_vn, dims, HEAD_DIM)  # [N, D]
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        x = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])  # m_j X_ij
        dq = dot(x.to(k.dtype), k, dq)
    for start_n in range(host_int(full), host_int(end), BLOCK_N):
        s, k, columns = scores_of(
            q, k_base, order, bias, start_n, end, tokens, num_keys, stride_kn, scale_log2, dims,
            HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, SOFT, True,
        )  # fmt: skip
        v = load_rows(v_base, columns, stride_vn, dims, HEAD_DIM)  # [N, D]
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        x = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
        dq = dot(x.to(k.dtype), k, dq)

    k_self = load_rows(k_base, safe_rows + offset, stride_kn, dims, HEAD_DIM)  # [M, D]
    dq += tl.load(vector + SELF_GRAD * plane_stride)[:, None] * k_self.to(tl.float32)
    out_rows = dq_ptr + (batch_head * num_queries + rows.to(tl.int64))[:, None] * HEAD_DIM
    tl.store(
        out_rows + dims[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=(rows < num_queries)[:, None] & (dims[None, :] < HEAD_DIM),
    )
