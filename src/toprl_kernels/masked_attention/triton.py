"""Launch code of the masked attention kernels: block sizes, the per-token vectors, autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from toprl_kernels._triton_common import ceil_div, next_power_of_2
from toprl_kernels.masked_attention.eager import SMALLEST_MASK
from toprl_kernels.masked_attention.triton_kernels import (
    masked_attention_bwd_dkdv_kernel,
    masked_attention_bwd_dq_kernel,
    masked_attention_bwd_prepare_kernel,
    masked_attention_fwd_kernel,
)

LOG2_E = math.log2(math.e)
MAX_BLOCK = 128  # every block size below divides it; the padding of the vectors relies on it


@dataclass(frozen=True)
class LaunchConfig:
    """Block sizes over queries (m) and keys (n), warps and pipeline stages of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def select_config(kernel: str, head_dim: int, dtype: torch.dtype) -> LaunchConfig:
    """The pinned block sizes of ``kernel`` in {"fwd", "dkdv", "dq", "prepare"}; no tuning at run time."""
    if kernel == "prepare":
        return LaunchConfig(32, 0, 8, 1)
    padded = next_power_of_2(head_dim, 16)
    if dtype == torch.float32:  # no tensor cores at full precision: small tiles, else the products spill
        table = {
            "fwd": LaunchConfig(32, 32, 8, 1),
            "dkdv": LaunchConfig(32, 32, 8, 1),
            "dq": LaunchConfig(32, 32, 8, 1),
        }
        if padded == 256:
            table = {
                "fwd": LaunchConfig(16, 16, 8, 1),
                "dkdv": LaunchConfig(32, 16, 8, 1),
                "dq": LaunchConfig(16, 32, 8, 1),
            }
    elif padded <= 128:
        table = {
            "fwd": LaunchConfig(128, 64, 8, 3),
            "dkdv": LaunchConfig(32, 64, 8, 2),
            "dq": LaunchConfig(128, 64, 8, 3),
        }
    else:
        table = {
            "fwd": LaunchConfig(64, 64, 8, 2),
            "dkdv": LaunchConfig(32, 32, 8, 2),
            "dq": LaunchConfig(64, 32, 8, 2),
        }
    return table[kernel]


@dataclass(frozen=True)
class TokenVectors:
    """What the kernels read per token, each [B, token_stride]; unused ones alias ``mask``."""

    mask: Tensor  # float32: m, 0 for padding and past the end
    bias: Tensor  # float32: log2 m
    order: Tensor  # int32: kept tokens ascending, then the others, then N
    kept: Tensor  # int32: inclusive count of kept tokens
    valid: Tensor  # uint8: 1 = a real token
    token_stride: int
    hard: bool
    has_padding: bool


def token_vectors(keep_mask: Tensor, key_padding_mask: Tensor | None) -> TokenVectors:
    """Prepare the per-token vectors; a handful of small launches and no synchronisation."""
    batch, num_tokens = keep_mask.shape
    # blocks of keys end at most at the next multiple of MAX_BLOCK, blocks of queries start up to N - 1 tokens in
    token_stride = (ceil_div(num_tokens, MAX_BLOCK) + 1) * MAX_BLOCK
    hard = keep_mask.dtype == torch.bool
    values = keep_mask.detach().float()
    values = values.masked_fill(values < SMALLEST_MASK, 0.0)
    if key_padding_mask is not None:
        values = values.masked_fill(~key_padding_mask, 0.0)
    mask = values.new_zeros(batch, token_stride)
    mask[:, :num_tokens] = values
    bias = order = kept = valid = mask
    if hard:
        is_kept = mask[:, :num_tokens] > 0
        count = is_kept.cumsum(dim=1)
        tokens = torch.arange(num_tokens, device=mask.device).expand(batch, -1)
        slots = torch.where(is_kept, count - 1, count[:, -1:] + tokens - count)
        order = torch.full((batch, token_stride), num_tokens, dtype=torch.int32, device=mask.device)
        order.scatter_(1, slots, tokens.to(torch.int32))
        kept = torch.zeros(batch, token_stride, dtype=torch.int32, device=mask.device)
        kept[:, :num_tokens] = count
    else:
        bias = mask.log2()
    if key_padding_mask is not None:
        valid = torch.zeros(batch, token_stride, dtype=torch.uint8, device=mask.device)
        valid[:, :num_tokens] = key_padding_mask
    return TokenVectors(mask, bias, order, kept, valid, token_stride, hard, key_padding_mask is not None)


