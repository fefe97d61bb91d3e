"""Registration: selection and gather as one op, whose backward is a scatter of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toprl_kernels._library import register
from toprl_kernels.topk.eager import topk_compact_backward_eager, topk_compact_eager

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward(*arguments: Any) -> Outputs:
    inputs = arguments[:-1]
    if arguments[-1] == "triton":
        from toprl_kernels.topk.triton import topk_compact_triton

        return topk_compact_triton(*inputs)
    return topk_compact_eager(*inputs)


def _forward_fake(
    hidden_states: Tensor,
    scores: Tensor,
    k: Tensor | None,
    length: int,
    valid_mask: Tensor | None,
    position_ids: Tensor | None,
    left: bool,
    inverse: bool,
    backend: str,
) -> Outputs:
    samples, num_tokens = scores.shape
    indices = scores.new_empty(samples, length, dtype=torch.int64)
    positions = indices.new_empty(0)
    if position_ids is not None:
        positions = position_ids.new_empty(*position_ids.shape[:-1], length)
    slots = indices.new_empty((samples, num_tokens) if inverse else 0)
    hidden = hidden_states.new_empty(samples, length, hidden_states.shape[2])
    return hidden, indices, torch.empty_like(indices, dtype=torch.bool), positions, slots


def _backward_implementation(gradient: Tensor, indices: Tensor, num_tokens: int, padded: bool, backend: str) -> Tensor:
    if backend == "triton":
        from toprl_kernels.topk.triton import topk_compact_backward_triton

        return topk_compact_backward_triton(gradient, indices, num_tokens)
    return topk_compact_backward_eager(gradient, indices, num_tokens, padded)


def _backward_fake(gradient: Tensor, indices: Tensor, num_tokens: int, padded: bool, backend: str) -> Tensor:
    return gradient.new_empty(gradient.shape[0], num_tokens, gradient.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    hidden_states, _, k, _, valid_mask, _, _, _, backend = inputs
    ctx.save_for_backward(output[1])
    ctx.options = hidden_states.size(1), k is not None or valid_mask is not None, backend


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    scattered = backward_op(gradient, indices, *ctx.options)
    return (scattered, *[None] * 8)


backward_op = register(
    "topk_compact_backward(Tensor gradient, Tensor indices, SymInt num_tokens, bool padded, str backend) -> Tensor",
    _backward_implementation,
    _backward_fake,
)
forward_op = register(
    "topk_compact(Tensor hidden_states, Tensor scores, Tensor? k, SymInt length, Tensor? valid_mask, "
    "Tensor? position_ids, bool left, bool inverse, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    num_inputs=1,
    only_first=True,
)
