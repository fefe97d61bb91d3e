"""Check, then time: what one case of the kernel suite does with its providers, whatever the op.

Columns that need a word:
    ratio_to_ours: median time over that of our op in the same case; above 1 we are faster.
    tflops, gbps: useful work over the median time. Each op's file says what is counted; nothing a provider does beyond
        it counts, so a provider that computes all N^2 pairs of a mask that keeps few shows a low number.
    floor_percent: the time that the useful work needs at the arithmetic and copy rates measured in this run
        (``peaks``), whichever is longer, over the median time. Above 100 where the data fit a cache.
    error, error_budget, error_ratio: of the output or gradient with the largest ratio, against the definition in
        float64; the budget is 2 * (error of eager at the same precision + eps * max|truth|).
    peak_mib: largest memory allocated during one call beyond what was there before, plus what a provider was given
        ready-made (an N x N mask). CUDA: torch.cuda.max_memory_allocated. CPU: every allocation and release seen by
        torch's profiler; buffers inside oneDNN and MKL are not seen.
    note: why a provider has no time, or what a reader must know about it.
"""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.kernel_cases import dtype_name
from bench.timing import time_interleaved, without_collector
from toprl_kernels.testing import error_budget, max_error

Row = dict[str, Any]
Call = Callable[[], list[Tensor]]
MIB = 2**20
LEFT_OUT = "left out here: the plan pays for torch.compile in other cases"
WRONG = 100.0  # a peer this far over the budget computes something else and is not timed


class WrongResultError(RuntimeError):
    """Our op missed its error budget; its timing would be worthless."""


class NotAvailableError(RuntimeError):
    """A provider cannot run here; the message is the reason."""


class Work(NamedTuple):
    """Useful work of one call."""

    flops: float
    bytes: float


class Check(NamedTuple):
    """The worst of a provider's results."""

    error: float
    budget: float

    @property
    def ratio(self) -> float:
        if self.error == 0:
            return 0.0
        return self.error / self.budget if self.budget > 0 else math.inf


class Built(NamedTuple):
    """A provider ready to be called; ``resident`` are bytes that it was given ready-made."""

    call: Call
    resident: int = 0


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        build: prepares what is not timed and returns the call; raises NotAvailableError with the reason.
        role: "ours" (must be right), "peer" (same result, else a note), "bound" (another result: a limit to compare
            with, or a part of our own call).
        work: useful work, where it is not that of the case.
        note: what a reader must know.
    """

    name: str
    build: Callable[[], Built]
    role: str = "peer"
    work: Work | None = None
    compiled: bool = False
    note: str = ""


@dataclass(frozen=True)
class Peaks:
    """Rates measured in this run."""

    flops: dict[torch.dtype, float]  # per second, of a square matrix product
    bytes: float  # per second, read plus written, of a copy

    def milliseconds(self, work: Work, dtype: torch.dtype) -> float:
        return 1e3 * max(work.flops / self.flops[dtype], work.bytes / self.bytes)


@dataclass(frozen=True)
class Settings:
    device: torch.device
    peaks: Peaks
    seconds: float
    min_rounds: int


def measure_peaks(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> Peaks:
    """Rates of a large matrix product per dtype and of a large copy."""
    size = 8192 if device.type == "cuda" else 1024 if quick else 2048
    flops = {}
    for dtype in dtypes:
        left, right = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
        timing = time_interleaved({"": lambda a=left, b=right: a @ b}, device, seconds=1.0)[""]  # type: ignore[misc]
        flops[dtype] = 2 * size**3 / (timing.p20_ms * 1e-3)
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"": lambda: target.copy_(source)}, device, seconds=1.0)[""]
    return Peaks(flops, 2 * source.numel() / (timing.p20_ms * 1e-3))


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes: the largest memory allocated at a time during one call, beyond what was allocated before it."""
    with without_collector():  # garbage of earlier providers, released during the call, would be subtracted
        return _peak_on_cuda(call, device) if device.type == "cuda" else _peak_on_cpu(call)


