"""Selection of tokens, for topk_compact and prune_stage, and the gather of their rows.

Up to 4,096 tokens a program holds the keys of a sample in registers and finds the k-th largest two bits at a time:
three candidate thresholds per step, their counts packed into an int64 reduction. Above, the k-th largest is found a
byte at a time: each of four launches writes a histogram per chunk of 2,048 tokens, a fifth the selection, with a
program for every chunk. No atomics: sums over chunks are taken in the same order by every program.

A *problem* is what a threshold is found for: a sample, a segment of a sample, or a sequence of a packed row. With
several problems per row the selection writes flags, which a second one (of a single byte) compacts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels.configs import select
from toprl_kernels.topk.reference import Selection, by_bytes
from toprl_kernels.triton_common import ceil_div, host_int, next_power_of_2

MAX_REGISTER_TOKENS = 4096  # above, the keys would spill
CHUNK = 2048
ROUNDS = 4  # bytes of a key


@triton.jit
def load_keys(
    scores_ptr, columns_ptr, valid_ptr, segments_ptr, row, segment, tokens, end, num_tokens, num_scores, threshold,
    HAS_COLUMNS: tl.constexpr, DIFFERENCE: tl.constexpr, HAS_VALID: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Order-preserving unsigned keys: 0 = not eligible, 1 = NaN, then -inf ... +inf; and which tokens always stay."""
    eligible = tokens < end
    if HAS_VALID:
        eligible = eligible & (tl.load(valid_ptr + row * num_tokens + tokens, mask=eligible, other=0) != 0)
    if SEGMENTS == "ids":
        eligible = eligible & (tl.load(segments_ptr + row * num_tokens + tokens, mask=eligible, other=-1) == segment)
    always = tokens < 0
    column = tokens
    if HAS_COLUMNS:
        column = tl.load(columns_ptr + row * num_tokens + tokens, mask=eligible, other=-1).to(tl.int32)
        always = eligible & (column < 0)
        eligible = eligible & (column >= 0)
    if DIFFERENCE:
        source = scores_ptr + row * num_scores * 2 + column * 2
        scores = tl.load(source, mask=eligible, other=0.0).to(tl.float32)
        scores = scores - tl.load(source + 1, mask=eligible, other=0.0).to(tl.float32)
    else:
        scores = tl.load(scores_ptr + row * num_scores + column, mask=eligible, other=0).to(tl.float32)
    if HAS_THRESHOLD:
        eligible = eligible & (scores >= threshold)
    bits = (tl.where(scores == 0.0, 0.0, scores)).to(tl.uint32, bitcast=True)  # -0.0 becomes 0.0
    keys = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000).to(tl.uint32)
    keys = tl.where(scores != scores, 1, keys).to(tl.uint32)
    return tl.where(eligible, keys, 0).to(tl.uint32), always


@triton.jit
def bounds_of(segments_ptr, segment, num_tokens, SEGMENTS: tl.constexpr):
    """First token of a problem and the one after its last."""
    if SEGMENTS == "bounds":
        return tl.load(segments_ptr + segment).to(tl.int32), tl.load(segments_ptr + segment + 1).to(tl.int32)
    return num_tokens * 0, num_tokens + 0


@triton.jit
def wanted(k_ptr, problem, num_eligible, limit, RAGGED: tl.constexpr):
    """Tokens that a problem keeps."""
    count = tl.minimum(num_eligible, limit)
    if RAGGED:
        count = tl.minimum(count, tl.load(k_ptr + problem).to(tl.int32))
    return count


@triton.jit
def pick_digit(histogram, remaining):
    """The largest byte that ``remaining`` keys reach, and how many of those keys have exactly that byte."""
    digits = tl.arange(0, 256)
    below = tl.cumsum(histogram, 0) - histogram
    reached = tl.sum(histogram, 0) - below  # keys with this byte or a larger one
    digit = tl.sum((reached >= remaining).to(tl.int32), 0) - 1
    return digit, remaining - tl.sum(tl.where(digits > digit, histogram, 0), 0)


@triton.jit
def sum_chunks(histogram_ptr, num_chunks, chunk):
    """Histogram of all chunks, and of those before ``chunk``: [256] each."""
    digits = tl.arange(0, 256)
    total = tl.zeros([256], tl.int32)
    before = tl.zeros([256], tl.int32)
    for other in range(0, host_int(num_chunks)):
        part = tl.load(histogram_ptr + other * 256 + digits)
        total += part
        before += tl.where(other < chunk, part, 0)
    return total, before


