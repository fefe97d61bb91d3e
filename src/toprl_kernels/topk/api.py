"""The public function: contract, checks, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_kernels import _checks as check
from toprl_kernels._known import Finding, KnownCalls, choose_for, examined
from toprl_kernels.topk.library import forward_op
from toprl_kernels.topk.output import TopkCompactOutput
from toprl_kernels.topk.reference import topk_compact_reference

OP = "topk_compact"
MAX_TRITON_TOKENS = 65536


def topk_compact(
    hidden_states: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    position_ids: Tensor | None = None,
    valid_mask: Tensor | None = None,
    max_length: int | None = None,
    padding_side: str = "right",
    return_inverse: bool = False,
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
            [B] gives each sample its own number; values outside 0..K are clipped to it unless ``validate``.
        position_ids: [B, N], or [3, B, N] for multimodal rotary embeddings; integer. Gathered alongside.
        valid_mask: [B, N] bool, True = eligible. A sample with fewer than k eligible tokens keeps those it has.
        max_length: output length K of a tensor k. By default it is max(k), which waits for the device that k is on;
            with it nothing waits, so that CUDA graphs and torch.compile work with k on the device.
        padding_side: "right" or "left", where a sample that keeps fewer than K tokens is padded. Generation reads the
            last position and wants "left".
        return_inverse: also return where each token went, to scatter results back.
        validate: also check values, which waits for the GPU: NaN scores, tensor k outside 0..N or above max_length,
            more than k tokens forced in by +inf.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.backend`.

    Returns:
        TopkCompactOutput with hidden_states [B, K, d], indices [B, K] (int64, ascending), valid_mask [B, K],
        position_ids [B, K] / [3, B, K] / None and inverse [B, N] (int64, output slot or -1) / None. K = k, or
        max_length or max(k) for a tensor. Padding has hidden state 0, index -1, valid_mask False, position 0.

    Raises:
        TypeError: wrong dtypes; a bool k.
        ValueError: wrong shapes or devices; int k or max_length outside 0..N; max_length with an int k; an unknown
            padding_side; under ``validate`` the conditions listed there. When more than k tokens are forced in and
            ``validate`` is off, the first k of them are kept.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64 scores, complex hidden
            states, N > 65536).

    Example:
        >>> import torch
        >>> from toprl_kernels import topk_compact
        >>> hidden = torch.arange(4.0).view(1, 4, 1)
        >>> out = topk_compact(hidden, torch.tensor([[0.1, 0.9, 0.9, 0.3]]), 2, return_inverse=True)
        >>> out.indices.tolist(), out.hidden_states.flatten().tolist(), out.inverse.tolist()
        ([[1, 2]], [1.0, 2.0], [[-1, 0, 1, -1]])
    """
    found = _known.find((hidden_states, scores))
    if found is None:
        found = _examine(hidden_states, scores)
    if not (position_ids is None and valid_mask is None):
        _validate_others(scores, position_ids, valid_mask)
    if padding_side not in ("right", "left"):
        raise ValueError(f"{OP}: padding_side={padding_side!r} is unknown; use 'right' or 'left'")
    length = _check_k(k, scores, max_length)
    if validate:
        _validate_values(scores, k, valid_mask, length)
    left = padding_side == "left"
    counts = k.to(device=scores.device, dtype=torch.int64).clamp(0, length) if isinstance(k, Tensor) else None

    choice = choose_for(found, backend)
    if choice.name == "reference":
        taken = [length] * scores.shape[0] if counts is None else counts.tolist()
        out = topk_compact_reference(
            hidden_states, scores, taken, length, position_ids=position_ids, valid_mask=valid_mask, left=left
        )
        return out if return_inverse else out._replace(inverse=None)
    run = forward_op.route(found.is_plain, found.requires_grad, hidden_states)
    hidden, indices, kept, positions, inverse = run(
        hidden_states,
        scores.detach() if scores.requires_grad else scores,
        counts,
        length,
        valid_mask,
        position_ids,
        left,
        return_inverse,
        choice.name,
    )
    if position_ids is None:
        positions = None
    return TopkCompactOutput(hidden, indices, kept, positions, inverse if return_inverse else None)


_known = KnownCalls()


