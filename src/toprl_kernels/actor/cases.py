"""What to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from toprl_kernels.actor import triton as kernels
from toprl_kernels.ahead_of_time import TYPES, Case, Select, Work
from toprl_kernels.configs import LaunchConfig

D1 = 4096  # of LLaVA-1.5-7B
FEW, MANY = 2880, 32 * 2880
VARIANTS = [
    (256, torch.bfloat16, FEW, False),
    (256, torch.bfloat16, MANY, False),
    (256, torch.float32, FEW, False),
    *((128, dtype, tokens, True) for dtype in (torch.bfloat16, torch.float32) for tokens in (FEW, MANY)),
    *((256, torch.float16, tokens, True) for tokens in (FEW, MANY)),
]


def cases(select: Select) -> Iterator[Case]:
    """Both kernels for few and for many tokens, at the default width and half of it."""
    for width, dtype, tokens, extended in VARIANTS:
        half = width // 2
        sizes: dict[str, Any] = dict(HALF=half, BLOCK_HALF=half, BLOCK_WIDTH=width, HAS_VALID=True)
        pointers = {"_": TYPES[dtype], "valid_ptr": "u8"}
        pointers |= {f"{name}_ptr": "fp32" for name in ("colsum", "bias", "partial", "count")}
        label = f"N={tokens} d2={width} {TYPES[dtype]}"
        for name, function in (
            ("actor_layer1", kernels.actor_layer1_kernel),
            ("actor_layers23", kernels.actor_layers23_kernel),
        ):
            config = select(name, tokens, dtype)
            blocks = {"BLOCK_M": config.block_m}
            if name == "actor_layer1":
                blocks |= {"BLOCK_K": config.block_n, "BLOCK_F": width // config.splits}
            else:
                blocks |= {"BLOCK_C": config.block_n}
            yield Case(
                name,
                label,
                function,
                pointers,
                sizes | blocks,
                config,
                ("stride_hd", "stride_vn"),
                matrix=dtype != torch.float32,
                extended=extended,
                work=_work(name, width, dtype, tokens, config),
            )


def _work(kernel: str, width: int, dtype: torch.dtype, tokens: int, config: LaunchConfig) -> Work:
    """One sample, or many as one: the blocks are the same."""
    blocks, size = -(-tokens // config.block_m), dtype.itemsize
    problem, single = f"N{tokens} d1={D1}", dtype == torch.float32
    hidden, first, rest = tokens * D1 * size, width * D1 * size, 2 * width * width * size
    if kernel == "actor_layer1":
        loads = blocks * first + config.splits * hidden
        flops = 2.0 * tokens * D1 * width
        return Work(problem, blocks * config.splits, flops, single, 1.0 * tokens * width, loads, hidden + first)
    z = tokens * width // 2 * size
    flops = 2.0 * tokens * (width * width // 2 + width * width)
    return Work(problem, blocks, flops, single, 2.0 * tokens * width, blocks * rest + z, z + rest)
