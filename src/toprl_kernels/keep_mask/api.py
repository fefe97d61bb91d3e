"""The public functions: contract, checks, seed, dispatch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from toprl_kernels import _checks as check
from toprl_kernels._known import Finding, KnownCalls, choose_for, examined
from toprl_kernels.keep_mask.eager import draw_uniform
from toprl_kernels.keep_mask.library import forward_op
from toprl_kernels.keep_mask.reference import keep_mask_reference

OP = "sample_keep_mask"
OP_LOG_PROB = "keep_mask_log_prob"
MAX_SEED = 2**63 - 1
NUMBERS = (int, float)
ONE = (1,)


class KeepMaskSample(NamedTuple):
    """What :func:`sample_keep_mask` returns, each [B, N], float32 (float64 for float64 logits)."""

    keep_mask: Tensor  # 0 or 1, with the gradient of the relaxed sample
    log_prob: Tensor  # log probability of the drawn action
    entropy: Tensor  # nats


def sample_keep_mask(
    logits: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    token_ids: Tensor | None = None,
    tau: float = 1.0,
    previous_mask: Tensor | None = None,
    backend: str | None = None,
) -> KeepMaskSample:
    """Draw keep/drop for every token by the Gumbel-max rule (the action of the paper's policy).

    The mask is hard: keep where logit_keep - logit_drop + log u - log(1 - u) > 0, which has probability
    sigmoid(logit_keep - logit_drop) whatever tau is. Its gradient is that of the relaxed sample
    sigmoid((difference + noise) / tau) (straight-through).

    The noise of a token is a function of the seed and of the token's number alone (Philox4x32-10): the same on every
    device and backend, and unchanged when compaction has moved the token. It is a multiple of 2^-24 in (0, 1).

    Args:
        logits: [B, N, 2], floating, index 0 = keep, 1 = drop, finite. Sixteen-bit logits are widened first.
        seed: an int, or an int64 tensor [1] on the device of the logits, which is not waited for.
        generator: draws the seed instead; on the device of the logits. Default: PyTorch's generator.
        uniform: the noise itself, u in (0, 1), [B, N], instead of a seed.
        token_ids: [B, N] int64, the number of each token, all different. Default: b * N + n.
        tau: temperature of the gradient, > 0.
        previous_mask: [B, N] bool, False = dropped at an earlier stage: mask, log-probability, entropy and gradient
            are 0 there.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.backend`.

    Returns:
        KeepMaskSample(keep_mask, log_prob, entropy), each [B, N].

    Raises:
        TypeError, ValueError: arguments that do not fit together, tau <= 0, more than one source of noise.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64).

    Example:
        >>> import torch
        >>> from toprl_kernels import sample_keep_mask
        >>> logits = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]])
        >>> sample_keep_mask(logits, uniform=torch.full((1, 2), 0.5)).keep_mask
        tensor([[1., 0.]])
    """
    found = _known[OP].find((logits,)) or _examine(OP, logits)
    if previous_mask is not None:
        _validate_previous(OP, logits, previous_mask)
    if not (isinstance(tau, NUMBERS) and 0 < tau < math.inf):
        raise ValueError(f"{OP}: tau={tau!r} must be a number > 0; use a small one such as 0.05 for a sharp gradient")
    is_other = generator is not None or uniform is not None
    if is_other and (seed is not None) + (generator is not None) + (uniform is not None) > 1:
        sources = (("seed", seed), ("generator", generator), ("uniform", uniform))
        given = [name for name, value in sources if value is not None]
        raise ValueError(f"{OP}: {' and '.join(given)} are given together; pass one of them")
    if uniform is not None:
        check.require_shape(OP, "uniform", uniform, tuple(logits.shape[:-1]), "[B, N]")
        check.require_dtype(OP, "uniform", uniform, check.FLOATS)
        check.require_device(OP, "uniform", uniform, logits.device)
        uniform = uniform.detach().to(torch.promote_types(logits.dtype, torch.float32))
        if token_ids is not None:
            raise ValueError(f"{OP}: token_ids has no use with uniform; leave one of them out")
        drawn = None
    elif isinstance(seed, Tensor) and seed.shape == ONE and seed.dtype == torch.int64 and seed.device == found.device:
        drawn = seed
    else:
        drawn = _seed(seed, generator, found.device)
    if token_ids is not None:
        check.require_shape(OP, "token_ids", token_ids, tuple(logits.shape[:-1]), "[B, N]")
        check.require_dtype(OP, "token_ids", token_ids, (torch.int64,), "use token_ids.long()")
        check.require_device(OP, "token_ids", token_ids, logits.device)
    choice = choose_for(found, backend)
    if choice.name == "reference":
        return KeepMaskSample(*_reference(logits, uniform, None, drawn, token_ids, float(tau), previous_mask))
    run = forward_op.route(found.is_plain, found.requires_grad, logits)
    results = run(logits, uniform, None, drawn, token_ids, previous_mask, float(tau), choice.name)
    return tuple.__new__(KeepMaskSample, results)  # half the time of KeepMaskSample(*results)


def _seed(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """int64 [1] on the device, without waiting for it."""
    if isinstance(seed, Tensor):
        check.require_shape(OP, "seed", seed, ONE, "[1]")
        check.require_dtype(OP, "seed", seed, (torch.int64,), "use seed.long()")
        check.require_device(OP, "seed", seed, device)
        return seed
    if seed is None:
        return torch.randint(0, MAX_SEED, (1,), generator=generator, dtype=torch.int64, device=device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{OP}: seed must be an int or an int64 tensor [1], got {seed!r} of type {type(seed).__name__}")
    if not -MAX_SEED - 1 <= seed <= MAX_SEED:
        raise ValueError(f"{OP}: seed={seed} does not fit in an int64; use seed % 2**63")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


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
    found = _known[OP_LOG_PROB].find((logits,)) or _examine(OP_LOG_PROB, logits)
    if previous_mask is not None:
        _validate_previous(OP_LOG_PROB, logits, previous_mask)
    check.require_shape(OP_LOG_PROB, "keep_mask", keep_mask, tuple(logits.shape[:-1]), "[B, N]")
    check.require_dtype(OP_LOG_PROB, "keep_mask", keep_mask, (torch.bool, *check.FLOATS), "use keep_mask.bool()")
    check.require_device(OP_LOG_PROB, "keep_mask", keep_mask, logits.device)
    given = keep_mask.detach() > 0.5 if keep_mask.dtype != torch.bool else keep_mask
    choice = choose_for(found, backend)
    if choice.name == "reference":
        _, log_prob, entropy = _reference(logits, None, given, None, None, 1.0, previous_mask)
    else:
        run = forward_op.route(found.is_plain, found.requires_grad, logits)
        _, log_prob, entropy = run(logits, None, given, None, None, previous_mask, 1.0, choice.name)
    return log_prob, entropy


def _reference(
    logits: Tensor,
    uniform: Tensor | None,
    given: Tensor | None,
    seed: Tensor | None,
    token_ids: Tensor | None,
    tau: float,
    previous_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seed is not None:
        uniform = draw_uniform(logits.shape[:-1], seed, token_ids).to(logits.dtype)
    return keep_mask_reference(logits, uniform=uniform, given=given, tau=tau, previous_mask=previous_mask)


_known = {OP: KnownCalls(), OP_LOG_PROB: KnownCalls()}


def _validate_previous(op: str, logits: Tensor, previous_mask: Tensor) -> None:
    check.require_shape(op, "previous_mask", previous_mask, tuple(logits.shape[:2]), "[B, N]")
    check.require_dtype(op, "previous_mask", previous_mask, (torch.bool,), "use previous_mask.bool()")
    check.require_device(op, "previous_mask", previous_mask, logits.device)


def _examine(op: str, logits: Tensor) -> Finding:
    check.require_ndim(op, "logits", logits, 3, "[B, N, 2]")
    check.require_shape(op, "logits", logits, (*logits.shape[:2], 2), "[B, N, 2] with (keep, drop) last")
    check.require_dtype(op, "logits", logits, check.FLOATS)
    obstacle = None
    if logits.dtype == torch.float64:
        obstacle = "logits has dtype float64, the kernels take float16, bfloat16, float32"
    found = examined(op, (logits,), requires_grad=logits.requires_grad, obstacle=obstacle, dtype=logits.dtype)
    _known[op].remember(found, (logits,))
    return found
