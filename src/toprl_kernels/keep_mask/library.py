"""Registration: one op for a drawn and for a given mask, and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toprl_kernels._library import register
from toprl_kernels.keep_mask.eager import keep_mask_backward_eager, keep_mask_eager

Outputs = tuple[Tensor, Tensor, Tensor]


def _forward(*arguments: Any) -> Outputs:
    inputs = arguments[:-2]  # tau is for the backward
    if arguments[-1] == "triton":
        from toprl_kernels.keep_mask.triton import keep_mask_triton

        return keep_mask_triton(*inputs)
    return keep_mask_eager(*inputs)


def _forward_fake(logits: Tensor, uniform: Tensor | None, given: Tensor | None, *arguments: Any) -> Outputs:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_prob = logits.new_empty(logits.shape[:-1], dtype=dtype)
    keep = logits.new_empty(logits.shape[:-1] if given is None else 0, dtype=dtype)
    return keep, log_prob, torch.empty_like(log_prob)


def _backward_implementation(*arguments: Any) -> Tensor:
    *inputs, backend = arguments
    implementation = keep_mask_backward_eager
    if backend == "triton":
        from toprl_kernels.keep_mask.triton import keep_mask_backward_triton as implementation
    return implementation(*inputs)


def _backward_fake(logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.options = inputs[-2:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-2])
    if inputs[2] is not None:  # a given mask
        ctx.mark_non_differentiable(output[0])


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    result = None
    if any(gradient is not None for gradient in gradients):
        logits, *others = ctx.saved_tensors
        result = backward_op(logits, *gradients, *others, *ctx.options)
    return (result, *[None] * 7)


backward_op = register(
    "keep_mask_backward(Tensor logits, Tensor? grad_keep_mask, Tensor? grad_log_prob, Tensor? grad_entropy, "
    "Tensor? uniform, Tensor? given, Tensor? seed, Tensor? token_ids, Tensor? previous_mask, float tau, str backend)"
    " -> Tensor",
    _backward_implementation,
    _backward_fake,
)
forward_op = register(
    "keep_mask(Tensor logits, Tensor? uniform, Tensor? given, Tensor? seed, Tensor? token_ids, Tensor? previous_mask, "
    "float tau, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    num_inputs=1,
)
