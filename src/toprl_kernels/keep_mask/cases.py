"""What to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from toprl_kernels.ahead_of_time import Case, Select, Work
from toprl_kernels.keep_mask import triton as kernels

TOKENS = 8 * 2880


def cases(select: Select) -> Iterator[Case]:
    """Forward and backward with every option on: noise drawn from a seed, noise given, mask given."""
    pointers = {"_": "fp32", "given_ptr": "u8", "previous_ptr": "u8", "seed_ptr": "i64", "token_ids_ptr": "i64"}
    config = select("keep_mask", 0, torch.float32)
    constants: dict[str, Any] = dict(HAS_PREVIOUS=True, HAS_TOKEN_IDS=True, BLOCK_T=config.block_n)
    constants |= dict(GRAD_KEEP=True, GRAD_LOG_PROB=True, GRAD_ENTROPY=True)
    work = Work(f"{TOKENS} tokens", programs=-(-TOKENS // config.block_n), dram_bytes=TOKENS * 26.0)
    for source in ("SEED", "UNIFORM", "GIVEN"):
        for name, function in (("fwd", kernels.keep_mask_fwd_kernel), ("bwd", kernels.keep_mask_bwd_kernel)):
            own = constants | {"SOURCE": getattr(kernels, source)}
            yield Case(
                "keep_mask",
                f"{name} {source.lower()}",
                function,
                pointers,
                own,
                config,
                extended=source != "SEED",
                work=work,
            )
