"""Masked attention in plain PyTorch, for CPU tensors and for whatever the kernels do not take.

Since G = 1 m^T + diag(1 - m), it is attention over the keys with m_j > 0 plus one self term per row. So the kept keys
are gathered, attention runs on them in blocks of rows (a causal block needs a prefix of them only), and the self term
is merged by log-sum-exp. No N x N tensor exists, and the cost is N times the number of kept keys. The backward has the
same form; only the gradient by the mask has to look at all keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A mask value below 2^-96 counts as 0, and exp(s - lse) is cut at 2^96: the two bounds meet, so that no kept key's
# probability is ever cut, and float32 cannot overflow. The Triton kernels use the same pair.
SMALLEST_MASK = 2.0**-96
LARGEST_EXPONENT = 96.0 * math.log(2.0)
ROWS_PER_BLOCK = 256  # of a causal pass: few calls, and on average 128 rows' worth of masked work per block
DENSE_BLOCK_BYTES = 2**22  # of the [B, H, rows, N] tile in the gradient by the mask: stays in the cache
DENSE_BLOCKS = 8  # at least, of a causal pass: each looks at the keys up to its last row only
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
    """Attention and its log-sum-exp [B, H, R]; a row without keys gives 0 and -inf."""
    if query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
    else:
        scores = grouped_scores(query, key, scale)
        if mask is not None:
            scores = scores + mask[:, :, None]
        lse = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        output = (weights.flatten(2, 3) @ value.to(weights.dtype)).view(*weights.shape[:-1], -1)
        output, lse = output.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)
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
    """Output [B, H, Nq, D] and natural log-sum-exp [B, H, Nq] (+inf for padding rows)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    mask = mask_values(keep_mask, key_padding_mask, dtype)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    if num_queries * num_keys <= SMALL:
        output, lse = attend(query, key, value, small_bias(mask, num_queries, is_causal), scale)
        return _zero_padding(output, lse, key_padding_mask)
    kept = gather_kept(key, value, mask)
    if is_causal and num_queries == num_keys and not kept.gathered and kept.bias is None and query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=True, scale=scale
        )
        return output.contiguous(), lse.contiguous()

    output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full((batch, num_heads, num_queries), -torch.inf, dtype=dtype, device=query.device)
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
    """Contiguous, with padding rows' output 0 and log-sum-exp +inf."""
    if key_padding_mask is not None:
        is_padding = ~key_padding_mask[:, None, key_padding_mask.shape[1] - output.shape[2] :]
        output = output.masked_fill(is_padding[..., None], 0.0)
        lse = lse.masked_fill(is_padding, torch.inf)
    return output.contiguous(), lse.contiguous()


def small_bias(mask: Tensor, num_queries: int, is_causal: bool) -> Tensor:
    """log G, -inf where not allowed, for a few rows: [B, 1, Nq, N]."""
    tokens = torch.arange(mask.shape[1], device=mask.device)
    rows = tokens[mask.shape[1] - num_queries :, None]
    bias = mask.log()[:, None, None]
    if is_causal:
        bias = bias.masked_fill(tokens > rows, -torch.inf)
    return bias.masked_fill(tokens == rows, 0.0)


def dense_rows(tensor: Tensor) -> Tensor:
    """The CPU kernel wants a dense head dimension."""
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


