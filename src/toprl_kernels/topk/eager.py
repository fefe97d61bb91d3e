"""The selection of topk_compact in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels.topk.reference import Selected, Selection, reaching


def unique_keys(scores: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Distinct int64 [B, N] that rank as the rule says: invalid < NaN < -inf < ... < inf, then the lower index first.

    The bits of a float32, read as an integer, ascend for positive numbers; for negative ones the magnitude bits are
    flipped. They fill the upper half of the key, the token number counted from the end the lower half.
    """
    num_tokens = scores.shape[1]
    countdown = torch.arange(num_tokens - 1, -1, -1, device=scores.device)
    if scores.dtype == torch.float64:  # no room for the token number: rank by a stable sort
        ranked = scores.masked_fill(scores.isnan(), -torch.inf)
        order = (ranked + 0.0).argsort(dim=1, descending=True, stable=True)
        is_number = ~scores.isnan().gather(1, order)
        # stable again, so that NaN goes after -inf and the rest stays where it is
        order = order.gather(1, is_number.to(torch.uint8).argsort(dim=1, descending=True, stable=True))
        keys = torch.empty_like(order).scatter_(1, order, countdown.expand_as(order))
    else:
        bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
        bits = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
        # Now -inf is -0x7F800001 and inf 0x7F800000, with NaN outside on both sides. Rotated so that inf is the
        # largest int32, every NaN lies below -inf; one clamp makes them equal and leaves lower values free.
        bits = bits.add_(0x7FFFFF).clamp_(min=-0x7F000003)
        keys = torch.add(countdown, bits, alpha=2**32)
    return keys if valid_mask is None else keys.masked_fill_(~valid_mask, -(2**63))


def select_fixed(scores: Tensor, length: int) -> Tensor:
    """The same number of tokens of every sample: ascending indices [B, K]."""
    samples, num_tokens = scores.shape
    if scores.device.type == "cpu" and samples and length:
        # Nearly always the K-th largest number is untied, and comparing with it is the whole selection. (On a GPU
        # the count below would wait for the device.)
        if scores.element_size() < 4:
            scores = scores.float()
        threshold = scores.topk(length, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        rows = (scores >= threshold).flatten().nonzero()
        # a threshold of NaN, which topk ranks first, is reached by nothing
        if rows.numel() == samples * length and (samples == 1 or not bool(threshold.isnan().any())):
            rows = rows.view(samples, length)
            return rows - torch.arange(samples)[:, None] * num_tokens if samples > 1 else rows
    return unique_keys(scores, None).topk(length, dim=1, sorted=False).indices.sort(dim=1).values


def select_ragged(keys: Tensor, taken: Tensor, length: int, left: bool) -> Tensor:
    """The ``taken`` [B, 1] tokens of each sample with the largest ``keys``: ascending [B, K], -1 in the padding."""
    num_tokens = keys.shape[1]
    order = keys.topk(length, dim=1).indices  # best first
    ranks = torch.arange(length, device=keys.device)
    # the padding sorts before every token (left) or after every token (right)
    order = torch.where(ranks < taken, order, -1 if left else num_tokens).sort(dim=1).values
    return order if left else order.masked_fill_(order == num_tokens, -1)


def choose_per_segment(scores: Tensor, segments: Tensor, quotas: Tensor, valid_mask: Tensor | None) -> Tensor:
    """The ``quotas`` [B, S] best tokens of every segment: bool [B, N]; segments outside 0..S-1 are not eligible."""
    number = quotas.shape[1]
    valid = (segments >= 0) & (segments < number)
    valid = valid if valid_mask is None else valid & valid_mask
    order = unique_keys(scores, valid).argsort(dim=1, descending=True)
    segment = torch.where(valid, segments, number).long().gather(1, order)
    by_segment = segment.argsort(dim=1, stable=True)
    order, segment = order.gather(1, by_segment), segment.gather(1, by_segment)
    sizes = torch.zeros(len(scores), number + 1, dtype=torch.int64, device=scores.device)
    sizes.scatter_add_(1, segment, torch.ones_like(segment))
    ranks = torch.arange(scores.shape[1], device=scores.device) - (sizes.cumsum(1) - sizes).gather(1, segment)
    quotas = torch.nn.functional.pad(quotas, (0, 1))
    return torch.zeros_like(valid).scatter_(1, order, ranks < quotas.gather(1, segment))


def compact_flags(flags: Tensor, length: int, left: bool) -> Tensor:
    """Ascending indices [B, K] of the first K set flags, -1 in the padding."""
    num_tokens = flags.shape[1]
    tokens = torch.arange(num_tokens, device=flags.device)
    flags = flags & (flags.cumsum(1) <= length)
    order = torch.where(flags, tokens, -1 if left else num_tokens).sort(dim=1).values
    return (
        order[:, num_tokens - length :] if left else order[:, :length].masked_fill(order[:, :length] >= num_tokens, -1)
    )


def gather_positions(position_ids: Tensor, indices: Tensor) -> Tensor:
    """position_ids[..., b, indices[b, r]]: [..., B, K], 0 where the index is -1."""
    safe = indices.clamp(min=0).expand(*position_ids.shape[:-2], *indices.shape)
    return position_ids.gather(-1, safe).masked_fill_(indices < 0, 0)


def topk_compact_eager(x: Selection) -> Selected:
    """What was not asked for is empty."""
    scores, k, segments, length = x.scores, x.k, x.segments, x.length
    samples, num_tokens = scores.shape
    valid_mask = reaching(scores, x.valid_mask, x.threshold)
    new_bounds = torch.empty(0, dtype=torch.int64, device=scores.device)
    if segments is not None:
        bounds = segments
        if x.packed:
            segments = torch.searchsorted(bounds[1:], torch.arange(num_tokens, device=bounds.device), right=True)[None]
        quotas = bounds.new_full((1, len(bounds) - 1), x.limit) if k is None else k
        flags = choose_per_segment(scores, segments, quotas, valid_mask)
        indices = compact_flags(flags, length, x.left)
        if x.packed:
            new_bounds = torch.nn.functional.pad(flags[0].cumsum(0), (1, 0))[bounds].clamp_(max=length)
    elif k is not None or valid_mask is not None:
        taken = torch.full((1, 1), x.limit, device=scores.device) if k is None else k[:, None]
        if valid_mask is not None:
            taken = taken.minimum(valid_mask.sum(dim=1, keepdim=True))
        indices = select_ragged(unique_keys(scores, valid_mask), taken, length, x.left)
    else:
        indices = select_fixed(scores, length)

    positions = indices.new_empty(0) if x.position_ids is None else gather_positions(x.position_ids, indices)
    slots = indices.new_empty(0)
    if x.inverse:
        column = torch.where(indices >= 0, indices, num_tokens)  # one column takes the padding
        slots = indices.new_full((samples, num_tokens + 1), -1)
        slots.scatter_(1, column, torch.arange(length, device=scores.device).expand_as(column))
        slots = slots[:, :num_tokens].contiguous()
    return indices.contiguous(), indices >= 0, positions, slots, new_bounds
