"""The public functions: contract, checks, dispatch, registration with torch.library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from toprl_kernels import dispatch as check
from toprl_kernels.attention.eager import empty_output
from toprl_kernels.attention.reference import AttentionCall, masked_attention_reference
from toprl_kernels.dispatch import Choice, choose, implementation, register

OP = "masked_attention"
PLAN = "attention_plan"
MASKS = (torch.bool, *check.FLOATS)
FIX = "use keep_mask.bool() for an integer mask"
MAX_HEAD_DIM = 512  # of the kernels; the other implementations take any


@dataclass(frozen=True)
class AttentionPlan:
    """What :func:`attention_plan` makes of a mask; its fields are private to the ops but for ``keep_mask``."""

    keep_mask: Tensor  # [B, N]
    key_padding_mask: Tensor | None
    ranges: Tensor | None  # int32 [B, N, 2]: token i sees tokens j with ranges[b, i, 0] <= j < ranges[b, i, 1]
    lists: Tensor | None  # of the kernels: kept tokens in order, their numbers, their logarithms
    is_causal: bool


def attention_plan(
    keep_mask: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    window: int | None = None,
    block_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ranges: Tensor | None = None,
    backend: str | None = None,
) -> AttentionPlan:
    """Prepare a mask for several :func:`masked_attention` calls: the layers between two pruning stages share it.

    Args:
        keep_mask, key_padding_mask: as in :func:`masked_attention`.
        is_causal: a token sees itself and earlier tokens only.
        window: sliding window: a token sees at most ``window`` - 1 tokens before itself (and, without ``is_causal``,
            as many after), as ``sliding_window`` of transformers' models.
        block_ids: [B, N] int64 or int32: a run of equal numbers >= 0 is a block (an image) whose tokens see each other
            in both directions, whatever causality and window say; -1 is no block.
        cu_seqlens: [S + 1] int32 or int64, 0 first and N last: B = 1, and the N tokens are S sequences in a row, which
            do not see each other, as in flash-attn's functions for variable lengths. Sequences need no padding.
        ranges: [B, N, 2] int32, instead of the patterns above: token i sees tokens j with ranges[b, i, 0] <= j <
            ranges[b, i, 1], and itself. Neither end may decrease from a token to the next.
        backend: where the plan is to be used; see :mod:`toprl_kernels.dispatch`.

    Raises:
        TypeError, ValueError: arguments that do not fit together. Values of tensors are not checked.

    Example:
        >>> import torch
        >>> from toprl_kernels import attention_plan, masked_attention
        >>> plan = attention_plan(torch.tensor([[True, False, True]]), is_causal=True)
        >>> q, k, v = torch.randn(3, 1, 2, 3, 8).unbind(0)
        >>> for layer in range(2):
        ...     q = masked_attention(q, k, v, plan=plan)
    """
    check.require(PLAN, "keep_mask", keep_mask, "[B, N]", 2, MASKS, None, FIX)
    check.require_flags(PLAN, is_causal=is_causal)
    shape, device = tuple(keep_mask.shape), keep_mask.device
    fix = "use .bool(), True = real token"
    check.require_given(PLAN, "key_padding_mask", key_padding_mask, "[B, N]", shape, check.BOOL, device, fix)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"{PLAN}: window={window!r} must be an int >= 1, or None")
    check.require_given(PLAN, "block_ids", block_ids, "[B, N]", shape, check.INTEGERS, device, "use .long()")
    check.require_given(PLAN, "cu_seqlens", cu_seqlens, "[S + 1]", 1, check.INTEGERS, device, "use .int()")
    if cu_seqlens is not None and shape[0] != 1:
        raise ValueError(f"{PLAN}: cu_seqlens needs one row that holds all sequences, got B={shape[0]}")
    check.require_given(PLAN, "ranges", ranges, "[B, N, 2]", (*shape, 2), (torch.int32,), device, "use .int()")
    if ranges is not None:
        patterns = dict(is_causal=is_causal, window=window, block_ids=block_ids, cu_seqlens=cu_seqlens)
        given = [name for name, pattern in patterns.items() if pattern is not None and pattern is not False]
        if given:
            raise ValueError(f"{PLAN}: {' and '.join(given)} given beside ranges, which say all of the pattern")
    if window is not None or block_ids is not None or cu_seqlens is not None:
        window = window if window is None else min(window, shape[1])
        ranges = _ranges(keep_mask, is_causal, window, block_ids, cu_seqlens)
        is_causal = False
    lists = None
    if choose(PLAN, backend, device).name == "triton" and keep_mask.numel():
        lists = _lists_op(keep_mask.detach(), key_padding_mask, ranges)
    return AttentionPlan(keep_mask, key_padding_mask, ranges, lists, is_causal)


def _ranges(
    keep_mask: Tensor, is_causal: bool, window: int | None, block_ids: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Write every pattern as an interval of tokens per token, whose two ends never decrease: int32 [B, N, 2]."""
    batch, length = keep_mask.shape
    tokens = torch.arange(length, device=keep_mask.device)[None].expand(batch, -1)
    low, high = torch.zeros_like(tokens), torch.full_like(tokens, length)
    if window is not None:
        low, high = tokens - window + 1, tokens + window
    if is_causal:
        high = tokens + 1
    if block_ids is not None:
        changes = torch.ones_like(tokens, dtype=torch.bool)
        changes[:, 1:] = block_ids[:, 1:] != block_ids[:, :-1]
        first = torch.where(changes, tokens, 0).cummax(dim=1).values
        ends = torch.where(changes, tokens, length).flip(1).cummin(dim=1).values.flip(1)  # the next change from here on
        last = torch.cat([ends[:, 1:], torch.full_like(ends[:, :1], length)], dim=1)
        low = torch.where(block_ids >= 0, low.minimum(first), low)
        high = torch.where(block_ids >= 0, high.maximum(last), high)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, tokens[0].to(cu_seqlens.dtype), right=True)
        low, high = low.maximum(cu_seqlens[sequence - 1]), high.minimum(cu_seqlens[sequence])
    return torch.stack([low.clamp(min=0), high.clamp(max=length)], dim=2).int()


