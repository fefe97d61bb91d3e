"""The public function: contract, checks, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels import _checks as check
from toprl_kernels._known import Finding, KnownCalls, choose_for, examined
from toprl_kernels._library import any_autocast, is_compiling
from toprl_kernels.attention import library
from toprl_kernels.attention.reference import masked_attention_reference

OP = "masked_attention"
MASKS = (torch.bool, *check.FLOATS)
TINY = 2**17  # pairs over all heads; measured on a CPU
MAX_HEAD_DIM = 256  # of the kernels; the other implementations take any


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    bounded_mask_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Attention in which dropped tokens are invisible to all others but still see themselves (Eqs. 6-7).

    .. math::
        \tilde A_{ij} = \frac{\exp(P_{ij}) G_{ij}}{\sum_k \exp(P_{ik}) G_{ik}}, \quad
        G_{ij} = 1 \text{ if } i = j \text{ else } m_j, \quad P = \text{scale} \cdot Q K^T

    The number of tokens stays N, which is what lets PPO train on batches whose samples drop different tokens. The
    result is differentiable in query, key, value and a floating keep_mask, also where the mask is exactly 0.

    Args:
        query: [B, H, Nq, D], float16, bfloat16, float32 or float64. Nq <= N; query i is token i + N - Nq, so that
            Nq = N is prefill and Nq = 1 is a decoding step over a cache of N tokens.
        key: [B, Hkv, N, D], H a multiple of Hkv (grouped queries), dtype of query.
        value: [B, Hkv, N, D], dtype of query.
        keep_mask: m, [B, N]; bool (True = kept), or floating with values in [0, 1]. Values are not checked: that
            would wait for the GPU. Values below 2^-96 count as 0. A bool mask is faster.
        key_padding_mask: [B, N] bool, True = a real token. Nobody sees a padding token; its own output row is 0.
        is_causal: a token sees itself and earlier tokens only.
        scale: factor on Q K^T; default 1 / sqrt(D).
        bounded_mask_grad: in the gradient by m_j where m_j = 0, put R / (1 + R) for R = exp(P_ij - log-sum-exp_i). The
            exact derivative is huge where a dropped token would have dominated a row; the bounded one has its sign and
            at most the slope 1 per pair. Exact where m_j > 0.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.backend`.

    Returns:
        [B, H, Nq, D], dtype of query, laid out in memory like it, as torch's scaled_dot_product_attention does: where
        query is a view of [B, Nq, H, D], ``output.transpose(1, 2).flatten(2)`` copies nothing. Empty inputs give an
        empty (or zero) result.

    Raises:
        TypeError: an argument's dtype is not listed above, or dtypes differ.
        ValueError: shapes that do not fit together, Nq > N, tensors on different devices, unknown backend.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64, D > 256).
        NotImplementedError: under torch.vmap.

    The derivative by m_j at m_j = 0 is exact and therefore unbounded: it grows like exp(P_ij) over the mass that is
    left. From exp(P_ij - log-sum-exp) = 2^96 on it is cut off. Under autocast, query, key and value are cast as torch
    does for its own attention; keep_mask is not. There is no second derivative outside of backend="reference".

    Example:
        >>> import torch
        >>> from toprl_kernels import masked_attention
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
        >>> nothing_kept = torch.zeros(1, 5, dtype=torch.bool)
        >>> bool(torch.allclose(masked_attention(q, k, v, nothing_kept), v))
        True
    """
    found = _known.find((query, key, value, keep_mask))
    if found is None:
        if is_compiling() or any_autocast():
            query, key, value = _autocast(query, key, value)
        found = _examine(query, key, value, keep_mask, key_padding_mask)
    if not (key_padding_mask is None or _padding_fits(key_padding_mask, keep_mask)):
        _explain_misfit(query, key, value, keep_mask, key_padding_mask)
    choice = choose_for(found, backend)
    default_scale, is_empty = found.extra
    scale = default_scale if scale is None else float(scale)
    if choice.name == "reference":
        return masked_attention_reference(
            query,
            key,
            value,
            keep_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            scale=scale,
            bounded_mask_grad=bounded_mask_grad,
        )
    if is_empty:
        return torch.zeros_like(query) + 0 * query  # connected to the graph
    run = library.forward.route(found.is_plain, found.requires_grad, query)
    return run(query, key, value, keep_mask, key_padding_mask, is_causal, scale, bounded_mask_grad, choice.name)[0]


_known = KnownCalls()


