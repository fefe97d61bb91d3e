"""The public function: contract, checks, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels import _checks as check
from toprl_kernels._known import Finding, KnownCalls, choose_for, examined
from toprl_kernels._library import is_transformed, without_autocast
from toprl_kernels.actor import library
from toprl_kernels.actor.eager import actor_score_recorded
from toprl_kernels.actor.reference import actor_score_reference
from toprl_kernels.actor.weights import ActorWeights

OP = "actor_score"
MAX_WIDTH = 256  # of the kernels: fc3's accumulator stays in registers


def actor_score(
    hidden_states: Tensor,
    stage: int,
    weights: ActorWeights,
    *,
    valid_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Keep/drop logits for every token: the policy network, whose cost is Eq. 11.

    With GELU in its exact (erf) form and d2 the width::

        z = GELU(fc1(LayerNorm(h)) + stage_bias[stage])
        z = [z[:d2/2], mean over the sample's valid tokens of z[d2/2:]]
        z = GELU(fc2 z);  z = GELU(fc3 z);  logits = head z

    On CUDA the automatic choice takes the fused kernels only where they were measured to be faster on this kind of
    GPU for this size (:func:`toprl_kernels.configs.faster`; ``python bench/tune.py`` measures), else eager.
    When a gradient is needed it is always eager, recorded by autograd operation by operation; after a forward by the
    kernels the backward recomputes the activations. The kernels fold LayerNorm into fc1 once per version of the
    weights.

    Autocast changes nothing: all layers run in the dtype of the weights.

    Args:
        hidden_states: h, [B, N, d1], floating. Converted to the dtype of the weights, in which all layers run.
        stage: pruning stage, 0-based, 0 <= stage < T (the paper's t - 1).
        weights: see :class:`ActorWeights`; all of one dtype and device, d2 even.
        valid_mask: [B, N] bool, True = counts in the mean; the others still get logits. A sample without any valid
            token has a mean of 0.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.backend`.

    Returns:
        logits [B, N, 2] in the dtype of the weights; index 0 = keep, index 1 = drop.

    Raises:
        TypeError, ValueError: arguments that do not fit together; stage out of range; d2 odd.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64, d2 > 256).
        NotImplementedError: under torch.vmap.

    There is no second derivative with backend="triton".

    Example:
        >>> import torch
        >>> from toprl_kernels import actor_score
        >>> from toprl_kernels.testing import make_actor_weights
        >>> actor_score(torch.randn(2, 5, 16), 0, make_actor_weights(16, 8)).shape
        torch.Size([2, 5, 2])
    """
    found = None
    if type(weights) is ActorWeights:
        found = _known.find((hidden_states, *weights))
    if found is None:
        found = _examine(hidden_states, stage, weights, valid_mask)
    if not (
        isinstance(stage, int)
        and stage is not True
        and stage is not False
        and 0 <= stage < found.extra
        and (valid_mask is None or _mask_fits(valid_mask, hidden_states))
    ):
        _explain_misfit(hidden_states, stage, weights, valid_mask)
    choice = choose_for(found, backend)
    if choice.name == "reference":
        return actor_score_reference(hidden_states, stage, weights, valid_mask=valid_mask)
    is_measured = choice.is_automatic and choice.name == "triton"
    if (
        (is_measured or choice.name == "eager")
        and found.requires_grad
        and torch.is_grad_enabled()
        and (found.is_plain or not is_transformed())  # the op refuses vmap
    ):
        return without_autocast(actor_score_recorded, hidden_states, valid_mask, weights, stage)
    run = library.logits_op.route(found.is_plain, found.requires_grad, hidden_states)
    return run(hidden_states, *weights, valid_mask, stage, library.MEASURED if is_measured else choice.name)


_known = KnownCalls()


def _examine(hidden_states: Tensor, stage: int, weights: ActorWeights, valid_mask: Tensor | None) -> Finding:
    if not _tensors_fit(hidden_states, weights):
        _explain_misfit(hidden_states, stage, weights, valid_mask)
    tensors = (hidden_states, *weights)
    found = examined(
        OP,
        tensors,
        requires_grad=any(tensor.requires_grad for tensor in tensors),
        obstacle=_obstacle(hidden_states, weights),
        dtype=weights.fc1_weight.dtype,
        extra=weights.stage_bias.shape[0],
    )
    _known.remember(found, tensors, any_size=(0, 1))
    return found


