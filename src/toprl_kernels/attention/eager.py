"""Masked attention in plain PyTorch, for CPU tensors and for whatever the kernels do not take.

Since G = 1 m^T + diag(1 - m), it is attention over the keys with m_j > 0 plus one self term per row. So the kept keys
are gathered, attention runs on them in blocks of rows (a causal block needs a prefix of them only), and the self term
is merged by log-sum-exp. No N x N tensor exists, and the cost is N times the number of kept keys. The backward has the
same form; only the gradient by the mask has to look at all keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A mask value below 2^-96 counts as 0, and exp(s - lse) is cut at 2^96: the two bounds meet, so that no kept key's
# probability is ever cut, and float32 cannot overflow. The Triton kernels use the same pair.
SMALLEST_MASK = 2.0**-96
ROWS_PER_BLOCK = 256  # of a causal pass: few calls, and on average 128 rows' worth of masked work per block
# SDPA's own CPU kernel, for its log-sum-exp; torch.ops.aten offers it too, for 6 us more per call
flash_attention = torch._scaled_dot_product_flash_attention_for_cpu
SMALL = 2**14  # query-key pairs up to which one call with a mask of them is faster than gathering


@dataclass(frozen=True)
class KeptKeys:
    """The keys that somebody other than themselves can see, K = the largest number of them in a sample."""

    key: Tensor  # [B, Hkv, K, D]
    value: Tensor  # [B, Hkv, K, D]
    tokens: Tensor  # [B or 1, K] ascending, N in the padded tail
    bias: Tensor | None  # [B, K] log m, None when every kept m is 1
    counts: Tensor  # [B]
    most: list[int]  # most[t] = largest number of kept keys among tokens 0..t of any sample
    fewest: list[int]  # the smallest number
    gathered: bool  # False: key and value are the arguments themselves


def mask_values(keep_mask: Tensor, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """m as the computation sees it: 0 for padding and below the smallest value. [B, N]."""
    values = keep_mask.to(dtype)
    if keep_mask.dtype != torch.bool:
        values = values.masked_fill(values < SMALLEST_MASK, 0.0)
    return values if key_padding_mask is None else values.masked_fill(~key_padding_mask, 0.0)


def gather_kept(key: Tensor, value: Tensor, mask: Tensor) -> KeptKeys:
    """``mask`` comes from :func:`mask_values`."""
    num_keys = mask.shape[1]
    seen = mask > 0
    running = seen.cumsum(dim=1)  # [B, N]
    counts = running[:, -1]
    most, fewest = running.amax(dim=0).tolist(), running.amin(dim=0).tolist()
    tokens = torch.arange(num_keys, device=mask.device)
    if fewest[-1] == num_keys:
        bias = mask.log() if bool((mask != 1).any()) else None
        return KeptKeys(key, value, tokens[None], bias, counts, most, fewest, gathered=False)
    length = most[-1]
    order = torch.where(seen, tokens, num_keys).sort(dim=1).values[:, :length]  # [B, K]
    source = order.clamp(max=num_keys - 1)
    gathered_key, gathered_value = (
        torch.stack([sample.index_select(1, rows) for sample, rows in zip(tensor, source, strict=True)])
        for tensor in (key, value)
    )
    kept_mask = mask.gather(1, source)
    in_tail = order == num_keys
    bias = None
    if bool(((kept_mask != 1) & ~in_tail).any()):
        bias = kept_mask.masked_fill(in_tail, 1.0).log()
    return KeptKeys(gathered_key, gathered_value, order, bias, counts, most, fewest, gathered=True)


def row_blocks(
    kept: KeptKeys, num_queries: int, num_keys: int, is_causal: bool, dtype: torch.dtype
) -> Iterator[tuple[slice, int, Tensor | None]]:
    """(rows, number of kept keys they may see, additive mask [B or 1, 1, R or 1, keys] or None)."""
    if not is_causal:
        length = kept.most[-1]
        mask = None
        if kept.bias is not None:
            mask = kept.bias.to(dtype)[:, None, None]
        if kept.fewest[-1] < length:  # shorter samples do not see their padded tail
            mask = torch.zeros((), dtype=dtype, device=kept.tokens.device) if mask is None else mask
            mask = mask.masked_fill((kept.tokens == num_keys)[:, None, None], -torch.inf)
        yield slice(0, num_queries), length, mask
        return
    offset = num_keys - num_queries
    row_tokens = torch.arange(offset, num_keys, device=kept.tokens.device)
    for start in range(0, num_queries, ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, num_queries))
        length = kept.most[rows.stop - 1 + offset]
        mask = None if kept.bias is None else kept.bias[:, None, None, :length].to(dtype)
        if kept.fewest[start + offset] < length:
            hidden = kept.tokens[:, None, :length] > row_tokens[rows, None]  # [B, R, keys]
            mask = torch.zeros((), dtype=dtype, device=hidden.device) if mask is None else mask
            mask = mask.masked_fill(hidden[:, None], -torch.inf)
        yield rows, length, mask


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, as :func:`empty_output`, and its log-sum-exp [B, H, R]; a row without keys gives 0 and -inf."""
    if query.device.type == "cpu":
        output, lse = flash_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        scores = grouped_scores(query, key, scale)
        if mask is not None:
            scores = scores + mask[:, :, None]
        lse = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        output = (weights.flatten(2, 3) @ value.to(weights.dtype)).view(*weights.shape[:-1], -1)
        output, lse = empty_output(query).copy_(output.flatten(1, 2)), lse.flatten(1, 2)
    return output, lse


