"""Which launch configuration a kernel gets: a measured one where there is a file of measurements, else the pinned one.

Nothing is tuned at run time. ``python bench/tune.py`` times candidates on the GPU at hand and writes a file that
:func:`select` prefers from then on; the same file says which implementation of an op was faster (:func:`faster`).
:func:`describe` says whether there is one.

Imports neither triton nor any op, so that every module may import it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class LaunchConfig(NamedTuple):
    """Block sizes over rows (``block_m``) and columns (``block_n``) of a kernel, warps and pipeline stages.

    Rows are queries or tokens; columns are keys, features or the inner dimension, as the comment at the kernel's rows
    says. A block size that a kernel does not have is 0. ``splits`` programs share a row block, where a kernel can.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 1


C = LaunchConfig

# Shared memory that one program may use, in bytes (CUDA C++ programming guide, technical specifications per compute
# capability). The compiler never checks it. sm_86 stands for 8.6, 8.9 and 12.x.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
ARCHITECTURES = tuple(SHARED_MEMORY)

HALF, SINGLE, ANY = "16 bit", "32 bit", "any"
KINDS = {torch.float16: HALF, torch.bfloat16: HALF, torch.float32: SINGLE}
NO_LIMIT = 1 << 62  # a row for every size

Rows = dict[int, LaunchConfig]  # largest size of the bucket -> configuration
_TABLE: dict[tuple[str, str, str], Rows] = {}  # (kernel, architecture, element type)


def _pin(kernel: str, architectures: str, kind: str, rows: Rows) -> None:
    for architecture in architectures.split():
        assert architecture in SHARED_MEMORY and (kernel, architecture, kind) not in _TABLE
        _TABLE[kernel, architecture, kind] = dict(sorted(rows.items()))


ALL = " ".join(ARCHITECTURES)
LARGE = "sm_80 sm_90 sm_100"


def _pin_attention(kernel: str, architectures: str, kind: str, *rows: LaunchConfig) -> None:
    """A row per bucket of the larger head dim, padded to a power of two: the last ones of 64, 128, 256 and 512."""
    buckets = (64, 128, 256, 512)[-len(rows) :]
    _pin(f"masked_attention_{kernel}", architectures, kind, dict(zip(buckets, rows, strict=True)))


