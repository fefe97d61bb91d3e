"""Every op against every peer that the machine has. Correctness first: a wrong result of ours aborts the run.

    python bench/run.py --suite kernels --quick
    python bench/run.py --suite kernels --output_dir runs/bench --resume

On CUDA the ops under test are the Triton kernels. On the CPU they are the eager paths: Triton's interpreter says
nothing about speed and is not timed. All providers of a case share their inputs and are timed interleaved, after each
was checked against the definition in float64. A peer that cannot run keeps its row, with the reason in ``note``.

Each axis is swept around a base case, not the full cross product. Base of masked_attention: N = 2048 tokens, 25 % kept
at random, one sample, causal, a hard mask. Around it:

* N in 576, 1024, 2048, 2880, 4096 for the forward and the forward with backward of a hard mask, and for the forward
  with backward of a soft mask that wants its own gradient;
* 10, 50 and 100 % kept, clustered masks, several samples (at N = 576), the soft mask without a gradient of its own, a
  mask that is exactly 0 or 1 but wants a gradient (straight-through), no causality, other head layouts and dtypes.

``--quick`` keeps the two sizes and the few graphs to compile that fit two minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.actor import ActorCase, bench_actor
from bench.attention import (
    BASE_SIZE,
    AttentionCase,
    DecodeCase,
    bench_attention,
    bench_decode,
)
from bench.cache import CacheCase, bench_cache
from bench.common import Report, Row, Settings, dtype_name, measure_peaks
from bench.keep_mask import KeepMaskCase, bench_keep_mask
from bench.targets import memory_table, targets_table
from bench.topk import TopkCase, bench_topk

PAPER_SIZES = (576, 1024, 2048, 2880, 4096)
DECODE_SIZES = (512, 1024, 2048, 4096, 8192)
Measure = Callable[[Settings], list[Row]]


@dataclass(frozen=True)
class Plan:
    """The cases of one run by name, and how long to look at each."""

    cases: dict[str, Measure]
    dtypes: tuple[torch.dtype, ...]
    seconds: float  # timing per case, all providers together
    min_rounds: int


def run(size: str, device: torch.device, report: Report, plan: Plan | None = None) -> None:
    """Measure all cases into ``report``, which is on disk after each; then the tables made of their rows.

    Raises:
        WrongResultError: one of our ops is over its error budget.
    """
    torch.manual_seed(0)
    plan = plan or (decode_plan(size, device) if report.suite == "decode" else plan_of(size, device))
    peaks = measure_peaks(device, plan.dtypes, size)
    report.add_table(
        "peaks",
        [
            {"matmul": dtype_name(dtype), "tflops": rate / 1e12, "copy_gbps": peaks.bytes / 1e9}
            for dtype, rate in peaks.flops.items()
        ],
    )
    settings = Settings(device, peaks, plan.seconds, plan.min_rounds)
    for label, measure in plan.cases.items():
        if not report.has(label):
            print(label, file=sys.stderr, flush=True)
            report.add(measure(settings))
    if report.suite == "kernels":
        report.add_table("memory", memory_table(report.rows, device))
        report.add_table("targets", targets_table(report.rows, device))


def by_label(measure: Callable[[Any, Settings], list[Row]], cases: list[Any]) -> dict[str, Measure]:
    """Name and measurement of each case, in order; lists of sizes may overlap."""
    return {case.label(): partial(measure, case) for case in cases}


def decode_plan(size: str, device: torch.device) -> Plan:
    """One query over growing caches, all visible and a quarter."""
    on_cuda = device.type == "cuda"
    base = DecodeCase(512, dtype=torch.bfloat16 if on_cuda else torch.float32)
    if size == "tiny":
        base = replace(base, num_heads=2, num_kv_heads=1, head_dim=16)
    sizes = {"tiny": (33,), "quick": (512, 2048), "full": DECODE_SIZES}[size]
    cases = [replace(base, num_tokens=n, keep=keep) for n in sizes for keep in (1.0, 0.25)]
    if size == "full":
        cases += [replace(base, num_tokens=n, batch=8) for n in DECODE_SIZES]
    seconds, rounds = (0.02, 2) if size == "tiny" else (1.5, 5)
    return Plan(by_label(bench_decode, cases), (base.dtype,), seconds, rounds)


def plan_of(size: str, device: torch.device) -> Plan:
    """The documented subset for a kind of device."""
    if size == "tiny":
        return tiny_plan()
    on_cuda, quick = device.type == "cuda", size == "quick"
    base = AttentionCase()
    width = 1024
    if on_cuda:
        base = replace(base, num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
        width = 4096
    attention = _quick_attention(base) if quick else _full_attention(base)
    masks = [KeepMaskCase(2880, batch) for batch in ((1,) if quick else (1, 8, 32))]
    return Plan(
        {
            **by_label(bench_attention, attention),
            **by_label(bench_topk, _topk(quick, on_cuda, base.dtype, width)),
            **by_label(bench_cache, _cache(quick, on_cuda, base.dtype)),
            **by_label(bench_actor, _actor(quick, on_cuda, base.dtype)),
            **by_label(bench_keep_mask, masks),
        },
        tuple(sorted({base.dtype, *(case.dtype for case in attention)}, key=dtype_name)),
        seconds=1.5 if quick else 6.0,
        min_rounds=3 if quick else 5,
    )


def tiny_plan() -> Plan:
    """A case or two per op, at sizes for Triton's interpreter: for rehearsals."""
    small = AttentionCase(20, num_heads=2, num_kv_heads=1, head_dim=16)
    cases = {
        **by_label(bench_attention, [replace(small, mode="fwd+bwd"), replace(small, mask="soft", mode="fwd+bwd+mask")]),
        **by_label(bench_topk, [TopkCase(20, 5, 16, mode="fwd+bwd")]),
        **by_label(bench_cache, [CacheCase(20, 5, num_kv_heads=1, head_dim=16)]),
        **by_label(bench_actor, [ActorCase(20, 32, 16)]),
        **by_label(bench_keep_mask, [KeepMaskCase(20)]),
    }
    return Plan(cases, (torch.float32,), seconds=0.02, min_rounds=2)


