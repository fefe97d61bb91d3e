"""Registration: the gather with its backward, and the form that writes into its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toprl_kernels._library import register
from toprl_kernels.cache.eager import (
    compact_cache_backward_eager,
    compact_cache_eager,
    compact_cache_inplace_eager,
)


def _forward(keys: Tensor, values: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from toprl_kernels.cache.triton import compact_cache_triton

        return compact_cache_triton(keys, values, indices)
    return compact_cache_eager(keys, values, indices)


def _forward_fake(keys: Tensor, values: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    samples, heads = keys.shape[:2]
    length = indices.shape[1]
    return (
        keys.new_empty(samples, heads, length, keys.shape[3]),
        values.new_empty(samples, heads, length, values.shape[3]),
    )


def _inplace(keys: Tensor, values: Tensor, indices: Tensor, backend: str) -> None:
    if backend == "triton":
        from toprl_kernels.cache.triton import compact_cache_inplace_triton

        compact_cache_inplace_triton(keys, values, indices)
        # a kernel's writes are invisible to autograd, which must refuse to use what it saved of these tensors before
        torch.autograd.graph.increment_version([cache for cache in (keys, values) if not cache.is_inference()])
    else:
        compact_cache_inplace_eager(keys, values, indices)


def _inplace_fake(keys: Tensor, values: Tensor, indices: Tensor, backend: str) -> None:
    return None


def _backward_implementation(
    indices: Tensor, grad_keys: Tensor | None, grad_values: Tensor | None, num_tokens: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from toprl_kernels.cache.triton import compact_cache_backward_triton

        return compact_cache_backward_triton(indices, grad_keys, grad_values, num_tokens)
    return compact_cache_backward_eager(indices, grad_keys, grad_values, num_tokens)


def _backward_fake(
    indices: Tensor, grad_keys: Tensor | None, grad_values: Tensor | None, num_tokens: int, backend: str
) -> tuple[Tensor, Tensor]:
    def make(gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return torch.empty(0, device=indices.device)
        return gradient.new_empty(*gradient.shape[:2], num_tokens, gradient.shape[3])

    return make(grad_keys), make(grad_values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    keys, _, indices, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices)
    ctx.options = keys.size(2), backend


def _backward(ctx: Any, grad_keys: Tensor | None, grad_values: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    wanted = [
        gradient if gradient is not None and needed else None
        for gradient, needed in zip((grad_keys, grad_values), ctx.needs_input_grad[:2], strict=True)
    ]
    if wanted == [None, None]:
        return None, None, None, None
    results = backward_op(indices, *wanted, *ctx.options)
    keys, values = (None if gradient is None else result for gradient, result in zip(wanted, results, strict=True))
    return keys, values, None, None


backward_op = register(
    "compact_cache_backward(Tensor indices, Tensor? grad_keys, Tensor? grad_values, SymInt num_tokens, str backend)"
    " -> (Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)
forward_op = register(
    "compact_cache(Tensor keys, Tensor values, Tensor indices, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    num_inputs=2,
)
inplace_op = register(
    "compact_cache_(Tensor(a!) keys, Tensor(b!) values, Tensor indices, str backend) -> ()",
    _inplace,
    _inplace_fake,
)
