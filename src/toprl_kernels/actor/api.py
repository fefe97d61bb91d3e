"""actor_score: contract, checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toprl_kernels import configs
from toprl_kernels import dispatch as check
from toprl_kernels.actor.eager import actor_score_eager
from toprl_kernels.actor.reference import ActorCall, ActorWeights, FoldedActorWeights, actor_score_reference
from toprl_kernels.dispatch import choose, implementation, register

OP = "actor_score"
MAX_WIDTH = 256  # of the kernels: fc3's accumulator stays in registers
# Up to here the two fused kernels take the automatic choice where nobody measured: at few tokens the seventeen eager
# ones are bound by their launches, at many by products, which cuBLAS makes better.
FUSED_TOKENS = 8192
MEASURED = "measured"  # as a backend: the faster implementation for this size on this GPU


def actor_score(
    hidden_states: Tensor,
    stage: int,
    weights: ActorWeights | FoldedActorWeights,
    *,
    valid_mask: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Keep/drop logits for every token: the policy network, whose cost is Eq. 11.

    With GELU in its exact (erf) form and d2 the width::

        z = GELU(fc1(LayerNorm(h)) + stage_bias[stage])
        z = [z[:d2/2], mean over the sample's valid tokens of z[d2/2:]]
        z = GELU(fc2 z);  z = GELU(fc3 z);  logits = head z

    On CUDA the automatic choice takes the fused kernels up to 8,192 tokens and eager above, unless a measurement says
    otherwise (:func:`toprl_kernels.configs.faster`). When a gradient is needed it is always eager, recorded by autograd
    operation by operation; after a forward by the kernels the backward recomputes that.

    Autocast changes nothing: all layers run in the dtype of the weights.

    Args:
        hidden_states: h, [B, N, d1], floating. Converted to the dtype of the weights, in which all layers run.
        stage: pruning stage, 0-based, 0 <= stage < T (the paper's t - 1).
        weights: see :class:`ActorWeights`; all of one dtype and device, d2 even. The kernels fold LayerNorm into fc1:
            for every call of these weights, or once, by :func:`toprl_kernels.fold_actor_weights` (no gradient then).
        valid_mask: [B, N] bool (or [B, V]), True = counts in the mean. The hidden state of another token is never
            looked at: its logits are those of zeros.
        indices: [B, V] int64, score these tokens of each sample instead of all; -1 = padding, which is not valid.
        cu_seqlens: [S + 1] int32 or int64, 0 first and ascending, as flash attention has it: S sequences of any length
            follow one another in hidden_states [N, d1] (valid_mask [N]), and each has its mean. Not with ``indices``.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.dispatch`.

    Returns:
        logits [B, N, 2] ([B, V, 2], [N, 2]) in the dtype of the weights, or in float32 for folded ones, as 16 bits
        would tie many tokens; index 0 = keep, index 1 = drop. A sample without any valid token has a mean of 0.

    Raises:
        TypeError, ValueError: arguments that do not fit together; stage out of range; d2 odd.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64, d2 > 256).
        NotImplementedError: without a gradient under torch.vmap; inputs with forward-mode tangents.

    There is no second derivative with backend="triton".

    Example:
        >>> import torch
        >>> from toprl_kernels import actor_score
        >>> from toprl_kernels.testing import make_actor_weights
        >>> actor_score(torch.randn(2, 5, 16), 0, make_actor_weights(16, 8)).shape
        torch.Size([2, 5, 2])
    """
    folded: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(weights, FoldedActorWeights):
        weights, *parts = weights
        folded = tuple(parts)
    packed = cu_seqlens is not None
    if cu_seqlens is not None:
        check.require(OP, "hidden_states", hidden_states, "[N, d1] with cu_seqlens", 2)
        fix = "use cu_seqlens.int()"
        check.require(OP, "cu_seqlens", cu_seqlens, "[S + 1]", 1, check.INTEGERS, hidden_states.device, fix)
        if indices is not None or len(cu_seqlens) < 2:
            raise ValueError(f"{OP}: cu_seqlens needs at least one sequence, and no indices")
        hidden_states, valid_mask = hidden_states[None], None if valid_mask is None else valid_mask[None]
    check.require(OP, "hidden_states", hidden_states, "[B, N, d1]", 3, check.FLOATS)
    _check_weights(hidden_states, stage, weights)
    shape, device = tuple(hidden_states.shape[:2]), hidden_states.device
    if indices is not None:
        check.require(OP, "indices", indices, "[B, V]", 2, check.LONG, device, "use indices.long()")
        shape = (shape[0], indices.shape[1])
        check.require(OP, "indices", indices, "[B, V]", shape)
    fix = "use valid_mask.bool(), True = counts"
    check.require_given(OP, "valid_mask", valid_mask, "[B, N]", shape, check.BOOL, device, fix)
    dtype = weights.fc1_weight.dtype
    obstacle = None
    for name, tensor in (("hidden_states", hidden_states), ("weights", weights.fc1_weight)):
        if tensor.dtype not in check.HALF_AND_SINGLE:
            obstacle = f"{name} has dtype {check.dtype_name(tensor.dtype)}, the kernels take 16 and 32 bit"
    if weights.fc1_weight.shape[0] > MAX_WIDTH:
        obstacle = f"width d2={weights.fc1_weight.shape[0]}, the kernels take d2 <= {MAX_WIDTH}"
    choice = choose(OP, backend, device, obstacle, dtype=dtype)
    bounds = cu_seqlens if cu_seqlens is None else cu_seqlens.long()
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, *weights))
    named_triton = choice.name == "triton" and not choice.is_automatic
    call = ActorCall(hidden_states, weights, folded, valid_mask, indices, bounds, stage)
    if choice.name == "reference" or (needs_gradient and not named_triton):
        run = actor_score_reference if choice.name == "reference" else actor_score_eager
        with torch.autocast(device.type, enabled=False):
            logits = run(call)
    else:
        backend = MEASURED if choice.name == "triton" and choice.is_automatic else choice.name
        logits = _op(hidden_states, *weights, *folded, *call[3:], backend)
    return logits[0] if packed else logits