def _quick_attention(base: AttentionCase) -> list[AttentionCase]:
    cases = []
    for num_tokens in (576, BASE_SIZE):
        at_size = replace(base, num_tokens=num_tokens)
        cases += [
            replace(at_size, compiled=num_tokens == BASE_SIZE),
            replace(at_size, mode="fwd+bwd"),
            replace(at_size, mask="soft", mode="fwd+bwd+mask"),
        ]
    return cases


def _full_attention(base: AttentionCase) -> list[AttentionCase]:
    hard_modes = [replace(base, mode=mode) for mode in ("fwd", "fwd+bwd")]
    soft = replace(base, mask="soft")
    cases = []
    for num_tokens in PAPER_SIZES:
        sized = [*hard_modes, replace(soft, mode="fwd+bwd+mask")]
        is_base = num_tokens == BASE_SIZE
        cases += [
            replace(case, num_tokens=num_tokens, compiled=case.mode == "fwd" or is_base or base.head_dim == 128)
            for case in sized
        ]
    for case in hard_modes:
        cases += [replace(case, keep=keep) for keep in (0.1, 0.5, 1.0)]
        cases.append(replace(case, pattern="clustered", compiled=True))
        cases += [replace(case, num_tokens=576, batch=batch) for batch in (8, 32)]
    cases += [replace(soft, compiled=True), replace(soft, mode="fwd+bwd", compiled=base.head_dim == 128)]
    cases.append(replace(base, mask="straight-through", mode="fwd+bwd+mask"))
    cases.append(replace(base, causal=False))
    if base.head_dim == 128:  # the plan of a GPU
        cases += [replace(base, keep=1.0, num_tokens=n) for n in PAPER_SIZES if n > BASE_SIZE]
        cases += [replace(base, num_kv_heads=32), replace(base, num_kv_heads=32, head_dim=64)]
        cases += [replace(base, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    else:
        cases += [replace(base, num_kv_heads=8, head_dim=128), replace(base, dtype=torch.bfloat16)]
    return cases


def _topk(quick: bool, on_cuda: bool, dtype: torch.dtype, width: int) -> list[TopkCase]:
    cases = [TopkCase(576, 192, width, batch=batch, dtype=dtype) for batch in (1, 8)]
    cases += [TopkCase(2880, 960, 4096, dtype=dtype), TopkCase(576, 192, 4096, batch=8, dtype=dtype)]
    base = TopkCase(BASE_SIZE, 512, 4096, dtype=dtype, compiled=not quick)
    if quick:
        return [*cases, base]
    cases += [replace(base, num_tokens=n, k=n // 4, compiled=n == BASE_SIZE) for n in PAPER_SIZES]
    cases += [replace(base, k=round(keep * BASE_SIZE), compiled=False) for keep in (0.1, 0.5, 1.0)]
    cases += [TopkCase(576, 144, 4096, batch=32, dtype=dtype), TopkCase(65536, 16384, 256, dtype=dtype)]
    cases.append(replace(base, mode="fwd+bwd", compiled=False))
    if on_cuda:  # 64 MB and more: bound by the copy, not by the launches
        cases += [TopkCase(2880, 720, 4096, batch=batch, dtype=dtype) for batch in (16, 32)]
    return cases


def _cache(quick: bool, on_cuda: bool, dtype: torch.dtype) -> list[CacheCase]:
    sizes = (BASE_SIZE,) if quick else PAPER_SIZES
    cases = [CacheCase(n, n // 4, dtype=dtype) for n in sizes]
    if not quick:
        cases.append(CacheCase(576, 144, batch=32 if on_cuda else 8, dtype=dtype))
    return cases


def _actor(quick: bool, on_cuda: bool, dtype: torch.dtype) -> list[ActorCase]:
    modes = ("fwd", "fwd+bwd")
    few = [ActorCase(32, 64, 16, mode=mode, dtype=dtype) for mode in modes]  # what surrounds the products counts
    if quick:
        return [*few, *(ActorCase(576, 1024, mode=mode, dtype=dtype) for mode in modes)]
    cases = [*few, *(ActorCase(576, 1024, mode=mode, dtype=dtype, compiled=True) for mode in modes)]
    cases += [ActorCase(n, 4096, dtype=dtype, compiled=n in (576, 2880)) for n in PAPER_SIZES]
    cases.append(ActorCase(BASE_SIZE, 4096, mode="fwd+bwd", dtype=dtype))
    cases.append(ActorCase(576, 4096, batch=32 if on_cuda else 8, dtype=dtype))
    return cases
