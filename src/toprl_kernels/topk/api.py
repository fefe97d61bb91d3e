"""topk_compact: contract, checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toprl_kernels import dispatch as check
from toprl_kernels.cache.api import gather_rows
from toprl_kernels.dispatch import choose, implementation, register
from toprl_kernels.topk.reference import Selected, Selection, TopkCompactOutput, topk_compact_reference

OP = "topk_compact"
MAX_TRITON_TOKENS = 1 << 20


def topk_compact(
    hidden_states: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    position_ids: Tensor | None = None,
    valid_mask: Tensor | None = None,
    threshold: float | None = None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
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
        hidden_states: [B, N, d], any dtype (float8 and bool move as bytes, without a gradient).
        scores: [B, N], floating. No gradient goes to them.
        k: tokens to keep. An int gives every sample k and needs no synchronisation with the GPU. An integer tensor
            [B] gives each sample its own number; values outside 0..K are clipped to it unless ``validate``.
        position_ids: [B, N], or [3, B, N] for multimodal rotary embeddings; integer. Gathered alongside.
        valid_mask: [B, N] bool, True = eligible. A sample with fewer than k eligible tokens keeps those it has.
        threshold: tokens with a score below it are not eligible, so that every token that reaches it is kept, up to k.
            NaN does not reach it. Compared in float32 (float64 for such scores).
        segments: [B, N] integer, the segment (image) of each token, with k [B, S]: of every segment s = 0..S-1 its
            k[:, s] best tokens are kept, in the order of the sample. Tokens with another number are dropped. When a
            sample's quotas sum up to more than K, the first K of the tokens that they select are kept.
        cu_seqlens: [S + 1] int32 or int64, 0 first and ascending, as flash attention has it: the batch is S sequences
            of any length in one row. Every shape loses its B: hidden_states [N, d], scores and valid_mask [N],
            position_ids [N] or [3, N], where N is the length of all together; k is an int or [S]. The kept tokens of
            all sequences follow one another, and their bounds are the ``cu_seqlens`` of the output. Without any
            synchronisation with the GPU for an int k: the output has min(S k, N) rows, of which those after the last
            bound are padding (there are some when a sequence has fewer than k eligible tokens).
        max_seqlen: tokens of the longest sequence with cu_seqlens. Known to be small, it saves launches.
        max_length: output length K of a tensor k (or with cu_seqlens). By default it is max(k), the largest sum of a
            sample's quotas, or sum(k) with cu_seqlens, which waits for the device that k is on; with it nothing waits,
            so that CUDA graphs and torch.compile work with k on the device.
        padding_side: "right" or "left", where a sample that keeps fewer than K tokens is padded. Generation reads the
            last position and wants "left". Packed sequences are padded on the right.
        return_inverse: also return where each token went, to scatter results back.
        validate: also check values, which waits for the GPU: NaN scores, tensor k outside 0..N or above max_length,
            more than k tokens forced in by +inf.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.dispatch`.

    Returns:
        TopkCompactOutput with hidden_states [B, K, d], indices [B, K] (int64, ascending), valid_mask [B, K],
        position_ids [B, K] / [3, B, K] / None, inverse [B, N] (int64, output slot or -1) / None and cu_seqlens
        [S + 1] / None. Padding has hidden state 0, index -1, valid_mask False, position 0.

    Raises:
        TypeError: wrong dtypes; a bool k.
        ValueError: wrong shapes or devices; int k or max_length outside 0..N; max_length with an int k; an unknown
            padding_side; segments with cu_seqlens or without their k; under ``validate`` the conditions listed there.
            When more than k tokens are forced in and ``validate`` is off, the first k of them are kept.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64 scores, complex hidden
            states, N > 2^20).
        NotImplementedError: under torch.vmap; inputs with forward-mode tangents.

    Example:
        >>> import torch
        >>> from toprl_kernels import topk_compact
        >>> hidden = torch.arange(4.0).view(1, 4, 1)
        >>> out = topk_compact(hidden, torch.tensor([[0.1, 0.9, 0.9, 0.3]]), 2, return_inverse=True)
        >>> out.indices.tolist(), out.hidden_states.flatten().tolist(), out.inverse.tolist()
        ([[1, 2]], [1.0, 2.0], [[-1, 0, 1, -1]])
    """
    check.require_flags(OP, return_inverse=return_inverse, validate=validate)
    check.require_ints(OP, max_seqlen=max_seqlen, max_length=max_length)
    check.require_float(OP, "threshold", threshold)
    packed = cu_seqlens is not None
    if cu_seqlens is not None:
        check.require(OP, "hidden_states", hidden_states, "[N, d] with cu_seqlens", 2)
        fix = "use cu_seqlens.int()"
        check.require(OP, "cu_seqlens", cu_seqlens, "[S + 1]", 1, check.INTEGERS, hidden_states.device, fix)
        if segments is not None or padding_side == "left" or not len(cu_seqlens):
            raise ValueError(f"{OP}: cu_seqlens [S + 1] goes with neither segments nor padding_side='left'")
        hidden_states, scores = hidden_states[None], scores[None]
        valid_mask = None if valid_mask is None else valid_mask[None]
        position_ids = None if position_ids is None else position_ids.unsqueeze(-2)
    check.require(OP, "hidden_states", hidden_states, "[B, N, d]", 3)
    shape, device = tuple(hidden_states.shape[:2]), hidden_states.device
    check.require(OP, "scores", scores, "[B, N]", shape, check.FLOATS, device, "use scores.float()")
    if position_ids is not None:
        planes, layout = (3, *shape) if getattr(position_ids, "ndim", 0) == 3 else shape, "[B, N] or [3, B, N]"
        fix = "use position_ids.long()"
        check.require(OP, "position_ids", position_ids, layout, planes, check.INTEGERS, device, fix)
    fix = "use valid_mask.bool(), True = eligible"
    check.require_given(OP, "valid_mask", valid_mask, "[B, N]", shape, check.BOOL, device, fix)
    check.require_given(OP, "segments", segments, "[B, N]", shape, check.INTEGERS, device, "use segments.long()")
    if padding_side not in ("right", "left"):
        raise ValueError(f"{OP}: padding_side={padding_side!r} is unknown; use 'right' or 'left'")
    number = len(cu_seqlens) - 1 if cu_seqlens is not None else None
    length = _check_k(k, shape, segments is not None, number, max_length, device)
    if validate:
        _validate_values(scores, k, valid_mask, length, plain=segments is None and not packed)
    counts = None
    if isinstance(k, Tensor):
        counts = k.to(device=device, dtype=torch.int64)
        counts = counts.clamp(0, length) if segments is None and not packed else counts.clamp(min=0)
        counts = counts[None] if packed else counts
    limit = length if isinstance(k, Tensor) else k

    obstacle = None
    if hidden_states.dtype.is_complex:
        obstacle = f"hidden_states has dtype {check.dtype_name(hidden_states.dtype)}, the kernels take real"
    elif scores.dtype == torch.float64:
        obstacle = "scores has dtype float64, the kernels take float16, bfloat16, float32"
    elif shape[1] > MAX_TRITON_TOKENS:
        obstacle = f"N={shape[1]} tokens, the kernels take N <= {MAX_TRITON_TOKENS}"
    choice = choose(OP, backend, device, obstacle)
    bounds = cu_seqlens.long() if cu_seqlens is not None else segments if segments is None else segments.long()
    longest = shape[1] if max_seqlen is None else min(max_seqlen, shape[1])
    selection = Selection(
        scores.detach(), counts, limit, length, valid_mask, position_ids, bounds, packed, longest, threshold,
        padding_side == "left", return_inverse,
    )  # fmt: skip
    reference = choice.name == "reference"
    chosen = topk_compact_reference(selection) if reference else _select_op(*selection, choice.name)
    (hidden,) = gather_rows([hidden_states.unsqueeze(1)], chosen[0], None, choice.name)
    indices, valid, *optional, new_bounds = chosen
    given = position_ids is not None, return_inverse
    positions, inverse = (part if wanted else None for part, wanted in zip(optional, given, strict=True))
    if cu_seqlens is None:
        return TopkCompactOutput(hidden.squeeze(1), indices, valid, positions, inverse)
    positions, inverse = (part if part is None else part.squeeze(-2) for part in (positions, inverse))
    return TopkCompactOutput(hidden[0, 0], indices[0], valid[0], positions, inverse, new_bounds.to(cu_seqlens.dtype))


