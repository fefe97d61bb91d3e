"""What a call costs before the first kernel is launched: checks, choice of backend, the dispatcher, autograd.

The implementation under an op is replaced by one that returns finished tensors, so what is left is that cost. It is
CPU time on any machine, and a GPU cannot hide it when kernels are short. It includes freeing the results. How fast the
machine is says ``function_us``: torch's own price of a node, an autograd.Function that does nothing with one tensor.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from bench.kernel_measure import Row
from bench.timing import without_collector
from toprl_kernels import actor_score, compact_cache, masked_attention, sample_keep_mask, topk_compact
from toprl_kernels.testing import make_actor_weights, make_attention_inputs

BAR_US = 10.0
PASSES, ROUNDS, CALLS = 8, 20, 100  # spread out: a shared machine is slow for seconds at a time


def dispatch_table() -> list[Row]:
    """One row per op: microseconds per call without and with a gradient.

    The smallest time of the call less the smallest of the replaced implementation, each over all passes: a difference
    within one pass would be smallest where the machine was slow for the implementation alone.
    """
    best: dict[tuple[str, str], tuple[float, float]] = {}
    function_us = float("inf")
    one = torch.ones(1, requires_grad=True)
    for _ in range(PASSES):
        function_us = min(function_us, _microseconds(lambda: _Nothing.apply(one)))
        for key, times in _one_pass():
            known = best.get(key, times)
            best[key] = min(known[0], times[0]), min(known[1], times[1])
    rows: dict[str, Row] = {}
    for (op, mode), (call_us, stub_us) in best.items():
        row = rows.setdefault(op, {"op": op, "bar_us": BAR_US, "function_us": function_us})
        row[mode] = call_us - stub_us
    return list(rows.values())


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _one_pass() -> Iterator[tuple[tuple[str, str], tuple[float, float]]]:
    """((op, mode), (microseconds of the call, and of what stands in for the implementation))."""
    for op, (functions, call, leaves) in _calls().items():
        for function, needs_gradient in zip(functions, (False, True), strict=True):
            module = importlib.import_module(f"toprl_kernels.{function.rpartition('.')[0]}")
            name = function.rpartition(".")[2]
            implementation = getattr(module, name)
            for leaf in leaves:
                leaf.requires_grad_(needs_gradient)
            results: list[Any] = []

            def record(*arguments: Any, real: Callable[..., Any] = implementation, to: list[Any] = results) -> Any:
                to.append(real(*arguments))
                return to[-1]

            with mock.patch.object(module, name, record):
                call()
            finished = results[0]

            def stub(*arguments: Any, finished: Any = finished) -> Any:
                return _detached(finished)

            with mock.patch.object(module, name, stub):
                mode = "grad_us" if needs_gradient else "no_grad_us"
                yield (op, mode), (_microseconds(call), _microseconds(stub))
        for leaf in leaves:
            leaf.requires_grad_(False)  # ops share inputs


def _detached(result: Any) -> Any:
    """New tensor objects: the dispatcher marks those it gets as outputs of the op."""
    if isinstance(result, torch.Tensor):
        return result.detach()
    if isinstance(result, tuple):
        parts = [_detached(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result


def _microseconds(call: Callable[[], object]) -> float:
    best = float("inf")
    with without_collector():  # as timeit does: how much there is to look through is the affair of the process
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            best = min(best, time.perf_counter() - begin)
    return best / CALLS * 1e6


def _calls() -> dict[str, tuple[tuple[str, str], Callable[[], object], list[torch.Tensor]]]:
    """Op: what is replaced without and with a gradient, the call, and the tensors that need one."""
    x = make_attention_inputs(1, 2, 2, 8, 8, 16, mask="hard")
    hidden, scores = torch.randn(1, 8, 16), torch.randn(1, 8)
    keys, values = torch.randn(2, 1, 2, 8, 16).unbind(0)
    keys, values = keys.clone(), values.clone()
    indices = torch.arange(4)[None]
    weights = make_actor_weights(16, 8)
    seed = torch.zeros(1, dtype=torch.int64)
    logits = torch.randn(1, 8, 2)
    return {
        "masked_attention": (
            ("masked_attention.library.masked_attention_forward_eager",) * 2,
            lambda: masked_attention(x.query, x.key, x.value, x.keep_mask, is_causal=True),
            [x.query, x.key, x.value],
        ),
        "topk_compact": (
            ("topk_compact.library.topk_compact_eager",) * 2,
            lambda: topk_compact(hidden, scores, 4),
            [hidden],
        ),
        "compact_cache": (
            ("compact_cache.library.compact_cache_eager",) * 2,
            lambda: compact_cache(keys, values, indices),
            [keys, values],
        ),
        "actor_score": (
            # what needs a gradient is recorded by autograd operation by operation
            ("actor_score.library.actor_score_eager", "actor_score.api.actor_score_recorded"),
            lambda: actor_score(hidden, 0, weights),
            list(weights),
        ),
        "sample_keep_mask": (
            ("keep_mask.library.keep_mask_eager",) * 2,
            lambda: sample_keep_mask(logits, seed=seed),
            [logits],
        ),
    }
