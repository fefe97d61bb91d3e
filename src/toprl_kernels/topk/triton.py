"""Selection of tokens, for topk_compact and prune_stage.

Up to 4,096 tokens a program holds the keys of a sample in registers and finds the k-th largest two bits at a time:
three candidate thresholds per step, their counts packed into an int64 reduction. Above, the k-th largest is found a
byte at a time: each of four launches writes a histogram per chunk of 2,048 tokens, a fifth the selection, with a
program for every chunk. No atomics: sums over chunks are taken in the same order by every program.

A *problem* is what a threshold is found for: a sample, a segment of a sample, or a sequence of a packed row. With
several problems per row the selection writes flags, which a second one (of a single byte) compacts.
"""

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels.cache.reference import by_bytes
from toprl_kernels.configs import select
from toprl_kernels.topk.reference import Selected, Selection
from toprl_kernels.triton_common import ceil_div, host_int, next_power_of_2

MAX_REGISTER_TOKENS = 4096  # above, the keys would spill
CHUNK = 2048
ROUNDS = 4  # bytes of a key

# What kernels get, contiguous, None where there is none. The inputs; what travels along and its results, indices
# [B, K], positions [P, B, K], inverse [B, N], lists [B, W]; and the scratch of several chunks
Inputs = namedtuple("Inputs", "scores columns valid segments k num_tokens num_scores")
Carried = namedtuple("Carried", "positions position_strides origins raster")
Outputs = namedtuple("Outputs", "indices valid positions inverse counts columns origins slots raster listed")
Scratch = namedtuple("Scratch", "histogram above always state")


@triton.jit
def load_keys(x, row, segment, tokens, end, threshold, DIFFERENCE: tl.constexpr, PACKED: tl.constexpr):
    """Order-preserving unsigned keys: 0 = not eligible, 1 = NaN, then -inf ... +inf; and which tokens always stay."""
    eligible = tokens < end
    if x.valid is not None:
        eligible = eligible & (tl.load(x.valid + row * x.num_tokens + tokens, mask=eligible, other=0) != 0)
    if x.segments is not None and not PACKED:
        eligible = eligible & (tl.load(x.segments + row * x.num_tokens + tokens, mask=eligible, other=-1) == segment)
    always = tokens < 0
    column = tokens
    if x.columns is not None:
        column = tl.load(x.columns + row * x.num_tokens + tokens, mask=eligible, other=-1).to(tl.int32)
        always = eligible & (column < 0)
        eligible = eligible & (column >= 0)
    if DIFFERENCE:
        source = x.scores + row * x.num_scores * 2 + column * 2
        scores = tl.load(source, mask=eligible, other=0.0).to(tl.float32)
        scores = scores - tl.load(source + 1, mask=eligible, other=0.0).to(tl.float32)
    else:
        scores = tl.load(x.scores + row * x.num_scores + column, mask=eligible, other=0).to(tl.float32)
    if threshold is not None:
        eligible = eligible & (scores >= threshold)
    bits = (tl.where(scores == 0.0, 0.0, scores)).to(tl.uint32, bitcast=True)  # -0.0 becomes 0.0
    keys = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000).to(tl.uint32)
    keys = tl.where(scores != scores, 1, keys).to(tl.uint32)
    return tl.where(eligible, keys, 0).to(tl.uint32), always


@triton.jit
def problem_of(x, num_segments, PACKED: tl.constexpr):
    """A program's row, segment, and the first token of its problem and the one after its last."""
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    segment = tl.program_id(0) % num_segments
    if PACKED:
        start, end = tl.load(x.segments + segment).to(tl.int32), tl.load(x.segments + segment + 1).to(tl.int32)
    else:
        start, end = x.num_tokens * 0, x.num_tokens + 0
    return row, segment, start, end


