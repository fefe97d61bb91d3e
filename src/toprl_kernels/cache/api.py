"""compact_cache: contract, checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from toprl_kernels import dispatch as check
from toprl_kernels.cache.reference import gather_rows_reference
from toprl_kernels.dispatch import choose, implementation, register

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
    check.require_flags(OP, validate=validate)
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
    new_keys, new_values = gather_rows([keys, values], indices, None, choice.name)
    return new_keys, new_values


def gather_rows(tensors: list[Tensor], indices: Tensor, origins: Tensor | None, backend: str) -> list[Tensor]:
    """Gather as :func:`gather_rows_reference` does; with ``origins`` only the first tensor may have a gradient."""
    if backend == "reference":
        return gather_rows_reference(tensors, indices, origins)
    return _gather_op(tensors, indices, origins, backend)


def _validate_values(indices: Tensor, num_tokens: int) -> None:
    outside = (indices < -1) | (indices >= num_tokens)
    if bool(outside.any()):
        raise ValueError(f"{OP}: indices has {indices[outside].tolist()} outside -1..N-1={num_tokens - 1}")
    ordered = indices.sort(dim=1).values
    if bool(((ordered[:, :-1] == ordered[:, 1:]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError(f"{OP}: indices names a token of a sample twice; the gradient needs unique indices")


def _gather(tensors: list[Tensor], indices: Tensor, origins: Tensor | None, backend: str) -> list[Tensor]:
    return implementation("cache", "gather_rows", backend)(tensors, indices, origins)


def _gather_fake(tensors: list[Tensor], indices: Tensor, origins: Tensor | None, backend: str) -> list[Tensor]:
    return [tensor.new_empty(*tensor.shape[:2], indices.shape[1], tensor.shape[3]) for tensor in tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, indices, _, backend = inputs
    ctx.mark_non_differentiable(*(rows for rows, x in zip(output, tensors, strict=True) if not x.requires_grad))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices)
    ctx.options = [x.size(2) for x in tensors], backend


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None] | None, ...]:
    (indices,), (sizes, backend) = ctx.saved_tensors, ctx.options
    parts = zip(gradients, sizes, ctx.needs_input_grad[0], strict=True)
    return [None if g is None or not n else _scatter_op(g, indices, size, backend) for g, size, n in parts], *[None] * 3


def _scatter(gradient: Tensor, indices: Tensor, num_tokens: int, backend: str) -> Tensor:
    return implementation("cache", "scatter_rows", backend)(gradient, indices, num_tokens)


def _scatter_fake(gradient: Tensor, indices: Tensor, num_tokens: int, backend: str) -> Tensor:
    return gradient.new_empty(*gradient.shape[:2], num_tokens, gradient.shape[3])


_scatter_op = register(
    "scatter_rows(Tensor gradient, Tensor indices, SymInt num_tokens, str backend) -> Tensor", _scatter, _scatter_fake
)
_gather_op = register(
    "gather_rows(Tensor[] tensors, Tensor indices, Tensor? origins, str backend) -> Tensor[]",
    _gather,
    _gather_fake,
    setup_context=_setup_context,
    backward=_backward,
)