def _examine(query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor, key_padding_mask: Tensor | None) -> Finding:
    """Shapes, dtypes and devices of all but the padding mask, which is for the error message."""
    if not _fits(query, key, value, keep_mask):
        _explain_misfit(query, key, value, keep_mask, key_padding_mask)
    tensors = (query, key, value, keep_mask)
    dtype, head_dim = query.dtype, query.shape[3]
    found = examined(
        OP,
        tensors,
        requires_grad=query.requires_grad or key.requires_grad or value.requires_grad or keep_mask.requires_grad,
        obstacle=_obstacle(dtype, head_dim),
        dtype=dtype,
        definition_because=_tiny(query, keep_mask) if keep_mask.requires_grad else None,
        extra=(head_dim**-0.5, query.numel() == 0),  # without keys it is empty too, since Nq <= N
    )
    _known.remember(found, tensors)
    return found


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch does for scaled_dot_product_attention, where autocast is on."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def _tiny(query: Tensor, keep_mask: Tensor) -> str | None:
    """For a mask with a gradient: over a handful of tokens autograd of the definition has the fewest calls."""
    if (
        query.dtype == torch.float32
        and not is_compiling()
        and query.numel() // query.shape[3] * keep_mask.shape[1] <= TINY
    ):
        return f"a mask gradient over at most {TINY} query-key pairs is fastest by autograd of the definition"
    return None


def _obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in check.HALF_AND_SINGLE:
        return f"query has dtype {str(dtype).removeprefix('torch.')}, the kernels take float16, bfloat16, float32"
    if head_dim > MAX_HEAD_DIM:
        return f"head dim D={head_dim}, the kernels take D <= {MAX_HEAD_DIM}"
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor) -> bool:
    """Whether the arguments are as documented, in few attribute reads: in decoding this runs before many kernels."""
    try:
        batch, num_heads, num_queries, head_dim = query.shape
        _, num_kv_heads, num_keys, _ = shape = key.shape
        dtype, device = query.dtype, query.device
        return (
            value.shape == shape
            and shape[0] == batch
            and shape[3] == head_dim > 0
            and num_queries <= num_keys
            and num_kv_heads > 0
            and num_heads % num_kv_heads == 0
            and keep_mask.shape == (batch, num_keys)
            and key.dtype == dtype
            and value.dtype == dtype
            and dtype in check.FLOATS
            and keep_mask.dtype in MASKS
            and key.device == device
            and value.device == device
            and keep_mask.device == device
        )
    except (AttributeError, ValueError):  # not a tensor, another number of dimensions
        return False


def _padding_fits(key_padding_mask: Tensor, keep_mask: Tensor) -> bool:
    return (
        isinstance(key_padding_mask, Tensor)
        and key_padding_mask.shape == keep_mask.shape
        and key_padding_mask.dtype == torch.bool
        and key_padding_mask.device == keep_mask.device
    )


def _explain_misfit(
    query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor, key_padding_mask: Tensor | None
) -> None:
    """Raise the error that names the argument."""
    check.require_ndim(OP, "query", query, 4, "[B, H, Nq, D]")
    check.require_ndim(OP, "key", key, 4, "[B, Hkv, N, D]")
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    check.require_shape(OP, "key", key, (batch, num_kv_heads, num_keys, head_dim), "[B, Hkv, N, D]")
    check.require_shape(OP, "value", value, (batch, num_kv_heads, num_keys, head_dim), "the shape of key")
    check.require_shape(OP, "keep_mask", keep_mask, (batch, num_keys), "[B, N]")
    if head_dim == 0:
        raise ValueError(f"{OP}: head dim D must be at least 1, got query of shape {tuple(query.shape)}")
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"{OP}: query has H={num_heads} heads and key Hkv={num_kv_heads}; H must be a multiple of Hkv >= 1"
        )
    if num_queries > num_keys:
        raise ValueError(
            f"{OP}: query has Nq={num_queries} tokens and key N={num_keys}; queries are the last tokens of the keys, "
            "so Nq <= N (append the new keys before the call)"
        )
    check.require_dtype(OP, "query", query, check.FLOATS)
    for name, tensor in (("key", key), ("value", value)):
        check.require_dtype(
            OP, name, tensor, (query.dtype,), f"query, key and value must agree: {name}.to(query.dtype)"
        )
    check.require_dtype(OP, "keep_mask", keep_mask, MASKS, "use keep_mask.bool() for an integer mask")
    tensors = [("key", key), ("value", value), ("keep_mask", keep_mask)]
    if key_padding_mask is not None:
        check.require_shape(OP, "key_padding_mask", key_padding_mask, (batch, num_keys), "[B, N]")
        check.require_dtype(OP, "key_padding_mask", key_padding_mask, (torch.bool,), "use .bool(), True = real token")
        tensors.append(("key_padding_mask", key_padding_mask))
    for name, tensor in tensors:
        check.require_device(OP, name, tensor, query.device)
    raise AssertionError(f"{OP}: arguments were refused for no stated reason")
