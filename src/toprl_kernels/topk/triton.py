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
from toprl_kernels.topk.reference import by_bytes
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
def store_selection(
    tokens, always, above, equal, ties, count, num_always, always_seen, above_seen, equal_seen,
    row, problem, num_rows, num_tokens, num_scores, length, width,
    position_ptr, origins_ptr, raster_ptr, indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr,
    out_columns_ptr, out_origins_ptr, out_slots_ptr, out_raster_ptr, out_listed_ptr, columns_ptr,
    stride_pr, stride_pb, stride_pn,
    POSITION_ROWS: tl.constexpr, LEFT: tl.constexpr, INVERSE: tl.constexpr, FLAGS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_ORIGINS: tl.constexpr,
):  # fmt: skip
    """Write what the chosen among ``tokens`` bring, and the output slots whose number is in ``tokens``.

    ``*_seen`` count the tokens of earlier chunks. Outputs are contiguous [B, K] (positions [P, B, K], inverse [B, N]).
    """
    pair = (above.to(tl.int32) << 16) + equal.to(tl.int32)
    before = tl.cumsum(pair, 0) - pair  # exclusive, two counts in one scan
    above_before = (before >> 16) + above_seen
    equal_before = (before & 0xFFFF) + equal_seen
    taken = above | (equal & (equal_before < ties))
    ranks = above_before + tl.minimum(equal_before, ties)  # among the chosen by score
    if FLAGS:
        tl.store(out_valid_ptr + row * num_tokens + tokens, 1, mask=taken)
        return
    slots, chosen, total = ranks, taken, count
    if HAS_COLUMNS:
        stays = always.to(tl.int32)
        slots = ranks + always_seen + tl.cumsum(stays, 0) - stays
        chosen = taken | always
        total = count + num_always
    first = length - total if LEFT else 0
    slots = slots + first
    if HAS_COLUMNS:  # a caller's length may be too short
        chosen = chosen & (slots >= 0) & (slots < length)
    out = row * length
    is_slot = (tokens >= first) & (tokens < first + total)
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


