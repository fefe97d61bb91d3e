"""Masked attention in plain PyTorch, for CPU tensors and for whatever the kernels do not take.

Since G = 1 m^T + diag(1 - m), Eq. 7 is attention over the keys with m_j > 0 plus one self term per row. The kept keys
are gathered, and the self term is one more key: a column of the queries holds the row's own score, which that key alone
multiplies, and a column of the values holds its weight. So torch's scaled_dot_product_attention does everything,
gradients included, in a few blocks of rows, at the cost of N times the number of kept keys. Only the gradient with
respect to the mask has to look at all keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels.attention.reference import attend

# A mask value below 2^-96 counts as 0, and exp(s - lse) is cut at 2^96: the two bounds meet, so that no kept key's
# probability is ever cut, and float32 cannot overflow. The Triton kernels use the same pair.
SMALLEST_MASK = 2.0**-96
SMALL = 2**14  # query-key pairs up to which one call with a mask of them is faster than gathering
BLOCKS = 8  # of rows: each sees a range of the keys, and each is a parallel region of the CPU
FEWEST_ROWS, MOST_ROWS = 256, 1024  # of a block
TILE_BYTES = 2**22  # of the [B, H, rows, N] tile in the gradient with respect to the mask: stays in the cache
FEWEST_TILE_ROWS = 64


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

    def blocks(self, before: Tensor) -> Iterator[tuple[slice, int, int]]:
        """Cut the queries into blocks, with the kept keys [first, last) that a block sees of a list.

        ``before`` [B, N + 1] is the number of kept tokens before a token.
        """
        number = self.low.shape[1]
        is_uniform = bool((self.low[:, 0] == self.low[:, -1]).all() and (self.high[:, 0] == self.high[:, -1]).all())
        step = number if is_uniform else min(max(FEWEST_ROWS, -(-number // BLOCKS)), MOST_ROWS)
        for start in range(0, number, step):
            stop = min(start + step, number)
            first = int(before.gather(1, self.low[:, start : start + 1]).min())
            yield slice(start, stop), first, int(before.gather(1, self.high[:, stop - 1 : stop]).max())


def make_pairs(
    query: Tensor, keep_mask: Tensor, key_padding_mask: Tensor | None, ranges: Tensor | None, is_causal: bool
) -> Pairs:
    """Read the masks of a call."""
    (batch, num_keys), num_queries = keep_mask.shape, query.shape[2]
    mask = keep_mask.to(torch.promote_types(query.dtype, torch.float32))
    if keep_mask.dtype != torch.bool:
        mask = mask.masked_fill(mask < SMALLEST_MASK, 0.0)
    is_token = torch.ones_like(mask, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    mask = mask.masked_fill(~is_token, 0.0)
    if ranges is not None:
        low, high = ranges[:, num_keys - num_queries :].long().unbind(dim=2)
    else:
        high = torch.full((batch, num_queries), num_keys, device=mask.device)
        if is_causal:
            high = torch.arange(num_keys - num_queries + 1, num_keys + 1, device=mask.device).expand(batch, -1)
        low = torch.zeros_like(high)
    return Pairs(mask, low, high, is_token, is_causal and ranges is None and num_queries == num_keys)


def masked_attention_forward_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    ranges: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the output, laid out like the query, and the natural log-sum-exp (empty unless asked for)."""
    result = empty_output(query, value)
    pairs = make_pairs(query, keep_mask, key_padding_mask, ranges, is_causal)
    query, key, value, is_bad_row = _cleaned(query, key, value, pairs)
    result.copy_(_attend(query, key, value, pairs, scale))
    lse = pairs.mask.new_empty(0)
    if return_lse:
        tiles = _tiles(query, pairs)
        lse = torch.cat([_by_definition(query, key, value, pairs, *tile, scale)[1] for tile in tiles], dim=2)
    for flags, number, logarithm in ((is_bad_row, torch.nan, torch.nan), (~pairs.is_row, 0.0, torch.inf)):
        if flags is not None:
            result.masked_fill_(flags[..., None], number)
            lse = lse.masked_fill(flags, logarithm) if return_lse else lse
    return result, lse