# block_m queries, block_n keys. Chosen by what the loops became: no spill inside, no warp that repeats another's
# product, three buffers of keys and values in flight where they fit (the load of the list takes further stages: two
# on sm_90, four on sm_80). D = 512 is there to run.
_pin_attention("fwd", "sm_90 sm_100", HALF, C(128, 64, 8, 5), C(128, 64, 8, 5), C(128, 64, 8, 2), C(16, 64, 8, 1))
_pin_attention("fwd", "sm_80", HALF, C(128, 64, 8, 7), C(128, 32, 8, 7), C(64, 64, 8, 2), C(16, 64, 8, 1))
_pin_attention("fwd", "sm_86", HALF, C(128, 64, 8, 7), C(128, 32, 8, 7), C(32, 64, 8, 1), C(16, 64, 8, 1))
_pin_attention("fwd_compact", "sm_90", HALF, C(128, 128, 8, 3), C(128, 128, 8, 3), C(128, 64, 8, 2), C(16, 64, 8, 1))
_pin_attention("fwd_compact", "sm_100", HALF, C(128, 64, 8, 3), C(128, 64, 8, 3), C(128, 64, 8, 2), C(16, 64, 8, 1))
_pin_attention("fwd_compact", "sm_80", HALF, C(128, 64, 8, 4), C(128, 64, 8, 4), C(64, 64, 8, 2), C(16, 64, 8, 1))
_pin_attention("fwd_compact", "sm_86", HALF, C(128, 64, 8, 4), C(128, 32, 8, 4), C(32, 64, 8, 1), C(16, 64, 8, 1))
_pin_attention("decode", LARGE, HALF, C(16, 64, 4, 5), C(16, 64, 4, 5), C(16, 64, 4, 3), C(16, 32, 8, 3))
_pin_attention("decode", "sm_86", HALF, C(16, 64, 4, 5), C(16, 64, 4, 5), C(16, 32, 4, 3), C(16, 32, 8, 1))
_pin_attention("bwd_prepare", ALL, HALF, C(32, 0, 8, 1), C(16, 0, 8, 1))
_pin_attention("bwd_dkdv", "sm_90", HALF, C(64, 128, 8, 3), C(64, 128, 8, 2), C(32, 128, 8, 2), C(32, 32, 8, 1))
_pin_attention("bwd_dkdv", "sm_100", HALF, C(64, 128, 8, 2), C(64, 128, 8, 2), C(32, 128, 8, 2), C(32, 32, 8, 1))
_pin_attention("bwd_dkdv", "sm_80", HALF, C(64, 128, 8, 3), C(32, 128, 8, 3), C(32, 64, 8, 2), C(32, 32, 8, 1))
_pin_attention("bwd_dkdv", "sm_86", HALF, C(64, 128, 8, 3), C(32, 128, 8, 3), C(16, 64, 8, 1), C(16, 32, 4, 1))
_pin_attention("bwd_dq", "sm_90", HALF, C(128, 64, 8, 5), C(128, 64, 8, 5), C(128, 32, 8, 2), C(16, 64, 8, 1))
_pin_attention("bwd_dq", "sm_100", HALF, C(128, 32, 8, 5), C(128, 32, 8, 5), C(64, 64, 8, 2), C(16, 64, 8, 1))
_pin_attention("bwd_dq", "sm_80", HALF, C(128, 64, 8, 7), C(128, 32, 8, 7), C(32, 64, 8, 1), C(16, 64, 8, 1))
_pin_attention("bwd_dq", "sm_86", HALF, C(128, 64, 8, 7), C(128, 32, 8, 2), C(32, 64, 8, 1), C(16, 32, 4, 1))
_pin_attention("bwd_dq_compact", "sm_90", HALF, C(128, 64, 8, 3), C(128, 64, 8, 3), C(128, 32, 8, 3), C(16, 64, 8, 1))
_pin_attention("bwd_dq_compact", "sm_100", HALF, C(128, 32, 8, 3), C(128, 32, 8, 3), C(64, 64, 8, 2), C(16, 64, 8, 1))
_pin_attention("bwd_dq_compact", "sm_80", HALF, C(128, 64, 8, 4), C(128, 32, 8, 4), C(32, 64, 8, 1), C(16, 64, 8, 1))
_pin_attention("bwd_dq_compact", "sm_86", HALF, C(128, 64, 8, 4), C(128, 32, 8, 2), C(32, 64, 8, 1), C(16, 32, 4, 1))
# Full float32 products run on the FMA units and hold rows of both operands in registers: small tiles. From D = 128 on
# two stages, not for the overlap: without, the loop-invariant operand is moved to registers as a whole, and spills.
for _kernel in ("fwd", "fwd_compact", "bwd_dq", "bwd_dq_compact"):
    _pin_attention(_kernel, ALL, SINGLE, C(32, 32, 8, 1), C(16, 16, 8, 2), C(16, 16, 8, 2), C(16, 16, 8, 2))
