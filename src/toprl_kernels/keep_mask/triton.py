"""Keep-mask sampling in one launch, and its backward in one launch that draws the same noise again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels.configs import select
from toprl_kernels.keep_mask.reference import Draw
from toprl_kernels.triton_common import ceil_div

# where the noise or the decision comes from
GIVEN, UNIFORM, SEED = (tl.constexpr(number) for number in range(3))


@triton.jit
def token_uniform(seed, tokens):
    """Bit for bit :func:`toprl_kernels.keep_mask.eager.token_uniform`."""
    low = (tokens & 0xFFFFFFFF).to(tl.uint32)
    high = ((tokens >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def load_decision(
    logits_ptr, uniform_ptr, given_ptr, seed_ptr, token_ids_ptr, offsets, mask,
    SOURCE: tl.constexpr, HAS_TOKEN_IDS: tl.constexpr,
):  # fmt: skip
    """Logit difference, the difference plus logistic noise (as it is for a given mask), and whether to keep."""
    keep = tl.load(logits_ptr + offsets * 2, mask=mask, other=0.0).to(tl.float32)
    drop = tl.load(logits_ptr + offsets * 2 + 1, mask=mask, other=0.0).to(tl.float32)
    delta = tl.minimum(tl.maximum(keep - drop, -3.4028234663852886e38), 3.4028234663852886e38)
    if SOURCE == GIVEN:
        margin = delta
        hard = tl.load(given_ptr + offsets, mask=mask, other=0) != 0
    else:
        if SOURCE == SEED:
            tokens = offsets
            if HAS_TOKEN_IDS:
                tokens = tl.load(token_ids_ptr + offsets, mask=mask, other=0)
            u = token_uniform(tl.load(seed_ptr), tokens)
        else:
            u = tl.load(uniform_ptr + offsets, mask=mask, other=0.5)
        # 1 - u is exact for u >= 1/2; below, log1p keeps the digits that 1 - u would round away
        small = -u * (1.0 + u * (0.5 + u * (0.333333343 + u * 0.25)))
        log_rest = tl.where(u < 0.01, small, tl.log(1.0 - u))
        margin = delta + (tl.log(u) - log_rest)
        hard = margin > 0
    return delta, margin, hard


@triton.jit
def keep_mask_fwd_kernel(
    logits_ptr, uniform_ptr, given_ptr, seed_ptr, token_ids_ptr, previous_ptr, keep_ptr, log_prob_ptr, entropy_ptr,
    total,
    SOURCE: tl.constexpr, HAS_TOKEN_IDS: tl.constexpr, HAS_PREVIOUS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = offsets < total
    delta, _, hard = load_decision(
        logits_ptr, uniform_ptr, given_ptr, seed_ptr, token_ids_ptr, offsets, mask, SOURCE, HAS_TOKEN_IDS
    )
    magnitude = tl.abs(delta)
    tail = tl.exp(-magnitude)
    # log(1 + tail); for a tail under 1e-3 the series keeps what 1 + tail rounds away
    log_total = tl.where(tail < 1e-3, tail * (1.0 - tail * (0.5 - tail * 0.333333343)), tl.log(1.0 + tail))
    agrees = hard == (delta > 0)
    log_prob = tl.where(agrees, 0.0, -magnitude) - log_total
    entropy = log_total + magnitude * (tail / (1.0 + tail))
    keep = hard
    if HAS_PREVIOUS:
        previous = tl.load(previous_ptr + offsets, mask=mask, other=0) != 0
        keep = keep & previous
        log_prob = tl.where(previous, log_prob, 0.0)
        entropy = tl.where(previous, entropy, 0.0)
    if SOURCE != GIVEN:
        tl.store(keep_ptr + offsets, keep.to(tl.float32), mask=mask)
    tl.store(log_prob_ptr + offsets, log_prob, mask=mask)
    tl.store(entropy_ptr + offsets, entropy, mask=mask)


@triton.jit
def keep_mask_bwd_kernel(
    logits_ptr, uniform_ptr, given_ptr, seed_ptr, token_ids_ptr, previous_ptr,
    grad_keep_ptr, grad_log_prob_ptr, grad_entropy_ptr, grad_ptr,
    total, tau,
    SOURCE: tl.constexpr, HAS_TOKEN_IDS: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
    GRAD_KEEP: tl.constexpr, GRAD_LOG_PROB: tl.constexpr, GRAD_ENTROPY: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = offsets < total
    delta, margin, hard = load_decision(
        logits_ptr, uniform_ptr, given_ptr, seed_ptr, token_ids_ptr, offsets, mask, SOURCE, HAS_TOKEN_IDS
    )
    tail = tl.exp(-tl.abs(delta))
    larger = 1.0 / (1.0 + tail)
    smaller = tail * larger
    p_keep = tl.where(delta > 0, larger, smaller)
    p_drop = tl.where(delta > 0, smaller, larger)
    grad = tl.zeros([BLOCK_T], tl.float32)
    if GRAD_LOG_PROB:  # d log p = 1 - p of what was chosen
        grad += tl.load(grad_log_prob_ptr + offsets, mask=mask, other=0.0) * tl.where(hard, p_drop, -p_keep)
    if GRAD_ENTROPY:  # dH = -delta p (1 - p)
        grad -= tl.load(grad_entropy_ptr + offsets, mask=mask, other=0.0) * delta * p_keep * p_drop
    if GRAD_KEEP:  # straight through: d sigmoid(margin / tau)
        soft_tail = tl.exp(-tl.abs(margin) / tau)
        slope = soft_tail / ((1.0 + soft_tail) * (1.0 + soft_tail)) / tau
        grad += tl.load(grad_keep_ptr + offsets, mask=mask, other=0.0) * slope
    if HAS_PREVIOUS:
        previous = tl.load(previous_ptr + offsets, mask=mask, other=0) != 0
        grad = tl.where(previous, grad, 0.0)
    tl.store(grad_ptr + offsets * 2, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_ptr + offsets * 2 + 1, (-grad).to(grad_ptr.dtype.element_ty), mask=mask)


def _pointers(logits: Tensor, optional: Sequence[Tensor | None]) -> list[Tensor]:
    """What a kernel gets: dense tensors, masks as bytes, the logits in place of what is absent and not read."""
    dense = [logits if tensor is None else tensor.contiguous() for tensor in optional]
    return [tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in dense]


def _launch(kernel: Any, x: Draw, others: list[Tensor], total: int, *numbers: float, **constants: bool) -> None:
    """Launch a kernel over all tokens with the inputs of the draw and ``others``."""
    config = select("keep_mask", size=total, dtype=torch.float32, device=x.logits.device)
    with torch.cuda.device_of(x.logits):
        kernel[(ceil_div(total, config.block_n),)](
            x.logits, *_pointers(x.logits, x[1:]), *others, total, *numbers,
            SOURCE=GIVEN if x.given is not None else SEED if x.seed is not None else UNIFORM,
            HAS_TOKEN_IDS=x.token_ids is not None, HAS_PREVIOUS=x.previous_mask is not None, BLOCK_T=config.block_n,
            num_warps=config.num_warps, enable_fp_fusion=True, **constants,
        )  # fmt: skip


def keep_mask_triton(x: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Keep mask (empty for a given one), log-probability and entropy."""
    x = x._replace(logits=x.logits.contiguous())
    shape = x.logits.shape[:-1]
    keep = torch.empty(shape if x.given is None else (0,), dtype=torch.float32, device=x.logits.device)
    log_prob, entropy = (torch.empty(shape, dtype=torch.float32, device=x.logits.device) for _ in range(2))
    if log_prob.numel():
        _launch(keep_mask_fwd_kernel, x, [keep, log_prob, entropy], log_prob.numel())
    return keep, log_prob, entropy


def keep_mask_backward_triton(
    x: Draw,
    grad_keep_mask: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    tau: float,
) -> Tensor:
    """Gradient of the logits, [B, N, 2]."""
    x = x._replace(logits=x.logits.contiguous())
    grad = torch.empty_like(x.logits)
    if grad.numel():
        gradients = (grad_keep_mask, grad_log_prob, grad_entropy)
        _launch(
            keep_mask_bwd_kernel, x, [*_pointers(x.logits, gradients), grad], grad.numel() // 2, tau,
            GRAD_KEEP=grad_keep_mask is not None and x.given is None, GRAD_LOG_PROB=grad_log_prob is not None,
            GRAD_ENTROPY=grad_entropy is not None,
        )  # fmt: skip
    return grad
