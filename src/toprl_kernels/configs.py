"""Which launch configuration a kernel gets: a measured one where there is a file of measurements, else the pinned one.

Nothing is tuned at run time. ``python -m toprl_kernels.tune`` times candidates on the GPU at hand and writes a file
that :func:`select` prefers from then on; the same file says which implementation is faster where that has to be
measured (:func:`faster`). :func:`describe` says whether there is one.

Imports neither triton nor any op, so that every module may import it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from toprl_kernels.launch_table import (
    ARCHITECTURES,
    KERNELS,
    KINDS,
    SHARED_MEMORY,
    LaunchConfig,
    all_rows,
    bucket,
    kind_of,
    pinned,
    rows,
)

__all__ = [
    "ARCHITECTURES", "ENVIRONMENT_VARIABLE", "KERNELS", "KINDS", "SHARED_MEMORY", "LaunchConfig", "Measurements",
    "Preference", "Times", "all_rows", "architecture_of", "bucket", "describe", "describe_choice", "faster", "forget",
    "kind_of", "measured", "override", "pinned", "read", "rows", "select", "using", "write",
]  # fmt: skip

INTERPRETED_ARCHITECTURE = "sm_90"  # whose rows run on CPU tensors, that is, in the interpreter

_overrides: dict[str, LaunchConfig] = {}


def select(kernel: str, *, size: int, dtype: torch.dtype, device: torch.device) -> LaunchConfig:
    """The configuration of ``kernel`` for tensors on ``device``: measured on this GPU if there is a file, else pinned.

    Args:
        kernel: one of :data:`KERNELS`.
        size: head dim or number of tokens; see the comment at the kernel's rows.
        dtype: float16, bfloat16 or float32. Kernels that move or count ignore it.
        device: CPU stands for the interpreter and gets the pinned rows of sm_90.

    Raises:
        ValueError: unknown kernel, or a size or dtype that it has no row for.
        RuntimeError: a GPU older than compute capability 8.0, or an unusable file of measurements.
    """
    if _overrides and kernel in _overrides:
        return _overrides[kernel]
    return _select(kernel, size, dtype, device)


@functools.lru_cache(maxsize=4096)
def _select(kernel: str, size: int, dtype: torch.dtype, device: torch.device) -> LaunchConfig:
    architecture = architecture_of(device)
    largest = bucket(kernel, architecture, size=size, dtype=dtype)
    measurements = measured(device)
    if measurements is not None:
        key = (kernel, kind_of(kernel, architecture, dtype), largest)
        if key in measurements.configs:
            return measurements.configs[key]
    return rows(kernel, architecture, dtype)[largest]


@contextlib.contextmanager
def override(replacements: Mapping[str, LaunchConfig]) -> Iterator[None]:
    """Make :func:`select` return these, whatever the size: for tuning and tests."""
    previous = dict(_overrides)
    _overrides.update(replacements)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(previous)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The name under which the table knows a device.

    Compute capability 8.0 and 8.7 (163 KiB of shared memory or more) share rows, as do 10.x and 11.x; 8.6, 8.9, 12.x
    and anything newer than this table get the rows that fit into 99 KiB.

    Raises:
        RuntimeError: compute capability below 8.0.
    """
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    if torch.version.hip:
        return "gfx942"
    major, minor = capability_of(device)
    if major < 8:
        raise RuntimeError(
            f"configs: compute capability {major}.{minor} is too old for the kernels, which need 8.0 (A100) or newer; "
            "use backend='eager'"
        )
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    if major == 9:
        return "sm_90"
    return "sm_100" if major in (10, 11) else "sm_86"


# --- measurements ---

ENVIRONMENT_VARIABLE = "TOPRL_KERNELS_CONFIGS"
FORMAT = 1
TUNE_COMMAND = "python -m toprl_kernels.tune"

Bucket = tuple[int, ...]


class Times(NamedTuple):
    """Milliseconds of an op's two implementations on the same inputs."""

    triton: float
    eager: float


class Measurements(NamedTuple):
    """What a tuning run found on one GPU."""

    device: str  # its name, for the reader
    configs: dict[tuple[str, str, int], LaunchConfig]  # (kernel, element type, largest size of the bucket)
    times: dict[tuple[str, str, Bucket], Times]  # (op, element type, size bucket)


class Preference(NamedTuple):
    """The implementation to take ("eager" or "triton") and why."""

    name: str
    reason: str


# Timings that come with the package, by (capability, op, element type, size bucket). There are none yet: until a
# tuning run, the automatic choice between implementations that have to be measured is the eager one.
PINNED_TIMES: dict[tuple[str, str, str, Bucket], Times] = {}


def size_bucket(sizes: Bucket) -> Bucket:
    """Each size rounded up to a power of two."""
    return tuple(1 << max(size - 1, 0).bit_length() for size in sizes)


@functools.lru_cache(maxsize=4096)
def faster(op: str, sizes: Bucket, dtype: torch.dtype, device: torch.device) -> Preference:
    """Which implementation of ``op`` was measured to be the faster one on this kind of GPU, for this size bucket.

    Raises:
        RuntimeError: an unusable file of measurements.
    """
    if device.type != "cuda":
        return Preference("eager", f"the tensors are on {device}")
    key = (op, KINDS.get(dtype, "none"), size_bucket(sizes))
    measurements = measured(device)
    times = measurements.times.get(key) if measurements is not None else None
    if times is None:
        times = PINNED_TIMES.get((capability_name(device), *key))
    if times is None:
        where = f"{capability_name(device)} at this size (bucket {'x'.join(map(str, key[2]))}, {key[1]})"
        return Preference("eager", f"nobody has timed the kernels on {where}; {TUNE_COMMAND} does")
    name = "triton" if times.triton < times.eager else "eager"
    return Preference(name, f"measured {times.triton:.4f} ms against {times.eager:.4f} ms eager")