@triton.jit(do_not_specialize=["limit", "length", "width", "threshold"])
def topk_select_kernel(
    scores_ptr, columns_ptr, valid_ptr, segments_ptr, k_ptr, position_ptr, origins_ptr, raster_ptr,
    indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr, counts_ptr,
    out_columns_ptr, out_origins_ptr, out_slots_ptr, out_raster_ptr, out_listed_ptr,
    stride_pr, stride_pb, stride_pn,
    num_rows, num_segments, num_tokens, num_scores, limit, length, width, threshold,
    BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, HAS_COLUMNS: tl.constexpr, DIFFERENCE: tl.constexpr,
    HAS_VALID: tl.constexpr, SEGMENTS: tl.constexpr, HAS_THRESHOLD: tl.constexpr, POSITION_ROWS: tl.constexpr,
    LEFT: tl.constexpr, INVERSE: tl.constexpr, FLAGS: tl.constexpr, HAS_ORIGINS: tl.constexpr,
):  # fmt: skip
    """All keys of a problem in registers. Grid (problems,)."""
    problem = tl.program_id(0).to(tl.int64)
    row, segment = problem // num_segments, problem % num_segments
    start, end = bounds_of(segments_ptr, segment, num_tokens, SEGMENTS)
    tokens = start + tl.arange(0, BLOCK_N)
    keys, always = load_keys(
        scores_ptr, columns_ptr, valid_ptr, segments_ptr, row, segment, tokens, end, num_tokens, num_scores, threshold,
        HAS_COLUMNS, DIFFERENCE, HAS_VALID, SEGMENTS, HAS_THRESHOLD,
    )  # fmt: skip  # [N]
    count = wanted(k_ptr, problem, tl.sum((keys != 0).to(tl.int32), 0), limit, RAGGED)

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

    above = keys > found.to(tl.uint32)
    equal = (keys == found.to(tl.uint32)) & (keys != 0)
    ties = count - tl.sum(above.to(tl.int32), 0)
    num_always = tl.sum(always.to(tl.int32), 0)
    if FLAGS:
        tl.store(counts_ptr + problem, count.to(tl.int64))
    store_selection(
        tokens, always, above, equal, ties, count, num_always, 0, 0, 0,
        row, problem, num_rows, num_tokens, num_scores, length, width,
        position_ptr, origins_ptr, raster_ptr, indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr,
        out_columns_ptr, out_origins_ptr, out_slots_ptr, out_raster_ptr, out_listed_ptr, columns_ptr,
        stride_pr, stride_pb, stride_pn, POSITION_ROWS, LEFT, INVERSE, FLAGS, HAS_COLUMNS, HAS_ORIGINS,
    )  # fmt: skip


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

    Grid (chunks, problems). ``state`` [rounds + 1, problems, 2] holds those bytes and the keys still to be taken;
    ``above`` [problems, chunks] counts the keys that are larger in an earlier byte.
    """
    chunk, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, segment = problem // num_segments, problem % num_segments
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


@triton.jit(do_not_specialize=["limit", "length", "width", "threshold"])
def topk_write_kernel(
    scores_ptr, columns_ptr, valid_ptr, segments_ptr, k_ptr, position_ptr, origins_ptr, raster_ptr,
    indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr, counts_ptr,
    out_columns_ptr, out_origins_ptr, out_slots_ptr, out_raster_ptr, out_listed_ptr,
    stride_pr, stride_pb, stride_pn,
    num_rows, num_segments, num_tokens, num_scores, limit, length, width, threshold,
    histogram_ptr, above_ptr, always_ptr, state_ptr, num_problems, num_chunks,
    BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, HAS_COLUMNS: tl.constexpr, DIFFERENCE: tl.constexpr,
    HAS_VALID: tl.constexpr, SEGMENTS: tl.constexpr, HAS_THRESHOLD: tl.constexpr, POSITION_ROWS: tl.constexpr,
    LEFT: tl.constexpr, INVERSE: tl.constexpr, FLAGS: tl.constexpr, HAS_ORIGINS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """A chunk's part of the selection after ROUNDS histograms. Grid (chunks, problems)."""
    chunk, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, segment = problem // num_segments, problem % num_segments
    start, end = bounds_of(segments_ptr, segment, num_tokens, SEGMENTS)
    digits = tl.arange(0, 256)
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
    above_seen = tl.sum(tl.where(digits > digit, before, 0), 0)
    equal_seen = tl.sum(tl.where(digits == digit, before, 0), 0)
    always_seen = tl.zeros([], tl.int32)
    num_always = tl.zeros([], tl.int32)
    for other in range(0, host_int(num_chunks)):
        slot = problem * num_chunks + other
        if ROUNDS > 1:
            above_seen += tl.where(other < chunk, tl.load(above_ptr + slot), 0)
        if HAS_COLUMNS:
            stays = tl.load(always_ptr + slot)
            num_always += stays
            always_seen += tl.where(other < chunk, stays, 0)

    tokens = start + chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, always = load_keys(
        scores_ptr, columns_ptr, valid_ptr, segments_ptr, row, segment, tokens, end, num_tokens, num_scores, threshold,
        HAS_COLUMNS, DIFFERENCE, HAS_VALID, SEGMENTS, HAS_THRESHOLD,
    )  # fmt: skip  # [N]
    bytes_ = keys.to(tl.int64) >> (32 - 8 * ROUNDS)
    above = (bytes_ > prefix) & (keys != 0)
    equal = (bytes_ == prefix) & (keys != 0)
    if FLAGS:
        tl.store(counts_ptr + problem, count.to(tl.int64), mask=chunk == 0)
    store_selection(
        tokens, always, above, equal, ties, count, num_always, always_seen, above_seen, equal_seen,
        row, problem, num_rows, num_tokens, num_scores, length, width,
        position_ptr, origins_ptr, raster_ptr, indices_ptr, out_valid_ptr, out_position_ptr, inverse_ptr,
        out_columns_ptr, out_origins_ptr, out_slots_ptr, out_raster_ptr, out_listed_ptr, columns_ptr,
        stride_pr, stride_pb, stride_pn, POSITION_ROWS, LEFT, INVERSE, FLAGS, HAS_COLUMNS, HAS_ORIGINS,
    )  # fmt: skip


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