@triton.jit
def wanted(x, problem, num_eligible, limit):
    """Tokens that a problem keeps."""
    count = tl.minimum(num_eligible, limit)
    if x.k is not None:
        count = tl.minimum(count, tl.load(x.k + problem).to(tl.int32))
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
    x, scratch, num_problems, num_segments, num_chunks, limit, threshold,
    ROUND: tl.constexpr, BLOCK_N: tl.constexpr, DIFFERENCE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Histogram [rounds, problems, chunks, 256] of byte ROUND of the keys whose earlier bytes are the k-th key's.

    Grid (problems, chunks). ``state`` [rounds + 1, problems, 2] holds those bytes and the keys still to be taken;
    ``above`` [problems, chunks] counts the keys that are larger in an earlier byte.
    """
    problem, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, segment, start, end = problem_of(x, num_segments, PACKED)
    histogram_ptr, above_ptr, always_ptr, state_ptr = scratch
    digits = tl.arange(0, 256)
    slot = problem * num_chunks + chunk
    prefix = tl.zeros([], tl.int64)
    if ROUND > 0:
        last = ((ROUND - 1) * num_problems + problem) * num_chunks
        total, _ = sum_chunks(histogram_ptr + last * 256, num_chunks, chunk)
        state = state_ptr + ((ROUND - 1) * num_problems + problem) * 2
        seen = tl.zeros([], tl.int32)
        if ROUND == 1:
            count = wanted(x, problem, tl.sum(total, 0), limit)
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
    keys, always = load_keys(x, row, segment, tokens, end, threshold, DIFFERENCE, PACKED)  # [N]
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
    x, carried, out, scratch, num_rows, num_segments, num_chunks, limit, length, width, threshold,
    ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, DIFFERENCE: tl.constexpr, PACKED: tl.constexpr,
    POSITION_ROWS: tl.constexpr, LEFT: tl.constexpr, INVERSE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Find the k-th largest key of a problem, in registers or (ROUNDS > 0) from histograms, and write the selection.

    Grid (problems, chunks).
    """
    problem, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, segment, start, end = problem_of(x, num_segments, PACKED)
    num_tokens = x.num_tokens
    histogram_ptr, above_ptr, always_ptr, state_ptr = scratch
    tokens = start + chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, always = load_keys(x, row, segment, tokens, end, threshold, DIFFERENCE, PACKED)  # [N]
    above_seen = tl.zeros([], tl.int32)  # in earlier chunks
    equal_seen = tl.zeros([], tl.int32)
    always_seen = tl.zeros([], tl.int32)
    num_always = tl.zeros([], tl.int32)
    if ROUNDS == 0:
        count = wanted(x, problem, tl.sum((keys != 0).to(tl.int32), 0), limit)
        found = find_in_registers(keys, count)
        above = keys > found.to(tl.uint32)
        equal = (keys == found.to(tl.uint32)) & (keys != 0)
        ties = count - tl.sum(above.to(tl.int32), 0)
        if x.columns is not None:
            num_always = tl.sum(always.to(tl.int32), 0)
    else:
        num_problems = tl.num_programs(0)
        last = ((ROUNDS - 1) * num_problems + problem) * num_chunks
        total, before = sum_chunks(histogram_ptr + last * 256, num_chunks, chunk)
        prefix = tl.zeros([], tl.int64)
        if ROUNDS == 1:
            count = wanted(x, problem, tl.sum(total, 0), limit)
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
            if x.columns is not None:
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
        tl.store(out.counts + problem, count.to(tl.int64), mask=chunk == 0)
        tl.store(out.valid + row * num_tokens + tokens, 1, mask=taken)
        return
    slots, chosen, total_kept = ranks, taken, count
    if x.columns is not None:
        stays = always.to(tl.int32)
        slots = ranks + always_seen + tl.cumsum(stays, 0) - stays
        chosen = taken | always
        total_kept = count + num_always
    first = length - total_kept if LEFT else 0
    slots = slots + first
    if x.columns is not None:  # a caller's length may be too short
        chosen = chosen & (slots >= 0) & (slots < length)
    first_slot = row * length
    is_slot = (tokens >= first) & (tokens < first + total_kept)
    padding = (tokens < length) & (is_slot == 0)  # length <= num_tokens, so every slot has its turn
    tl.store(out.indices + first_slot + slots, tokens, mask=chosen)
    tl.store(out.indices + first_slot + tokens, -1, mask=padding)
    tl.store(out.valid + first_slot + tokens, is_slot, mask=tokens < length)
    if INVERSE:
        tl.store(out.inverse + row * num_tokens + tokens, tl.where(chosen, slots, -1), mask=tokens < num_tokens)
    origin = tokens.to(tl.int64)
    if carried.origins is not None:
        origin = tl.load(carried.origins + row * num_tokens + tokens, mask=chosen, other=0)
    for plane in tl.static_range(POSITION_ROWS):
        stride_p, stride_b, stride_n = carried.position_strides
        source = carried.positions + plane * stride_p + row * stride_b + origin * stride_n
        target = out.positions + (row + plane * num_rows) * length
        tl.store(target + slots, tl.load(source, mask=chosen, other=0), mask=chosen)
        tl.store(target + tokens, 0, mask=padding)
    if x.columns is not None:
        tl.store(out.origins + first_slot + slots, origin, mask=chosen)
        tl.store(out.origins + first_slot + tokens, 0, mask=padding)
        tl.store(out.columns + first_slot + slots, tl.where(taken, ranks, -1), mask=chosen)
        tl.store(out.columns + first_slot + tokens, -1, mask=padding)
        listed, unlisted = row * width, (tokens >= count) & (tokens < width)
        taken = chosen & taken & (ranks < width)
        tl.store(out.slots + listed + ranks, slots, mask=taken)
        tl.store(out.slots + listed + tokens, 0, mask=unlisted)
        column = tl.load(x.columns + row * num_tokens + tokens, mask=taken, other=0)
        raster = tl.load(carried.raster + row * x.num_scores + column, mask=taken, other=0)
        tl.store(out.raster + listed + ranks, raster, mask=taken)
        tl.store(out.raster + listed + tokens, -1, mask=unlisted)
        tl.store(out.listed + listed + tokens, tokens < count, mask=tokens < width)


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
        given = [by, columns, mask, segments if first else None, k if first else None]
        dense = [part if part is None else by_bytes(part) for part in given]
        inputs = Inputs._make([*dense, num_tokens, by.shape[1]])
        strides = None if position_ids is None else position_ids.stride()
        outputs = Outputs(
            indices, target.view(torch.uint8), out["positions"], out["inverse"], counts,
            *(by_bytes(out[name]) if name in out else None for name in Outputs._fields[5:]),
        )  # fmt: skip
        limits = limit if first else length, threshold if first else None
        size = longest if packed and first else num_tokens
        chunks = 1 if size <= MAX_REGISTER_TOKENS else ceil_div(size, CHUNK)
        rounds = 0 if chunks == 1 else rounds
        block = CHUNK if rounds else next_power_of_2(size, 16)
        config = select("topk_select", size=block, dtype=torch.float32, device=device)
        grid = (rows * number, chunks)
        histogram = new(rounds, *grid, 256, dtype=torch.int32)
        above, stays = new(2, *grid, dtype=torch.int32).unbind()
        scratch = Scratch(histogram, above, stays, new(max(rounds, 1), rows * number, 2))
        keys = dict(
            BLOCK_N=block, DIFFERENCE=by.ndim == 3, PACKED=packed and first, num_warps=config.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        for number_of_round in range(rounds):
            topk_histogram_kernel[grid](
                inputs, scratch, rows * number, number, chunks, *limits, ROUND=number_of_round, **keys
            )
        topk_select_kernel[grid](
            inputs, Carried(position_ids, strides, origins, raster), outputs, scratch, rows, number, chunks,
            limits[0], length, width, limits[1], ROUNDS=rounds, LEFT=left, INVERSE=inverse, FLAGS=flags,
            POSITION_ROWS=0 if position_ids is None else position_ids.shape[0], **keys,
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


def topk_compact_triton(x: Selection) -> Selected:
    """Same contract as :func:`topk_compact_eager`."""
    out = select_tokens(num_tokens=x.scores.shape[1], **x._asdict())
    bounds = out["bounds"] if x.packed else out["indices"].new_empty(0)
    return out["indices"], out["valid"], out["positions"], out["inverse"], bounds