_pin_attention("decode", ALL, SINGLE, C(16, 32, 8, 1), C(16, 16, 8, 2), C(16, 16, 8, 2), C(16, 16, 8, 2))
_pin_attention("bwd_prepare", ALL, SINGLE, C(32, 0, 8, 1), C(16, 0, 8, 1))
_pin_attention("bwd_dkdv", LARGE, SINGLE, C(32, 32, 8, 2), C(16, 32, 8, 1), C(16, 16, 4, 1), C(16, 16, 4, 1))
_pin_attention("bwd_dkdv", "sm_86", SINGLE, C(16, 32, 8, 1), C(16, 32, 8, 1), C(16, 16, 4, 1), C(16, 16, 4, 1))
# block_n rows of one program
_pin_attention("merge", ALL, ANY, C(0, 0, 4, 1))
_pin_attention("bwd_finish", ALL, ANY, C(0, 16, 4, 1))
# Sizes: none. block_n tokens.
_pin("masked_attention_lists", ALL, ANY, {NO_LIMIT: C(0, 2048, 4, 1)})
# Sizes: rows per key/value head, Nq * H / Hkv. block_n keys that a program gathers; 0 where the loops read through the
# list instead. A gather moves 8 D bytes per kept key, which this many rows win back.
_pin("masked_attention_compact", ALL, ANY, {4095: C(0, 0, 4, 1), NO_LIMIT: C(0, 32, 4, 1)})

# Sizes: number of tokens. block_n is the number of keys held in registers at once: all of them, or a chunk of 4,096.
_pin("topk_select", ALL, ANY, {1024: C(1, 1024, 4, 1), 2048: C(1, 2048, 8, 1), 4096: C(1, 4096, 16, 1)})
# Sizes: hidden size, or head dim of a cache. block_m rows, block_n dimensions (at most; of narrower ones, more rows).
for _kernel in ("topk_gather", "topk_scatter"):
    _pin(_kernel, ALL, ANY, {NO_LIMIT: C(8, 1024, 8, 1)})

# Sizes: tokens of all samples. block_m tokens; block_n is the block of the inner dimension d1 (layer 1), of fc2's
# outputs (layers 2 and 3). Few tokens: two programs share a row block, which halves what a program reads of W1 and
# fills the chip; many tokens: h is read once.
_pin("actor_layer1", LARGE, HALF, {8192: C(64, 64, 4, 3, splits=2), NO_LIMIT: C(64, 64, 8, 3)})
_pin("actor_layer1", "sm_86", HALF, {8192: C(64, 64, 4, 3, splits=2), NO_LIMIT: C(64, 64, 8, 2)})
_pin("actor_layer1", ALL, SINGLE, {NO_LIMIT: C(32, 32, 8, 2, splits=4)})
_pin("actor_layers23", ALL, HALF, {NO_LIMIT: C(64, 32, 4, 2)})
_pin("actor_layers23", ALL, SINGLE, {NO_LIMIT: C(16, 16, 8, 1)})

# Sizes: none. block_n tokens.
_pin("keep_mask", ALL, ANY, {NO_LIMIT: C(0, 512, 4, 1)})

KERNELS = tuple(dict.fromkeys(kernel for kernel, _, _ in _TABLE))


class Row(NamedTuple):
    """A row of the table: "16 bit", "32 bit" or "any", the largest size of its bucket, and the configuration."""

    kind: str
    largest: int
    config: LaunchConfig


def row(kernel: str, architecture: str, *, size: int, dtype: torch.dtype) -> Row:
    """Look up the pinned row for an architecture named explicitly. Raises ValueError as :func:`select` does."""
    if kernel not in KERNELS:
        raise ValueError(f"configs: kernel={kernel!r} is unknown; use one of {', '.join(KERNELS)}")
    if architecture not in SHARED_MEMORY:
        raise ValueError(f"configs: architecture={architecture!r} is unknown; use one of {', '.join(ARCHITECTURES)}")
    for kind in (KINDS.get(dtype, ANY), ANY):
        rows = _TABLE.get((kernel, architecture, kind), {})
        for largest, config in rows.items():
            if size <= largest:
                return Row(kind, largest, config)
        if rows:
            limit = f"no row for size={size}, the largest is {max(rows)}"
            raise ValueError(f"configs: {kernel} has {limit}; use backend='eager'")
    raise ValueError(f"configs: {kernel} has no row for dtype={dtype}; use float16, bfloat16 or float32")


