"""Masked attention in plain PyTorch, for CPU tensors and for whatever the kernels do not take.

Since G = 1 m^T + diag(1 - m), Eq. 7 is attention over the keys with m_j > 0 plus one self term per row. The kept keys
are gathered, and the self term is one more key: a column of the queries holds the row's own score, which that key alone
multiplies, and a column of the values holds its weight. So torch's scaled_dot_product_attention does everything,
in a few blocks of rows, at the cost of N times the number of kept keys. The backward computes tiles of scores again, of
the kept keys; only the gradient with respect to the mask has to look at all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels.attention.reference import AttentionCall

# A mask value below 2^-96 counts as 0, and exp(s - lse) is cut at 2^96: the two bounds meet, so that no kept key's
# probability is ever cut, and float32 cannot overflow. The Triton kernels use the same pair.
SMALLEST_MASK = 2.0**-96
SMALL = 2**14  # query-key pairs up to which one call with a mask of them is faster than gathering
BLOCKS = 8  # of rows: each sees a range of the keys, and each is a parallel region of the CPU
FEWEST_ROWS, MOST_ROWS = 256, 1024  # of a block
TILE_BYTES = 2**22  # of a [B, H, rows, keys] tile in the backward: stays in the cache
FEWEST_TILE_ROWS = 64
LARGEST_EXPONENT = 96.0 * math.log(2.0)


@dataclass
class Pairs:
    """Which pairs of tokens see each other, in O(N): m without what counts as 0, and the keys of each query."""

    mask: Tensor  # [B, N] in at least float32; 0 for padding
    low: Tensor  # [B, Nq] int64: query i sees keys j with low <= j < high, if m_j > 0 or i == j
    high: Tensor
    is_token: Tensor  # [B, N] bool, False for padding
    is_causal: bool  # causality is all that low and high say, and queries are as many as keys

    @property
    def is_row(self) -> Tensor:
        """Queries that are no padding, [B, 1, Nq]: padding sees nothing."""
        return self.is_token[:, None, -self.low.shape[1] :]

    def rows_seeing(self, is_key: Tensor) -> Tensor:
        """Find the queries [B, H, Nq] that see any of the flagged keys [B, H, N]."""
        number = F.pad((is_key & (self.mask > 0)[:, None]).cumsum(dim=2), (1, 0))
        low, high = (bound[:, None].expand(-1, is_key.shape[1], -1) for bound in (self.low, self.high))
        seen = number.gather(2, high) > number.gather(2, low)
        return (seen | is_key[:, :, -low.shape[2] :]) & self.is_row

    def keys_reached(self, is_query: Tensor, *, dropped: bool) -> Tensor:
        """Find the keys [B, H, N] that any of the flagged queries [B, H, Nq] sees, or would if nothing were dropped."""
        flags = (is_query & self.is_row).long()
        ends = flags.new_zeros(*flags.shape[:2], self.mask.shape[1] + 1)
        for bound, sign in ((self.low, 1), (self.high, -1)):
            ends.scatter_add_(2, bound[:, None].expand_as(flags), sign * flags)
        reached = ends.cumsum(dim=2)[:, :, :-1] > 0
        if dropped:
            return reached
        reached &= (self.mask > 0)[:, None]
        reached[:, :, -flags.shape[2] :] |= flags > 0
        return reached

    def bias(self, rows: slice, columns: Tensor, log_mask: Tensor) -> Tensor:
        """Return log m_j where query i sees token ``columns`` j, else -inf: [B, R, K] of columns [B, K]."""
        low, high = self.low[:, rows, None], self.high[:, rows, None]
        is_allowed = (low <= columns[:, None]) & (columns[:, None] < high)
        return log_mask[:, None].where(is_allowed, -torch.inf)

    def blocks(self, before: Tensor, step: int | None = None) -> Iterator[tuple[slice, int, int]]:
        """Cut the queries into blocks, with the entries [first, last) that a block sees of a list of tokens.

        ``before`` [B, N + 1] is the number of entries before a token; ``step`` the number of queries of a block.
        """
        number = self.low.shape[1]
        is_uniform = bool((self.low[:, 0] == self.low[:, -1]).all() and (self.high[:, 0] == self.high[:, -1]).all())
        if step is None:
            step = number if is_uniform else min(max(FEWEST_ROWS, -(-number // BLOCKS)), MOST_ROWS)
        for start in range(0, number, step):
            stop = min(start + step, number)
            first = int(before.gather(1, self.low[:, start : start + 1]).min())
            yield slice(start, stop), first, int(before.gather(1, self.high[:, stop - 1 : stop]).max())


def make_pairs(x: AttentionCall) -> Pairs:
    """Read the masks of a call."""
    keep_mask, ranges, is_causal = x.keep_mask, x.ranges, x.is_causal
    (batch, num_keys), num_queries = keep_mask.shape, x.query.shape[2]
    mask = keep_mask.to(torch.promote_types(x.query.dtype, torch.float32))
    if keep_mask.dtype != torch.bool:
        mask = mask.masked_fill(mask < SMALLEST_MASK, 0.0)
    is_token = torch.ones_like(mask, dtype=torch.bool) if x.key_padding_mask is None else x.key_padding_mask
    mask = mask.masked_fill(~is_token, 0.0)
    if ranges is not None:
        low, high = ranges[:, num_keys - num_queries :].long().unbind(dim=2)
    else:
        high = torch.full((batch, num_queries), num_keys, device=mask.device)
        if is_causal:
            high = torch.arange(num_keys - num_queries + 1, num_keys + 1, device=mask.device).expand(batch, -1)
        low = torch.zeros_like(high)
    return Pairs(mask, low, high, is_token, is_causal and ranges is None and num_queries == num_keys)


@dataclass
class Kept:
    """The keys that the queries see besides their own: the tokens with m_j > 0, or all of them."""

    key: Tensor  # [B, Hkv, K, D]
    value: Tensor  # [B, Hkv, K, Dv]
    tokens: Tensor  # [B or 1, K] ascending
    mask: Tensor  # [B, K] m; 0 for the tail of samples that keep fewer
    before: Tensor  # [B, N + 1] entries before a token

    def scattered(self, gradient: Tensor, num_keys: int) -> Tensor:
        """Put rows [B, Hkv, K, D] to their tokens, [B, Hkv, N, D]; tails are 0."""
        if self.tokens.shape == (1, num_keys):  # nothing was gathered
            return gradient
        result = gradient.new_zeros(*gradient.shape[:2], num_keys, gradient.shape[3])
        return result.scatter_add_(2, self.tokens[:, None, :, None].expand_as(gradient), gradient)


def gather(key: Tensor, value: Tensor, pairs: Pairs, *, everything: bool) -> Kept:
    """Gather the kept keys and values; with ``everything`` take all of them as they are."""
    mask, num_keys = pairs.mask, key.shape[2]
    tokens = torch.arange(num_keys, device=mask.device)[None]
    is_listed = torch.ones_like(pairs.is_token) if everything else mask > 0
    before = F.pad(is_listed.cumsum(dim=1), (1, 0))
    numbers = before[:, -1]
    if int(numbers.min()) == num_keys:
        return Kept(key, value, tokens, mask, before)
    length = int(numbers.max())
    tokens = torch.where(is_listed, tokens, num_keys).sort(dim=1).values[:, :length].clamp(max=num_keys - 1)
    key, value = (
        torch.stack([sample.index_select(1, rows) for sample, rows in zip(tensor, tokens, strict=True)])
        for tensor in (key, value)
    )
    is_tail = torch.arange(length, device=mask.device) >= numbers[:, None]
    return Kept(key, value, tokens, mask.gather(1, tokens).masked_fill(is_tail, 0.0), before)


def masked_attention_forward_eager(x: AttentionCall, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Compute the output, laid out like the query, and the natural log-sum-exp (empty unless asked for)."""
    scale, pairs, result = x.scale, make_pairs(x), empty_output(x.query, x.value)
    query, key, value, is_bad_row = _cleaned(x, pairs)
    result.copy_(_attend(query, key, value, pairs, scale))
    lse = pairs.mask.new_empty(0)
    if return_lse:
        kept = gather(key, value, pairs, everything=False)
        lse = torch.cat([_scores(query, key, kept, pairs, *tile, scale)[4] for tile in _tiles(query, kept, pairs)], 3)
        lse = lse.flatten(1, 2).squeeze(-1)
    for flags, number, logarithm in ((is_bad_row, torch.nan, torch.nan), (~pairs.is_row, 0.0, torch.inf)):
        if flags is not None:
            result.masked_fill_(flags[..., None], number)
            lse = lse.masked_fill(flags, logarithm) if return_lse else lse
    return result, lse


