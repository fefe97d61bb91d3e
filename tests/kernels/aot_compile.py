"""Compile every shipped kernel configuration for a CUDA architecture without a GPU; print one JSON line per kernel.

Run by test_ahead_of_time.py in a process of its own, because a process that interprets kernels cannot compile them:

    python tests/kernels/aot_compile.py 90
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from toprl_kernels.actor_score import triton as actor
from toprl_kernels.keep_mask import triton as keep_mask
from toprl_kernels.masked_attention import triton as attention
from toprl_kernels.masked_attention import triton_kernels as attention_kernels
from toprl_kernels.topk_compact import triton as topk

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DENSE_STRIDES = ("stride_hd", "stride_gd", "stride_sn", "stride_vn", "stride_pn")
FLOAT_SCALARS = ("scale", "scale_log2", "eps", "tau")
# label, kernel, pointer types ("_" is the default), constants, launch options
Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]


def attention_cases() -> Iterator[Case]:
    kernels = {
        "fwd": attention_kernels.masked_attention_fwd_kernel,
        "prepare": attention_kernels.masked_attention_bwd_prepare_kernel,
        "dkdv": attention_kernels.masked_attention_bwd_dkdv_kernel,
        "dq": attention_kernels.masked_attention_bwd_dq_kernel,
    }
    matrices = ("q", "k", "v", "out", "do", "dq", "dk", "dv")
    for head_dim, dtype in [(64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)]:
        pointers = {"_": "fp32", "order_ptr": "i32", "kept_ptr": "i32", "valid_ptr": "u8"}
        pointers |= {f"{name}_ptr": TYPES[dtype] for name in matrices}
        for name, kernel in kernels.items():
            for hard in (True, False):
                if name == "prepare" and hard:
                    continue  # the same program for both
                config = attention.select_config(name, head_dim, dtype)
                constants = dict(
                    GROUPS=4, HEAD_DIM=head_dim, BLOCK_D=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                    CAUSAL=True, HARD=hard, HAS_PADDING=True, NEED_DM=not hard,
                )  # fmt: skip
                label = f"attention_{name} D={head_dim} {TYPES[dtype]} {'hard' if hard else 'soft'}"
                yield label, kernel, pointers, constants, dict(num_warps=config.num_warps, num_stages=config.num_stages)


def topk_cases() -> Iterator[Case]:
    for tokens in (1024, 4096, 16384):
        pointers = {"_": "i64", "scores_ptr": "fp32", "valid_ptr": "u8", "out_valid_ptr": "u8"}
        constants = dict(BLOCK_N=tokens, RAGGED=True, HAS_VALID=True, POSITION_ROWS=3)
        yield (
            f"topk_select N={tokens}",
            topk.topk_select_kernel,
            pointers,
            constants,
            dict(num_warps=topk.select_warps(tokens)),
        )
    for name, kernel in (("gather", topk.topk_gather_kernel), ("scatter", topk.topk_scatter_kernel)):
        constants = dict(BLOCK_R=topk.ROWS_PER_PROGRAM, BLOCK_D=topk.MAX_BLOCK_D)
        yield f"topk_{name}", kernel, {"_": "bf16", "indices_ptr": "i64"}, constants, dict(num_warps=8)


def actor_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for half in (64, 128):
            configs = actor.select_config(dtype)
            sizes = dict(HALF=half, BLOCK_HALF=half, BLOCK_WIDTH=2 * half, HAS_VALID=True)
            for name, kernel in (("layer1", actor.actor_layer1_kernel), ("layers23", actor.actor_layers23_kernel)):
                config = dict(configs[name])
                options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
                pointers = {"_": TYPES[dtype], "valid_ptr": "u8"}
                pointers |= {f"{key}_ptr": "fp32" for key in ("colsum", "bias", "partial", "count")}
                yield f"actor_{name} d2={2 * half} {TYPES[dtype]}", kernel, pointers, sizes | config, options


def keep_mask_cases() -> Iterator[Case]:
    pointers = {"_": "fp32", "given_ptr": "u8", "previous_ptr": "u8"}
    for sample in (True, False):
        constants = dict(SAMPLE=sample, HAS_PREVIOUS=True, BLOCK_T=keep_mask.BLOCK)
        for name, kernel in (("fwd", keep_mask.keep_mask_fwd_kernel), ("bwd", keep_mask.keep_mask_bwd_kernel)):
            yield f"keep_mask_{name} sample={sample}", kernel, pointers, constants, dict(num_warps=4)


def sass_of(cubin: bytes) -> str:
    """Disassembly, or nothing where triton ships no cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([str(tool), "-sass", str(path)], capture_output=True, text=True).stdout


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    label, kernel, pointers, constants, options = case
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    # What the launcher finds out about ordinary tensors and bakes in: pointers, row strides and sizes divisible by
    # 16, dense last dimensions of stride 1. (In the attention kernels a stride ending in n is a row stride.)
    if not label.startswith("attention"):
        constants |= {name: 1 for name in DENSE_STRIDES if name in kernel.arg_names}
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, pointers["_"])
        else:
            signature[name] = "fp32" if name in FLOAT_SCALARS else "i32"
        divisible = name.endswith("_ptr") or name.startswith("stride_") or name in ("d1", "hidden_size")
        if divisible and name not in constants:
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | {"enable_fp_fusion": True})
    sass = sass_of(compiled.asm["cubin"])
    return {
        "kernel": label,
        "shared_bytes": compiled.metadata.shared,
        "spill_instructions": sass.count("STL") if sass else None,
        "wgmma_instructions": sass.count("HGMMA") if sass else None,
    }


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "compiling needs a process without TRITON_INTERPRET"
    for make in (attention_cases, topk_cases, actor_cases, keep_mask_cases):
        for each in make():
            print(json.dumps(compile_case(each, int(sys.argv[1]))), flush=True)