@triton.jit(do_not_specialize=["limit", "threshold"])
def topk_histogram_kernel(
    scores_ptr, columns_ptr, valid_ptr, segments_ptr, k_ptr, histogram_ptr, above_ptr, always_ptr, state_ptr,
    num_problems, num_segments, num_tokens, num_scores, num_chunks, limit, threshold,
    ROUND: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    DIFFERENCE: tl.constexpr, HAS_VALID: tl.constexpr, SEGMENTS: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Histogram [rounds, problems, chunks, 256] of byte ROUND of the keys whose earlier bytes are the k-th key's.

    Grid (problems, chunks). ``state`` [rounds + 1, problems, 2] holds those bytes and the keys still to be taken;
    ``above`` [problems, chunks] counts the keys that are larger in an earlier byte.
    """
    problem, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    segment = tl.program_id(0) % num_segments
    start, end = bounds_of(segments_ptr, segment, num_tokens, SEGMENTS)
    digits = tl.arange(0, 256)
    slot = problem * num_chunks + chunk
    prefix = tl.zeros([], tl.int64)
    if ROUND > 0:
        last = ((ROUND - 1) * num_problems + problem) * num_chunks
        total, _ = sum_chunks(histogram_ptr + last * 256, num_chunks, chunk)
        state = state_ptr + ((ROUND - 1) * num_problems + problem) * 2
        seen = tl.zeros([], tl.int32)
        if ROUND == 1:
            count = wanted(k_ptr, problem, tl.sum(total, 0), limit, RAGGED)
            remaining = count
            if chunk == 0:
                tl.store(state + 1, count.to(tl.int64))
        else:
            prefix = tl.load(state)
            remaining = tl.load(state + 1).to(tl.int32)
            seen = tl.load(above_ptr + slot)
        digit, remaining = pick_digit(total, remaining)
        prefix = prefix * 256 + digit
        mine = tl.load(histogram_ptr + (last + chunk) * 256 + digits)
        tl.store(above_ptr + slot, seen + tl.sum(tl.where(digits > digit, mine, 0), 0))
        if chunk == 0:
            state = state_ptr + (ROUND * num_problems + problem) * 2
            tl.store(state, prefix)
            tl.store(state + 1, remaining.to(tl.int64))

    tokens = start + chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, always = load_keys(
        scores_ptr, columns_ptr, valid_ptr, segments_ptr, row, segment, tokens, end, num_tokens, num_scores, threshold,
        HAS_COLUMNS, DIFFERENCE, HAS_VALID, SEGMENTS, HAS_THRESHOLD,
    )  # fmt: skip  # [N]
    counted = keys != 0
    wide = keys.to(tl.int64)
    if ROUND > 0:
        counted = counted & ((wide >> (32 - 8 * ROUND)) == prefix)
    else:
        tl.store(always_ptr + slot, tl.sum(always.to(tl.int32), 0))
    byte = ((wide >> (24 - 8 * ROUND)) & 255).to(tl.int32)
    target = histogram_ptr + ((ROUND * num_problems + problem) * num_chunks + chunk) * 256
    tl.store(target + digits, tl.histogram(byte, 256, mask=counted).to(tl.int32))


@triton.jit
def find_in_registers(keys, count):
    """The ``count``-th largest of all keys, int64."""
    found = tl.zeros([], tl.int64)
    for step in tl.static_range(16):
        reach_1 = keys >= (found + (1 << (30 - 2 * step))).to(tl.uint32)
        reach_2 = keys >= (found + (2 << (30 - 2 * step))).to(tl.uint32)
        reach_3 = keys >= (found + (3 << (30 - 2 * step))).to(tl.uint32)
        packed = reach_1.to(tl.int64) + (reach_2.to(tl.int64) << 20) + (reach_3.to(tl.int64) << 40)
        reached = tl.sum(packed, 0)  # three counts of 20 bits
        digit = ((reached & 0xFFFFF) >= count).to(tl.int64)
        digit += (((reached >> 20) & 0xFFFFF) >= count).to(tl.int64)
        digit += ((reached >> 40) >= count).to(tl.int64)
        found += digit << (30 - 2 * step)
    return found


@triton.jit(do_not_specialize=["limit", "length", "width", "threshold"])
def topk_select_kernel(
    scores_ptr, columns_ptr, valid_ptr, segments_ptr, k_ptr, position_ptr, origins_ptr, raster_ptr,
    indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr, counts_ptr,
    out_columns_ptr, out_origins_ptr, out_slots_ptr, out_raster_ptr, out_listed_ptr,
    histogram_ptr, above_ptr, always_ptr, state_ptr, stride_pr, stride_pb, stride_pn,
    num_rows, num_segments, num_tokens, num_scores, num_chunks, limit, length, width, threshold,
    ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    DIFFERENCE: tl.constexpr, HAS_VALID: tl.constexpr, SEGMENTS: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    POSITION_ROWS: tl.constexpr, LEFT: tl.constexpr, INVERSE: tl.constexpr, FLAGS: tl.constexpr,
    HAS_ORIGINS: tl.constexpr,
):  # fmt: skip
    """Find the k-th largest key of a problem, in registers or (ROUNDS > 0) from histograms, and write the selection.

    Grid (problems, chunks). Outputs are contiguous [B, K] (positions [P, B, K], inverse [B, N], lists [B, W]).
    """
    problem, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    segment = tl.program_id(0) % num_segments
    start, end = bounds_of(segments_ptr, segment, num_tokens, SEGMENTS)
    tokens = start + chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, always = load_keys(
        scores_ptr, columns_ptr, valid_ptr, segments_ptr, row, segment, tokens, end, num_tokens, num_scores, threshold,
        HAS_COLUMNS, DIFFERENCE, HAS_VALID, SEGMENTS, HAS_THRESHOLD,
    )  # fmt: skip  # [N]
    above_seen = tl.zeros([], tl.int32)  # in earlier chunks
    equal_seen = tl.zeros([], tl.int32)
    always_seen = tl.zeros([], tl.int32)
    num_always = tl.zeros([], tl.int32)
    if ROUNDS == 0:
        count = wanted(k_ptr, problem, tl.sum((keys != 0).to(tl.int32), 0), limit, RAGGED)
        found = find_in_registers(keys, count)
        above = keys > found.to(tl.uint32)
        equal = (keys == found.to(tl.uint32)) & (keys != 0)
        ties = count - tl.sum(above.to(tl.int32), 0)
        if HAS_COLUMNS:
            num_always = tl.sum(always.to(tl.int32), 0)
    else:
        num_problems = tl.num_programs(0)
        last = ((ROUNDS - 1) * num_problems + problem) * num_chunks
        total, before = sum_chunks(histogram_ptr + last * 256, num_chunks, chunk)
        prefix = tl.zeros([], tl.int64)
        if ROUNDS == 1:
            count = wanted(k_ptr, problem, tl.sum(total, 0), limit, RAGGED)
            remaining = count
        else:
            count = tl.load(state_ptr + problem * 2 + 1).to(tl.int32)
            state = state_ptr + ((ROUNDS - 1) * num_problems + problem) * 2
            prefix = tl.load(state)
            remaining = tl.load(state + 1).to(tl.int32)
        digit, ties = pick_digit(total, remaining)
        prefix = prefix * 256 + digit
        digits = tl.arange(0, 256)
        above_seen = tl.sum(tl.where(digits > digit, before, 0), 0)
        equal_seen = tl.sum(tl.where(digits == digit, before, 0), 0)
        for other in range(0, host_int(num_chunks)):
            slot = problem * num_chunks + other
            if ROUNDS > 1:
                above_seen += tl.where(other < chunk, tl.load(above_ptr + slot), 0)
            if HAS_COLUMNS:
                stays = tl.load(always_ptr + slot)
                num_always += stays
                always_seen += tl.where(other < chunk, stays, 0)
        leading = keys.to(tl.int64) >> (32 - 8 * ROUNDS)
        above = (leading > prefix) & (keys != 0)
        equal = (leading == prefix) & (keys != 0)

    pair = (above.to(tl.int32) << 16) + equal.to(tl.int32)
    pairs = tl.cumsum(pair, 0) - pair  # exclusive, two counts in one scan
    equal_before = (pairs & 0xFFFF) + equal_seen
    taken = above | (equal & (equal_before < ties))
    ranks = (pairs >> 16) + above_seen + tl.minimum(equal_before, ties)  # among the chosen by score
    if FLAGS:
        tl.store(counts_ptr + problem, count.to(tl.int64), mask=chunk == 0)
        tl.store(out_valid_ptr + row * num_tokens + tokens, 1, mask=taken)
        return
    slots, chosen, total_kept = ranks, taken, count
    if HAS_COLUMNS:
        stays = always.to(tl.int32)
        slots = ranks + always_seen + tl.cumsum(stays, 0) - stays
        chosen = taken | always
        total_kept = count + num_always
    first = length - total_kept if LEFT else 0
    slots = slots + first
    if HAS_COLUMNS:  # a caller's length may be too short
        chosen = chosen & (slots >= 0) & (slots < length)
    out = row * length
    is_slot = (tokens >= first) & (tokens < first + total_kept)
    padding = (tokens < length) & (is_slot == 0)  # length <= num_tokens, so every slot has its turn
    tl.store(indices_ptr + out + slots, tokens, mask=chosen)
    tl.store(indices_ptr + out + tokens, -1, mask=padding)
    tl.store(out_valid_ptr + out + tokens, is_slot, mask=tokens < length)
    if INVERSE:
        tl.store(inverse_ptr + row * num_tokens + tokens, tl.where(chosen, slots, -1), mask=tokens < num_tokens)
    origin = tokens.to(tl.int64)
    if HAS_ORIGINS:
        origin = tl.load(origins_ptr + row * num_tokens + tokens, mask=chosen, other=0)
    for plane in tl.static_range(POSITION_ROWS):
        source = position_ptr + plane * stride_pr + row * stride_pb + origin * stride_pn
        target = out_position_ptr + (row + plane * num_rows) * length
        tl.store(target + slots, tl.load(source, mask=chosen, other=0), mask=chosen)
        tl.store(target + tokens, 0, mask=padding)
    if HAS_COLUMNS:
        tl.store(out_origins_ptr + out + slots, origin, mask=chosen)
        tl.store(out_origins_ptr + out + tokens, 0, mask=padding)
        tl.store(out_columns_ptr + out + slots, tl.where(taken, ranks, -1), mask=chosen)
        tl.store(out_columns_ptr + out + tokens, -1, mask=padding)
        listed, unlisted = row * width, (tokens >= count) & (tokens < width)
        taken = chosen & taken & (ranks < width)
        tl.store(out_slots_ptr + listed + ranks, slots, mask=taken)
        tl.store(out_slots_ptr + listed + tokens, 0, mask=unlisted)
        column = tl.load(columns_ptr + row * num_tokens + tokens, mask=taken, other=0)
        raster = tl.load(raster_ptr + row * num_scores + column, mask=taken, other=0)
        tl.store(out_raster_ptr + listed + ranks, raster, mask=taken)
        tl.store(out_raster_ptr + listed + tokens, -1, mask=unlisted)
        tl.store(out_listed_ptr + listed + tokens, tokens < count, mask=tokens < width)


@triton.jit
def copy_rows(source_ptr, out_ptr, index, rows, in_range, dims, size, stride_n, stride_d):
    """[R, D] rows, zero where the index is -1."""
    dim_ok = (dims < size)[None, :]
    source = source_ptr + index[:, None] * stride_n + dims.to(tl.int64)[None, :] * stride_d
    tile = tl.load(source, mask=(index >= 0)[:, None] & dim_ok, other=0)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * size + dims[None, :], tile, mask=in_range[:, None] & dim_ok)


@triton.jit(do_not_specialize=["length"])
def topk_gather_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, indices_ptr, origins_ptr, out_a_ptr, out_b_ptr, out_c_ptr, out_d_ptr,
    stride_ab, stride_ah, stride_an, stride_ad, stride_bb, stride_bh, stride_bn, stride_bd,
    stride_cb, stride_ch, stride_cn, stride_cd, stride_db, stride_dh, stride_dn, stride_dd,
    num_heads, num_row_blocks, length, size_a, size_b, size_c, size_d, num_blocks,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, HAS_ORIGINS: tl.constexpr,
):  # fmt: skip
    """out[b, h, r] = x[b, h, indices[b, r]] of up to four tensors, zero where the index is -1.

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
        dims = part * BLOCK_D + tl.arange(0, BLOCK_D)
        source = a_ptr + sample * stride_ab + head * stride_ah
        copy_rows(source, out_a_ptr + out * size_a, index, rows, in_range, dims, size_a, stride_an, stride_ad)
    else:
        origin = index
        if HAS_ORIGINS:
            origin = tl.load(origins_ptr + sample * length + rows, mask=in_range, other=0)
            origin = tl.where(index >= 0, origin, -1)
        columns = tl.arange(0, BLOCK_W)
        # pointers of several types need names of their own
        if part == num_blocks:
            source_b = b_ptr + sample * stride_bb + head * stride_bh
            copy_rows(source_b, out_b_ptr + out * size_b, origin, rows, in_range, columns, size_b, stride_bn, stride_bd)
        elif part == num_blocks + 1:
            source_c = c_ptr + sample * stride_cb + head * stride_ch
            copy_rows(source_c, out_c_ptr + out * size_c, origin, rows, in_range, columns, size_c, stride_cn, stride_cd)
        else:
            source_d = d_ptr + sample * stride_db + head * stride_dh
            copy_rows(source_d, out_d_ptr + out * size_d, origin, rows, in_range, columns, size_d, stride_dn, stride_dd)


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


def select_tokens(
    scores: Tensor,  # [B, V], or [B, V, 2] for keep and drop logits
    num_tokens: int,
    *,
    length: int,
    k: Tensor | None,
    limit: int,
    valid_mask: Tensor | None = None,
    position_ids: Tensor | None = None,  # [..., B or 1, N]
    segments: Tensor | None = None,
    packed: bool = False,
    longest: int = 0,
    threshold: float | None = None,
    left: bool = False,
    inverse: bool = False,
    columns: Tensor | None = None,  # [B, N], the score of each token; -1: the token stays
    origins: Tensor | None = None,
    raster: Tensor | None = None,
    width: int = 0,
) -> dict[str, Tensor]:
    """Launch the selection: once up to 4,096 tokens, else five times (more with segments).

    Returns:
        indices, valid, positions, inverse; with columns also columns, origins, slots, raster and listed; with
        ``packed`` bounds.
    """
    rows, device = scores.shape[0], scores.device
    flags = segments is not None
    number = 1 if segments is None else len(segments) - 1 if packed else k.shape[1]  # type: ignore[union-attr]

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    indices = new(rows, length)
    out = {"indices": indices, "valid": new(rows, length, dtype=torch.bool), "positions": new(0)}
    out["inverse"] = new(rows, num_tokens) if inverse else new(0)
    if position_ids is not None:
        planes = position_ids.shape[:-2]
        out["positions"] = new(*planes, rows, length, dtype=position_ids.dtype)
        position_ids = position_ids.expand(*planes, rows, -1)
        position_ids = position_ids if position_ids.ndim == 3 else position_ids[None]
    if columns is not None:
        out |= {"columns": new(rows, length), "origins": new(rows, length), "slots": new(rows, width)}
        out |= {"raster": new(rows, width), "listed": new(rows, width, dtype=torch.bool)}
    if not (rows and num_tokens and number):
        out["bounds"] = torch.zeros(number + 1, dtype=torch.int64, device=device)
        return {name: part.fill_(-1) if name in ("indices", "inverse") else part.zero_() for name, part in out.items()}
    chosen = torch.zeros(rows, num_tokens, dtype=torch.uint8, device=device) if flags else out["valid"]
    counts = new(rows * number) if flags else indices

    def launch(by: Tensor, mask: Tensor | None, number: int, rounds: int, target: Tensor, flags: bool) -> None:
        """Select by scores, to flags if these have several problems, or by flags, which needs a single round."""
        first = by is scores
        fill = indices  # for pointers that are not read
        ragged = k is not None and first
        inputs = [by, columns, mask, segments if first else None, k if ragged else None]
        given = [fill if part is None else by_bytes(part) for part in inputs]
        carried = [fill if part is None else part for part in (position_ids, origins, raster)]
        names = ("positions", "inverse"), ("columns", "origins", "slots", "raster", "listed")
        outputs = [indices, target.view(torch.uint8), *(out[name] for name in names[0]), counts]
        outputs += [by_bytes(out.get(name, fill)) for name in names[1]]
        limits = limit if first else length, length, width, threshold or 0.0
        size = longest if packed and first else num_tokens
        chunks = 1 if size <= MAX_REGISTER_TOKENS else ceil_div(size, CHUNK)
        rounds = 0 if chunks == 1 else rounds
        block = CHUNK if rounds else next_power_of_2(size, 16)
        config = select("topk_select", size=block, dtype=torch.float32, device=device)
        grid = (rows * number, chunks)
        histogram = new(rounds, *grid, 256, dtype=torch.int32)
        above, stays = new(2, *grid, dtype=torch.int32).unbind()
        state = new(max(rounds, 1), rows * number, 2)
        keys = dict(
            BLOCK_N=block, RAGGED=ragged, HAS_COLUMNS=columns is not None, DIFFERENCE=by.ndim == 3,
            HAS_VALID=mask is not None, SEGMENTS=("bounds" if packed else "ids") if flags else "none",
            HAS_THRESHOLD=threshold is not None and first, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
        for number_of_round in range(rounds):
            topk_histogram_kernel[grid](
                *given, histogram, above, stays, state, rows * number, number, num_tokens, by.shape[1], chunks,
                limits[0], limits[3], ROUND=number_of_round, **keys,
            )  # fmt: skip
        topk_select_kernel[grid](
            *given, *carried, *outputs, histogram, above, stays, state,
            *((0, 0, 0) if position_ids is None else position_ids.stride()),
            rows, number, num_tokens, by.shape[1], chunks, *limits,
            ROUNDS=rounds, POSITION_ROWS=0 if position_ids is None else position_ids.shape[0], LEFT=left,
            INVERSE=inverse, FLAGS=flags, HAS_ORIGINS=origins is not None, **keys,
        )  # fmt: skip

    with torch.cuda.device_of(scores):
        scores = scores.contiguous()
        valid_mask = None if valid_mask is None else valid_mask.contiguous()
        columns, origins, raster, segments, k = (
            part if part is None else part.contiguous() for part in (columns, origins, raster, segments, k)
        )
        launch(scores, valid_mask, number, ROUNDS, chosen, flags)
        if flags:
            launch(chosen, chosen, 1, 1, out["valid"], False)
    if packed:
        out["bounds"] = torch.zeros(number + 1, dtype=torch.int64, device=device)
        torch.cumsum(counts, 0, out=out["bounds"][1:])
        out["bounds"].clamp_(max=length)
    return out


def row_config(kernel: str, sizes: list[int], device: torch.device) -> tuple[int, int, int, int]:
    """Rows, dimensions of the first tensor and of the others, and warps of a program that moves rows."""
    config = select(kernel, size=sizes[0], dtype=torch.float32, device=device)
    block_d = min(next_power_of_2(sizes[0]), config.block_n)
    block_w = next_power_of_2(max(sizes[1:], default=1))
    return max(1, config.block_m * config.block_n // max(block_d, block_w)), block_d, block_w, config.num_warps


def _as_real(tensor: Tensor) -> Tensor:
    """Complex rows as pairs of numbers, rows of one byte as bytes."""
    return torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else by_bytes(tensor)


def gather_heads(tensors: list[Tensor], indices: Tensor, origins: Tensor | None = None) -> list[Tensor]:
    """x[b, h, indices[b, r]] of up to four tensors [B, H, N, d] in one launch; the others than the first by origins."""
    samples, heads = tensors[0].shape[:2]
    length = indices.shape[1]
    outputs = [x.new_empty(samples, heads, length, x.shape[3]) for x in tensors]
    if samples and heads and length:
        sources, targets = [_as_real(x) for x in tensors], [_as_real(x) for x in outputs]
        fill = 4 - len(tensors)
        sizes = [source.shape[3] for source in sources]
        strides = [stride for source in sources for stride in source.stride()] + [0] * 4 * fill
        rows, block_d, block_w, num_warps = row_config("topk_gather", sizes, indices.device)
        blocks, row_blocks, indices = ceil_div(sizes[0], block_d), ceil_div(length, rows), indices.contiguous()
        with torch.cuda.device_of(indices):
            topk_gather_kernel[(samples * heads * row_blocks, blocks + len(tensors) - 1)](
                *sources, *[indices] * fill, indices, indices if origins is None else origins,
                *targets, *[indices] * fill, *strides, heads, row_blocks, length, *sizes, *[1] * fill, blocks,
                BLOCK_R=rows, BLOCK_D=block_d, BLOCK_W=block_w, HAS_ORIGINS=origins is not None,
                num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return outputs


def scatter_heads(gradient: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Transpose of :func:`gather_heads` for one tensor: [B, H, N, d], zero where no index points."""
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


def topk_compact_triton(x: Selection) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same contract as :func:`topk_compact_eager`."""
    options = x._asdict()
    hidden_states = options.pop("hidden_states")
    out = select_tokens(num_tokens=x.scores.shape[1], **options)
    indices, bounds = out["indices"], out["bounds"] if x.packed else out["indices"].new_empty(0)
    (hidden,) = gather_heads([hidden_states[:, None]], indices)
    return hidden[:, 0], indices, out["valid"], out["positions"], out["inverse"], bounds