def masked_attention_backward_eager(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    ranges: Tensor | None,
    is_causal: bool,
    scale: float,
    bounded_mask_grad: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """Compute the gradients of query, key, value and keep_mask; None where ``needs`` says no."""
    pairs = make_pairs(query, keep_mask, key_padding_mask, ranges, is_causal)
    query, key, value, is_bad_row = _cleaned(query, key, value, pairs)
    grad_output = grad_output.masked_fill(~pairs.is_row[..., None], 0.0)
    is_nan = None
    if is_bad_row is not None or not _is_finite(grad_output):
        is_live, is_bad = (grad_output != 0).any(dim=-1), ~grad_output.isfinite().all(dim=-1)
        is_nan = is_live & (is_bad if is_bad_row is None else is_bad | is_bad_row)  # [B, H, Nq]
        grad_output = grad_output.masked_fill((is_nan if is_bad_row is None else is_nan | is_bad_row)[..., None], 0.0)
    if needs[3]:
        gradients = _dense_backward(grad_output, query, key, value, pairs, scale, bounded_mask_grad)
    else:
        pull_back = torch.func.vjp(lambda q, k, v: _attend(q, k, v, pairs, scale), query, key, value)[1]
        gradients = [*pull_back(grad_output), pairs.mask]
    if is_nan is not None:
        reached = pairs.keys_reached(is_nan, dropped=False).unflatten(1, (key.shape[1], -1)).any(dim=2)[..., None]
        by_mask = pairs.keys_reached(is_nan, dropped=True).any(dim=1) & pairs.is_token
        flags = (is_nan[..., None], reached, reached, by_mask)
        gradients = [gradient.masked_fill(flag, torch.nan) for gradient, flag in zip(gradients, flags, strict=True)]
    dtypes = (query.dtype, key.dtype, value.dtype, keep_mask.dtype)
    return [
        gradient.to(dtype).contiguous() if needed else None
        for gradient, dtype, needed in zip(gradients, dtypes, needs, strict=True)
    ]


def _is_finite(tensor: Tensor) -> bool:
    """Say whether all numbers are finite; no for a sum beyond float32, which costs time and changes nothing."""
    return bool(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite())


def _cleaned(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Put 0 for tokens with a number that is not finite; and the rows [B, H, Nq] that see such a token, None if none.

    A product would spread such a number to rows that do not see it: 0 * NaN is NaN.
    """
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
    """Compute the output [B, H, Nq, Dv]; all numbers are finite."""
    mask, num_queries, num_keys = pairs.mask, query.shape[2], key.shape[2]
    is_kept = mask > 0
    if bool((mask == 1).all()) and (pairs.is_causal or bool((pairs.high - pairs.low == num_keys).all())):
        return _sdpa(query, key, value, None, scale, is_causal=pairs.is_causal)
    tokens = torch.arange(num_keys, device=mask.device)[None]
    if num_queries * num_keys <= SMALL:
        bias = pairs.bias(slice(None), tokens, mask.log())
        bias = bias.masked_fill(tokens[0] == tokens[0, num_keys - num_queries :, None], 0.0)
        return _sdpa(query, key, value, bias[:, None], scale)

    before = F.pad(is_kept.cumsum(dim=1), (1, 0))  # kept tokens before a token [B, N + 1]
    numbers = before[:, -1]
    length, columns = int(numbers.max()), tokens
    value_self, scores = value[:, :, num_keys - num_queries :], _self_scores(query, key)
    if int(numbers.min()) < num_keys:
        columns = torch.where(is_kept, tokens, num_keys).sort(dim=1).values[:, :length].clamp(max=num_keys - 1)
        key, value = (
            torch.stack([sample.index_select(1, rows) for sample, rows in zip(tensor, columns, strict=True)])
            for tensor in (key, value)
        )
    is_tail = torch.arange(length, device=mask.device) >= numbers[:, None]  # of samples that keep fewer
    log_mask = mask.gather(1, columns.expand(len(mask), -1)).masked_fill(is_tail, 0.0).log()

    # key 0 is the row's own: it meets the extra columns of the query alone, and has a 1 in the value's extra column
    parts = _split(scores, query.dtype)
    width = max(query.shape[3] + len(parts), value.shape[3] + 1)
    query = F.pad(torch.cat([query, *(part for part, _ in parts)], dim=3), (0, width - query.shape[3] - len(parts)))
    first_key = key.new_zeros(*key.shape[:2], 1, width)
    for number, (_, factor) in enumerate(parts):
        first_key[..., key.shape[3] + number] = factor
    first_value = torch.zeros_like(first_key)
    first_value[..., value.shape[3]] = 1.0
    key = torch.cat([first_key, F.pad(key, (0, width - key.shape[3]))], dim=2)
    size = value.shape[3]
    value = torch.cat([first_value, F.pad(value, (0, width - size))], dim=2)
    log_rest = torch.log1p(-mask[:, num_keys - num_queries :])  # log(1 - m_i) of the rows' own tokens

    outputs = []
    for rows, first, last in pairs.blocks(before):
        bias = pairs.bias(rows, columns[:, first:last], log_mask[:, first:last])
        bias = torch.cat([log_rest[:, rows, None], bias], dim=2)[:, None]
        keys, values = (
            tensor[:, :, : last + 1]
            if first == 0
            else torch.cat([tensor[:, :, :1], tensor[:, :, first + 1 : last + 1]], 2)
            for tensor in (key, value)
        )
        outputs.append(_sdpa(query[:, :, rows], keys, values, bias, scale))
    output = torch.cat(outputs, dim=2)
    groups = query.shape[1] // key.shape[1]
    return output[..., :size] + output[..., size : size + 1] * value_self.repeat_interleave(groups, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, is_causal: bool = False) -> Tensor:
    size = v.shape[3]
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


def _tiles(query: Tensor, pairs: Pairs) -> Iterator[tuple[slice, slice]]:
    """Cut the queries into tiles, with the keys that any row of a tile may see."""
    size = query.shape[0] * query.shape[1] * pairs.mask.shape[1] * pairs.mask.element_size()
    step = max(FEWEST_TILE_ROWS, TILE_BYTES // max(size, 1))
    for start in range(0, query.shape[2], step):
        stop = min(start + step, query.shape[2])
        yield slice(start, stop), slice(int(pairs.low[:, start].min()), int(pairs.high[:, stop - 1].max()))


def _by_definition(
    query: Tensor, key: Tensor, value: Tensor, pairs: Pairs, rows: slice, columns: slice, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp of a tile, in at least float32."""
    key, value, mask = key[:, :, columns], value[:, :, columns], pairs.mask[:, columns]
    return _tile(query[:, :, rows], key, value, mask, pairs, rows, columns, scale, False)


def _tile(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, pairs: Pairs, rows: slice, columns: slice, scale: float,
    bounded_mask_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_keys = pairs.mask.shape[1]
    tokens = torch.arange(num_keys, device=mask.device)
    is_self = tokens[columns] == tokens[num_keys - pairs.low.shape[1] :][rows, None]
    low, high = pairs.low[:, None, rows, None], pairs.high[:, None, rows, None]
    is_allowed = (low <= tokens[columns]) & (tokens[columns] < high)
    is_allowed &= pairs.is_row[:, :, rows, None] & pairs.is_token[:, None, None, columns]
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.to(mask.dtype).repeat_interleave(groups, dim=1) for tensor in (key, value))
    return attend(query.to(mask.dtype), key, value, mask, is_allowed, is_self, scale, bounded_mask_grad)


def _dense_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, pairs: Pairs, scale: float, bounded: bool
) -> list[Tensor]:
    """Compute all gradients through all pairs, a tile at a time: a dropped key has one with respect to its m_j."""
    tensors = (query, key, value, pairs.mask)
    gradients = [torch.zeros(tensor.shape, dtype=pairs.mask.dtype, device=query.device) for tensor in tensors]
    for rows, columns in _tiles(query, pairs):
        where = ((slice(None), slice(None), rows), *[(slice(None), slice(None), columns)] * 2, (slice(None), columns))

        def tile(q: Tensor, k: Tensor, v: Tensor, m: Tensor, rows: slice = rows, columns: slice = columns) -> Tensor:
            return _tile(q, k, v, m, pairs, rows, columns, scale, bounded)[0]

        parts = (tensor[index] for tensor, index in zip(tensors, where, strict=True))
        of_tile = torch.func.vjp(tile, *parts)[1](grad_output[:, :, rows].to(pairs.mask.dtype))
        for total, index, part in zip(gradients, where, of_tile, strict=True):
            total[index] += part
    return gradients


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Make an output [B, H, Nq, Dv] laid out in memory like the query, as torch's own attention does it."""
    shape = (*query.shape[:3], value.shape[3])
    order = sorted(range(3), key=lambda dim: query.stride(dim), reverse=True)
    output = query.new_empty(*(shape[dim] for dim in order), shape[3])
    return output.permute(*(order.index(dim) for dim in range(3)), 3)
