"""The noise of keep-mask sampling in plain PyTorch; the sampling itself is the definition, on any device.

It is reproducible: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Every
token has a counter and every call a seed; a token's number depends on these two alone, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