def masked_attention_backward_eager(
    grad_output: Tensor, output: Tensor, lse: Tensor, x: AttentionCall, bounded_mask_grad: bool, needs: list[bool]
) -> list[Tensor | None]:
    """Compute the gradients of query, key, value and keep_mask; None where ``needs`` says no. Ignores the results.

    With R = exp(s - lse), D_i = dO_i . O_i and X = R (dO.V - D): dV_j sums R_ij G_ij dO_i, dQ and dK take X_ij G_ij,
    and dm_j sums X_ij over the rows other than j.
    """
    scale, pairs = x.scale, make_pairs(x)
    query, key, value, is_bad_row = _cleaned(x, pairs)
    grad_output = grad_output.masked_fill(~pairs.is_row[..., None], 0.0)
    is_nan = None
    if is_bad_row is not None or not _is_finite(grad_output):
        is_live, is_bad = (grad_output != 0).any(dim=-1), ~grad_output.isfinite().all(dim=-1)
        is_nan = is_live & (is_bad if is_bad_row is None else is_bad | is_bad_row)  # [B, H, Nq]
        grad_output = grad_output.masked_fill(is_nan[..., None], 0.0)  # the other bad rows have no gradient

    dtype, own = pairs.mask.dtype, slice(key.shape[2] - query.shape[2], None)
    query, key, value, grad_output = (tensor.to(dtype) for tensor in (query, key, value, grad_output))
    kept = gather(key, value, pairs, everything=needs[3])
    grad_query, grad_own = torch.zeros_like(query), [torch.zeros_like(tensor[:, :, own]) for tensor in (key, value)]
    grad_key, grad_value, grad_mask = (torch.zeros_like(tensor) for tensor in (kept.key, kept.value, pairs.mask))
    for rows, columns in _tiles(query, kept, pairs):
        ratio, gate, ratio_self, rest, _ = _scores(query, key, kept, pairs, rows, columns, scale)
        keys, values = kept.key[:, :, columns], kept.value[:, :, columns]
        key_self, value_self = (tensor[:, :, None, own][..., rows, :] for tensor in (key, value))  # [B, Hkv, 1, R, D]
        q, gradient = (tensor[:, :, rows].unflatten(1, (key.shape[1], -1)) for tensor in (query, grad_output))
        weights, weights_self = ratio * gate, ratio_self * rest
        slope, slope_self = _product(gradient, values), (gradient * value_self).sum(dim=-1, keepdim=True)
        delta = torch.linalg.vecdot(weights, slope)[..., None] + weights_self * slope_self  # D
        slope, slope_self = slope.sub_(delta), slope_self - delta  # dO.V - D
        if needs[3]:
            if bounded_mask_grad:
                ratio = torch.where(gate == 0, ratio / (1.0 + ratio), ratio)
            by_mask = (slope * ratio).sum(dim=(1, 2))  # [B, R, K]
            # G_ii is a constant: by comparison, since a subtraction would leave rounding
            is_other = kept.tokens[:, None, columns] != torch.arange(key.shape[2], device=key.device)[own][rows, None]
            zero = torch.zeros_like(kept.mask[:, columns])
            by_mask = by_mask.where(is_other & (pairs.bias(rows, kept.tokens[:, columns], zero) == 0), 0.0)
            grad_mask[:, columns] += by_mask.sum(dim=1)
        slope, slope_self = slope.mul_(weights).mul_(scale), slope_self * weights_self * scale
        grad_query[:, :, rows] = (_product(slope, keys.transpose(2, 3)) + slope_self * key_self).flatten(1, 2)
        grad_key[:, :, columns] += slope.flatten(2, 3).transpose(2, 3) @ q.flatten(2, 3)
        grad_value[:, :, columns] += weights.flatten(2, 3).transpose(2, 3) @ gradient.flatten(2, 3)
        grad_own[0][:, :, rows] = (slope_self * q).sum(dim=2)
        grad_own[1][:, :, rows] = (weights_self * gradient).sum(dim=2)

    grad_key, grad_value = (kept.scattered(tensor, key.shape[2]) for tensor in (grad_key, grad_value))
    grad_key[:, :, own] += grad_own[0]
    grad_value[:, :, own] += grad_own[1]
    gradients = [grad_query, grad_key, grad_value, grad_mask.masked_fill(~pairs.is_token, 0.0)]
    if is_nan is not None:
        reached = pairs.keys_reached(is_nan, dropped=False).unflatten(1, (key.shape[1], -1)).any(dim=2)[..., None]
        by_mask = pairs.keys_reached(is_nan, dropped=True).any(dim=1) & pairs.is_token
        flags = (is_nan[..., None], reached, reached, by_mask)
        gradients = [gradient.masked_fill(flag, torch.nan) for gradient, flag in zip(gradients, flags, strict=True)]
    return [
        gradient.to(tensor.dtype) if needed else None
        for gradient, tensor, needed in zip(gradients, x[:4], needs, strict=True)
    ]


