"""What to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from toprl_kernels.ahead_of_time import TYPES, Case, Select, Work
from toprl_kernels.attention import triton as kernels
from toprl_kernels.configs import LaunchConfig
from toprl_kernels.triton_common import next_power_of_2

KERNELS = {
    "masked_attention_fwd": kernels.masked_attention_fwd_kernel,
    "masked_attention_bwd_prepare": kernels.masked_attention_bwd_prepare_kernel,
    "masked_attention_bwd_dkdv": kernels.masked_attention_bwd_dkdv_kernel,
    "masked_attention_bwd_dq": kernels.masked_attention_bwd_dq_kernel,
}
MATRICES = ("q", "k", "v", "out", "do", "dq", "dk", "dv")
HEADS, TOKENS, GROUPS = 32, 2880, 4
# head dims of every bucket first, then those that are padded and the other 16-bit type
VARIANTS = [
    *((head_dim, dtype, False) for dtype in (torch.bfloat16, torch.float32) for head_dim in (64, 128, 256)),
    *((head_dim, torch.bfloat16, True) for head_dim in (32, 80, 96)),
    *((head_dim, torch.float16, True) for head_dim in (64, 80, 96, 128, 256)),
    *((head_dim, torch.float32, True) for head_dim in (80, 96)),
]
# mask, whether its gradient is wanted
MASKS = [("hard", False), ("soft", True)]


def cases(select: Select) -> Iterator[Case]:
    """Causal with padding; hard masks without the mask gradient and soft masks with it (bounded: one more step)."""
    config = select("masked_attention_tokens", TOKENS, torch.float32)
    for soft in (True, False):
        yield Case(
            "masked_attention_tokens", "soft" if soft else "hard", kernels.masked_attention_tokens_kernel,
            {"mask_ptr": "fp32" if soft else "u8", "valid_ptr": "u8", "_": "i32"},
            dict(HAS_PADDING=True, BLOCK_T=config.block_n), config, unit_strides=("stride_mn", "stride_vn"),
        )  # fmt: skip
    for head_dim, dtype, extended in VARIANTS:
        pointers = {"_": "fp32", "token_ptr": "i32", **{f"{name}_ptr": TYPES[dtype] for name in MATRICES}}
        for kernel, function in KERNELS.items():
            config = select(kernel, head_dim, dtype)
            for mask, need_dm in MASKS:
                if kernel == "masked_attention_bwd_prepare" and mask == "hard":
                    continue  # the same program for both
                constants: dict[str, Any] = dict(
                    GROUPS=GROUPS, HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim, 16),
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, CAUSAL=True, SOFT=mask == "soft", HAS_PADDING=True,
                    NEED_DK=True, NEED_DV=True, NEED_DM=need_dm, BOUNDED=need_dm,
                )  # fmt: skip
                yield Case(
                    kernel,
                    f"D={head_dim} {TYPES[dtype]} {mask}",
                    function,
                    pointers,
                    constants,
                    config,
                    matrix=dtype != torch.float32 and kernel != "masked_attention_bwd_prepare",
                    extended=extended or _is_repetition(kernel, head_dim, dtype, mask),
                    work=_work(kernel, head_dim, dtype, config),
                )


def _is_repetition(kernel: str, head_dim: int, dtype: torch.dtype, mask: str) -> bool:
    """Cases that have told nothing new: prepare has one row per dtype, and hard masks mostly need less than soft."""
    if kernel == "masked_attention_bwd_prepare":
        return head_dim != 256
    return mask == "hard" and (dtype == torch.float32 or head_dim != 128)


def _work(kernel: str, head_dim: int, dtype: torch.dtype, config: LaunchConfig) -> Work:
    """Nothing dropped, causal, one sample of 32 query heads on 8 key/value heads: half of all pairs."""
    size = dtype.itemsize
    pairs = HEADS * TOKENS * TOKENS / 2
    rows, key_rows = HEADS * TOKENS * head_dim * size, HEADS // GROUPS * TOKENS * head_dim * size
    problem = f"B1 H{HEADS}/{HEADS // GROUPS} N{TOKENS}"
    single = dtype == torch.float32
    if kernel == "masked_attention_bwd_prepare":
        blocks = HEADS * -(-TOKENS // config.block_m)
        return Work(problem, programs=blocks, dram_bytes=3 * rows + 2 * key_rows)
    if kernel == "masked_attention_bwd_dkdv":  # a program owns keys and reads q and dO of every query that sees them
        products, owned, heads, dram = 4, config.block_n, HEADS // GROUPS, 2 * rows + 4 * key_rows
    elif kernel == "masked_attention_bwd_dq":
        products, owned, heads, dram = 3, config.block_m, HEADS, 3 * rows + 2 * key_rows
    else:
        products, owned, heads, dram = 2, config.block_m, HEADS, 2 * rows + 2 * key_rows
    return Work(
        problem,
        programs=heads * -(-TOKENS // owned),
        flops=products * 2 * pairs * head_dim,
        single=single,
        exps=pairs,
        l2_bytes=pairs / owned * 2 * head_dim * size,
        dram_bytes=dram,
    )
