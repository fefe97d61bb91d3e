"""The pinned launch configurations: block sizes, warps and pipeline stages of every kernel.

Keyed by kernel, architecture, element type and size bucket. The rows were chosen by the compiler's resource report: no
spills, no stack, shared memory within the limit, and headroom, because a configuration at 255 registers starts to
spill when a line of the kernel changes. ``python -m toprl_kernels.report`` prints what the compiler makes of them.
Use it through :mod:`toprl_kernels.configs`.
"""

from __future__ import annotations

from collections.abc import Iterator
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
# capability; LDS of CDNA 3). The compiler never checks it. sm_86 stands for 8.6, 8.9 and 12.x.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
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
SMALL = "sm_86 gfx942"
NVIDIA = "sm_80 sm_86 sm_90 sm_100"

# Sizes: head dim D (a bucket is the power of two it is padded to). block_m queries, block_n keys.
_pin("masked_attention_fwd", "sm_90 sm_100", HALF, {128: C(128, 64, 8, 3), 256: C(64, 64, 8, 2)})
_pin("masked_attention_fwd", "sm_80", HALF, {128: C(128, 64, 8, 3), 256: C(64, 32, 8, 2)})
_pin("masked_attention_fwd", "sm_86", HALF, {64: C(64, 64, 4, 2), 128: C(128, 32, 8, 2), 256: C(64, 32, 8, 1)})
_pin("masked_attention_bwd_prepare", ALL, HALF, {256: C(32, 0, 8, 1)})
_pin("masked_attention_bwd_dkdv", "sm_90", HALF, {64: C(64, 64, 8, 2), 128: C(32, 64, 8, 2), 256: C(64, 32, 8, 1)})
_pin("masked_attention_bwd_dkdv", "sm_100", HALF, {64: C(32, 64, 8, 2), 128: C(32, 64, 8, 1), 256: C(64, 32, 8, 1)})
_pin("masked_attention_bwd_dkdv", "sm_80", HALF, {64: C(32, 64, 4, 2), 128: C(32, 64, 8, 2), 256: C(32, 32, 8, 1)})
_pin("masked_attention_bwd_dkdv", "sm_86", HALF, {64: C(32, 32, 4, 2), 128: C(32, 64, 8, 2), 256: C(32, 32, 8, 1)})
_pin("masked_attention_bwd_dq", "sm_90 sm_100", HALF, {128: C(128, 64, 8, 3), 256: C(64, 32, 8, 2)})
_pin("masked_attention_bwd_dq", "sm_80", HALF, {128: C(128, 32, 8, 3), 256: C(64, 32, 8, 2)})
_pin("masked_attention_bwd_dq", "sm_86", HALF, {64: C(128, 64, 8, 2), 128: C(128, 32, 8, 2), 256: C(32, 32, 8, 1)})
# Full float32 products run on the FMA units and hold rows of both operands in registers: small tiles. From D = 128 on
# two stages, not for the overlap: without, the loop-invariant operand is moved to registers as a whole, and spills.
_pin("masked_attention_fwd", LARGE, SINGLE, {64: C(32, 32, 8, 1), 256: C(16, 16, 8, 2)})
_pin("masked_attention_fwd", "sm_86", SINGLE, {64: C(32, 32, 8, 1), 128: C(16, 16, 8, 2), 256: C(16, 16, 4, 2)})
_pin("masked_attention_bwd_prepare", ALL, SINGLE, {256: C(32, 0, 8, 1)})
_pin("masked_attention_bwd_dkdv", LARGE, SINGLE, {64: C(32, 32, 8, 2), 128: C(32, 32, 8, 1), 256: C(16, 16, 4, 1)})
_pin("masked_attention_bwd_dkdv", "sm_86", SINGLE, {64: C(16, 32, 8, 1), 128: C(32, 32, 8, 1), 256: C(16, 16, 4, 1)})
_pin("masked_attention_bwd_dq", NVIDIA, SINGLE, {64: C(32, 32, 8, 1), 256: C(16, 16, 8, 2)})
# A warp of AMD's has 64 threads; with four of them each thread may use 512 registers.
_pin("masked_attention_fwd", "gfx942", HALF, {128: C(64, 32, 4, 2), 256: C(32, 32, 4, 1)})
_pin("masked_attention_bwd_dkdv", "gfx942", HALF, {128: C(32, 64, 4, 1), 256: C(32, 32, 4, 1)})
_pin("masked_attention_bwd_dq", "gfx942", HALF, {128: C(64, 32, 4, 2), 256: C(32, 32, 4, 1)})
_pin("masked_attention_fwd", "gfx942", SINGLE, {128: C(32, 32, 4, 1), 256: C(16, 16, 4, 1)})
_pin("masked_attention_bwd_dkdv", "gfx942", SINGLE, {64: C(32, 32, 4, 1), 128: C(16, 32, 4, 1), 256: C(16, 16, 4, 1)})
_pin("masked_attention_bwd_dq", "gfx942", SINGLE, {128: C(32, 32, 4, 1), 256: C(16, 16, 4, 1)})
# Sizes: none. block_n tokens.
_pin("masked_attention_tokens", ALL, ANY, {NO_LIMIT: C(0, 2048, 4, 1)})

