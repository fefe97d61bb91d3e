"""What all suites share: timing, checked comparison of providers, results as CSV.

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

import contextlib
import csv
import gc
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toprl_kernels.testing import error_budget, max_error

Row = dict[str, Any]
Call = Callable[[], list[Tensor]]
MIB = 2**20
FLUSH_BYTES = 256 * MIB  # larger than the L2 cache of any current GPU
SIZES = ("tiny", "quick", "full")
LEFT_OUT = "left out here: the plan pays for torch.compile in other cases"
WRONG = 100.0  # a peer this far over the budget computes something else and is not timed
COMPARABLE = ("device", "device_type", "torch_threads", "torch", "triton", "python", "git_commit", "size")
COLUMNS = (
    "op mode shape dtype batch num_tokens keep pattern hidden_size provider role p20_ms p50_ms p80_ms rounds "
    "ratio_to_ours tflops gbps floor_percent error error_budget error_ratio peak_mib note case"
).split()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def our_name(device: torch.device) -> str:
    """How tables call our op: by the implementation that the automatic choice takes."""
    forced = os.environ.get("TOPRL_KERNELS_BACKEND") == "triton"
    return "toprl (triton)" if device.type == "cuda" or forced else "toprl (eager)"


def environment(device: torch.device, size: str) -> Row:
    """What a number means nothing without."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
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
    command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# -- results -------------------------------------------------------------------------------------------------------


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def read_csv(path: Path) -> list[Row]:
    """Rows of a results file, with numbers as numbers and empty cells as None."""

    def value(text: str) -> object:
        if text in ("True", "False", ""):
            return {"True": True, "False": False, "": None}[text]
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text

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
        if resume and folder is not None and (folder / f"{suite}.csv").exists():
            self._take_over(read_csv(folder / f"{suite}.csv"))

    def _take_over(self, rows: list[Row]) -> None:
        for row in rows:
            for name in COMPARABLE:
                if str(row.get(name)) != str(self.where.get(name)):
                    raise ValueError(
                        f"--resume: {self.suite}.csv was measured with {name}={row.get(name)!r}, this run has "
                        f"{self.where.get(name)!r}; start anew without --resume"
                    )
        self.rows = [{name: value for name, value in row.items() if name not in self.where} for row in rows]

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


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """The garbage collector off, and on again afterwards only where it was on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80 with linear interpolation."""
    fractions = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(samples, dtype=torch.float64).quantile(fractions).tolist()
    return p20, p50, p80


def now(device: torch.device) -> float:
    """Milliseconds, after everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def time_interleaved(
    providers: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warm_up: int = 2,
) -> dict[str, Timing]:
    """Run A B C, A B C, ... for about ``seconds`` in all and return the quantiles of each provider.

    On CUDA each call is timed by events after clearing the L2 cache; on the CPU by the wall clock. ``warm_up`` untimed
    rounds come first: compilation, allocation, paging in.
    """
    on_cuda = device.type == "cuda"
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if on_cuda else None
    for _ in range(warm_up):
        for call in providers.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in providers}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
        for name, call in providers.items():
            if scratch is not None:
                scratch.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                torch.cuda.synchronize(device)
                samples[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                call()
                samples[name].append((time.perf_counter() - begin) * 1e3)
        rounds += 1
    return {name: Timing(*quantiles(values), rounds) for name, values in samples.items()}


# -- checked comparison of providers -------------------------------------------------------------------------------


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


def measure_peaks(device: torch.device, dtypes: Sequence[torch.dtype], size: str) -> Peaks:
    """Rates of a large matrix product per dtype and of a large copy."""
    edge = 8192 if device.type == "cuda" else {"tiny": 64, "quick": 1024, "full": 2048}[size]
    flops, seconds = {}, 0.05 if size == "tiny" else 1.0
    for dtype in dtypes:
        left, right = torch.randn(2, edge, edge, device=device).to(dtype).unbind(0)
        timing = time_interleaved({"": lambda a=left, b=right: a @ b}, device, seconds=seconds)[""]  # type: ignore[misc]
        flops[dtype] = 2 * edge**3 / (timing.p20_ms * 1e-3)
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"": lambda: target.copy_(source)}, device, seconds=seconds)[""]
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
