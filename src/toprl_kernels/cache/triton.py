"""compact_cache in one launch for both tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels.configs import select
from toprl_kernels.topk.reference import by_bytes
from toprl_kernels.triton_common import ceil_div, next_power_of_2


@triton.jit
def load_rows(cache_ptr, index, dims, size, stride_n, stride_d):
    """[R, D] rows of one head, zero where the index is -1."""
    source = cache_ptr + index[:, None] * stride_n + dims.to(tl.int64)[None, :] * stride_d
    return tl.load(source, mask=(index >= 0)[:, None] & (dims < size)[None, :], other=0)


@triton.jit(do_not_specialize=["length"])
def compact_cache_kernel(
    keys_ptr, values_ptr, indices_ptr, out_keys_ptr, out_values_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, length, key_size, value_size,
    BLOCK_R: tl.constexpr, BLOCK_KD: tl.constexpr, BLOCK_VD: tl.constexpr,
):  # fmt: skip
    """out[b, h, r] = cache[b, h, indices[b, r]], contiguous. Grid (B * Hkv, row blocks, 2 for keys and values)."""
    matrix = tl.program_id(0).to(tl.int64)
    sample = matrix // num_heads
    head = matrix % num_heads
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = rows < length
    index = tl.load(indices_ptr + sample * length + rows, mask=in_range, other=-1)  # [R]
    if tl.program_id(2) == 0:
        dims = tl.arange(0, BLOCK_KD)
        source = keys_ptr + sample * stride_kb + head * stride_kh
        tile = load_rows(source, index, dims, key_size, stride_kn, stride_kd)
        target = out_keys_ptr + (matrix * length + rows)[:, None] * key_size + dims[None, :]
        tl.store(target, tile, mask=in_range[:, None] & (dims < key_size)[None, :])
    else:
        dims = tl.arange(0, BLOCK_VD)
        source = values_ptr + sample * stride_vb + head * stride_vh
        tile = load_rows(source, index, dims, value_size, stride_vn, stride_vd)
        target = out_values_ptr + (matrix * length + rows)[:, None] * value_size + dims[None, :]
        tl.store(target, tile, mask=in_range[:, None] & (dims < value_size)[None, :])


@triton.jit
def store_rows(
    grad_ptr, out_ptr, index, rows, size, stride_gr, stride_gd, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows of one head's gradient to where they came from."""
    dims = tl.arange(0, BLOCK_D)
    mask = (index >= 0)[:, None] & (dims < size)[None, :]
    source = grad_ptr + rows.to(tl.int64)[:, None] * stride_gr + dims.to(tl.int64)[None, :] * stride_gd
    tile = tl.load(source, mask=mask, other=0)  # [R, D]
    tl.store(out_ptr + index[:, None] * size + dims[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=["length"])
def compact_cache_bwd_kernel(
    grad_keys_ptr, grad_values_ptr, indices_ptr, out_keys_ptr, out_values_ptr,
    stride_kb, stride_kh, stride_kr, stride_kd, stride_vb, stride_vh, stride_vr, stride_vd,
    num_heads, num_tokens, length, key_size, value_size,
    BLOCK_R: tl.constexpr, BLOCK_KD: tl.constexpr, BLOCK_VD: tl.constexpr,
    NEED_KEYS: tl.constexpr, NEED_VALUES: tl.constexpr,
):  # fmt: skip
    """out[b, h, indices[b, r]] = grad[b, h, r]; out starts at 0. Grid (B * Hkv, row blocks)."""
    matrix = tl.program_id(0).to(tl.int64)
    sample = matrix // num_heads
    head = matrix % num_heads
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    index = tl.load(indices_ptr + sample * length + rows, mask=rows < length, other=-1)  # [R]
    if NEED_KEYS:
        source = grad_keys_ptr + sample * stride_kb + head * stride_kh
        target = out_keys_ptr + matrix * num_tokens * key_size
        store_rows(source, target, index, rows, key_size, stride_kr, stride_kd, BLOCK_KD)
    if NEED_VALUES:
        source = grad_values_ptr + sample * stride_vb + head * stride_vh
        target = out_values_ptr + matrix * num_tokens * value_size
        store_rows(source, target, index, rows, value_size, stride_vr, stride_vd, BLOCK_VD)


def select_config(kernel: str, key_size: int, value_size: int, device: torch.device) -> tuple[dict[str, int], int]:
    """Constants and warps; a configuration's block_n is a program's number of elements."""
    block_kd, block_vd = next_power_of_2(key_size), next_power_of_2(value_size)
    config = select(kernel, size=max(key_size, value_size), dtype=torch.float32, device=device)
    rows = max(1, config.block_n // max(block_kd, block_vd))
    return dict(BLOCK_R=rows, BLOCK_KD=block_kd, BLOCK_VD=block_vd), config.num_warps


def compact_cache_triton(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`compact_cache_eager`."""
    samples, heads, _, key_size = keys.shape
    length, value_size = indices.shape[1], values.shape[3]
    out_keys = keys.new_empty(samples, heads, length, key_size)
    out_values = values.new_empty(samples, heads, length, value_size)
    if samples and heads and length:
        constants, num_warps = select_config("compact_cache", key_size, value_size, keys.device)
        with torch.cuda.device_of(keys):
            compact_cache_kernel[(samples * heads, ceil_div(length, constants["BLOCK_R"]), 2)](
                by_bytes(keys), by_bytes(values), indices.contiguous(), by_bytes(out_keys), by_bytes(out_values),
                *keys.stride(), *values.stride(),
                heads, length, key_size, value_size, **constants, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out_keys, out_values


def compact_cache_backward_triton(
    indices: Tensor, grad_keys: Tensor | None, grad_values: Tensor | None, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`compact_cache_backward_eager`."""
    outputs = []
    for gradient in (grad_keys, grad_values):
        if gradient is None:
            outputs.append(torch.empty(0, device=indices.device))
        else:
            outputs.append(gradient.new_zeros(*gradient.shape[:2], num_tokens, gradient.shape[3]))
    given = [gradient for gradient in (grad_keys, grad_values) if gradient is not None]
    if given and given[0].shape[0] * given[0].shape[1] * given[0].shape[2]:
        samples, heads, length, _ = given[0].shape
        left = given[0] if grad_keys is None else grad_keys
        right = given[0] if grad_values is None else grad_values
        constants, num_warps = select_config("compact_cache_bwd", left.shape[3], right.shape[3], left.device)
        with torch.cuda.device_of(left):
            compact_cache_bwd_kernel[(samples * heads, ceil_div(length, constants["BLOCK_R"]))](
                left, right, indices.contiguous(), *outputs, *left.stride(), *right.stride(),
                heads, num_tokens, length, left.shape[3], right.shape[3], **constants,
                NEED_KEYS=grad_keys is not None, NEED_VALUES=grad_values is not None,
                num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return outputs[0], outputs[1]
