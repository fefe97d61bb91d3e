"""Keep-mask sampling in plain PyTorch, in terms of the logit difference.

The noise is reproducible: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Every
token has a counter and every call a seed; a token's number depends on these two alone, on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels.keep_mask.reference import Draw

MASK_32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
ROUNDS = 10


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """The four output words. All words are 32-bit numbers in int64 tensors, where a product wraps around harmlessly:
    its low 64 bits are right, and a shift with a mask cuts both halves out of them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for number in range(ROUNDS):
        if number:
            k0, k1 = (k0 + KEY_STEPS[0]) & MASK_32, (k1 + KEY_STEPS[1]) & MASK_32
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (odd >> 32).bitwise_and_(MASK_32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (even >> 32).bitwise_and_(MASK_32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = odd.bitwise_and_(MASK_32), even.bitwise_and_(MASK_32)
    return [c0, c1, c2, c3]


def token_uniform(seed: Tensor, token_ids: Tensor) -> Tensor:
    """One float32 number in (0, 1) per token: (w + 1/2) / 2^23 with the upper 23 bits w of the first output word.

    Args:
        seed: int64 [1], the key.
        token_ids: int64, the lower half of the counter.
    """
    zero = torch.zeros_like(token_ids)
    counter = [token_ids & MASK_32, (token_ids >> 32) & MASK_32, zero, zero]
    word = philox(counter, [seed & MASK_32, (seed >> 32) & MASK_32])[0]
    # exact: w + 1/2 has 24 significant bits. One bit more would round the largest number to 1.
    return ((word >> 9).float() + 0.5) * 2.0**-23


def draw_uniform(shape: torch.Size, seed: Tensor, token_ids: Tensor | None) -> Tensor:
    """The noise of a call, [B, N] float32 in (0, 1)."""
    if token_ids is None:
        token_ids = torch.arange(shape.numel(), device=seed.device).view(shape)
    return token_uniform(seed, token_ids)


def _difference_and_margin(x: Draw) -> tuple[Tensor, Tensor | None]:
    """Logit difference and, unless a mask is given, the difference plus logistic noise."""
    logits, uniform = x.logits.to(torch.promote_types(x.logits.dtype, torch.float32)), x.uniform
    largest = torch.finfo(logits.dtype).max  # an infinite difference would make the entropy 0 * inf
    delta = (logits[..., 0] - logits[..., 1]).clamp(-largest, largest)
    if x.seed is not None:
        uniform = draw_uniform(delta.shape, x.seed, x.token_ids).to(delta.dtype)
    if uniform is None:
        return delta, None
    return delta, delta + (torch.log(uniform) - torch.log1p(-uniform))


def keep_mask_eager(x: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Keep mask (empty for a given one), log-probability and entropy."""
    delta, margin = _difference_and_margin(x)
    hard = x.given if margin is None else margin > 0
    assert hard is not None
    keep_mask = delta.new_empty(0) if margin is None else hard.to(delta.dtype)
    # log-sigmoid of the difference stays exact where log(softmax) rounds to log 0
    log_prob = F.logsigmoid(torch.where(hard, delta, -delta))
    # H = p log(1/p) + (1 - p) log(1/(1 - p)), each logarithm a softplus of the difference
    entropy = torch.sigmoid(delta) * F.softplus(-delta) + torch.sigmoid(-delta) * F.softplus(delta)
    if x.previous_mask is not None:
        dropped = ~x.previous_mask
        keep_mask = keep_mask.masked_fill(dropped, 0.0) if margin is not None else keep_mask
        log_prob = log_prob.masked_fill(dropped, 0.0)
        entropy = entropy.masked_fill(dropped, 0.0)
    return keep_mask, log_prob, entropy


def keep_mask_backward_eager(
    x: Draw,
    grad_keep_mask: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    tau: float,
) -> Tensor:
    """Gradient of the logits, [B, N, 2]."""
    delta, margin = _difference_and_margin(x)
    hard = x.given if margin is None else margin > 0
    assert hard is not None
    p_keep, p_drop = torch.sigmoid(delta), torch.sigmoid(-delta)
    total = torch.zeros_like(delta)
    if grad_log_prob is not None:  # d log p = 1 - p of what was chosen
        total = total + grad_log_prob * torch.where(hard, p_drop, -p_keep)
    if grad_entropy is not None:  # dH = -delta p (1 - p)
        total = total - grad_entropy * delta * p_keep * p_drop
    if grad_keep_mask is not None and margin is not None:  # straight through: d sigmoid(margin / tau)
        total = total + grad_keep_mask * torch.sigmoid(margin / tau) * torch.sigmoid(-margin / tau) / tau
    if x.previous_mask is not None:
        total = total.masked_fill(~x.previous_mask, 0.0)
    return torch.stack([total, -total], dim=-1).to(x.logits.dtype)