def masked_attention_backward_eager(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bounded_mask_grad: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by query, key, value and keep_mask; None where ``needs`` says no."""
    dtype = lse.dtype
    offset = key.shape[2] - query.shape[2]
    if key_padding_mask is not None:  # a padding row's output is the constant 0
        grad_output = grad_output.masked_fill(~key_padding_mask[:, None, offset:, None], 0.0)
    grad_output = dense_rows(grad_output)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    mask = mask_values(keep_mask, key_padding_mask, dtype)
    if needs[3]:
        delta = (grad_output.to(dtype) * output.to(dtype)).sum(dim=-1)  # D_i [B, H, Nq]
        *dense, grad_mask = _dense_backward(
            grad_output, query, key, value, mask, lse, delta, is_causal, scale, bounded_mask_grad, needs
        )
        if key_padding_mask is not None:
            grad_mask = grad_mask.masked_fill(~key_padding_mask, 0.0)
        return (*_wanted(dense, (query, key, value), needs), grad_mask.to(keep_mask.dtype))
    if query.shape[2] * key.shape[2] <= SMALL:
        bias = small_bias(mask, query.shape[2], is_causal)
        gradients = _attend_backward(grad_output, query, key, value, output, lse, bias, scale)
    else:
        gradients = _kept_backward(grad_output, query, key, value, mask, output, lse, is_causal, scale)
        rest = 1.0 - mask[:, None, offset:]  # [B, 1, Nq]
        if bool((rest > 0).any()):
            _add_self_terms(*gradients, grad_output, query, key, value, output, lse, rest, scale)
    return (*_wanted(gradients, (query, key, value), needs), None)


def _wanted(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    first, second, third = (
        gradient.to(tensor.dtype).contiguous() if needed and gradient is not None else None
        for gradient, tensor, needed in zip(gradients, tensors, needs, strict=False)
    )
    return first, second, third


def _kept_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the kept keys only. The merged output and log-sum-exp make an ordinary attention backward exact."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    kept = gather_kept(key, value, mask)
    grad_query = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
    grad_kept_key = torch.zeros(kept.key.shape, dtype=lse.dtype, device=query.device)
    grad_kept_value = torch.zeros_like(grad_kept_key)
    for rows, length, bias in row_blocks(kept, num_queries, num_keys, is_causal, lse.dtype):
        if length:
            parts = _attend_backward(
                grad_output[:, :, rows],
                query[:, :, rows],
                kept.key[:, :, :length],
                kept.value[:, :, :length],
                output[:, :, rows],
                lse[:, :, rows],
                bias,
                scale,
            )
            grad_query[:, :, rows] = parts[0]
            grad_kept_key[:, :, :length] += parts[1]
            grad_kept_value[:, :, :length] += parts[2]
    if not kept.gathered:
        return grad_query, grad_kept_key, grad_kept_value
    grad_key = torch.zeros(key.shape, dtype=lse.dtype, device=query.device)
    grad_value = torch.zeros_like(grad_key)
    for sample, count in enumerate(kept.counts.tolist()):
        rows_of_sample = kept.tokens[sample, :count]
        grad_key[sample].index_copy_(1, rows_of_sample, grad_kept_key[sample, :, :count])
        grad_value[sample].index_copy_(1, rows_of_sample, grad_kept_value[sample, :, :count])
    return grad_query, grad_key, grad_value


def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend` when ``output`` and ``lse`` include further terms of each row's sum."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, lse, 0.0, False, attn_mask=mask, scale=scale
        )
    num_kv_heads, dtype = key.shape[1], lse.dtype
    scores = grouped_scores(query, key, scale)
    if mask is not None:
        scores = scores + mask[:, :, None]
    weights = torch.exp(scores - lse.view(scores.shape[:-1])[..., None]).flatten(2, 3)  # P [B, Hkv, G * R, K]
    grad_rows = fold(grad_output, num_kv_heads).to(dtype)
    delta = fold((grad_output.to(dtype) * output.to(dtype)).sum(dim=-1, keepdim=True), num_kv_heads)
    grad_scores = (grad_rows @ value.to(dtype).transpose(-1, -2)).sub_(delta).mul_(weights).mul_(scale)
    grad_query = (grad_scores @ key.to(dtype)).view(query.shape)
    grad_key = grad_scores.transpose(-1, -2) @ fold(query, num_kv_heads).to(dtype)
    return grad_query, grad_key, weights.transpose(-1, -2) @ grad_rows


def _dense_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    lse: Tensor,
    delta: Tensor,
    is_causal: bool,
    scale: float,
    bounded_mask_grad: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Through all pairs, a few rows at a time: a dropped key has a gradient by its mask value.

    With R = exp(s - lse) and X = R (dO.V - D): dV_j sums R_ij G_ij dO_i, dQ and dK take X_ij G_ij, and dm_j sums X_ij
    over the rows other than j.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    offset = num_keys - num_queries
    dtype = lse.dtype
    key, value = key.to(dtype), value.to(dtype)
    scaled_query = query.to(dtype) * scale
    grad_query: list[Tensor] = []
    grad_mask = grad_key = grad_value = None
    dropped = (mask == 0)[:, None, None, None] if bounded_mask_grad else None
    block = DENSE_BLOCK_BYTES // (batch * num_heads * num_keys * lse.element_size())
    if is_causal:
        block = min(block, num_queries // DENSE_BLOCKS)
    block = max(64, block // 16 * 16)
    for start in range(0, num_queries, block):
        rows = slice(start, min(start + block, num_queries))
        first, end = start + offset, (rows.stop + offset if is_causal else num_keys)
        own = slice(first, rows.stop + offset)  # the tokens of these rows
        gate = mask[:, None, :end].repeat(1, rows.stop - start, 1)  # G [B, R, keys]
        gate[..., own].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        gate = gate[:, None, None]
        query_rows, grad_rows = (
            fold(tensor[:, :, rows], num_kv_heads) for tensor in (scaled_query, grad_output.to(dtype))
        )  # [B, Hkv, G * R, D]
        ratio = (query_rows @ key[:, :, :end].transpose(-1, -2)).view(batch, num_kv_heads, -1, rows.stop - start, end)
        ratio = ratio.sub_(lse[:, :, rows].reshape(ratio.shape[:-1])[..., None]).clamp_(max=LARGEST_EXPONENT).exp_()
        if is_causal:
            ratio[..., own].tril_()
        if needs[2]:
            part = (ratio * gate).flatten(2, 3).transpose(-1, -2) @ grad_rows
            grad_value = _add_prefix(grad_value, part, 2, num_keys)
        x = (grad_rows @ value[:, :, :end].transpose(-1, -2)).view(ratio.shape)
        x = x.sub_(delta[:, :, rows].reshape(ratio.shape[:-1])[..., None])
        by_mask = ratio  # what d/dm of exp(P) m becomes over the row's sum
        if dropped is not None:
            by_mask = torch.where(dropped[..., :end], ratio / (1.0 + ratio), ratio)
        by_mask = (x * by_mask).sum(dim=(1, 2))  # [B, R, keys]
        by_mask[..., own].diagonal(dim1=-2, dim2=-1).zero_()  # G_ii is a constant; a subtraction would leave rounding
        grad_mask = _add_prefix(grad_mask, by_mask.sum(dim=1), 1, num_keys)
        if needs[0] or needs[1]:
            grad_scores = x.mul_(ratio).mul_(gate).flatten(2, 3)
            if needs[0]:
                part = (grad_scores @ key[:, :, :end]).mul_(scale)
                grad_query.append(part.view(batch, num_heads, rows.stop - start, head_dim))
            if needs[1]:
                grad_key = _add_prefix(grad_key, grad_scores.transpose(-1, -2) @ query_rows, 2, num_keys)
    assert grad_mask is not None
    return torch.cat(grad_query, dim=2) if grad_query else None, grad_key, grad_value, grad_mask


def _add_prefix(total: Tensor | None, part: Tensor, dim: int, length: int) -> Tensor:
    """Add ``part`` to the first entries along ``dim`` of ``total``, which is made when it is None."""
    if total is None:
        if part.shape[dim] == length:
            return part
        shape = [*part.shape]
        shape[dim] = length
        total = part.new_zeros(shape)
    total.narrow(dim, 0, part.shape[dim]).add_(part)
    return total


def _add_self_terms(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    rest: Tensor,
    scale: float,
) -> None:
    """Add the share of the diagonal that the mask does not cover; ``rest`` [B, 1, Nq] is 1 - m of the row's token."""
    batch, _, num_queries, head_dim = query.shape
    offset = key.shape[2] - num_queries
    per_group = (batch, key.shape[1], -1, num_queries, head_dim)
    grad = grad_output.to(lse.dtype)
    weight = rest * torch.exp(own_scores(query, key, scale) - lse)  # (1 - m_i) r_i [B, H, Nq]
    difference = own_rows(value, query).to(lse.dtype) - output.to(lse.dtype)
    slope = (grad * difference).sum(dim=-1).mul_(weight).mul_(scale)[..., None]  # (1 - m_i) r_i (dO.V_i - D_i)
    grad_value[:, :, offset:] += (grad * weight[..., None]).view(per_group).sum(dim=2)
    grad_query.addcmul_(own_rows(key, query).to(lse.dtype), slope)
    grad_key[:, :, offset:] += (query.to(lse.dtype) * slope).view(per_group).sum(dim=2)
