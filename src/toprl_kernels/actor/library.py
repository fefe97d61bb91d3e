"""torch.library registration of actor_score and its backward, which recomputes the activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from toprl_kernels import configs
from toprl_kernels._library import register
from toprl_kernels.actor.eager import INPUTS, actor_score_backward, actor_score_eager
from toprl_kernels.actor.weights import ActorWeights

MEASURED = "measured"  # as a backend: the faster one for this size on this GPU, the eager path if nobody measured

_WEIGHTS = ", ".join(f"Tensor {name}" for name in ActorWeights._fields)
_NUM_WEIGHTS = len(ActorWeights._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[ActorWeights, tuple[Any, ...]]:
    """The weights, which stand in a row in the schemas, and what follows them."""
    return tuple.__new__(ActorWeights, arguments[:_NUM_WEIGHTS]), arguments[_NUM_WEIGHTS:]


def _logits(hidden_states: Tensor, *arguments: Any) -> Tensor:
    weights, (valid_mask, stage, backend) = _split(arguments)
    if backend == MEASURED:
        batch, num_tokens, d1 = hidden_states.shape
        like = weights.fc1_weight
        sizes = (batch * num_tokens, d1, like.shape[0])
        preference = configs.faster("actor_score", sizes, like.dtype, like.device)
        backend = "eager" if preference is None else preference.name
    if backend == "triton":
        from toprl_kernels.actor.triton import actor_score_triton

        return actor_score_triton(hidden_states, valid_mask, weights, stage)
    return actor_score_eager(hidden_states, valid_mask, weights, stage, False)[0]


def _logits_fake(hidden_states: Tensor, *arguments: Any) -> Tensor:
    return _split(arguments)[0].fc1_weight.new_empty(*hidden_states.shape[:2], 2)


def _backward(grad_logits: Tensor, hidden_states: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (valid_mask, stage, needs) = _split(arguments)
    _, activations = actor_score_eager(hidden_states, valid_mask, weights, stage, True)
    gradients = actor_score_backward(grad_logits, hidden_states, valid_mask, weights, stage, activations, needs)
    return tuple(grad_logits.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(grad_logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs = arguments[: len(INPUTS)], arguments[-1]
    return tuple(
        tensor.new_empty(tensor.shape) if needed else grad_logits.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.stage, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[: len(INPUTS)])
    if grad_logits is None or not any(needs):
        return (None,) * (len(INPUTS) + 3)
    gradients = backward_op(grad_logits, *ctx.saved_tensors, ctx.stage, needs)
    return *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None, None, None


backward_op = register(
    f"actor_score_backward(Tensor grad_logits, Tensor hidden_states, {_WEIGHTS}, Tensor? valid_mask, int stage, "
    "bool[] needs) -> (" + ", ".join(["Tensor"] * len(INPUTS)) + ")",
    _backward,
    _backward_fake,
)

logits_op = register(
    f"actor_score(Tensor hidden_states, {_WEIGHTS}, Tensor? valid_mask, int stage, str backend) -> Tensor",
    _logits,
    _logits_fake,
    setup_context=_setup_context,
    backward=_autograd,
    num_inputs=len(INPUTS),
)
