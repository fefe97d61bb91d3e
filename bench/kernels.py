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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.actor import ActorCase
from bench.attention import BASE_SIZE, AttentionCase, DecodeCase
from bench.cache import CacheCase
from bench.common import Case, Report, Settings, dtype_name, measure_peaks
from bench.keep_mask import KeepMaskCase
from bench.targets import memory_table, targets_table
from bench.topk import TopkCase

PAPER_SIZES = (576, 1024, 2048, 2880, 4096)
DECODE_SIZES = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Plan:
    """The cases of one run, and how long to look at each; of those with the same label the first is measured."""

    cases: Sequence[Case]
    seconds: float
    min_rounds: int


def run(size: str, device: torch.device, report: Report, plan: Plan | None = None) -> None:
    """Measure all cases into ``report``, which is on disk after each; then the tables made of their rows.

    Raises:
        WrongResultError: one of our ops is over its error budget.
    """
    torch.manual_seed(0)
    plan = plan or (decode_plan if report.suite == "decode" else kernels_plan)(size, device)
    peaks = measure_peaks(device, sorted({case.dtype for case in plan.cases}, key=dtype_name), size)
    rates = {dtype_name(dtype): rate / 1e12 for dtype, rate in peaks.flops.items()}
    copy = {"copy_gbps": peaks.bytes / 1e9}
    report.add_table("peaks", [{"matmul": name, "tflops": rate, **copy} for name, rate in rates.items()])
    settings = Settings(device, peaks, plan.seconds, plan.min_rounds)
    for case in plan.cases:
        if not report.has(case.label()):
            print(case.label(), file=sys.stderr, flush=True)
            report.add(case.measure(settings))
    if report.suite == "kernels":
        report.add_table("memory", memory_table(report.rows, device))
        report.add_table("targets", targets_table(report.rows, device))


