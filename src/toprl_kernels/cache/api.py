"""compact_cache: contract, checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toprl_kernels import dispatch as check
from toprl_kernels.cache.eager import compact_cache_backward_eager, compact_cache_eager
from toprl_kernels.cache.reference import compact_cache_reference
from toprl_kernels.dispatch import choose, register

OP = "compact_cache"


def compact_cache(
    keys: Tensor, values: Tensor, indices: Tensor, *, validate: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Keep the same tokens in every head of a layer's cached keys and values.

    For caches that were filled before the decision which tokens stay: ``indices`` is what
    :func:`toprl_kernels.topk_compact` returned, one call per layer. Differentiable in keys and values.

    Args:
        keys: [B, Hkv, N, D], any real dtype (float8 moves as bytes) and strides (a transposed [B, N, Hkv, D], a slice
            of a static cache).
        values: [B, Hkv, N, Dv].
        indices: [B, K] int64 in 0..N-1, unique per sample, -1 = padding.
        validate: also check the values of indices, which waits for the GPU.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.dispatch`.

    Returns:
        (keys, values), [B, Hkv, K, D] and [B, Hkv, K, Dv], new contiguous tensors, zero in the padding.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes or devices; under ``validate`` indices outside -1..N-1 or twice in a sample.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, complex tensors).
        NotImplementedError: under torch.vmap; inputs with forward-mode tangents.

    Example:
        >>> import torch
        >>> from toprl_kernels import compact_cache, topk_compact
        >>> cache = [(torch.arange(4.0).view(1, 1, 4, 1), torch.arange(4.0).view(1, 1, 4, 1)) for layer in range(2)]
        >>> kept = topk_compact(torch.zeros(1, 4, 8), torch.tensor([[0.1, 0.9, 0.2, 0.3]]), 2)
        >>> cache = [compact_cache(keys, values, kept.indices) for keys, values in cache]
        >>> cache[1][0].flatten().tolist()
        [1.0, 3.0]

        The layers of a transformers ``DynamicCache`` are such pairs:
        ``layer.keys, layer.values = compact_cache(layer.keys, layer.values, kept.indices)``.
    """
    check.require_ndim(OP, "keys", keys, 4, "[B, Hkv, N, D]")
    check.require_ndim(OP, "values", values, 4, "[B, Hkv, N, Dv]")
    check.require_shape(OP, "values", values, (*keys.shape[:3], values.shape[3]), "[B, Hkv, N, Dv]")
    check.require_device(OP, "values", values, keys.device)
    check.require_ndim(OP, "indices", indices, 2, "[B, K]")
    shape = (keys.shape[0], indices.shape[1])
    check.require(OP, "indices", indices, shape, "[B, K]", (torch.int64,), keys.device, "use indices.long()")
    if validate:
        _validate_values(indices, keys.shape[2])
    obstacle = None
    if keys.dtype.is_complex or values.dtype.is_complex:
        obstacle = "keys or values are complex, the kernels take real dtypes"
    choice = choose(OP, backend, keys.device, obstacle)
    if choice.name == "reference":
        return compact_cache_reference(keys, values, indices)
    return _forward_op(keys, values, indices, choice.name)


def _validate_values(indices: Tensor, num_tokens: int) -> None:
    outside = (indices < -1) | (indices >= num_tokens)
    if bool(outside.any()):
        raise ValueError(f"{OP}: indices has {indices[outside].tolist()} outside -1..N-1={num_tokens - 1}")
    ordered = indices.sort(dim=1).values
    if bool(((ordered[:, :-1] == ordered[:, 1:]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError(f"{OP}: indices names a token of a sample twice; the gradient needs unique indices")


def _forward(keys: Tensor, values: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from toprl_kernels.cache.triton import compact_cache_triton

        return compact_cache_triton(keys, values, indices)
    return compact_cache_eager(keys, values, indices)


def _forward_fake(keys: Tensor, values: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*keys.shape[:2], indices.shape[1])
    return keys.new_empty(*shape, keys.shape[3]), values.new_empty(*shape, values.shape[3])


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
    keys, values = (
        torch.empty(0, device=indices.device)
        if gradient is None
        else gradient.new_empty(*gradient.shape[:2], num_tokens, gradient.shape[3])
        for gradient in (grad_keys, grad_values)
    )
    return keys, values


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
_forward_op = register(
    "compact_cache(Tensor keys, Tensor values, Tensor indices, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