@overload
def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor | None = None, *, return_lse: Literal[False] = False,
    plan: AttentionPlan | None = None, key_padding_mask: Tensor | None = None, is_causal: bool = False,
    window: int | None = None, block_ids: Tensor | None = None, cu_seqlens: Tensor | None = None,
    scale: float | None = None, bounded_mask_grad: bool = False, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor | None = None, *, return_lse: Literal[True],
    plan: AttentionPlan | None = None, key_padding_mask: Tensor | None = None, is_causal: bool = False,
    window: int | None = None, block_ids: Tensor | None = None, cu_seqlens: Tensor | None = None,
    scale: float | None = None, bounded_mask_grad: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor | None = None,
    *,
    plan: AttentionPlan | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    block_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    bounded_mask_grad: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
        value: [B, Hkv, N, Dv], dtype of query.
        keep_mask: m, [B, N]; bool (True = kept), or floating with values in [0, 1]. Values are not checked: that
            would wait for the GPU. Values below 2^-96 count as 0. A bool mask is faster.
        plan: from :func:`attention_plan`, instead of all masks and patterns, when several calls share them.
        key_padding_mask: [B, N] bool, True = a real token. Nobody sees a padding token; its own output row is 0.
        is_causal, window, block_ids, cu_seqlens: which tokens a token may see; see :func:`attention_plan`.
        scale: factor on Q K^T; default 1 / sqrt(D).
        bounded_mask_grad: in the gradient with respect to m_j where m_j = 0, put R / (1 + R) for R = exp(P_ij -
            log-sum-exp_i). The exact derivative is huge where a dropped token would have dominated a row; the bounded
            one has its sign and at most the slope 1 per pair. Exact where m_j > 0.
        return_lse: also return the natural logarithm of each row's sum, which has no gradient.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.dispatch`.

    Returns:
        [B, H, Nq, Dv], dtype of query, laid out in memory like it, as torch's scaled_dot_product_attention does: where
        query is a view of [B, Nq, H, D], ``output.transpose(1, 2).flatten(2)`` copies nothing. With ``return_lse`` also
        [B, H, Nq] in at least float32, inf for padding. Empty inputs give an empty (or zero) result.

    Raises:
        TypeError: an argument's dtype is not listed above, or dtypes differ.
        ValueError: shapes that do not fit together, Nq > N, tensors on different devices, unknown backend, a plan
            beside a mask or pattern.
        RuntimeError: backend="triton" cannot run (no CUDA device, triton missing, float64, D or Dv > 512).
        NotImplementedError: under torch.vmap or in forward mode.

    An invisible pair of tokens (i, j) contributes nothing: NaN or infinity in a dropped, padded or later token changes
    no result of a token that does not see it, forward or backward, and a row without a gradient changes no gradient of
    another token. A token that does see such a number is NaN.

    The derivative with respect to m_j at m_j = 0 is exact and therefore unbounded: it grows like exp(P_ij) over the
    mass that is left. From exp(P_ij - log-sum-exp) = 2^96 on it is cut off. Under autocast, query, key and value are
    cast as torch does for its own attention; keep_mask is not. Only backend="reference" has a second derivative.

    Example:
        >>> import torch
        >>> from toprl_kernels import masked_attention
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
        >>> nothing_kept = torch.zeros(1, 5, dtype=torch.bool)
        >>> bool(torch.allclose(masked_attention(q, k, v, nothing_kept), v))
        True
    """
    check.require_flags(OP, is_causal=is_causal, bounded_mask_grad=bounded_mask_grad, return_lse=return_lse)
    check.require_float(OP, "scale", scale)
    patterns = dict(is_causal=is_causal, window=window, block_ids=block_ids, cu_seqlens=cu_seqlens)
    masks = dict(keep_mask=keep_mask, key_padding_mask=key_padding_mask, **patterns)
    given = [name for name, argument in masks.items() if argument is not None and argument is not False]
    if plan is not None and given:
        raise ValueError(f"{OP}: {' and '.join(given)} given beside plan; the plan says it already")
    query, key, value = _autocast(query, key, value)
    choice = _examine(query, key, value, keep_mask if plan is None else plan.keep_mask, backend)
    if plan is None:
        assert keep_mask is not None  # examined
        plan = attention_plan(keep_mask, key_padding_mask, **patterns, backend=choice.name)  # type: ignore[arg-type]
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"{OP}: scale={scale} must be finite; leave it out for 1 / sqrt(D)")
    if query.numel() == 0 or value.numel() == 0:  # without keys too, since Nq <= N
        output = empty_output(query, value).zero_() + 0 * query.sum()  # connected to the graph
        lse = query.new_full(query.shape[:3], torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    else:
        call = AttentionCall(query, key, value, **vars(plan), scale=scale)
        if choice.name == "reference":
            output, lse = masked_attention_reference(call, bounded_mask_grad)
        else:
            output, lse = _forward_op(*call, bounded_mask_grad, return_lse, choice.name)
    return (output, lse) if return_lse else output


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch does for scaled_dot_product_attention, where autocast is on."""
    first = tensors[0]
    # torch raises for a device type without autocast
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def _examine(query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor | None, backend: str | None) -> Choice:
    """Raise for arguments that do not fit together; choose the implementation."""
    check.require(OP, "query", query, "[B, H, Nq, D]", 4, check.FLOATS)
    check.require(OP, "key", key, "[B, Hkv, N, D]", 4)
    check.require(OP, "value", value, "[B, Hkv, N, Dv]", 4)
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    like = ((query.dtype,), query.device, "query, key and value must agree: use .to(query.dtype)")
    check.require(OP, "key", key, "[B, Hkv, N, D]", (batch, num_kv_heads, num_keys, head_dim), *like)
    check.require(OP, "value", value, "[B, Hkv, N, Dv]", (*key.shape[:3], value.shape[3]), *like)
    if keep_mask is None:
        raise ValueError(f"{OP}: keep_mask is missing; give it, or plan=attention_plan(keep_mask, ...)")
    check.require(OP, "keep_mask", keep_mask, "[B, N]", (batch, num_keys), MASKS, query.device, FIX)
    if head_dim == 0 or value.shape[3] == 0:
        raise ValueError(f"{OP}: head dims must be at least 1, got D={head_dim} and Dv={value.shape[3]}")
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"{OP}: query has H={num_heads} heads and key Hkv={num_kv_heads}; H must be a multiple of Hkv >= 1"
        )
    if num_queries > num_keys:
        raise ValueError(
            f"{OP}: query has Nq={num_queries} tokens and key N={num_keys}; queries are the last tokens of the keys, "
            "so Nq <= N (append the new keys before the call)"
        )
    obstacle = None
    if query.dtype not in check.HALF_AND_SINGLE:
        obstacle = f"query has dtype {check.dtype_name(query.dtype)}, the kernels take 16 and 32 bit floats"
    elif max(head_dim, value.shape[3]) > MAX_HEAD_DIM:
        obstacle = f"head dims D={head_dim} and Dv={value.shape[3]}, the kernels take at most {MAX_HEAD_DIM}"
    return choose(OP, backend, query.device, obstacle, dtype=query.dtype)