def decode_plan(size: str, device: torch.device) -> Plan:
    """One query over growing caches, all visible and a quarter."""
    base = DecodeCase(dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    if size == "tiny":
        base = replace(base, num_heads=2, num_kv_heads=1, head_dim=16)
    sizes = {"tiny": (33,), "quick": (512, 2048), "full": DECODE_SIZES}[size]
    cases = [replace(base, num_tokens=n, keep=keep) for n in sizes for keep in (1.0, 0.25)]
    if size == "full":
        cases += [replace(base, num_tokens=n, keep=1.0, batch=8) for n in DECODE_SIZES]
    return Plan(cases, 0.02, 2) if size == "tiny" else Plan(cases, 1.5, 5)


def kernels_plan(size: str, device: torch.device) -> Plan:
    """The documented subset for a kind of device; tiny is for rehearsals in Triton's interpreter."""
    if size == "tiny":
        small = AttentionCase(20, num_heads=2, num_kv_heads=1, head_dim=16)
        soft = replace(small, mask="soft", dtype=torch.bfloat16 if device.type == "cuda" else small.dtype)
        attention = [replace(small, mode="fwd+bwd"), replace(soft, mode="fwd+bwd+mask")]
        others = [TopkCase(20, 5, 16, mode="fwd+bwd"), CacheCase(20, 5, 1, 16), ActorCase(20, 32, 16), KeepMaskCase(20)]
        return Plan([*attention, *others], seconds=0.02, min_rounds=2)
    on_cuda, quick = device.type == "cuda", size == "quick"
    base, width = AttentionCase(), 1024
    if on_cuda:
        base = replace(base, num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
        width = 4096
    cases: list[Case] = [
        *(_quick_attention(base) if quick else _full_attention(base)),
        *_topk(quick, on_cuda, base.dtype, width),
        *_cache(quick, on_cuda, base.dtype),
        *_actor(quick, on_cuda, base.dtype),
        *(KeepMaskCase(2880, batch=batch) for batch in ((1,) if quick else (1, 8, 32))),
    ]
    return Plan(cases, seconds=1.5 if quick else 6.0, min_rounds=3 if quick else 5)


def _quick_attention(base: AttentionCase) -> list[AttentionCase]:
    sizes = [replace(base, num_tokens=n) for n in (576, BASE_SIZE)]
    modes = [("hard", "fwd"), ("hard", "fwd+bwd"), ("soft", "fwd+bwd+mask")]
    cases = [replace(case, mask=mask, mode=mode) for case in sizes for mask, mode in modes]
    return [replace(case, compiled=case == base) for case in cases]


def _full_attention(base: AttentionCase) -> list[AttentionCase]:
    on_gpu = base.head_dim == 128
    hard_modes = [base, replace(base, mode="fwd+bwd")]
    soft = replace(base, mask="soft")
    sized = [*hard_modes, replace(soft, mode="fwd+bwd+mask")]
    cases = [
        replace(case, num_tokens=n, compiled=case.mode == "fwd" or n == BASE_SIZE or on_gpu)
        for n in PAPER_SIZES
        for case in sized
    ]
    for case in hard_modes:
        cases += [replace(case, keep=keep) for keep in (0.1, 0.5, 1.0)]
        cases.append(replace(case, pattern="clustered", compiled=True))
        cases += [replace(case, num_tokens=576, batch=batch) for batch in (8, 32)]
    cases += [replace(soft, compiled=True), replace(soft, mode="fwd+bwd", compiled=on_gpu)]
    cases += [replace(base, mask="straight-through", mode="fwd+bwd+mask"), replace(base, causal=False)]
    if not on_gpu:
        return [*cases, replace(base, num_kv_heads=8, head_dim=128), replace(base, dtype=torch.bfloat16)]
    cases += [replace(base, keep=1.0, num_tokens=n) for n in PAPER_SIZES if n > BASE_SIZE]
    cases += [replace(base, num_kv_heads=32), replace(base, num_kv_heads=32, head_dim=64)]
    return cases + [replace(base, dtype=dtype) for dtype in (torch.float16, torch.float32)]


def _topk(quick: bool, on_cuda: bool, dtype: torch.dtype, width: int) -> list[TopkCase]:
    cases = [TopkCase(576, 192, width, batch=batch, dtype=dtype) for batch in (1, 8)]
    cases += [TopkCase(2880, 960, 4096, dtype=dtype), TopkCase(576, 192, 4096, batch=8, dtype=dtype)]
    base = TopkCase(BASE_SIZE, 512, 4096, dtype=dtype)
    if quick:
        return [*cases, base]
    cases += [replace(base, num_tokens=n, k=n // 4, compiled=n == BASE_SIZE) for n in PAPER_SIZES]
    cases += [replace(base, k=round(keep * BASE_SIZE)) for keep in (0.1, 0.5, 1.0)]
    cases += [TopkCase(576, 144, 4096, batch=32, dtype=dtype), TopkCase(65536, 16384, 256, dtype=dtype)]
    cases.append(replace(base, mode="fwd+bwd"))
    if on_cuda:  # 64 MB and more: bound by the copy, not by the launches
        cases += [TopkCase(2880, 720, 4096, batch=batch, dtype=dtype) for batch in (16, 32)]
    return cases


def _cache(quick: bool, on_cuda: bool, dtype: torch.dtype) -> list[CacheCase]:
    cases = [CacheCase(n, n // 4, dtype=dtype) for n in ((BASE_SIZE,) if quick else PAPER_SIZES)]
    return cases if quick else [*cases, CacheCase(576, 144, batch=32 if on_cuda else 8, dtype=dtype)]


def _actor(quick: bool, on_cuda: bool, dtype: torch.dtype) -> list[ActorCase]:
    modes = ("fwd", "fwd+bwd")
    cases = [ActorCase(32, 64, 16, mode=mode, dtype=dtype) for mode in modes]  # what surrounds the products counts
    cases += [ActorCase(576, 1024, mode=mode, dtype=dtype, compiled=not quick) for mode in modes]
    if quick:
        return cases
    cases += [ActorCase(n, 4096, dtype=dtype, compiled=n in (576, 2880)) for n in PAPER_SIZES]
    cases.append(ActorCase(BASE_SIZE, 4096, mode="fwd+bwd", dtype=dtype))
    return [*cases, ActorCase(576, 4096, batch=32 if on_cuda else 8, dtype=dtype)]
