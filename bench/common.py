"""What all suites share: timing, checked comparison of providers, tables, results as CSV.

Columns that need a word:
    ratio_to_ours: median time over that of our op in the same case; above 1 we are faster.
    tflops, gbps: useful work over the median time. Each op's file says what is counted; nothing a provider does beyond
        it counts, so a provider that computes all N^2 pairs of a mask that keeps few shows a low number.
    floor_percent: the time that the useful work needs at the arithmetic and copy rates measured in this run
        (``peaks``), whichever is longer, over the median time. Above 100 where the data fit a cache.
    error, error_budget, error_ratio: of the output or gradient with the largest ratio, against the definition in
        float64; the budget is 2 * (error of eager at the same precision + eps * max|truth|).
    peak_mib: largest memory allocated during one call beyond what was there before, plus what a provider was given
        ready-made (an N x N mask). On a CPU as torch's profiler sees it: without the buffers of oneDNN and MKL.
    note: why a provider has no time, or what a reader must know about it.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from toprl_kernels.dispatch import dtype_name
from toprl_kernels.testing import error_budget, max_error

T = TypeVar("T")
Row = dict[str, Any]
Call = Callable[[], list[Tensor]]
MIB = 2**20
MAX_ROUNDS = 200
FLUSH_BYTES = 256 * MIB  # larger than the L2 cache of any current GPU
LEFT_OUT = "left out here: the plan pays for torch.compile in other cases"
WRONG = 100.0  # a peer this far over the budget computes something else and is not timed
COMPARABLE = ("device", "device_type", "torch_threads", "torch", "triton", "python", "git_commit", "size")
COLUMNS = (
    "op mode shape dtype batch num_tokens keep pattern hidden_size provider role p20_ms p50_ms p80_ms rounds "
    "ratio_to_ours tflops gbps floor_percent error error_budget error_ratio peak_mib note case"
).split()


def graph(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function compiled for static sizes; nothing of Dynamo is imported before the first call."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=False, **options))
    return lambda *arguments, **named: compiled()(*arguments, **named)


def our_name(device: torch.device) -> str:
    """How tables call our op: by the implementation that the automatic choice takes."""
    forced = os.environ.get("TOPRL_KERNELS_BACKEND") == "triton"
    return "toprl (triton)" if device.type == "cuda" or forced else "toprl (eager)"


def environment(device: torch.device, size: str) -> Row:
    """What a number means nothing without."""

    def version(package: str) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
        return None

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "device_type": device.type, "cpu_count": os.cpu_count(), "torch_threads": torch.get_num_threads(),
        "bound_threads": os.environ.get("OMP_PROC_BIND", ""), "torch": torch.__version__, "triton": version("triton"),
        "transformers": version("transformers"), "python": platform.python_version(), "git_commit": git_commit(),
        "size": size, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def git_commit() -> str | None:
    """The commit that is measured; None without git."""
    command, folder = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# -- results -------------------------------------------------------------------------------------------------------


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """A Markdown table with aligned columns, by default all of them; a word where there are no rows."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1e-2 else f"{value:.3f}"
        return "" if value is None else str(value).replace("|", "/")

    if not rows:
        return "not measured"
    columns = columns_of(rows) if columns is None else columns
    lines = [list(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def read_csv(path: Path) -> list[Row]:
    """Rows of a results file, with numbers as numbers and empty cells as None; no rows without the file."""

    def value(text: str) -> object:
        if text in ("True", "False", ""):
            return {"True": True, "False": False, "": None}[text]
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text

    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file at once, so that a killed run leaves the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


class Report:
    """Collects what a suite measures, and writes it after every case.

    Args:
        suite: name of the files: ``<suite>.csv``, and ``<suite>_<table>.csv`` of further tables.
        where: the environment, whose columns every row of ``<suite>.csv`` carries.
        folder: where to write; None writes nothing.
        resume: take over the rows of an interrupted run from ``folder``.

    Raises:
        ValueError: ``resume`` without a folder, or the rows there come from another environment.
    """

    def __init__(self, suite: str, where: Row, folder: Path | None = None, *, resume: bool = False) -> None:
        self.suite, self.where, self.folder = suite, where, folder
        self.rows: list[Row] = []
        self.tables: dict[str, list[Row]] = {}
        if resume and folder is None:
            raise ValueError("--resume needs the --output_dir of the interrupted run")
        for row in read_csv(folder / f"{suite}.csv") if resume and folder is not None else []:
            for name in COMPARABLE:
                if str(row.get(name)) != str(where.get(name)):
                    raise ValueError(
                        f"--resume: {suite}.csv was measured with {name}={row.get(name)!r}, this run has "
                        f"{where.get(name)!r}; start anew without --resume"
                    )
            self.rows.append({name: value for name, value in row.items() if name not in where})

    def has(self, case: str) -> bool:
        """Whether the rows of ``case`` are there already."""
        return any(row.get("case") == case for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        """Rows of a finished case; on disk when this returns."""
        self.rows += rows
        if self.folder is not None:
            write_csv(self.folder / f"{self.suite}.csv", [{**row, **self.where} for row in self.rows])

    def add_table(self, name: str, rows: list[Row]) -> None:
        """A further table, in a file of its own."""
        self.tables[name] = rows
        if self.folder is not None:
            write_csv(self.folder / f"{self.suite}_{name}.csv", rows)


# -- timing --------------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Milliseconds of one provider."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80 with linear interpolation."""
    p20, p50, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return p20, p50, p80


def now(device: torch.device) -> float:
    """Milliseconds, after everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def in_turn(
    calls: Mapping[str, Callable[[], T]], *, seconds: float = 0.0, min_rounds: int = 5, warm_up: int = 2
) -> dict[str, list[T]]:
    """Call A B C, A B C, ... for about ``seconds`` in all, so that a machine's drift hits all alike; what they return.

    ``warm_up`` further rounds come first and leave no result: compilation, allocation, paging in.
    """
    results: dict[str, list[T]] = {name: [] for name in calls}
    for _ in range(warm_up):
        for call in calls.values():
            call()
    deadline, done = time.perf_counter() + seconds, 0
    while done < min_rounds or (done < MAX_ROUNDS and time.perf_counter() < deadline):
        for name, call in calls.items():
            results[name].append(call())
        done += 1
    return results


def milliseconds(call: Callable[[], T], device: torch.device, scratch: Tensor | None = None) -> tuple[float, T]:
    """Time of a call, and its result: by events on CUDA, after clearing the L2 cache with ``scratch``."""
    if device.type != "cuda":
        begin = time.perf_counter()
        result = call()
        return (time.perf_counter() - begin) * 1e3, result
    if scratch is None:
        torch.cuda.synchronize(device)
    else:
        scratch.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end), result


def time_interleaved(
    providers: Mapping[str, Callable[[], object]], device: torch.device, **rounds: Any
) -> dict[str, Timing]:
    """Quantiles of each provider's time, called as :func:`in_turn` says."""
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    timed = {name: lambda call=call: milliseconds(call, device, scratch)[0] for name, call in providers.items()}
    return {name: Timing(*quantiles(times), len(times)) for name, times in in_turn(timed, **rounds).items()}


# -- checked comparison of providers -------------------------------------------------------------------------------


class WrongResultError(RuntimeError):
    """Our op missed its error budget; its timing would be worthless."""


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
        return self.error / self.budget if self.budget > 0 else math.inf if self.error else 0.0


Checker = Callable[[list[Tensor]], Check]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        call: what is timed. Its first call, which is not, may prepare what a provider is given (a mask).
        role: "ours" (must be right), "peer" (same result, else a note), "bound" (another result: a limit to compare
            with, or a part of our own call).
        work: useful work, where it is not that of the case.
        resident: bytes that it is given.
        compiled: whether it needs torch.compile.
        missing: why it cannot run.
    """

    name: str
    call: Call
    role: str = "peer"
    work: Work | None = None
    resident: int = 0
    compiled: bool = False
    missing: str = ""


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
    seconds: float  # timing per case, all providers together
    min_rounds: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed in one comparison; an op's file adds sizes, ``shape`` and ``bench``."""

    op: ClassVar[str]
    batch: int = 1
    mode: str = "fwd"  # or "fwd+bwd"
    dtype: torch.dtype = torch.float32
    compiled: bool = False  # whether the peers that need torch.compile take part

    @property
    def backward(self) -> bool:
        return self.mode != "fwd"

    @property
    def shape(self) -> str:
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """What is computed, without the sizes; the ``mode`` column."""
        return self.mode

    @property
    def share(self) -> str:
        """How many tokens are kept, where the shape does not say it."""
        return ""

    def label(self) -> str:
        return f"{self.op} {self.kind} {self.shape}{self.share} {dtype_name(self.dtype)}"

    def labels(self) -> Row:
        """The columns that all rows of the case share."""
        axes = {name: getattr(self, name, None) for name in ("batch", "num_tokens", "keep", "pattern", "hidden_size")}
        names = {"op": self.op, "mode": self.kind, "shape": self.shape, "dtype": dtype_name(self.dtype)}
        return {**names, **axes, "case": self.label()}

    def bench(self, settings: Settings) -> list[Row]:
        """A row per provider."""
        raise NotImplementedError

    def measure(self, settings: Settings) -> list[Row]:
        with torch.set_grad_enabled(self.backward):
            return self.bench(settings)


def measure_peaks(device: torch.device, dtypes: Sequence[torch.dtype], size: str) -> Peaks:
    """Rates of a large matrix product per dtype and of a large copy."""
    edge = 64 if size == "tiny" else 8192 if device.type == "cuda" else 1024 if size == "quick" else 2048
    flops, seconds = {}, 0.05 if size == "tiny" else 1.0
    for dtype in dtypes:
        left, right = torch.randn(2, edge, edge, device=device).to(dtype).unbind(0)
        timing = time_interleaved({"": functools.partial(torch.matmul, left, right)}, device, seconds=seconds)[""]
        flops[dtype] = 2 * edge**3 / (timing.p20_ms * 1e-3)
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    timing = time_interleaved({"": copy}, device, seconds=seconds)[""]
    return Peaks(flops, 2 * source.numel() / (timing.p20_ms * 1e-3))


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes: the largest memory allocated at a time during one call, beyond what was allocated before it."""
    gc.disable()  # garbage of earlier providers, released during the call, would be subtracted
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    finally:
        gc.enable()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
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


def compare(case: Case, providers: Sequence[Provider], check: Checker, work: Work, settings: Settings) -> list[Row]:
    """Check and meter every provider, then time those that can run in turn. One row each, in their order.

    ``check`` returns the error of a provider's results against the definition.

    Raises:
        WrongResultError: a provider of role "ours" is over its budget.
    """
    gc.collect()
    torch.compiler.reset()  # each case compiles for its own static sizes; old graphs would count against a limit
    rows = {each.name: {**case.labels(), "provider": each.name, "role": each.role} for each in providers}
    calls: dict[str, Call] = {}
    for provider in providers:
        row, notes = rows[provider.name], []
        missing = provider.missing or (LEFT_OUT if provider.compiled and not case.compiled else "")
        try:
            if missing:
                notes = [missing]
            elif _meter(provider, row, notes, check, settings.device):
                calls[provider.name] = provider.call
        except Exception as error:  # whatever a peer does, the others are still to be measured
            if provider.role == "ours":
                raise
            notes.append(f"cannot run: {reason_of(error)}")
        row["note"] = "; ".join(notes)
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    # no further warm-up: each ran twice for its error and its memory
    rounds = {"seconds": settings.seconds, "min_rounds": settings.min_rounds, "warm_up": 0}
    timings = time_interleaved(calls, settings.device, **rounds)
    ours = next(provider.name for provider in providers if provider.role == "ours")
    for provider in providers:
        row, timing, useful = rows[provider.name], timings.get(provider.name), provider.work or work
        row["rounds"] = 0
        if timing is None:
            continue
        seconds = timing.p50_ms * 1e-3
        row |= timing._asdict() | {
            "ratio_to_ours": timing.p50_ms / timings[ours].p50_ms,
            "tflops": useful.flops / seconds / 1e12 if useful.flops else None,
            "gbps": useful.bytes / seconds / 1e9,
            "floor_percent": 100 * settings.peaks.milliseconds(useful, case.dtype) / timing.p50_ms,
        }
    return [{column: row.get(column) for column in COLUMNS} for row in rows.values()]


def _meter(provider: Provider, row: Row, notes: list[str], check: Checker, device: torch.device) -> bool:
    """Put error and memory of a provider into ``row``; whether it is right enough to be timed."""
    begin = now(device)
    results = provider.call()
    if provider.compiled:
        notes.append(f"first call {(now(device) - begin) / 1e3:.0f} s (compilation)")
    if provider.role != "bound":
        worst = check(results)
        row |= {"error": worst.error, "error_budget": worst.budget, "error_ratio": worst.ratio}
        if not worst.ratio <= 1:
            notes.append(f"error {worst.error:.2e} exceeds the budget {worst.budget:.2e}")
            if provider.role == "ours":
                raise WrongResultError(f"{row['case']}, {provider.name}: {notes[-1]}")
            if not worst.ratio <= WRONG:
                notes.append("wrong result, not timed")
                return False
    del results
    row["peak_mib"] = (peak_memory(provider.call, device) + provider.resident) / MIB
    return True
