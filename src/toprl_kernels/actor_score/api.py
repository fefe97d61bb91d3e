"""The public function: contract, checks, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels import _checks as check
from toprl_kernels.actor_score.eager import actor_score_eager
from toprl_kernels.actor_score.reference import actor_score_reference
from toprl_kernels.actor_score.weights import ActorWeights
from toprl_kernels.backend import choose

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

    Differentiable in hidden_states and weights on the eager path. The kernels are forward only: when a gradient is
    needed, the automatic choice is eager.

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
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64, d2 > 256, or a gradient
            is needed).

    Example:
        >>> import torch
        >>> from toprl_kernels import actor_score
        >>> from toprl_kernels.testing import make_actor_weights
        >>> actor_score(torch.randn(2, 5, 16), 0, make_actor_weights(16, 8)).shape
        torch.Size([2, 5, 2])
    """
    _validate(hidden_states, stage, weights, valid_mask)
    choice = choose(OP, backend, hidden_states.device, _obstacle(hidden_states, weights))
    if choice.name == "triton":
        from toprl_kernels.actor_score.triton import actor_score_triton as implementation
    elif choice.name == "reference":
        implementation = actor_score_reference
    else:
        implementation = actor_score_eager
    return implementation(hidden_states, stage, weights, valid_mask=valid_mask)


def _obstacle(hidden_states: Tensor, weights: ActorWeights) -> str | None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *weights)):
        return "a gradient is needed and the kernels are forward only (use backend='eager', or torch.no_grad())"
    for name, tensor in (("hidden_states", hidden_states), ("weights", weights.fc1_weight)):
        if tensor.dtype not in check.HALF_AND_SINGLE:
            return f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, the kernels take 16 and 32 bit"
    if weights.fc1_weight.shape[0] > MAX_WIDTH:
        return f"width d2={weights.fc1_weight.shape[0]}, the kernels take d2 <= {MAX_WIDTH}"
    return None


def _validate(hidden_states: Tensor, stage: int, weights: ActorWeights, valid_mask: Tensor | None) -> None:
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
    shapes: tuple[tuple[int, ...], ...] = (
        (d1,), (d1,), (num_stages, d2), (d2, d1), (d2,), (d2, d2), (d2,), (d2, d2), (d2,), (2, d2), (2,),
    )  # fmt: skip
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