def _obstacle(hidden_states: Tensor, weights: ActorWeights) -> str | None:
    if hidden_states.dtype not in check.HALF_AND_SINGLE:
        return _double("hidden_states", hidden_states)
    if weights.fc1_weight.dtype not in check.HALF_AND_SINGLE:
        return _double("weights", weights.fc1_weight)
    if weights.fc1_weight.shape[0] > MAX_WIDTH:
        return f"width d2={weights.fc1_weight.shape[0]}, the kernels take d2 <= {MAX_WIDTH}"
    return None


def _double(name: str, tensor: Tensor) -> str:
    return f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, the kernels take 16 and 32 bit"


def _expected_shapes(d1: int, d2: int, num_stages: int) -> tuple[tuple[int, ...], ...]:
    """Of the fields of ActorWeights."""
    wide, square = (d2,), (d2, d2)
    return (d1,), (d1,), (num_stages, d2), (d2, d1), wide, square, wide, square, wide, (2, d2), (2,)


def _tensors_fit(hidden_states: Tensor, weights: ActorWeights) -> bool:
    try:
        _, _, d1 = hidden_states.shape
        d2, device, dtype = weights.fc1_weight.shape[0], hidden_states.device, weights.fc1_weight.dtype
        shapes = _expected_shapes(d1, d2, weights.stage_bias.shape[0])
        return (
            isinstance(weights, ActorWeights)
            and all(
                tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
                for tensor, shape in zip(weights, shapes, strict=True)
            )
            and d2 >= 2
            and d2 % 2 == 0
            and dtype in check.FLOATS
            and hidden_states.dtype in check.FLOATS
        )
    except (AttributeError, ValueError, IndexError):  # not a tensor, another number of dimensions
        return False


def _mask_fits(valid_mask: Tensor, hidden_states: Tensor) -> bool:
    return (
        isinstance(valid_mask, Tensor)
        and valid_mask.shape == hidden_states.shape[:2]
        and valid_mask.dtype == torch.bool
        and valid_mask.device == hidden_states.device
    )


def _explain_misfit(hidden_states: Tensor, stage: int, weights: ActorWeights, valid_mask: Tensor | None) -> None:
    """Raise the error that names the argument."""
    check.require_ndim(OP, "hidden_states", hidden_states, 3, "[B, N, d1]")
    check.require_dtype(OP, "hidden_states", hidden_states, check.FLOATS)
    if not isinstance(weights, ActorWeights):
        raise TypeError(f"{OP}: weights must be an ActorWeights, got {type(weights).__name__}")
    check.require_ndim(OP, "weights.fc1_weight", weights.fc1_weight, 2, "[d2, d1]")
    check.require_ndim(OP, "weights.stage_bias", weights.stage_bias, 2, "[T, d2]")
    d1 = hidden_states.shape[2]
    d2 = weights.fc1_weight.shape[0]
    num_stages = weights.stage_bias.shape[0]
    if d2 < 2 or d2 % 2:
        raise ValueError(f"{OP}: weights.fc1_weight has d2={d2} rows; d2 must be even (one half local, one half mean)")
    shapes = _expected_shapes(d1, d2, num_stages)
    dtype = weights.fc1_weight.dtype
    for name, tensor, shape in zip(ActorWeights._fields, weights, shapes, strict=True):
        check.require_shape(OP, f"weights.{name}", tensor, shape, f"for d1={d1}, d2={d2}, T={num_stages}")
        check.require_dtype(OP, f"weights.{name}", tensor, (dtype,), "all weights must share one dtype")
        check.require_device(OP, f"weights.{name}", tensor, hidden_states.device)
    check.require_dtype(OP, "weights.fc1_weight", weights.fc1_weight, check.FLOATS)
    if isinstance(stage, bool) or not isinstance(stage, int):
        raise TypeError(f"{OP}: stage must be an int, got {stage!r} of type {type(stage).__name__}")
    if not 0 <= stage < num_stages:
        raise ValueError(
            f"{OP}: stage={stage} is outside 0..{num_stages - 1} (weights.stage_bias has {num_stages} rows)"
        )
    if valid_mask is not None:
        check.require_shape(OP, "valid_mask", valid_mask, tuple(hidden_states.shape[:2]), "[B, N]")
        check.require_dtype(OP, "valid_mask", valid_mask, (torch.bool,), "use valid_mask.bool(), True = counts")
        check.require_device(OP, "valid_mask", valid_mask, hidden_states.device)
    raise AssertionError(f"{OP}: arguments were refused for no stated reason")
