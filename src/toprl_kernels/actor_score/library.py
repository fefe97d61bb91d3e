"""torch.library registration of actor_score: without a gradient, with one, and the explicit backward."""

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


def _logits(hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any) -> Tensor:
    return _run(hidden_states, valid_mask, arguments, False)[0]


def _run(
    hidden_states: Tensor, valid_mask: Tensor | None, arguments: tuple[Any, ...], keep: bool
) -> tuple[Tensor, Activations | None]:
    weights, (stage, backend) = ActorWeights._make(arguments[:_NUM_WEIGHTS]), arguments[_NUM_WEIGHTS:]
    if backend == MEASURED:
        batch, num_tokens, d1 = hidden_states.shape
        like = weights.fc1_weight
        backend = configs.faster("actor_score", (batch * num_tokens, d1, like.shape[0]), like.dtype, like.device).name
    if backend == "triton":
        from toprl_kernels.actor_score.triton import actor_score_triton

        return actor_score_triton(hidden_states, valid_mask, weights, stage), None
    return actor_score_eager(hidden_states, valid_mask, weights, stage, keep)


def _logits_fake(hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any) -> Tensor:
    like = ActorWeights._make(arguments[:_NUM_WEIGHTS]).fc1_weight
    return like.new_empty(*hidden_states.shape[:2], 2)


def _forward(hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    logits, activations = _run(hidden_states, valid_mask, arguments, True)
    return logits, *(activations or [logits.new_empty(0) for _ in range(3)])


def _forward_fake(hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    logits = _logits_fake(hidden_states, valid_mask, *arguments)
    width = arguments[ActorWeights._fields.index("fc1_weight")].shape[0]
    kept = (*logits.shape[:2], width) if arguments[-1] == "eager" else (0,)
    return logits, *(logits.new_empty(kept) for _ in range(3))


def _backward(
    grad_logits: Tensor, hidden_states: Tensor, valid_mask: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    weights, (*kept, stage, is_kept, needs) = ActorWeights._make(arguments[:_NUM_WEIGHTS]), arguments[_NUM_WEIGHTS:]
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
    ctx.stage = inputs[-2]
    ctx.is_kept = inputs[-1] == "eager"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-2], *output[1:])


def _autograd(ctx: Any, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2 : 2 + _NUM_WEIGHTS]]
    if grad_logits is None or not any(needs):
        return (None,) * (len(INPUTS) + 3)
    gradients = backward_op(grad_logits, *ctx.saved_tensors, ctx.stage, ctx.is_kept, needs)
    by_hidden, *by_weights = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return by_hidden, None, *by_weights, None, None


backward_op = register(
    f"actor_score_backward(Tensor grad_logits, Tensor hidden_states, Tensor? valid_mask, {_WEIGHTS}, "
    "Tensor first, Tensor second, Tensor third, int stage, bool is_kept, bool[] needs) -> ("
    + ", ".join(["Tensor"] * len(INPUTS))
    + ")",
    _backward,
    _backward_fake,
)

_SIGNATURE = f"(Tensor hidden_states, Tensor? valid_mask, {_WEIGHTS}, int stage, str backend)"

logits_op = register(f"actor_score{_SIGNATURE} -> Tensor", _logits, _logits_fake)

# Returns the logits and the activations that the backward starts from (empty where the kernels ran).
training_op = register(
    f"actor_score_training{_SIGNATURE} -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
    num_inputs=2 + _NUM_WEIGHTS,
    only_first=True,
)