def _examine(hidden_states: Tensor, scores: Tensor) -> Finding:
    check.require_ndim(OP, "hidden_states", hidden_states, 3, "[B, N, d]")
    check.require_shape(OP, "scores", scores, tuple(hidden_states.shape[:2]), "[B, N]")
    check.require_dtype(OP, "scores", scores, check.FLOATS, "use scores.float()")
    check.require_device(OP, "scores", scores, hidden_states.device)
    tensors = (hidden_states, scores)
    found = examined(OP, tensors, requires_grad=hidden_states.requires_grad, obstacle=_obstacle(hidden_states, scores))
    _known.remember(found, tensors)
    return found


def _obstacle(hidden_states: Tensor, scores: Tensor) -> str | None:
    if hidden_states.dtype.is_complex:
        return f"hidden_states has dtype {str(hidden_states.dtype).removeprefix('torch.')}, the kernels take real ones"
    if scores.dtype == torch.float64:
        return "scores has dtype float64, the kernels take float16, bfloat16, float32"
    if scores.shape[1] > MAX_TRITON_TOKENS:
        return f"N={scores.shape[1]} tokens, the kernels take N <= {MAX_TRITON_TOKENS}"
    return None


def _validate_others(scores: Tensor, position_ids: Tensor | None, valid_mask: Tensor | None) -> None:
    """Against scores [B, N], which were checked."""
    batch, num_tokens = scores.shape
    if position_ids is not None:
        check.require_tensor(OP, "position_ids", position_ids)
        if tuple(position_ids.shape) not in ((batch, num_tokens), (3, batch, num_tokens)):
            raise ValueError(
                f"{OP}: position_ids must be [B, N] = {(batch, num_tokens)} or [3, B, N], "
                f"got shape {tuple(position_ids.shape)}"
            )
        check.require_dtype(OP, "position_ids", position_ids, check.INTEGERS, "use position_ids.long()")
        check.require_device(OP, "position_ids", position_ids, scores.device)
    if valid_mask is not None:
        check.require_shape(OP, "valid_mask", valid_mask, (batch, num_tokens), "[B, N]")
        check.require_dtype(OP, "valid_mask", valid_mask, (torch.bool,), "use valid_mask.bool(), True = eligible")
        check.require_device(OP, "valid_mask", valid_mask, scores.device)


def _check_k(k: int | Tensor, scores: Tensor, max_length: int | None) -> int:
    """The output length K."""
    num_tokens = scores.size(1)
    if isinstance(k, Tensor):
        batch = scores.size(0)
        check.require_shape(OP, "k", k, (batch,), "[B] (or pass an int)")
        check.require_dtype(OP, "k", k, check.INTEGERS, "use k.long()")
        if max_length is None:
            return min(max(int(k.max()), 0), num_tokens) if batch else 0  # the one synchronisation of a ragged call
        if not 0 <= max_length <= num_tokens:
            raise ValueError(f"{OP}: max_length={max_length} is outside 0..N={num_tokens}; use min(max_length, N)")
        return max_length
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{OP}: k must be an int or an int64 tensor [B], got {k!r} of type {type(k).__name__}")
    if max_length is not None:
        raise ValueError(f"{OP}: max_length={max_length} is for a tensor k, the int k={k} is the length; leave it out")
    if not 0 <= k <= num_tokens:
        raise ValueError(f"{OP}: k={k} is outside 0..N={num_tokens}; use min(k, scores.shape[1])")
    return k


def _validate_values(scores: Tensor, k: int | Tensor, valid_mask: Tensor | None, length: int) -> None:
    eligible = torch.ones_like(scores, dtype=torch.bool) if valid_mask is None else valid_mask
    num_nan = int((scores.isnan() & eligible).sum())
    if num_nan:
        raise ValueError(f"{OP}: scores has {num_nan} NaN; replace them, or drop those tokens with valid_mask")
    num_tokens = scores.shape[1]
    if isinstance(k, Tensor):
        k = k.to(scores.device)
        if bool(((k < 0) | (k > num_tokens)).any()):
            raise ValueError(f"{OP}: k={k.tolist()} has values outside 0..N={num_tokens}; use k.clamp(0, N)")
        if bool((k > length).any()):
            raise ValueError(f"{OP}: k={k.tolist()} has values above max_length={length}; raise max_length")
    forced = ((scores == torch.inf) & eligible).sum(dim=1)
    if bool((forced > k).any()):
        shown = k if isinstance(k, int) else k.tolist()
        raise ValueError(
            f"{OP}: scores force in {forced.tolist()} tokens per sample with +inf but k={shown}; raise k or force fewer"
        )
