"""Keep-mask sampling in one launch, and its backward in one launch. The noise comes from PyTorch's generator."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from toprl_kernels._triton_common import ceil_div

BLOCK = 512


@triton.jit
def load_margin(logits_ptr, uniform_ptr, offsets, mask, SAMPLE: tl.constexpr):
    """Logit difference and, when sampling, the difference plus logistic noise."""
    keep = tl.load(logits_ptr + offsets * 2, mask=mask, other=0.0).to(tl.float32)
    drop = tl.load(logits_ptr + offsets * 2 + 1, mask=mask, other=0.0).to(tl.float32)
    delta = keep - drop
    margin = delta
    if SAMPLE:
        u = tl.load(uniform_ptr + offsets, mask=mask, other=0.5)
        # 1 - u is exact for u >= 1/2; below, log1p keeps the digits that 1 - u would round away
        small = -u * (1.0 + u * (0.5 + u * (0.333333343 + u * 0.25)))
        log_rest = tl.where(u < 0.01, small, tl.log(1.0 - u))
        margin = delta + (tl.log(u) - log_rest)
    return delta, margin


@triton.jit
def keep_mask_fwd_kernel(
    logits_ptr, uniform_ptr, given_ptr, previous_ptr, keep_ptr, log_prob_ptr, entropy_ptr, total,
    SAMPLE: tl.constexpr, HAS_PREVIOUS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = offsets < total
    delta, margin = load_margin(logits_ptr, uniform_ptr, offsets, mask, SAMPLE)
    if SAMPLE:
        hard = margin > 0
    else:
        hard = tl.load(given_ptr + offsets, mask=mask, other=0) != 0
    magnitude = tl.abs(delta)
    tail = tl.exp(-magnitude)
    # log(1 + tail); for a tail under 1e-3 the series keeps what 1 + tail rounds away
    log_total = tl.where(tail < 1e-3, tail * (1.0 - tail * (0.5 - tail * 0.333333343)), tl.log(1.0 + tail))
    agrees = hard == (delta > 0)
    log_prob = tl.where(agrees, 0.0, -magnitude) - log_total
    entropy = log_total + magnitude * (tail / (1.0 + tail))
    keep = hard.to(tl.float32)
    if HAS_PREVIOUS:
        previous = tl.load(previous_ptr + offsets, mask=mask, other=0) != 0
        keep = tl.where(previous, keep, 0.0)
        log_prob = tl.where(previous, log_prob, 0.0)
        entropy = tl.where(previous, entropy, 0.0)
    tl.store(keep_ptr + offsets, keep, mask=mask)
    tl.store(log_prob_ptr + offsets, log_prob, mask=mask)
    tl.store(entropy_ptr + offsets, entropy, mask=mask)


@triton.jit
def keep_mask_bwd_kernel(
    logits_ptr, uniform_ptr, given_ptr, previous_ptr, grad_keep_ptr, grad_log_prob_ptr, grad_entropy_ptr, grad_ptr,
    total, tau,
    SAMPLE: tl.constexpr, HAS_PREVIOUS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = offsets < total
    delta, margin = load_margin(logits_ptr, uniform_ptr, offsets, mask, SAMPLE)
    magnitude = tl.abs(delta)
    tail = tl.exp(-magnitude)
    larger = 1.0 / (1.0 + tail)
    smaller = tail * larger
    p_keep = tl.where(delta > 0, larger, smaller)
    p_drop = tl.where(delta > 0, smaller, larger)
    if SAMPLE:
        hard = margin > 0
    else:
        hard = tl.load(given_ptr + offsets, mask=mask, other=0) != 0
    # d log p: 1 - p of what was chosen;  d H = -delta p (1 - p);  straight-through: d sigmoid(margin / tau)
    grad = tl.load(grad_log_prob_ptr + offsets, mask=mask, other=0.0) * tl.where(hard, p_drop, -p_keep)
    grad -= tl.load(grad_entropy_ptr + offsets, mask=mask, other=0.0) * delta * p_keep * p_drop
    if SAMPLE:
        soft_tail = tl.exp(-tl.abs(margin) / tau)
        slope = soft_tail / ((1.0 + soft_tail) * (1.0 + soft_tail)) / tau
        grad += tl.load(grad_keep_ptr + offsets, mask=mask, other=0.0) * slope
    if HAS_PREVIOUS:
        previous = tl.load(previous_ptr + offsets, mask=mask, other=0) != 0
        grad = tl.where(previous, grad, 0.0)
    tl.store(grad_ptr + offsets * 2, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_ptr + offsets * 2 + 1, (-grad).to(grad_ptr.dtype.element_ty), mask=mask)


def keep_mask_triton(
    logits: Tensor,
    *,
    uniform: Tensor | None,
    given: Tensor | None,
    tau: float,
    previous_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as :func:`keep_mask_eager`."""
    outputs: tuple[Tensor, Tensor, Tensor] = _KeepMask.apply(logits, uniform, given, tau, previous_mask)
    return outputs


def _bytes(mask: Tensor | None, unused: Tensor) -> Tensor:
    return unused if mask is None else mask.contiguous().view(torch.uint8)


class _KeepMask(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        uniform: Tensor | None,
        given: Tensor | None,
        tau: float,
        previous_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.contiguous()
        noise = logits if uniform is None else uniform.contiguous()
        chosen, previous = _bytes(given, logits), _bytes(previous_mask, logits)
        keep, log_prob, entropy = (
            torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device) for _ in range(3)
        )
        total = keep.numel()
        if total:
            with torch.cuda.device_of(logits):
                keep_mask_fwd_kernel[(ceil_div(total, BLOCK),)](
                    logits, noise, chosen, previous, keep, log_prob, entropy, total,
                    SAMPLE=uniform is not None, HAS_PREVIOUS=previous_mask is not None, BLOCK_T=BLOCK, num_warps=4,
                )  # fmt: skip
        ctx.save_for_backward(logits, noise, chosen, previous)
        ctx.sample, ctx.has_previous, ctx.tau = uniform is not None, previous_mask is not None, tau
        return keep, log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_keep: Tensor, grad_log_prob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, noise, chosen, previous = ctx.saved_tensors
        grad = torch.empty_like(logits)
        total = grad_keep.numel()
        if total:
            with torch.cuda.device_of(logits):
                keep_mask_bwd_kernel[(ceil_div(total, BLOCK),)](
                    logits, noise, chosen, previous,
                    grad_keep.contiguous(), grad_log_prob.contiguous(), grad_entropy.contiguous(), grad,
                    total, float(ctx.tau),
                    SAMPLE=ctx.sample, HAS_PREVIOUS=ctx.has_previous, BLOCK_T=BLOCK, num_warps=4,
                )  # fmt: skip
        return grad, None, None, None, None
