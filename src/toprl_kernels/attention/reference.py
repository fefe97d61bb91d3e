"""The definition of masked attention, Eqs. 6-7, in plain PyTorch. Run it in float64 and it is the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention_reference(
    query: Tensor,  # [B, H, Nq, D]
    key: Tensor,  # [B, Hkv, N, D]
    value: Tensor,  # [B, Hkv, N, D]
    keep_mask: Tensor,  # [B, N]
    *,
    key_padding_mask: Tensor | None,  # [B, N] bool, True = valid
    is_causal: bool,
    scale: float,
    bounded_mask_grad: bool = False,
) -> Tensor:  # [B, H, Nq, D]
    """Eq. 7 as printed, plus padding and causality. Differentiable in query, key, value and a float keep_mask."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == 0 or num_keys == 0:
        return query * 0
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    mask = keep_mask.to(query.dtype)

    # query i is the token i + N - Nq, so "i == j" and "causal" are said in token numbers
    tokens = torch.arange(num_keys, device=query.device)
    query_tokens = tokens[num_keys - num_queries :]
    is_self = query_tokens[:, None] == tokens[None, :]  # [Nq, N]

    gate = torch.where(is_self, torch.ones_like(mask)[:, None, :], mask[:, None, :])[:, None]  # G, Eq. 6: [B, 1, Nq, N]

    allowed = torch.ones_like(is_self)[None, None]  # [1, 1, Nq, N]
    if is_causal:
        allowed = allowed & (tokens[None, :] <= query_tokens[:, None])
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :]
    row_is_valid = (allowed & is_self).any(dim=-1, keepdim=True)  # a padding row sees nothing; its output is 0
    allowed = allowed | (is_self & ~row_is_valid)

    scores = scale * (query @ key.transpose(-1, -2))  # P: [B, H, Nq, N]
    # A shift per row cancels in Eq. 7. It is taken over the keys that count, so the sum below is at least 1.
    counts = allowed & (gate > 0)
    shift = scores.detach().masked_fill(~counts, -torch.inf).amax(dim=-1, keepdim=True)
    # Where G = 0 the exponent may be large; the bound keeps inf * 0 out of the gradient.
    largest = 700.0 if query.dtype == torch.float64 else 80.0
    exponential = torch.exp((scores - shift).clamp(max=largest)).masked_fill(~allowed, 0.0)
    if (
        bounded_mask_grad
    ):  # d/dm of exp(P) m is exp(P) / sum = R; a factor that autograd does not see makes it R / (1 + R)
        total = (exponential * gate).detach().sum(dim=-1, keepdim=True)
        gate = torch.where(gate == 0, gate * (total / (total + exponential.detach())), gate)
    numerator = exponential * gate  # exp(P) G
    attention = numerator / numerator.sum(dim=-1, keepdim=True)  # A, Eq. 7
    return (attention @ value).masked_fill(~row_is_valid, 0.0)