def _check_weights(hidden_states: Tensor, stage: int, weights: ActorWeights) -> None:
    if not isinstance(weights, ActorWeights):
        raise TypeError(f"{OP}: weights must be an ActorWeights or FoldedActorWeights, got {type(weights).__name__}")
    check.require(OP, "weights.fc1_weight", weights.fc1_weight, "[d2, d1]", 2, check.FLOATS)
    check.require(OP, "weights.stage_bias", weights.stage_bias, "[T, d2]", 2)
    d1, d2, num_stages = hidden_states.shape[2], weights.fc1_weight.shape[0], weights.stage_bias.shape[0]
    if d2 < 2 or d2 % 2:
        raise ValueError(f"{OP}: weights.fc1_weight has d2={d2} rows; d2 must be even (one half local, one half mean)")
    shapes = (d1,), (d1,), (num_stages, d2), (d2, d1), (d2,), (d2, d2), (d2,), (d2, d2), (d2,), (2, d2), (2,)
    dtype, layout = weights.fc1_weight.dtype, f"for d1={d1}, d2={d2}, T={num_stages}"
    for name, tensor, shape in zip(ActorWeights._fields, weights, shapes, strict=True):
        fix = "all weights must share one dtype"
        check.require(OP, f"weights.{name}", tensor, layout, shape, (dtype,), hidden_states.device, fix)
    if isinstance(stage, bool) or not isinstance(stage, int):
        raise TypeError(f"{OP}: stage must be an int, got {stage!r} of type {type(stage).__name__}")
    if not 0 <= stage < num_stages:
        raise ValueError(
            f"{OP}: stage={stage} is outside 0..{num_stages - 1} (weights.stage_bias has {num_stages} rows)"
        )


_NUM_WEIGHTS = len(ActorWeights._fields)
_WEIGHTS = ", ".join(f"Tensor {name}" for name in ActorWeights._fields)


def _split(*arguments: Any) -> ActorCall:
    """The call out of the tensors of the schema, in its order; ``stage`` is the last."""
    last = 1 + _NUM_WEIGHTS
    return ActorCall(arguments[0], ActorWeights(*arguments[1:last]), arguments[last : last + 3], *arguments[last + 3 :])


def _forward(*arguments: Any) -> Tensor:
    x, backend = _split(*arguments[:-1]), arguments[-1]
    if backend == MEASURED:
        tokens = x.hidden_states.shape[0] * (x.hidden_states if x.indices is None else x.indices).shape[1]
        like = x.weights.fc1_weight
        backend = configs.faster(OP, (tokens, like.shape[1], like.shape[0]), like.dtype, like.device)
        backend = backend or ("triton" if tokens <= FUSED_TOKENS else "eager")
    return implementation("actor", "actor_score", backend)(x)


def _fake(*arguments: Any) -> Tensor:
    x = _split(*arguments[:-1])
    tokens = x.hidden_states if x.indices is None else x.indices
    dtype = x.weights.fc1_weight.dtype if x.folded[0] is None else torch.float32
    return x.weights.fc1_weight.new_empty(x.hidden_states.shape[0], tokens.shape[1], 2, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.stage = inputs[-2]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-2])


def _backward(ctx: Any, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
    """Recompute the logits in eager, with a graph from the inputs to them."""
    number = 1 + _NUM_WEIGHTS
    gradients: list[Tensor | None] = [None] * (number + 8)
    needs = ctx.needs_input_grad[:number]
    if grad_logits is None or not any(needs):
        return tuple(gradients)
    saved = ctx.saved_tensors  # once: checkpointing recomputes a tensor for one reading
    leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(saved[:number], needs, strict=True)]
    with torch.enable_grad(), torch.autocast(grad_logits.device.type, enabled=False):
        logits = actor_score_eager(_split(*leaves, *saved[number:], ctx.stage))
        wanted = [place for place, needed in enumerate(needs) if needed]
        results = torch.autograd.grad(logits, [leaves[place] for place in wanted], grad_logits)
    for place, result in zip(wanted, results, strict=True):
        gradients[place] = result
    return tuple(gradients)


_op = register(
    f"actor_score(Tensor hidden_states, {_WEIGHTS}, Tensor? folded_weight, Tensor? colsum, Tensor? folded_bias, "
    "Tensor? valid_mask, Tensor? indices, Tensor? bounds, int stage, str backend) -> Tensor",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