def masked_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    *,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Same contract as the public function; arguments already checked."""
    if query.numel() == 0 or key.shape[2] == 0:
        return torch.zeros_like(query) + 0 * query
    output: Tensor = _MaskedAttention.apply(query, key, value, keep_mask, key_padding_mask, is_causal, scale)
    return output


def _rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but want the head dimension dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Batch, head and token strides of each tensor, in the kernels' argument order."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep_mask: Tensor,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        query, key, value = _rows(query), _rows(key), _rows(value)
        batch, num_heads, num_queries, head_dim = query.shape
        num_keys, groups = key.shape[2], num_heads // key.shape[1]
        vectors = token_vectors(keep_mask, key_padding_mask)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        row_stride = ceil_div(num_queries, MAX_BLOCK) * MAX_BLOCK
        lse = torch.empty(batch * num_heads, row_stride, dtype=torch.float32, device=query.device)
        config = select_config("fwd", head_dim, query.dtype)
        with torch.cuda.device_of(query):
            masked_attention_fwd_kernel[(ceil_div(num_queries, config.block_m), batch * num_heads)](
                query, key, value, output, lse,
                vectors.mask, vectors.bias, vectors.order, vectors.kept, vectors.valid,
                *_strides(query, key, value, output),
                num_heads, num_queries, num_keys, vectors.token_stride, row_stride, scale * LOG2_E,
                GROUPS=groups, HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim, 16),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                CAUSAL=is_causal, HARD=vectors.hard, HAS_PADDING=vectors.has_padding,
                num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.vectors, ctx.is_causal, ctx.scale, ctx.mask_dtype = vectors, is_causal, scale, keep_mask.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        vectors: TokenVectors = ctx.vectors
        needs_query, needs_key, needs_value, needs_mask = ctx.needs_input_grad[:4]
        batch, num_heads, num_queries, head_dim = query.shape
        num_kv_heads, num_keys = key.shape[1], key.shape[2]
        grad_output = _rows(grad_output)
        row_stride = lse.shape[1]
        delta, self_prob, self_grad = (torch.empty_like(lse) for _ in range(3))
        sizes = (num_heads, num_queries, num_keys, vectors.token_stride, row_stride)
        shared: dict[str, Any] = dict(
            GROUPS=num_heads // num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=next_power_of_2(head_dim, 16),
            enable_fp_fusion=True,
        )
        grad_query = grad_key = grad_value = grad_mask = None
        with torch.cuda.device_of(query):
            config = select_config("prepare", head_dim, query.dtype)
            masked_attention_bwd_prepare_kernel[(row_stride // config.block_m, batch * num_heads)](
                query, key, value, output, grad_output, lse, delta, self_prob, self_grad, vectors.mask,
                *_strides(query, key, value, output, grad_output), *sizes, ctx.scale * LOG2_E,
                BLOCK_M=config.block_m, num_warps=config.num_warps, num_stages=config.num_stages, **shared,
            )  # fmt: skip
            if needs_key or needs_value or needs_mask:
                config = select_config("dkdv", head_dim, query.dtype)
                grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
                grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
                mask_shape = (batch, num_kv_heads, num_keys) if needs_mask else (1,)
                grad_mask_parts = torch.empty(mask_shape, dtype=torch.float32, device=query.device)
                masked_attention_bwd_dkdv_kernel[(ceil_div(num_keys, config.block_n), batch * num_kv_heads)](
                    query, key, value, grad_output, grad_key, grad_value, grad_mask_parts,
                    lse, delta, self_prob, self_grad, vectors.mask, vectors.order, vectors.kept, vectors.valid,
                    *_strides(query, key, value, grad_output), *sizes, ctx.scale, ctx.scale * LOG2_E,
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, CAUSAL=ctx.is_causal, HARD=vectors.hard,
                    HAS_PADDING=vectors.has_padding, NEED_DM=needs_mask,
                    num_warps=config.num_warps, num_stages=config.num_stages, **shared,
                )  # fmt: skip
                if needs_mask:
                    grad_mask = grad_mask_parts.sum(dim=1).to(ctx.mask_dtype)
            if needs_query:
                config = select_config("dq", head_dim, query.dtype)
                grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
                masked_attention_bwd_dq_kernel[(ceil_div(num_queries, config.block_m), batch * num_heads)](
                    query, key, value, grad_output, grad_query, lse, delta, self_grad,
                    vectors.mask, vectors.order, vectors.kept,
                    *_strides(query, key, value, grad_output), *sizes, ctx.scale, ctx.scale * LOG2_E,
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, CAUSAL=ctx.is_causal, HARD=vectors.hard,
                    num_warps=config.num_warps, num_stages=config.num_stages, **shared,
                )  # fmt: skip
        return (
            grad_query,
            grad_key if needs_key else None,
            grad_value if needs_value else None,
            grad_mask,
            None,
            None,
            None,
        )
