"""The public functions: contract, checks, noise, dispatch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from toprl_kernels import _checks as check
from toprl_kernels.backend import choose
from toprl_kernels.keep_mask.eager import keep_mask_eager
from toprl_kernels.keep_mask.reference import keep_mask_reference

OP = "sample_keep_mask"
OP_LOG_PROB = "keep_mask_log_prob"


class KeepMaskSample(NamedTuple):
    """What :func:`sample_keep_mask` returns, each [B, N], float32 (float64 for float64 logits)."""

    keep_mask: Tensor  # 0 or 1, with the gradient of the relaxed sample
    log_prob: Tensor  # log probability of the drawn action
    entropy: Tensor  # nats


def sample_keep_mask(
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    tau: float = 1.0,
    previous_mask: Tensor | None = None,
    backend: str | None = None,
) -> KeepMaskSample:
    """Draw keep/drop for every token by the Gumbel-max rule (the action of the paper's policy).

    The mask is hard: keep where logit_keep - logit_drop + log u - log(1 - u) > 0, which has probability
    sigmoid(logit_keep - logit_drop) whatever tau is. Its gradient is that of the relaxed sample
    sigmoid((difference + noise) / tau) (straight-through).

    Args:
        logits: [B, N, 2], floating, index 0 = keep, 1 = drop, finite. Sixteen-bit logits are widened first.
        generator: source of the noise, on the device of the logits. Default: PyTorch's generator.
        uniform: the noise itself, u in (0, 1), [B, N], instead of a generator.
        tau: temperature of the gradient, > 0.
        previous_mask: [B, N] bool, False = dropped at an earlier stage: mask, log-probability, entropy and gradient
            are 0 there.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.backend`.

    Returns:
        KeepMaskSample(keep_mask, log_prob, entropy), each [B, N].

    Raises:
        TypeError, ValueError: arguments that do not fit together, tau <= 0, both generator and uniform given.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64).

    Example:
        >>> import torch
        >>> from toprl_kernels import sample_keep_mask
        >>> logits = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]])
        >>> sample_keep_mask(logits, uniform=torch.full((1, 2), 0.5)).keep_mask
        tensor([[1., 0.]])
    """
    _validate(OP, logits, previous_mask)
    if not (isinstance(tau, int | float) and math.isfinite(tau) and tau > 0):
        raise ValueError(f"{OP}: tau={tau!r} must be a number > 0; use a small one such as 0.05 for a sharp gradient")
    if generator is not None and uniform is not None:
        raise ValueError(f"{OP}: generator and uniform are both given; pass one of them")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if uniform is None:
        uniform = torch.rand(logits.shape[:-1], generator=generator, dtype=dtype, device=logits.device)
        uniform = uniform.clamp(min=2.0**-25)  # rand may return exactly 0, whose logarithm is -inf
    else:
        check.require_shape(OP, "uniform", uniform, tuple(logits.shape[:-1]), "[B, N]")
        check.require_dtype(OP, "uniform", uniform, check.FLOATS)
        check.require_device(OP, "uniform", uniform, logits.device)
        uniform = uniform.detach().to(dtype)
    return KeepMaskSample(*_run(OP, logits, uniform, None, float(tau), previous_mask, backend))


def keep_mask_log_prob(
    logits: Tensor,
    keep_mask: Tensor,
    previous_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of a mask drawn earlier, as PPO needs them under the current policy.

    For the logits and mask of a :func:`sample_keep_mask` call the values are bitwise those it returned.

    Args:
        logits: [B, N, 2].
        keep_mask: [B, N], bool, or floating with values 0 and 1.
        previous_mask: [B, N] bool, False = dropped earlier: both results are 0 there.
        backend: as in :func:`sample_keep_mask`.

    Returns:
        (log_prob, entropy), each [B, N], differentiable in the logits.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sample_keep_mask`.
    """
    _validate(OP_LOG_PROB, logits, previous_mask)
    check.require_shape(OP_LOG_PROB, "keep_mask", keep_mask, tuple(logits.shape[:-1]), "[B, N]")
    check.require_dtype(OP_LOG_PROB, "keep_mask", keep_mask, (torch.bool, *check.FLOATS), "use keep_mask.bool()")
    check.require_device(OP_LOG_PROB, "keep_mask", keep_mask, logits.device)
    given = keep_mask.detach() > 0.5 if keep_mask.dtype != torch.bool else keep_mask
    _, log_prob, entropy = _run(OP_LOG_PROB, logits, None, given, 1.0, previous_mask, backend)
    return log_prob, entropy


def _run(
    op: str,
    logits: Tensor,
    uniform: Tensor | None,
    given: Tensor | None,
    tau: float,
    previous_mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    obstacle = None
    if logits.dtype == torch.float64:
        obstacle = "logits has dtype float64, the kernels take float16, bfloat16, float32"
    choice = choose(op, backend, logits.device, obstacle)
    if choice.name == "triton":
        from toprl_kernels.keep_mask.triton import keep_mask_triton as implementation
    elif choice.name == "reference":
        implementation = keep_mask_reference
    else:
        implementation = keep_mask_eager
    return implementation(logits, uniform=uniform, given=given, tau=tau, previous_mask=previous_mask)


def _validate(op: str, logits: Tensor, previous_mask: Tensor | None) -> None:
    check.require_ndim(op, "logits", logits, 3, "[B, N, 2]")
    check.require_shape(op, "logits", logits, (*logits.shape[:2], 2), "[B, N, 2] with (keep, drop) last")
    check.require_dtype(op, "logits", logits, check.FLOATS)
    if previous_mask is not None:
        check.require_shape(op, "previous_mask", previous_mask, tuple(logits.shape[:2]), "[B, N]")
        check.require_dtype(op, "previous_mask", previous_mask, (torch.bool,), "use previous_mask.bool()")
        check.require_device(op, "previous_mask", previous_mask, logits.device)
