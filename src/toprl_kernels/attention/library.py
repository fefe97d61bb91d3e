"""Registration of masked attention: a forward op and a backward op, each running eager or Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toprl_kernels._library import register
from toprl_kernels.attention.eager import by_token, empty_output, masked_attention_forward_eager
from toprl_kernels.attention.eager_backward import masked_attention_backward_eager


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = arguments[:-2]  # the mask gradient's kind is for the backward
    if arguments[-1] == "triton":
        from toprl_kernels.attention.triton import masked_attention_forward_triton

        return masked_attention_forward_triton(*inputs)
    return masked_attention_forward_eager(*inputs)


def _forward_fake(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return empty_output(query), lse if arguments[-1] == "triton" else by_token(lse)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, backend = arguments
    if backend == "triton":
        from toprl_kernels.attention.triton import masked_attention_backward_triton as run
    else:
        run = masked_attention_backward_eager
    query = inputs[1]
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in run(*inputs))


def _backward_fake(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    needs = arguments[-2]
    wanted = zip((query, key, value, keep_mask), needs, strict=True)
    return tuple(tensor.new_empty(tensor.shape) if needed else query.new_empty(0) for tensor, needed in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)


def _autograd(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    if grad_output is None or not any(needs):
        return (None,) * 9
    is_causal, scale, bounded_mask_grad, backend = ctx.options
    gradients = backward(grad_output, *ctx.saved_tensors, is_causal, scale, bounded_mask_grad, needs, backend)
    return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *(None,) * 5)


backward = register(
    "masked_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor keep_mask, "
    "Tensor? key_padding_mask, Tensor output, Tensor lse, bool is_causal, float scale, bool bounded_mask_grad, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)

# The second result, the log-sum-exp of each row, is private to the backend: natural in eager, base 2 in Triton.
forward = register(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor keep_mask, Tensor? key_padding_mask, "
    "bool is_causal, float scale, bool bounded_mask_grad, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
    num_inputs=4,
    only_first=True,
)