def all_rows(architecture: str) -> dict[tuple[str, str, int], LaunchConfig]:
    """Every row of an architecture by (kernel, element type, largest size)."""
    tables = ((kernel, kind, rows) for (kernel, name, kind), rows in _TABLE.items() if name == architecture)
    return {(kernel, kind, largest): config for kernel, kind, rows in tables for largest, config in rows.items()}


_cpu_architecture = "sm_90"  # whose rows run on CPU tensors, that is, in the interpreter
_overrides: dict[str, LaunchConfig] = {}


def select(kernel: str, *, size: int, dtype: torch.dtype, device: torch.device) -> LaunchConfig:
    """Return the configuration of ``kernel`` for tensors on ``device``: measured if there is a file, else pinned.

    Args:
        kernel: one of :data:`KERNELS`.
        size: head dim or number of tokens; see the comment at the kernel's rows.
        dtype: float16, bfloat16 or float32. Kernels that move or count ignore it.
        device: CPU stands for the interpreter and gets the pinned rows of sm_90.

    Raises:
        ValueError: unknown kernel, or a size or dtype that it has no row for.
        RuntimeError: a GPU older than compute capability 8.0, or a corrupt file of measurements.
    """
    return _overrides.get(kernel) or _select(kernel, size, dtype, device)


@functools.lru_cache(maxsize=4096)
def _select(kernel: str, size: int, dtype: torch.dtype, device: torch.device) -> LaunchConfig:
    kind, largest, config = row(kernel, architecture_of(device), size=size, dtype=dtype)
    measurements = measured(device)
    return config if measurements is None else measurements.configs.get((kernel, kind, largest), config)


@contextlib.contextmanager
def override(replacements: Mapping[str, LaunchConfig]) -> Iterator[None]:
    """Make :func:`select` return these, whatever the size: for tuning and tests."""
    global _overrides
    previous, _overrides = _overrides, {**_overrides, **replacements}
    try:
        yield
    finally:
        _overrides = previous


@contextlib.contextmanager
def cpu_stands_for(architecture: str) -> Iterator[None]:
    """Give CPU tensors the rows of ``architecture``: for compiling without a GPU."""
    global _cpu_architecture
    previous, _cpu_architecture = _cpu_architecture, architecture
    forget()
    try:
        yield
    finally:
        _cpu_architecture = previous
        forget()


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a device; 4 for the interpreter. Asks the driver: no synchronisation."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Return the name under which the table knows a device.

    Compute capability 8.0 and 8.7 (163 KiB of shared memory or more) share rows, as do 10.x and 11.x; 8.6, 8.9, 12.x
    and anything newer than this table get the rows that fit into 99 KiB.

    Raises:
        RuntimeError: compute capability below 8.0, or an AMD GPU.
    """
    if device.type != "cuda":
        return _cpu_architecture
    if torch.version.hip:
        raise RuntimeError("configs: AMD GPUs are not supported; use backend='eager'")
    major, minor = capability_of(device)
    if major < 8:
        raise RuntimeError(
            f"configs: compute capability {major}.{minor} is too old for the kernels, which need 8.0 (A100) or newer; "
            "use backend='eager'"
        )
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_86")


# --- measurements ---

ENVIRONMENT_VARIABLE = "TOPRL_KERNELS_CONFIGS"
FORMAT = 1
TUNE_COMMAND = "python bench/tune.py"

Bucket = tuple[int, ...]


class Times(NamedTuple):
    """Milliseconds of an op's two implementations on the same inputs."""

    triton: float
    eager: float


class Measurements(NamedTuple):
    """What a tuning run measured on a GPU, whose name comes first."""

    device: str
    configs: dict[tuple[str, str, int], LaunchConfig]  # (kernel, element type, largest size of the bucket)
    times: dict[tuple[str, str, Bucket], Times]  # (op, element type, size bucket)


class OtherVersionError(RuntimeError):
    """A file of measurements was written for another GPU, triton or version of this package."""


def size_bucket(sizes: Bucket) -> Bucket:
    """Round each size up to a power of two."""
    return tuple(1 << max(size - 1, 0).bit_length() for size in sizes)