def select_tokens(
    scores: Tensor,  # [B, V], or [B, V, 2] for keep and drop logits
    num_tokens: int,
    length: int,
    *,
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
    size = longest if packed else num_tokens

    def launch(by: Tensor, mask: Tensor | None, number: int, rounds: int, target: Tensor, **options: object) -> None:
        """A selection by ``by``, with all options or, for compaction, without those of the first."""
        several = number > 1 or bool(options["FLAGS"])
        fill = indices  # for pointers that are not read
        inputs = [by, columns, mask, segments if several else None, k if options["RAGGED"] else None]
        carried = [position_ids, origins, raster]
        given = [fill if part is None else by_bytes(part) for part in inputs + carried]
        names = ("positions", "inverse"), ("columns", "origins", "slots", "raster", "listed")
        outputs = [indices, target.view(torch.uint8), *(out[name] for name in names[0]), counts]
        outputs += [by_bytes(out.get(name, fill)) for name in names[1]]
        strides = (0, 0, 0) if position_ids is None else position_ids.stride()
        limits = limit if several or not flags else length, length, width, 0.0 if threshold is None else threshold
        sizes = rows, number, num_tokens, by.shape[1]
        keys = dict(
            HAS_COLUMNS=columns is not None, DIFFERENCE=by.ndim == 3, HAS_VALID=mask is not None,
            SEGMENTS=("bounds" if packed else "ids") if several else "none", RAGGED=options["RAGGED"],
            HAS_THRESHOLD=threshold is not None and by is scores, enable_fp_fusion=True,
        )  # fmt: skip
        full = keys | dict(
            POSITION_ROWS=0 if position_ids is None else position_ids.shape[0], LEFT=left, INVERSE=inverse,
            FLAGS=options["FLAGS"], HAS_ORIGINS=origins is not None,
        )  # fmt: skip
        length_of = size if several else num_tokens
        registers = length_of <= MAX_REGISTER_TOKENS
        config = select("topk_select", size=length_of if registers else CHUNK, dtype=torch.float32, device=device)
        if registers:
            block = next_power_of_2(length_of, 16)
            topk_select_kernel[(rows * number,)](
                *given, *outputs, *strides, *sizes, *limits, BLOCK_N=block, num_warps=config.num_warps, **full
            )
            return
        chunks = ceil_div(length_of, CHUNK)
        grid = (chunks, rows * number)
        histogram = new(rounds, rows * number, chunks, 256, dtype=torch.int32)
        above, stays = new(2, rows * number, chunks, dtype=torch.int32).unbind()
        state = new(rounds, rows * number, 2)
        shared = dict(BLOCK_N=CHUNK, num_warps=config.num_warps)
        for number_of_round in range(rounds):
            topk_histogram_kernel[grid](
                *given[:5], histogram, above, stays, state, rows * number, number, num_tokens, by.shape[1], chunks,
                limits[0], limits[3], ROUND=number_of_round, **shared, **keys,
            )  # fmt: skip
        topk_write_kernel[grid](
            *given, *outputs, *strides, *sizes, *limits, histogram, above, stays, state, rows * number, chunks,
            ROUNDS=rounds, **shared, **full,
        )  # fmt: skip

    with torch.cuda.device_of(scores):
        scores = scores.contiguous()
        valid_mask = None if valid_mask is None else valid_mask.contiguous()
        columns, origins, raster, segments, k = (
            part if part is None else part.contiguous() for part in (columns, origins, raster, segments, k)
        )
        launch(scores, valid_mask, number, ROUNDS, chosen, FLAGS=flags, RAGGED=k is not None)
        if flags:
            launch(chosen, chosen, 1, 1, out["valid"], FLAGS=False, RAGGED=False)
    if packed:
        out["bounds"] = torch.zeros(number + 1, dtype=torch.int64, device=device)
        torch.cumsum(counts, 0, out=out["bounds"][1:])
        out["bounds"].clamp_(max=length)
    return out


def _row_grid(
    kernel: str, samples: int, length: int, hidden_size: int, device: torch.device
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and constants of a kernel that moves rows."""
    config = select(kernel, size=hidden_size, dtype=torch.float32, device=device)
    block_d = min(next_power_of_2(hidden_size), config.block_n)
    grid = (ceil_div(length, config.block_m), ceil_div(hidden_size, block_d), samples)
    return grid, dict(BLOCK_R=config.block_m, BLOCK_D=block_d, num_warps=config.num_warps)


def gather_rows(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """hidden_states[b, indices[b, r]], [B, K, d]; zero where the index is -1."""
    samples, _, hidden_size = hidden_states.shape
    length = indices.shape[1]
    output = hidden_states.new_empty(samples, length, hidden_size)
    if output.numel():
        grid, constants = _row_grid("topk_gather", samples, length, hidden_size, output.device)
        with torch.cuda.device_of(output):
            topk_gather_kernel[grid](
                by_bytes(hidden_states), indices, by_bytes(output), *hidden_states.stride(),
                length, hidden_size, **constants, enable_fp_fusion=True,
            )  # fmt: skip
    return output


def topk_compact_triton(
    hidden_states: Tensor,
    scores: Tensor,
    k: Tensor | None,
    limit: int,
    length: int,
    valid_mask: Tensor | None,
    position_ids: Tensor | None,
    segments: Tensor | None,
    packed: bool,
    longest: int,
    threshold: float | None,
    left: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same contract as :func:`topk_compact_eager`."""
    out = select_tokens(
        scores, scores.shape[1], length, k=k, limit=limit, valid_mask=valid_mask, position_ids=position_ids,
        segments=segments, packed=packed, longest=longest, threshold=threshold, left=left, inverse=inverse,
    )  # fmt: skip
    indices, bounds = out["indices"], out["bounds"] if packed else out["indices"].new_empty(0)
    return gather_rows(hidden_states, indices), indices, out["valid"], out["positions"], out["inverse"], bounds


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
