"""A stand-in for the package flash-attn 2 that runs on the CPU, so that transformers' flash path can be tested there.

Only the two functions are replaced: how masks become ``cu_seqlens``, what is unpadded and when the varlen function is
called is transformers' own code. They follow the documented interface of flash-attn 2: ``[B, N, H, D]`` or packed
``[total, H, D]`` tensors, grouped queries, and a causal mask aligned to the *bottom right* corner: of 2 queries and 5
keys the first query sees 4. Unlike the package they take float32, so that comparisons can be exact.
"""

from __future__ import annotations

import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils

CALLS: Counter[str] = Counter()


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int]) -> Tensor:
    """One batch: ``[B, Nq, H, D]`` queries on ``[B, Nk, Hkv, D]`` keys; a query that sees no key gives 0."""
    queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.repeat_interleave(groups, 2).transpose(1, 2) for t in (k, v))
    scores = (q.float() @ k.float().transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # how far a key lies behind its query when the last query stands at the last key
    behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    left, right = window[0], 0 if causal else window[1]
    closed = torch.zeros_like(behind, dtype=torch.bool)
    if left >= 0:
        closed |= behind > left
    if right >= 0:
        closed |= -behind > right
    weights = scores.masked_fill(closed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ v.float()).to(v.dtype).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, dims: int, dropout_p: float, softcap: float, alibi_slopes: Any) -> None:
    assert q.ndim == k.ndim == v.ndim == dims
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "the last dimension must be contiguous"
    assert q.shape[-2] % k.shape[-2] == 0 and k.shape == v.shape
    assert not dropout_p and not softcap and alibi_slopes is None, "not in the stand-in"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """q ``[B, Nq, H, D]``, k and v ``[B, Nk, Hkv, D]``: ``[B, Nq, H, D]``."""
    CALLS["flash_attn_func"] += 1
    _check(q, k, v, 4, dropout_p, softcap, alibi_slopes)
    return _attend(q, k, v, softmax_scale, causal, window_size)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Sequences laid end to end: sample b owns rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``."""
    CALLS["flash_attn_varlen_func"] += 1
    _check(q, k, v, 3, dropout_p, softcap, alibi_slopes)
    assert block_table is None, "not in the stand-in"
    parts, starts = [], []
    for tensor, ends, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert ends.dtype == torch.int32, "cu_seqlens must have dtype int32"
        assert ends[0] == 0 and ends[-1] == len(tensor), "cu_seqlens must cover all rows"
        assert int(ends.diff().max()) <= int(longest), "max_seqlen is shorter than a sequence: its end is never written"
        starts.append(ends.tolist())
    assert len(starts[0]) == len(starts[1]), "as many sequences of queries as of keys"
    for q0, q1, k0, k1 in zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False):
        one = (q[None, q0:q1], k[None, k0:k1], v[None, k0:k1])
        parts.append(_attend(*one, softmax_scale, causal, window_size)[0])
    return torch.cat(parts)


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Tensor:
    """For paged caches, which these tests have not."""
    raise NotImplementedError("flash_attn_with_kvcache is not in the stand-in")


def install(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Make ``attn_implementation="flash_attention_2"`` run on these functions; returns the count of their calls."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(package, function.__name__, function)
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input  # type: ignore[attr-defined]
    for module in (package, padding):
        module.__spec__ = ModuleSpec(module.__name__, loader=None)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def available(*args: Any, **kwargs: Any) -> bool:
        return True

    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", available)
    row = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(row, "general_availability_check", available)
    monkeypatch.setitem(row, "supported_devices", ((available, "cpu"),))
    # load anew now, and again when the test is over
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    CALLS.clear()
    return CALLS