def capability_name(device: torch.device) -> str:
    """For example "sm_89": unlike :func:`architecture_of` never shared by two capabilities."""
    return "sm_" + "".join(map(str, capability_of(device)))


def triton_version() -> str:
    """Version of the installed triton, without importing it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def measurements_path(capability: str) -> Path:
    """Where the measurements of a GPU are kept: the environment variable's file, else one in the user's cache."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "toprl_kernels" / f"{capability}-{triton_version()}.json"


@functools.cache
def measured(device: torch.device) -> Measurements | None:
    """The measurements for a device, read once per process; None where nobody has tuned.

    Raises:
        RuntimeError: the file cannot be used, or the environment variable names one that does not exist.
    """
    if device.type != "cuda":
        return None
    capability = capability_name(device)
    path = measurements_path(capability)
    if not path.exists() and not os.environ.get(ENVIRONMENT_VARIABLE):
        return None
    return read(path, capability, architecture_of(device))


@contextlib.contextmanager
def using(path: Path) -> Iterator[None]:
    """Take the measurements from this file for a while."""
    previous = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = str(path)
    forget()
    try:
        yield
    finally:
        if previous is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = previous
        forget()


def forget() -> None:
    """Read the file and the environment variable again at the next call."""
    for cached in (_select, architecture_of, faster, measured):
        cached.cache_clear()


def read(path: Path, capability: str, architecture: str) -> Measurements:
    """Parse a file of measurements. Raises RuntimeError, naming the file and the way out, unless it fits completely."""

    def refuse(problem: str) -> RuntimeError:
        return RuntimeError(
            f"the kernel measurements in {path} cannot be used: {problem}; delete the file or run {TUNE_COMMAND} "
            f"again ({ENVIRONMENT_VARIABLE} names another file)"
        )

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise refuse(f"{type(error).__name__}: {error}") from error
    expected = {"format": FORMAT, "architecture": capability, "triton": triton_version()}
    for name, value in expected.items():
        if not isinstance(content, dict) or content.get(name) != value:
            found = content.get(name) if isinstance(content, dict) else content
            raise refuse(f"its {name} is {found!r}, here it is {value!r}")
    try:
        configs = {
            (str(row["kernel"]), str(row["dtype"]), int(row["size"])): LaunchConfig(*map(int, row["config"]))
            for row in content["configs"]
        }
        times = {
            (str(row["op"]), str(row["dtype"]), tuple(map(int, row["bucket"]))): Times(
                float(row["triton_ms"]), float(row["eager_ms"])
            )
            for row in content["times"]
        }
        device = str(content["device"])
    except (KeyError, TypeError, ValueError) as error:
        raise refuse(f"a row is malformed ({type(error).__name__}: {error})") from error
    for kernel, kind, size in configs:
        if (kernel, kind, size) not in {row[:3] for row in all_rows(architecture)}:
            raise refuse(f"it has a row for {kernel}, {kind}, size {size}, which this version of the package has not")
    return Measurements(device, configs, times)


def write(path: Path, capability: str, measurements: Measurements, **details: Any) -> None:
    """Write a file that :func:`read` takes. Atomic: a reader sees the old content or the new one."""
    content = {
        "format": FORMAT,
        "architecture": capability,
        "triton": triton_version(),
        "torch": torch.__version__,
        "device": measurements.device,
        **details,
        "configs": [
            {"kernel": kernel, "dtype": kind, "size": size, "config": list(config)}
            for (kernel, kind, size), config in measurements.configs.items()
        ],
        "times": [
            {"op": op, "dtype": kind, "bucket": list(sizes), "triton_ms": times.triton, "eager_ms": times.eager}
            for (op, kind, sizes), times in measurements.times.items()
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        try:
            json.dump(content, file, indent=1)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    forget()


def describe(device: torch.device | None = None) -> str:
    """One sentence: where the configurations of a device come from. Never raises; an unusable file is described."""
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type != "cuda":
        return "launch configurations: pinned (there are measurements for GPUs only)"
    try:
        measurements = measured(where)
        architecture = architecture_of(where)
    except RuntimeError as error:
        return f"launch configurations: error ({error})"
    if measurements is None:
        return f"launch configurations: pinned for {architecture}; {TUNE_COMMAND} measures them on this GPU"
    return (
        f"launch configurations: {len(measurements.configs)} of {sum(1 for _ in all_rows(architecture))} rows and "
        f"{len(measurements.times)} timings measured on {measurements.device} "
        f"({measurements_path(capability_name(where))}), the others pinned for {architecture}"
    )


def describe_choice(op: str, device: torch.device) -> Preference:
    """What :func:`faster` says over all measured sizes: for :func:`toprl_kernels.explain`."""
    if device.type != "cuda":
        return Preference("eager", f"the tensors are on {device}")
    measurements = measured(device)
    capability = capability_name(device)
    times = {key[2:]: value for key, value in PINNED_TIMES.items() if key[:2] == (capability, op)}
    if measurements is not None:
        times |= {key[1:]: value for key, value in measurements.times.items() if key[0] == op}
    wins = sum(each.triton < each.eager for each in times.values())
    if not times:
        return Preference("eager", f"nobody has timed the kernels on {capability}; {TUNE_COMMAND} does")
    return Preference(
        "triton" if wins else "eager",
        f"by measurement: Triton in {wins} of {len(times)} size buckets, eager in the others and where nobody measured",
    )
