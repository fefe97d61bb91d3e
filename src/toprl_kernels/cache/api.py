"""compact_cache: contract, checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from toprl_kernels import dispatch as check
from toprl_kernels.cache.eager import compact_cache_eager
from toprl_kernels.cache.reference import compact_cache_reference
from toprl_kernels.dispatch import choose, register
from toprl_kernels.topk.api import gather_backward

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
    check.require(OP, "keys", keys, "[B, Hkv, N, D]", 4)
    check.require(OP, "values", values, "[B, Hkv, N, Dv]", 4)
    check.require(OP, "values", values, "[B, Hkv, N, Dv]", (*keys.shape[:3], values.shape[3]), (), keys.device)
    check.require(OP, "indices", indices, "[B, K]", 2)
    shape = (keys.shape[0], indices.shape[1])
    check.require(OP, "indices", indices, "[B, K]", shape, check.LONG, keys.device, "use indices.long()")
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    keys, _, indices, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices)
    ctx.options = keys.size(2), backend


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    keys, values = (
        gather_backward(gradient, indices, *ctx.options) if gradient is not None and needed else None
        for gradient, needed in zip(gradients, ctx.needs_input_grad[:2], strict=True)
    )
    return keys, values, None, None


_forward_op = register(
    "compact_cache(Tensor keys, Tensor values, Tensor indices, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