def _check_k(
    k: int | Tensor, shape: tuple[int, ...], segmented: bool, sequences: int | None, max_length: int | None,
    device: torch.device,
) -> int:  # fmt: skip
    """Check k and return the output length K."""
    batch, num_tokens = shape
    if isinstance(k, Tensor):
        wanted: tuple[int, ...] = (batch,) if sequences is None else (sequences,)
        layout = "[B] (or pass an int)" if sequences is None else "[S] with cu_seqlens (or pass an int)"
        if segmented:
            wanted, layout = (batch, k.shape[1] if k.ndim == 2 else -1), "[B, S] with segments"
        check.require_counts(OP, k, layout, wanted, device)
        if max_length is None:  # the one synchronisation of a ragged call
            totals = k.clamp(min=0).sum(-1) if segmented or sequences is not None else k
            return min(max(int(totals.max()), 0), num_tokens) if totals.numel() else 0
    elif isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{OP}: k must be an int or an int64 tensor [B], got {k!r} of type {type(k).__name__}")
    elif segmented:
        raise ValueError(f"{OP}: k={k} is one number for all segments; give each its quota in a tensor k [B, S]")
    elif k < 0 or (k > num_tokens and sequences is None):
        raise ValueError(f"{OP}: k={k} is outside 0..N={num_tokens}; use min(k, scores.shape[1])")
    elif sequences is not None:
        max_length = min(sequences * k, num_tokens) if max_length is None else max_length
    elif max_length is not None:
        raise ValueError(f"{OP}: max_length={max_length} is for a tensor k, the int k={k} is the length; leave it out")
    else:
        return k
    if not 0 <= max_length <= num_tokens:
        raise ValueError(f"{OP}: max_length={max_length} is outside 0..N={num_tokens}; use min(max_length, N)")
    return max_length


