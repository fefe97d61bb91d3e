"""Every op against every peer that the machine has. Correctness first: a wrong result of ours aborts the run.

    python bench/run.py --suite kernels --quick
    python bench/run.py --suite kernels --output_dir runs/bench --resume

On CUDA the ops under test are the Triton kernels. On the CPU they are the eager paths: Triton's interpreter says
nothing about speed and is not timed. All providers of a case share their inputs and are timed interleaved, after each
was checked against the definition in float64. A peer that cannot run keeps its row, with the reason in ``note``.

The cases are in kernel_cases.py, the columns in kernel_measure.py, the peers in kernel_peers.py and with their op, the
bars in kernel_targets.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch

from bench.kernel_actor import bench_actor
from bench.kernel_attention import bench_attention
from bench.kernel_cache import bench_cache
from bench.kernel_cases import Plan, dtype_name, plan_of
from bench.kernel_compaction import bench_compaction
from bench.kernel_dispatch import dispatch_table
from bench.kernel_measure import Row, Settings, measure_peaks
from bench.kernel_targets import memory_table, targets_table
from bench.kernel_topk import bench_topk
from bench.report import Report


def run(quick: bool, device: torch.device, report: Report) -> None:
    """Measure all cases into ``report``, which is on disk after each; then the tables made of their rows.

    Raises:
        WrongResultError: one of our ops is over its error budget.
    """
    torch.manual_seed(0)
    plan = plan_of(quick, device)
    peaks = measure_peaks(device, plan.dtypes, quick)
    report.add_table(
        "peaks",
        [
            {"matmul": dtype_name(dtype), "tflops": rate / 1e12, "copy_gbps": peaks.bytes / 1e9}
            for dtype, rate in peaks.flops.items()
        ],
    )
    settings = Settings(device, peaks, plan.seconds, plan.min_rounds)
    dispatch = dispatch_table()  # first, before compilers and large tensors have been through memory and caches
    for label, measure in cases_of(plan):
        if report.has(label):
            continue
        print(label, file=sys.stderr, flush=True)
        report.add(measure(settings))
    report.add_table("dispatch", dispatch)
    report.add_table("memory", memory_table(report.rows, device))
    report.add_table("targets", targets_table([*report.rows, *dispatch], device))


def cases_of(plan: Plan) -> Iterator[tuple[str, partial[list[Row]]]]:
    """Name and measurement of every case, in order."""
    for case in plan.attention:
        yield case.label(), partial(bench_attention, case)
    for case in plan.compaction:
        yield f"compaction of {case.label()}", partial(bench_compaction, case)
    for topk in plan.topk:
        yield topk.label(), partial(bench_topk, topk)
    for cache in plan.cache:
        yield cache.label(), partial(bench_cache, cache)
    for actor in plan.actor:
        yield actor.label(), partial(bench_actor, actor)