def _lists(keep_mask: Tensor, key_padding_mask: Tensor | None, ranges: Tensor | None) -> Tensor:
    from toprl_kernels.attention.triton import make_lists

    return make_lists(keep_mask, key_padding_mask, ranges)


def _lists_fake(keep_mask: Tensor, key_padding_mask: Tensor | None, ranges: Tensor | None) -> Tensor:
    from toprl_kernels.attention.triton import lists_shape

    return keep_mask.new_empty(lists_shape(*keep_mask.shape), dtype=torch.int32)


NUMBER = len(AttentionCall._fields)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, return_lse, backend = arguments[NUMBER:]
    return implementation("attention", "masked_attention_forward", backend)(
        AttentionCall(*arguments[:NUMBER]), return_lse
    )


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return_lse, backend = arguments[-2:]
    shape = query.shape[:3] if return_lse or backend == "triton" else (0,)
    return empty_output(query, value), query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def _backward(grad_output: Tensor, output: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call, options = AttentionCall(*arguments[:NUMBER]), arguments[NUMBER:]
    backward = implementation("attention", "masked_attention_backward", options[-1])
    gradients = backward(grad_output, output, lse, call, *options[:-1])
    return tuple(grad_output.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(grad_output: Tensor, output: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    wanted = zip(arguments[:4], arguments[-2], strict=True)
    return tuple(tensor.new_empty(tensor.shape) if needed else grad_output.new_empty(0) for tensor, needed in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = (*inputs[7:10], inputs[-1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:7])


def _autograd(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    if grad_output is None or not any(needs):
        return (None,) * 12
    is_causal, scale, bounded_mask_grad, backend = ctx.options
    gradients = _backward_op(grad_output, *ctx.saved_tensors, is_causal, scale, bounded_mask_grad, needs, backend)
    return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *(None,) * 8)


_MASKS = "Tensor keep_mask, Tensor? key_padding_mask, Tensor? ranges"
_INPUTS = f"Tensor query, Tensor key, Tensor value, {_MASKS}, Tensor? lists"
_lists_op = register(f"attention_lists({_MASKS}) -> Tensor", _lists, _lists_fake)
_backward_op = register(
    f"masked_attention_backward(Tensor grad_output, Tensor output, Tensor lse, {_INPUTS}, bool is_causal, float scale, "
    "bool bounded_mask_grad, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    f"masked_attention({_INPUTS}, bool is_causal, float scale, bool bounded_mask_grad, bool return_lse, str backend) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