def _tiles(query: Tensor, kept: Kept, pairs: Pairs) -> Iterator[tuple[slice, slice]]:
    """Cut the queries into tiles, with the columns of ``kept`` that any row of a tile may see."""
    size = query.shape[0] * query.shape[1] * kept.mask.shape[1] * pairs.mask.element_size()
    step = min(max(FEWEST_TILE_ROWS, TILE_BYTES // max(size, 1)), max(FEWEST_TILE_ROWS, -(-query.shape[2] // BLOCKS)))
    for rows, first, last in pairs.blocks(kept.before, step):
        yield rows, slice(first, last)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply rows of all heads of a group, [B, Hkv, G, R, D], by [B, Hkv, K, D]: [B, Hkv, G, R, K]."""
    return (left.flatten(2, 3) @ right.transpose(2, 3)).unflatten(2, left.shape[2:4])


def _scores(
    query: Tensor, key: Tensor, kept: Kept, pairs: Pairs, rows: slice, columns: slice, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute a tile by the definition, in at least float32.

    Returns:
        R = exp(s - lse) [B, Hkv, G, R, K] and G [B, 1, 1, R, K] of the kept keys; the same [..., 1] of the row's own
        key, whose G is what the list leaves over, 1 - m_i; and lse [B, Hkv, G, R, 1].
    """
    dtype, own = pairs.mask.dtype, slice(key.shape[2] - query.shape[2], None)
    q = query[:, :, rows].to(dtype).unflatten(1, (key.shape[1], -1))
    key_self = key[:, :, None, own][..., rows, :].to(dtype)
    gate = pairs.bias(rows, kept.tokens[:, columns], kept.mask[:, columns]).clamp_(min=0.0)  # -inf where not allowed
    gate, rest = gate[:, None, None], 1.0 - pairs.mask[:, None, None, own][..., rows, None]
    score = _product(q, kept.key[:, :, columns].to(dtype)).mul_(scale)
    score_self = (q * key_self).sum(dim=-1, keepdim=True) * scale
    shift = score_self.masked_fill(rest == 0, -torch.inf)
    if score.shape[-1]:
        shift = shift.maximum(score.masked_fill(gate == 0, -torch.inf).amax(dim=-1, keepdim=True))
    total = rest * (score_self - shift).clamp_(max=LARGEST_EXPONENT).exp_()
    total += ((score - shift).clamp_(max=LARGEST_EXPONENT).exp_() * gate).sum(dim=-1, keepdim=True)
    lse = shift + total.log()
    ratio, ratio_self = (part.sub_(lse).clamp_(max=LARGEST_EXPONENT).exp_() for part in (score, score_self))
    return ratio, gate, ratio_self, rest, lse


def _is_finite(tensor: Tensor) -> bool:
    """Say whether all numbers are finite; no for a sum beyond float32, which costs time and changes nothing."""
    return bool(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite())


def _cleaned(x: AttentionCall, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Put 0 for tokens with a number that is not finite; and the rows [B, H, Nq] that see such a token, None if none.

    A product would spread such a number to rows that do not see it: 0 * NaN is NaN.
    """
    query, key, value = x[:3]
    if all(map(_is_finite, (query, key, value))):
        return query, key, value, None
    is_bad_query, is_bad_key, is_bad_value = (~tensor.isfinite().all(dim=-1) for tensor in (query, key, value))
    is_bad_key |= is_bad_value
    by_head = is_bad_key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (
        query.masked_fill(is_bad_query[..., None], 0),
        key.masked_fill(is_bad_key[..., None], 0),
        value.masked_fill(is_bad_key[..., None], 0),
        (is_bad_query & pairs.is_row) | pairs.rows_seeing(by_head),
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs, scale: float) -> Tensor:
    """Compute the output [B, H, Nq, Dv] of numbers that are all finite."""
    mask, num_queries, num_keys = pairs.mask, query.shape[2], key.shape[2]
    if bool((mask == 1).all()) and (pairs.is_causal or bool((pairs.high - pairs.low == num_keys).all())):
        return _sdpa(query, key, value, None, scale, is_causal=pairs.is_causal)
    if num_queries * num_keys <= SMALL:
        tokens = torch.arange(num_keys, device=mask.device)
        bias = pairs.bias(slice(None), tokens[None], mask.log())
        bias = bias.masked_fill(tokens == tokens[num_keys - num_queries :, None], 0.0)
        return _sdpa(query, key, value, bias[:, None], scale)

    kept = gather(key, value, pairs, everything=False)
    # key 0 is the row's own: it meets the extra columns of the query alone, and has a 1 in the value's extra column
    size, own = value.shape[3], slice(num_keys - num_queries, None)
    parts = _split(_self_scores(query, key), query.dtype)
    width = -(-max(query.shape[3] + len(parts), size + 1) // 8) * 8  # an odd width costs a third of the time
    first_key, first_value = (key.new_zeros(*key.shape[:2], 1, width) for _ in range(2))
    first_key[..., key.shape[3] : key.shape[3] + len(parts)] = key.new_tensor([factor for _, factor in parts])
    first_value[..., size] = 1.0
    padded = torch.cat([query, *(part for part, _ in parts)], dim=3)
    padded = F.pad(padded, (0, width - padded.shape[3]))
    all_keys = torch.cat([first_key, F.pad(kept.key, (0, width - key.shape[3]))], dim=2)
    all_values = torch.cat([first_value, F.pad(kept.value, (0, width - size))], dim=2)
    log_mask, log_rest = kept.mask.log(), torch.log1p(-mask[:, own])  # log(1 - m_i) of the rows' own tokens

    outputs = []
    for rows, first, last in pairs.blocks(kept.before):
        bias = pairs.bias(rows, kept.tokens[:, first:last], log_mask[:, first:last])
        bias = torch.cat([log_rest[:, rows, None], bias], dim=2)[:, None]
        keys, values = all_keys[:, :, : last + 1], all_values[:, :, : last + 1]
        if first:
            keys, values = (torch.cat([part[:, :, :1], part[:, :, first + 1 :]], dim=2) for part in (keys, values))
        outputs.append(_sdpa(padded[:, :, rows], keys, values, bias, scale))
    output = torch.cat(outputs, dim=2)
    value_self = value[:, :, own].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return output[..., :size] + output[..., size : size + 1] * value_self


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, is_causal: bool = False) -> Tensor:
    size = v.shape[3]
    if scale <= 0:  # torch multiplies the -inf of causality by it, too
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    if q.shape[3] != size:  # the CPU kernel wants one head dimension
        width = max(q.shape[3], size)
        q, k, v = (F.pad(tensor, (0, width - tensor.shape[3])) for tensor in (q, k, v))
    if bias is not None and not q.is_cpu:
        bias = bias.to(q.dtype)
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=is_causal, scale=scale, enable_gqa=is_grouped)[
        ..., :size
    ]


def _self_scores(query: Tensor, key: Tensor) -> Tensor:
    """Compute q_i . k_i in at least float32, [B, H, Nq, 1]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))
    return (
        (grouped * key[:, :, None, key.shape[2] - query.shape[2] :].to(dtype)).sum(dim=-1, keepdim=True).flatten(1, 2)
    )


def _split(scores: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, float]]:
    """Write float32 numbers as sums of products (column in ``dtype``, factor), so that 16 bits lose no digit."""
    if dtype.itemsize > 2:
        return [(scores.to(dtype), 1.0)]
    parts, rest = [(scores / 256.0).to(dtype)], scores.detach()
    factors = (256.0, 1.0, 1.0 / 256.0)
    for previous, factor in itertools.pairwise(factors):
        rest = rest - parts[-1].detach().to(rest.dtype) * previous
        parts.append((rest / factor).to(dtype))
    return list(zip(parts, factors, strict=True))


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Make an output [B, H, Nq, Dv] laid out in memory like the query, as torch's own attention does it."""
    shape = (*query.shape[:3], value.shape[3])
    order = sorted(range(3), key=lambda dim: query.stride(dim), reverse=True)
    output = query.new_empty(*(shape[dim] for dim in order), shape[3])
    return output.permute(*(order.index(dim) for dim in range(3)), 3)