def _peak_on_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def checked(results: Sequence[Tensor], eager: Sequence[Tensor], oracle: Sequence[Tensor], dtype: torch.dtype) -> Check:
    """The result with the largest error against its budget. ``eager`` is the same computed at the same precision."""
    if len(results) != len(oracle):
        raise WrongResultError(f"{len(results)} results instead of {len(oracle)}")
    checks = []
    for got, plain, want in zip(results, eager, oracle, strict=True):
        if got.shape != want.shape:
            raise WrongResultError(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
        checks.append(Check(max_error(got, want), error_budget(plain, want, dtype)))
    return max(checks, key=lambda check: check.ratio)


def exact(results: Sequence[Tensor], truth: Sequence[Tensor]) -> Check:
    """Selection and copying round nothing: the budget is 0."""
    return Check(max(max_error(got, want) for got, want in zip(results, truth, strict=True)), 0.0)


def reason_of(error: BaseException) -> str:
    """One line: type and message of the innermost cause. Dynamo wraps what it finds, and quotes it inside a message."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).strip().splitlines() or [""]
    quoted = re.match(r"raised exception (\w+)\(['\"](.*?)['\"]\)$", lines[0])
    name, message = quoted.groups() if quoted else (type(error).__name__, lines[0])
    return f"{name}: {message}"[:240].removesuffix(": ")


def compare(
    labels: Row,
    dtype: torch.dtype,
    providers: Sequence[Provider],
    check: Callable[[list[Tensor]], Check],
    work: Work,
    settings: Settings,
) -> list[Row]:
    """Build, check and meter every provider, then time those that can run in turn. One row each, in their order.

    Args:
        labels: columns that all rows of the case share; ``labels["case"]`` names it in messages.
        check: the error of a provider's results against the definition.

    Raises:
        WrongResultError: a provider of role "ours" is over its budget.
    """
    gc.collect()
    torch._dynamo.reset()  # each case compiles for its own static sizes; old graphs would count against Dynamo's limit
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for provider in providers:
        row: Row = {**labels, "provider": provider.name, "role": provider.role, "note": provider.note}
        rows[provider.name] = row
        try:
            call = _prepare(provider, row, check, settings.device)
        except NotAvailableError as error:
            row["note"] = str(error)
        except Exception as error:  # whatever a peer does, the others are still to be measured
            if provider.role == "ours":
                raise
            row["note"] = f"cannot run: {reason_of(error)}"
        else:
            if call is not None:
                calls[provider.name] = call
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    # no further warm-up: each ran twice for its error and its memory
    timings = time_interleaved(
        calls, settings.device, seconds=settings.seconds, min_rounds=settings.min_rounds, warm_up=0
    )
    ours = next(provider.name for provider in providers if provider.role == "ours")
    for provider in providers:
        timing = timings.get(provider.name)
        own = provider.work or work
        seconds = timing.p50_ms * 1e-3 if timing else math.nan
        row = rows[provider.name]
        row |= {
            "p20_ms": timing.p20_ms if timing else None,
            "p50_ms": timing.p50_ms if timing else None,
            "p80_ms": timing.p80_ms if timing else None,
            "rounds": timing.rounds if timing else 0,
            "ratio_to_ours": timing.p50_ms / timings[ours].p50_ms if timing and ours in timings else None,
            "tflops": own.flops / seconds / 1e12 if timing and own.flops else None,
            "gbps": own.bytes / seconds / 1e9 if timing else None,
            "floor_percent": 100 * settings.peaks.milliseconds(own, dtype) / timing.p50_ms if timing else None,
        }
    return [{column: rows[provider.name].get(column) for column in COLUMNS} for provider in providers]


def _prepare(provider: Provider, row: Row, check: Callable[[list[Tensor]], Check], device: torch.device) -> Call | None:
    """The provider's call after one run, with its error and memory in ``row``; None when it must not be timed."""
    built = provider.build()
    begin = time.perf_counter()
    results = built.call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if provider.compiled:
        _add_note(row, f"first call {time.perf_counter() - begin:.0f} s (compilation)")
    if provider.role != "bound":
        found = check(results)
        row |= {"error": found.error, "error_budget": found.budget, "error_ratio": found.ratio}
        if not found.ratio <= 1:
            said = f"error {found.error:.2e} exceeds the budget {found.budget:.2e}"
            if provider.role == "ours":
                raise WrongResultError(f"{row['case']}, {provider.name}: {said}")
            _add_note(row, said)
            if not found.ratio <= WRONG:
                _add_note(row, "wrong result, not timed")
                return None
    del results
    row["peak_mib"] = (peak_memory(built.call, device) + built.resident) / MIB
    return built.call


def _add_note(row: Row, text: str) -> None:
    row["note"] = "; ".join(filter(None, (row["note"], text)))


def shared_labels(op: str, mode: str, shape: str, dtype: torch.dtype, case: str, **axes: object) -> Row:
    """The columns that name a case. ``axes``: batch, num_tokens, keep, pattern, hidden_size."""
    return {"op": op, "mode": mode, "shape": shape, "dtype": dtype_name(dtype), "case": case, **axes}


COLUMNS = (
    "op mode shape dtype batch num_tokens keep pattern hidden_size provider role p20_ms p50_ms p80_ms rounds "
    "ratio_to_ours tflops gbps floor_percent error error_budget error_ratio peak_mib note case"
).split()


def our_name(device: torch.device) -> str:
    return "toprl (triton)" if device.type == "cuda" else "toprl (eager)"