@functools.lru_cache(maxsize=4096)
def faster(op: str, sizes: Bucket, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return "triton" or "eager", whichever was measured to be faster on this GPU, or None where nobody measured.

    Raises:
        RuntimeError: a corrupt file of measurements.
    """
    measurements = measured(device)
    times = measurements and measurements.times.get((op, KINDS.get(dtype, ""), size_bucket(sizes)))
    if not times:
        return None
    return "triton" if times.triton < times.eager else "eager"


def capability_name(device: torch.device) -> str:
    """For example "sm_89": unlike :func:`architecture_of` never shared by two capabilities."""
    return "sm_" + "".join(map(str, capability_of(device)))


def triton_version() -> str:
    """Return the version of the installed triton, without importing it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def measurements_path(capability: str) -> Path:
    """Where the measurements of a GPU are kept: the environment variable's file, else one in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = cache / "toprl_kernels" / f"{capability}-{triton_version()}.json"
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or default)


@functools.cache
def measured(device: torch.device) -> Measurements | None:
    """Return the measurements for a device, read once per process; None where there are none for this version.

    A file of another version is left alone, with one warning.

    Raises:
        RuntimeError: the file is corrupt, or the environment variable names one that does not exist.
    """
    if device.type != "cuda":
        return None
    path = measurements_path(capability_name(device))
    if not path.exists() and not os.environ.get(ENVIRONMENT_VARIABLE):
        return None
    try:
        return read(path, capability_name(device), architecture_of(device))
    except OtherVersionError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


def forget() -> None:
    """Read the file and the environment variable again at the next call."""
    for cached in (_select, architecture_of, faster, measured):
        cached.cache_clear()


def read(path: Path, capability: str, architecture: str) -> Measurements:
    """Parse a file of measurements.

    Raises:
        OtherVersionError: it is whole, but for another GPU, triton or version of this package.
        RuntimeError: it cannot be read. Both name the file and the way out.
    """
    remedy = f"delete the file or run {TUNE_COMMAND} again ({ENVIRONMENT_VARIABLE} names another file)"
    expected = {"format": FORMAT, "architecture": capability, "triton": triton_version()}
    try:
        content = json.loads(path.read_text())
        other = [f"its {name} is {content.get(name)!r}, not {value!r}" for name, value in expected.items()
                 if content.get(name) != value]  # fmt: skip
        if not other:
            configs = {(r["kernel"], r["dtype"], r["size"]): C(*map(int, r["config"])) for r in content["configs"]}
            times = {
                (r["op"], r["dtype"], tuple(r["bucket"])): Times(float(r["triton_ms"]), float(r["eager_ms"]))
                for r in content["times"]
            }
            other = [f"no row {key} in this package" for key in configs if key not in all_rows(architecture)]
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"cannot be read ({type(error).__name__}: {error})"
        raise RuntimeError(f"the kernel measurements in {path} {reason}; {remedy}") from error
    if other:
        raise OtherVersionError(f"the kernel measurements in {path} are not used: {other[0]}; {remedy}")
    return Measurements(str(content.get("device")), configs, times)


def describe(device: torch.device | None = None) -> str:
    """Say in a sentence where the configurations of a device come from. Never raises; a corrupt file is described."""
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type != "cuda":
        return "launch configurations: pinned (there are measurements for GPUs only)"
    try:
        measurements, architecture = measured(where), architecture_of(where)
    except RuntimeError as error:
        return f"launch configurations: error ({error})"
    if measurements is None:
        return f"launch configurations: pinned for {architecture}; {TUNE_COMMAND} measures them on this GPU"
    return (
        f"launch configurations: {len(measurements.configs)} of {len(all_rows(architecture))} rows and "
        f"{len(measurements.times)} timings measured on {measurements.device} "
        f"({measurements_path(capability_name(where))}), the others pinned for {architecture}"
    )