# Sizes: number of tokens. block_n is the number of keys held in registers at once: all of them, or a chunk.
_pin("topk_select", ALL, ANY, {1024: C(1, 1024, 4, 1), 2048: C(1, 2048, 8, 1), 4096: C(1, 4096, 16, 1)})
_pin("topk_select_chunked", ALL, ANY, {NO_LIMIT: C(1, 4096, 16, 1)})
# Sizes: hidden size. block_m rows, block_n dimensions (at most; smaller hidden sizes take less).
_pin("topk_gather", ALL, ANY, {NO_LIMIT: C(8, 1024, 8, 1)})
_pin("topk_scatter", ALL, ANY, {NO_LIMIT: C(8, 1024, 8, 1)})
# Sizes: none. block_n elements, rows times head dim, that a program moves.
_pin("compact_cache", ALL, ANY, {NO_LIMIT: C(0, 8192, 8, 1)})
_pin("compact_cache_bwd", ALL, ANY, {NO_LIMIT: C(0, 8192, 8, 1)})
_pin("compact_cache_inplace", ALL, ANY, {NO_LIMIT: C(0, 4096, 4, 1)})

# Sizes: tokens of all samples. block_m tokens; block_n is the block of the inner dimension d1 (layer 1), of fc2's
# outputs (layers 2 and 3). Few tokens: two programs share a row block, which halves what a program reads of W1 and
# fills the chip; many tokens: h is read once.
_pin("actor_layer1", LARGE, HALF, {8192: C(64, 64, 4, 3, splits=2), NO_LIMIT: C(64, 64, 8, 3)})
_pin("actor_layer1", SMALL, HALF, {8192: C(64, 64, 4, 3, splits=2), NO_LIMIT: C(64, 64, 8, 2)})
_pin("actor_layer1", ALL, SINGLE, {NO_LIMIT: C(32, 32, 8, 2, splits=4)})
_pin("actor_layers23", ALL, HALF, {NO_LIMIT: C(64, 32, 8, 2)})
_pin("actor_layers23", ALL, SINGLE, {NO_LIMIT: C(16, 16, 8, 1)})

# Sizes: none. block_n tokens.
_pin("keep_mask", ALL, ANY, {NO_LIMIT: C(0, 512, 4, 1)})

KERNELS = tuple(dict.fromkeys(kernel for kernel, _, _ in _TABLE))


def pinned(kernel: str, architecture: str, *, size: int, dtype: torch.dtype) -> LaunchConfig:
    """The row of the table for an architecture named explicitly. Raises ValueError as ``configs.select`` does."""
    return rows(kernel, architecture, dtype)[bucket(kernel, architecture, size=size, dtype=dtype)]


def rows(kernel: str, architecture: str, dtype: torch.dtype) -> Rows:
    """All buckets of a kernel."""
    return _TABLE[kernel, architecture, kind_of(kernel, architecture, dtype)]


def kind_of(kernel: str, architecture: str, dtype: torch.dtype) -> str:
    """The element type under which the table knows ``dtype``: "16 bit", "32 bit" or "any"."""
    if kernel not in KERNELS:
        raise ValueError(f"configs: kernel={kernel!r} is unknown; use one of {', '.join(KERNELS)}")
    if architecture not in SHARED_MEMORY:
        raise ValueError(f"configs: architecture={architecture!r} is unknown; use one of {', '.join(ARCHITECTURES)}")
    for kind in (KINDS.get(dtype), ANY):
        if kind is not None and (kernel, architecture, kind) in _TABLE:
            return kind
    raise ValueError(f"configs: {kernel} has no row for dtype={dtype}; use float16, bfloat16 or float32")


def bucket(kernel: str, architecture: str, *, size: int, dtype: torch.dtype) -> int:
    """The largest size of the bucket that ``size`` falls into."""
    buckets = rows(kernel, architecture, dtype)
    for largest in buckets:
        if size <= largest:
            return largest
    raise ValueError(
        f"configs: {kernel} has no row for size={size}, the largest is {max(buckets)}; use backend='eager'"
    )


def all_rows(architecture: str) -> Iterator[tuple[str, str, int, LaunchConfig]]:
    """(kernel, element type, largest size, configuration) of every row of an architecture."""
    for (kernel, row_architecture, kind), buckets in _TABLE.items():
        if row_architecture == architecture:
            for largest, config in buckets.items():
                yield kernel, kind, largest, config
