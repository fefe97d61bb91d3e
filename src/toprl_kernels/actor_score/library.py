"""torch.library registration of actor_score: the forward and its explicit backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from toprl_kernels import configs
from toprl_kernels._library import register
from toprl_kernels.actor_score.eager import INPUTS, Activations, actor_score_backward, actor_score_eager
from toprl_kernels.actor_score.weights import ActorWeights

MEASURED = "measured"  # as a backend: the faster one for this size on this GPU, the eager path if nobody measured

_WEIGHTS = ", ".join(f"Tensor {name}" for name in ActorWeights._fields)
_NUM_WEIGHTS = len(ActorWeights._fields)


def _forward(hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (stage, keep, backend) = ActorWeights(*arguments[:_NUM_WEIGHTS]), arguments[_NUM_WEIGHTS:]
    if backend == MEASURED:
        batch, num_tokens, d1 = hidden_states.shape
        like = weights.fc1_weight
        backend = configs.faster("actor_score", (batch * num_tokens, d1, like.shape[0]), like.dtype, like.device).name
    if backend == "triton":
        from toprl_kernels.actor_score.triton import actor_score_triton

        logits = actor_score_triton(hidden_states, valid_mask, weights, stage)
        return logits, *(logits.new_empty(0) for _ in range(3))
    logits, activations = actor_score_eager(hidden_states, valid_mask, weights, stage, keep)
    return logits, *(activations or (logits.new_empty(0) for _ in range(3)))


def _forward_fake(hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (_, keep, backend) = ActorWeights(*arguments[:_NUM_WEIGHTS]), arguments[_NUM_WEIGHTS:]
    like = weights.fc1_weight
    batch, num_tokens = hidden_states.shape[:2]
    kept = (batch, num_tokens, like.shape[0]) if keep and backend == "eager" else (0,)
    return like.new_empty(batch, num_tokens, 2), *(like.new_empty(kept) for _ in range(3))


def _backward(
    grad_logits: Tensor, hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    weights, (*kept, stage, is_kept, needs) = ActorWeights(*arguments[:_NUM_WEIGHTS]), arguments[_NUM_WEIGHTS:]
    activations = Activations(*kept) if is_kept else None
    if activations is None:  # the kernels keep nothing
        _, activations = actor_score_eager(hidden_states, valid_mask, weights, stage, True)
        assert activations is not None
    gradients = actor_score_backward(grad_logits, hidden_states, valid_mask, weights, stage, activations, needs)
    return tuple(grad_logits.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(
    grad_logits: Tensor, hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    inputs, needs = (hidden_states, *arguments[:_NUM_WEIGHTS]), arguments[-1]
    return tuple(
        tensor.new_empty(tensor.shape) if needed else grad_logits.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.stage, keep, backend = inputs
    ctx.is_kept = keep and backend == "eager"
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx: Any, grad_logits: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2 : 2 + _NUM_WEIGHTS]]
    if grad_logits is None or not any(needs):
        return (None,) * (len(INPUTS) + 4)
    gradients = backward(grad_logits, *ctx.saved_tensors, ctx.stage, ctx.is_kept, needs)
    by_hidden, *by_weights = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return by_hidden, None, *by_weights, None, None, None


backward = register(
    f"actor_score_backward(Tensor grad_logits, Tensor hidden_states, Tensor? valid_mask, {_WEIGHTS}, "
    "Tensor first, Tensor second, Tensor third, int stage, bool is_kept, bool[] needs) -> ("
    + ", ".join(["Tensor"] * len(INPUTS))
    + ")",
    _backward,
    _backward_fake,
)

# Returns the logits and the activations that the backward starts from (empty unless the eager path is to keep them).
forward = register(
    f"actor_score(Tensor hidden_states, Tensor? valid_mask, {_WEIGHTS}, int stage, bool keep, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
