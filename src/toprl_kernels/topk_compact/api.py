"""The public function: contract, checks, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels import _checks as check
from toprl_kernels.backend import choose
from toprl_kernels.topk_compact.eager import topk_compact_eager
from toprl_kernels.topk_compact.output import TopkCompactOutput
from toprl_kernels.topk_compact.reference import topk_compact_reference

OP = "topk_compact"
MAX_TRITON_TOKENS = 16384


def topk_compact(
    hidden_states: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    position_ids: Tensor | None = None,
    valid_mask: Tensor | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> TopkCompactOutput:
    """Keep each sample's k best-scored tokens, in their original order.

    Exact and deterministic: ties go to the lowest index and -0.0 equals +0.0. A score of +inf forces a token in: it
    ranks before every number. NaN ranks after every number, -inf included. Differentiable in hidden_states.

    Args:
        hidden_states: [B, N, d], any dtype.
        scores: [B, N], floating. No gradient goes to them.
        k: tokens to keep. An int gives every sample k and needs no synchronisation with the GPU. An integer tensor
            [B] gives each sample its own number; the output length max(k) then costs one synchronisation, and values
            outside 0..N are clipped to it unless ``validate``.
        position_ids: [B, N], or [3, B, N] for multimodal rotary embeddings; integer. Gathered alongside.
        valid_mask: [B, N] bool, True = eligible. A sample with fewer than k eligible tokens keeps those it has.
        validate: also check values, which waits for the GPU: NaN scores, tensor k outside 0..N, more than k tokens
            forced in by +inf.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.backend`.

    Returns:
        TopkCompactOutput with hidden_states [B, K, d], indices [B, K] (int64, ascending), valid_mask [B, K] and
        position_ids [B, K] / [3, B, K] / None. K = k, or max(k) for a tensor. A sample that keeps fewer than K tokens
        is padded at the end: hidden state 0, index -1, valid_mask False, position 0.

    Raises:
        TypeError: wrong dtypes; a bool k.
        ValueError: wrong shapes or devices; int k outside 0..N; under ``validate`` the conditions listed there. When
            more than k tokens are forced in and ``validate`` is off, the first k of them are kept.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64 scores, N > 16384).

    Example:
        >>> import torch
        >>> from toprl_kernels import topk_compact
        >>> hidden = torch.arange(4.0).view(1, 4, 1)
        >>> out = topk_compact(hidden, torch.tensor([[0.1, 0.9, 0.9, 0.3]]), 2)
        >>> out.indices.tolist(), out.hidden_states.flatten().tolist()
        ([[1, 2]], [1.0, 2.0])
    """
    _validate_layout(hidden_states, scores, position_ids, valid_mask)
    k = _check_k(k, scores)
    if validate:
        _validate_values(scores, k, valid_mask)
    num_tokens = scores.shape[1]
    length = k
    if isinstance(k, Tensor):
        k = k.clamp(0, num_tokens)
        length = int(k.max()) if k.numel() else 0  # the one synchronisation of a ragged call
    assert isinstance(length, int)

    choice = choose(OP, backend, scores.device, _obstacle(scores))
    if choice.name == "reference":
        counts = k.tolist() if isinstance(k, Tensor) else [k] * scores.shape[0]
        return topk_compact_reference(
            hidden_states, scores, counts, length, position_ids=position_ids, valid_mask=valid_mask
        )
    if choice.name == "triton":
        from toprl_kernels.topk_compact.triton import topk_compact_triton as implementation
    else:
        implementation = topk_compact_eager
    return implementation(hidden_states, scores, k, length, position_ids=position_ids, valid_mask=valid_mask)


def _obstacle(scores: Tensor) -> str | None:
    if scores.dtype == torch.float64:
        return "scores has dtype float64, the kernels take float16, bfloat16, float32"
    if scores.shape[1] > MAX_TRITON_TOKENS:
        return f"N={scores.shape[1]} tokens, the kernels take N <= {MAX_TRITON_TOKENS}"
    return None


def _validate_layout(
    hidden_states: Tensor, scores: Tensor, position_ids: Tensor | None, valid_mask: Tensor | None
) -> None:
    check.require_ndim(OP, "hidden_states", hidden_states, 3, "[B, N, d]")
    batch, num_tokens = hidden_states.shape[:2]
    check.require_shape(OP, "scores", scores, (batch, num_tokens), "[B, N]")
    check.require_dtype(OP, "scores", scores, check.FLOATS, "use scores.float()")
    check.require_device(OP, "scores", scores, hidden_states.device)
    if position_ids is not None:
        check.require_tensor(OP, "position_ids", position_ids)
        if tuple(position_ids.shape) not in ((batch, num_tokens), (3, batch, num_tokens)):
            raise ValueError(
                f"{OP}: position_ids must be [B, N] = {(batch, num_tokens)} or [3, B, N], "
                f"got shape {tuple(position_ids.shape)}"
            )
        check.require_dtype(OP, "position_ids", position_ids, check.INTEGERS, "use position_ids.long()")
        check.require_device(OP, "position_ids", position_ids, hidden_states.device)
    if valid_mask is not None:
        check.require_shape(OP, "valid_mask", valid_mask, (batch, num_tokens), "[B, N]")
        check.require_dtype(OP, "valid_mask", valid_mask, (torch.bool,), "use valid_mask.bool(), True = eligible")
        check.require_device(OP, "valid_mask", valid_mask, hidden_states.device)


def _check_k(k: int | Tensor, scores: Tensor) -> int | Tensor:
    batch, num_tokens = scores.shape
    if isinstance(k, Tensor):
        check.require_shape(OP, "k", k, (batch,), "[B] (or pass an int)")
        check.require_dtype(OP, "k", k, check.INTEGERS, "use k.long()")
        return k.to(device=scores.device, dtype=torch.int64)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{OP}: k must be an int or an int64 tensor [B], got {k!r} of type {type(k).__name__}")
    if not 0 <= k <= num_tokens:
        raise ValueError(f"{OP}: k={k} is outside 0..N={num_tokens}; use min(k, scores.shape[1])")
    return k


def _validate_values(scores: Tensor, k: int | Tensor, valid_mask: Tensor | None) -> None:
    eligible = torch.ones_like(scores, dtype=torch.bool) if valid_mask is None else valid_mask
    num_nan = int((scores.isnan() & eligible).sum())
    if num_nan:
        raise ValueError(f"{OP}: scores has {num_nan} NaN; replace them, or drop those tokens with valid_mask")
    num_tokens = scores.shape[1]
    if isinstance(k, Tensor):
        outside = (k < 0) | (k > num_tokens)
        if bool(outside.any()):
            raise ValueError(f"{OP}: k={k.tolist()} has values outside 0..N={num_tokens}; use k.clamp(0, N)")
    forced = ((scores == torch.inf) & eligible).sum(dim=1)
    if bool((forced > k).any()):
        shown = k if isinstance(k, int) else k.tolist()
        raise ValueError(
            f"{OP}: scores force in {forced.tolist()} tokens per sample with +inf but k={shown}; raise k or force fewer"
        )