def _validate_values(scores: Tensor, k: int | Tensor, valid_mask: Tensor | None, length: int, plain: bool) -> None:
    eligible = torch.ones_like(scores, dtype=torch.bool) if valid_mask is None else valid_mask
    num_nan = int((scores.isnan() & eligible).sum())
    if num_nan:
        raise ValueError(f"{OP}: scores has {num_nan} NaN; replace them, or drop those tokens with valid_mask")
    num_tokens = scores.shape[1]
    if isinstance(k, Tensor):
        k = k.to(scores.device)
        if bool(((k < 0) | (k > num_tokens)).any()):
            raise ValueError(f"{OP}: k={k.tolist()} has values outside 0..N={num_tokens}; use k.clamp(0, N)")
        if bool(((k if plain else k.sum(-1)) > length).any()):
            raise ValueError(f"{OP}: k={k.tolist()} has values above max_length={length}; raise max_length")
    forced = ((scores == torch.inf) & eligible).sum(dim=1)
    if plain and bool((forced > k).any()):
        shown = k if isinstance(k, int) else k.tolist()
        raise ValueError(
            f"{OP}: scores force in {forced.tolist()} tokens per sample with +inf but k={shown}; raise k or force fewer"
        )


def _select(*arguments: Any) -> Selected:
    return implementation("topk", "topk_compact", arguments[-1])(Selection(*arguments[:-1]))


def _select_fake(*arguments: Any) -> Selected:
    x = Selection(*arguments[:-1])
    samples, num_tokens = x.scores.shape
    indices = x.scores.new_empty(samples, x.length, dtype=torch.int64)
    positions = x.position_ids
    return (
        indices,
        torch.empty_like(indices, dtype=torch.bool),
        indices.new_empty(0) if positions is None else positions.new_empty(*positions.shape[:-1], x.length),
        indices.new_empty((samples, num_tokens) if x.inverse else 0),
        indices.new_empty(x.segments.shape if x.packed and x.segments is not None else 0),
    )


_select_op = register(
    "topk_compact(Tensor scores, Tensor? k, SymInt limit, SymInt length, Tensor? valid_mask, Tensor? position_ids, "
    "Tensor? segments, bool packed, SymInt longest, float? threshold, bool left, bool inverse, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _select,
    _select_fake,
)
