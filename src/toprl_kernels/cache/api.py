"""The public function: contract, checks, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels import _checks as check
from toprl_kernels._known import Finding, KnownCalls, choose_for, examined
from toprl_kernels.cache.library import forward_op, inplace_op
from toprl_kernels.cache.reference import compact_cache_reference

OP = "compact_cache"


def compact_cache(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    inplace: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the same tokens in every head of a layer's cached keys and values.

    For caches that were filled before the decision which tokens stay: ``indices`` is what
    :func:`toprl_kernels.topk_compact` returned, one call per layer. Differentiable in keys and values unless in place.

    Args:
        keys: [B, Hkv, N, D], any real dtype and strides (a transposed [B, N, Hkv, D], a slice of a static cache).
        values: [B, Hkv, N, Dv].
        indices: [B, K] int64 in 0..N-1, unique per sample, -1 = padding.
        inplace: move the rows inside the given storage. The first K rows then hold the result, the others are
            undefined. The indices have to ascend with the padding at the end (``padding_side="right"`` of
            topk_compact): a row must not move behind one that is still to be read.
        validate: also check the values of indices, which waits for the GPU.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.backend`.

    Returns:
        (keys, values), [B, Hkv, K, D] and [B, Hkv, K, Dv], zero in the padding: new contiguous tensors, or the views
        ``keys[:, :, :K]`` and ``values[:, :, :K]`` of the arguments when in place.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes or devices; in place: K > N, the same tensor twice, tensors that overlap themselves
            (expanded), arguments that require a gradient; under ``validate`` the conditions above.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, complex tensors).

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
    found = _known.find((keys, values, indices))
    if found is None:
        found = _examine(keys, values, indices)
    if inplace:
        _validate_inplace(keys, values, indices)
    if validate:
        _validate_values(indices, keys.shape[2], inplace)
    choice = choose_for(found, backend)
    if inplace:
        length = indices.shape[1]
        if choice.name == "reference":
            new_keys, new_values = compact_cache_reference(keys, values, indices)
            keys[:, :, :length], values[:, :, :length] = new_keys, new_values
        else:
            inplace_op(keys, values, indices, choice.name)
        return keys[:, :, :length], values[:, :, :length]
    if choice.name == "reference":
        return compact_cache_reference(keys, values, indices)
    run = forward_op.route(found.is_plain, found.requires_grad, keys)
    return run(keys, values, indices, choice.name)


_known = KnownCalls()


def _examine(keys: Tensor, values: Tensor, indices: Tensor) -> Finding:
    check.require_ndim(OP, "keys", keys, 4, "[B, Hkv, N, D]")
    check.require_ndim(OP, "values", values, 4, "[B, Hkv, N, Dv]")
    check.require_shape(OP, "values", values, (*keys.shape[:3], values.shape[3]), "[B, Hkv, N, Dv]")
    check.require_device(OP, "values", values, keys.device)
    check.require_ndim(OP, "indices", indices, 2, "[B, K]")
    check.require_shape(OP, "indices", indices, (keys.shape[0], indices.shape[1]), "[B, K]")
    check.require_dtype(OP, "indices", indices, (torch.int64,), "use indices.long()")
    check.require_device(OP, "indices", indices, keys.device)
    obstacle = None
    if keys.dtype.is_complex or values.dtype.is_complex:
        obstacle = "keys or values are complex, the kernels take real dtypes"
    tensors = (keys, values, indices)
    found = examined(OP, tensors, requires_grad=keys.requires_grad or values.requires_grad, obstacle=obstacle)
    _known.remember(found, tensors)
    return found


def _validate_inplace(keys: Tensor, values: Tensor, indices: Tensor) -> None:
    length, num_tokens = indices.shape[1], keys.shape[2]
    if length > num_tokens:
        raise ValueError(f"{OP}: inplace=True has no room for K={length} rows in N={num_tokens}; use inplace=False")
    if keys is values:
        raise ValueError(f"{OP}: keys and values are the same tensor and inplace=True would move its rows twice")
    for name, cache in (("keys", keys), ("values", values)):
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(
                f"{OP}: {name} overlaps itself (shape {tuple(cache.shape)}, strides {cache.stride()}), so its rows "
                f"cannot be moved; use inplace=False or {name}.contiguous()"
            )
        if cache.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: {name} requires a gradient, which inplace=True has not; use inplace=False")


def _validate_values(indices: Tensor, num_tokens: int, inplace: bool) -> None:
    outside = (indices < -1) | (indices >= num_tokens)
    if bool(outside.any()):
        raise ValueError(f"{OP}: indices has {indices[outside].tolist()} outside -1..N-1={num_tokens - 1}")
    ordered = indices if inplace else indices.sort(dim=1).values
    before, after = ordered[:, :-1], ordered[:, 1:]
    if not inplace:
        if bool(((before == after) & (after >= 0)).any()):
            raise ValueError(f"{OP}: indices names a token of a sample twice; the gradient needs unique indices")
    elif bool((((after <= before) | (before < 0)) & (after >= 0)).any()):
        raise ValueError(
            f"{OP}: indices must ascend with padding (-1) at the end for inplace=True; use padding_side='right' in "
            "topk_compact, or inplace=False"
        )