def grouped_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale * q.k in at least float32, [B, Hkv, H / Hkv, R, K]. The heads of a group are rows, never expanded keys."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = fold(query, key.shape[1]).to(dtype) * scale
    scores = rows @ key.to(dtype).transpose(-1, -2)
    return scores.view(query.shape[0], key.shape[1], -1, query.shape[2], key.shape[2])


def fold(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """[B, H, R, D] to [B, Hkv, H / Hkv * R, D]: all rows that read one key/value head."""
    return tensor.reshape(tensor.shape[0], num_kv_heads, -1, tensor.shape[3])


def masked_attention_forward_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, D] and natural log-sum-exp [B, H, Nq] (+inf for padding rows), in memory [B, Nq, H]."""
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    if is_ordinary(query, key, keep_mask, key_padding_mask, is_causal):
        output, lse = flash_attention(query, key, value, is_causal=is_causal, scale=scale)
        return output, by_token(lse)
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    mask = mask_values(keep_mask, key_padding_mask, dtype)
    if is_small(query, key):
        output, lse = attend(query, key, value, small_bias(mask, num_queries, is_causal), scale)
        return _zero_padding(output, lse, key_padding_mask)
    kept = gather_kept(key, value, mask)
    output = empty_output(query).zero_()
    lse = torch.full((batch, num_queries, num_heads), -torch.inf, dtype=dtype, device=query.device).transpose(1, 2)
    for rows, length, bias in row_blocks(kept, num_queries, num_keys, is_causal, dtype):
        if length:
            output[:, :, rows], lse[:, :, rows] = attend(
                query[:, :, rows], kept.key[:, :, :length], kept.value[:, :, :length], bias, scale
            )
    offset = num_keys - num_queries
    if kept.fewest[offset if is_causal else -1] == 0:  # the CPU kernel reports 0 for a row that sees no key
        seen = (mask > 0).cumsum(dim=1)[:, offset:] if is_causal else kept.counts[:, None]
        lse = lse.masked_fill((seen == 0)[:, None], -torch.inf)

    rest = 1.0 - mask[:, None, offset:]  # [B, 1, Nq]
    if bool((rest > 0).any()):
        value_self = own_rows(value, query)  # [B, H, Nq, D]
        self_score = own_scores(query, key, scale) + rest.log()
        total = torch.logaddexp(lse, self_score)
        merged = output.to(dtype).mul_(torch.exp(lse - total)[..., None])
        output = merged.addcmul_(value_self.to(dtype), torch.exp(self_score - total)[..., None]).to(query.dtype)
        lse = total
    return _zero_padding(output, lse, key_padding_mask)


def _zero_padding(output: Tensor, lse: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """With padding rows' output 0 and log-sum-exp +inf, written in place."""
    if key_padding_mask is not None:
        is_padding = ~key_padding_mask[:, None, key_padding_mask.shape[1] - output.shape[2] :]
        output.masked_fill_(is_padding[..., None], 0.0)
        lse.masked_fill_(is_padding, torch.inf)
    return output, by_token(lse)


def empty_output(query: Tensor) -> Tensor:
    """[B, H, Nq, D] laid out in memory like the query, as torch's own attention does it, with D dense."""
    output = torch.empty_like(dense_rows(query))
    if output.stride(-1) == 1:
        return output
    return torch.empty_like(output, memory_format=torch.contiguous_format)


def by_token(lse: Tensor) -> Tensor:
    """In memory [B, Nq, H], as the CPU kernel returns it."""
    return lse if lse.stride(1) == 1 else lse.transpose(1, 2).contiguous().transpose(1, 2)


def is_ordinary(
    query: Tensor, key: Tensor, keep_mask: Tensor, key_padding_mask: Tensor | None, is_causal: bool
) -> bool:
    """Whether a bool mask keeps everything, and torch's own causality (row i sees columns up to i) is meant."""
    # after real pruning this is asked before every layer; is_cpu and size() make no object, as device and shape do
    return (
        query.is_cpu
        and keep_mask.dtype is torch.bool
        and key_padding_mask is None
        and (not is_causal or query.size(2) == key.size(2))
        and keep_mask.all().item() is True
    )


def is_small(query: Tensor, key: Tensor) -> bool:
    """Whether an additive mask of all pairs is the fastest way."""
    return query.shape[2] * key.shape[2] <= SMALL


def small_bias(mask: Tensor, num_queries: int, is_causal: bool) -> Tensor:
    """log G, -inf where not allowed, for a few rows: [B, 1, Nq, N]."""
    tokens = torch.arange(mask.shape[1], device=mask.device)
    rows = tokens[mask.shape[1] - num_queries :, None]
    bias = mask.log()[:, None, None]
    if is_causal:
        bias = bias.masked_fill(tokens > rows, -torch.inf)
    return bias.masked_fill(tokens == rows, 0.0)


def dense_rows(tensor: Tensor) -> Tensor:
    """Any strides but those of the head dimension, which torch's CPU kernel and the Triton kernels want dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def own_rows(tensor: Tensor, query: Tensor) -> Tensor:
    """Row i of each query head: the key or value of the query's own token. [B, H, Nq, D]."""
    groups = query.shape[1] // tensor.shape[1]
    own = tensor[:, :, tensor.shape[2] - query.shape[2] :]
    return own if groups == 1 else own.repeat_interleave(groups, dim=1)


def own_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """s_ii [B, H, Nq] in at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (query.to(dtype) * own_rows(key, query).to(dtype)).sum(dim=-1).mul_(scale)
