"""The public functions: contract, checks, seed, dispatch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toprl_kernels import dispatch as check
from toprl_kernels.dispatch import Choice, choose, implementation, register
from toprl_kernels.keep_mask.eager import draw_uniform
from toprl_kernels.keep_mask.reference import Draw, keep_mask_reference

OP = "sample_keep_mask"
OP_LOG_PROB = "keep_mask_log_prob"
MAX_SEED = 2**63 - 1
NUMBERS = (int, float)


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
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.dispatch`.

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
    choice, shape = _examine(OP, logits, previous_mask, backend), tuple(logits.shape[:2])
    if not (isinstance(tau, NUMBERS) and 0 < tau < math.inf):
        raise ValueError(f"{OP}: tau={tau!r} must be a number > 0; use a small one such as 0.05 for a sharp gradient")
    sources = (("seed", seed), ("generator", generator), ("uniform", uniform))
    given = [name for name, value in sources if value is not None]
    if len(given) > 1:
        raise ValueError(f"{OP}: {' and '.join(given)} are given together; pass one of them")
    if uniform is not None:
        check.require(OP, "uniform", uniform, "[B, N]", shape, check.FLOATS, logits.device)
        uniform = uniform.detach().to(torch.promote_types(logits.dtype, torch.float32))
        if token_ids is not None:
            raise ValueError(f"{OP}: token_ids has no use with uniform; leave one of them out")
        drawn = None
    else:
        drawn = _seed(seed, generator, logits.device)
    fix = "use token_ids.long()"
    check.require_given(OP, "token_ids", token_ids, "[B, N]", shape, check.LONG, logits.device, fix)
    draw = Draw(logits, uniform, None, drawn, token_ids, previous_mask)
    return KeepMaskSample(*_run(draw, float(tau), choice.name))


def _seed(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """int64 [1] on the device, without waiting for it."""
    if isinstance(seed, Tensor):
        check.require(OP, "seed", seed, "[1]", (1,), check.LONG, device, "use seed.long()")
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
    choice = _examine(OP_LOG_PROB, logits, previous_mask, backend)
    shape, dtypes, fix = tuple(logits.shape[:2]), (torch.bool, *check.FLOATS), "use keep_mask.bool()"
    check.require(OP_LOG_PROB, "keep_mask", keep_mask, "[B, N]", shape, dtypes, logits.device, fix)
    given = keep_mask.detach() > 0.5 if keep_mask.dtype != torch.bool else keep_mask
    _, log_prob, entropy = _run(Draw(logits, None, given, None, None, previous_mask), 1.0, choice.name)
    return log_prob, entropy


def _run(x: Draw, tau: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        return _forward_op(*x, tau)
    uniform = x.uniform
    if x.seed is not None:
        uniform = draw_uniform(x.logits.shape[:-1], x.seed, x.token_ids)
        uniform = uniform.to(torch.promote_types(x.logits.dtype, torch.float32))
    return keep_mask_reference(x, uniform, tau)


def _examine(op: str, logits: Tensor, previous_mask: Tensor | None, backend: str | None) -> Choice:
    check.require(op, "logits", logits, "[B, N, 2]", 3, check.FLOATS)
    check.require(op, "logits", logits, "[B, N, 2] with (keep, drop) last", (*logits.shape[:2], 2))
    shape, fix = tuple(logits.shape[:2]), "use previous_mask.bool()"
    check.require_given(op, "previous_mask", previous_mask, "[B, N]", shape, check.BOOL, logits.device, fix)
    obstacle = None
    if logits.dtype == torch.float64:
        obstacle = "logits has dtype float64, the kernels take float16, bfloat16, float32"
    return choose(op, backend, logits.device, obstacle, dtype=logits.dtype)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("keep_mask", "keep_mask", "triton")(Draw(*arguments[:-1]))  # tau is for the backward


def _forward_fake(
    logits: Tensor, uniform: Tensor | None, given: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_prob = logits.new_empty(logits.shape[:-1], dtype=dtype)
    keep = logits.new_empty(logits.shape[:-1] if given is None else 0, dtype=dtype)
    return keep, log_prob, torch.empty_like(log_prob)


def _backward_implementation(*arguments: Any) -> Tensor:
    return implementation("keep_mask", "keep_mask_backward", "triton")(Draw(*arguments[:6]), *arguments[6:])


def _backward_fake(logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.tau = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1])
    if inputs[2] is not None:  # a given mask
        ctx.mark_non_differentiable(output[0])


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    result = None
    if any(gradient is not None for gradient in gradients):
        result = _backward_op(*ctx.saved_tensors, *gradients, ctx.tau)
    return (result, *[None] * 6)


_DRAW = "Tensor logits, " + ", ".join(f"Tensor? {name}" for name in Draw._fields[1:])
_backward_op = register(
    f"keep_mask_backward({_DRAW}, Tensor? grad_keep_mask, Tensor? grad_log_prob, Tensor? grad_entropy, float tau) "
    "-> Tensor",
    _backward_implementation,
    _backward_fake,
)
_forward_op = register(
    f"keep_mask({_DRAW}, float tau) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
