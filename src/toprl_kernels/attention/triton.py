"""Launch code of the masked attention kernels: buffers, block sizes, which gradients to compute."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from toprl_kernels.attention.eager import dense_rows, empty_output
from toprl_kernels.attention.triton_dkdv import masked_attention_bwd_dkdv_kernel
from toprl_kernels.attention.triton_kernels import (
    TOKEN_ROWS,
    masked_attention_bwd_dq_kernel,
    masked_attention_bwd_prepare_kernel,
    masked_attention_fwd_kernel,
    masked_attention_tokens_kernel,
)
from toprl_kernels.configs import LaunchConfig, select
from toprl_kernels.triton_common import ceil_div, next_power_of_2

LOG2_E = math.log2(math.e)
MAX_BLOCK = 128  # every block size divides it; the padding of the vectors relies on it
ROW_PLANES = 4  # of the row buffer, see triton_kernels.py


def select_config(kernel: str, head_dim: int, query: Tensor) -> LaunchConfig:
    """The pinned configuration of ``kernel`` in {"fwd", "bwd_prepare", "bwd_dkdv", "bwd_dq"}."""
    return select(f"masked_attention_{kernel}", size=head_dim, dtype=query.dtype, device=query.device)


def token_buffer(keep_mask: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """The per-token vectors [B, 5, token_stride] int32; one launch, no synchronisation."""
    batch, num_tokens = keep_mask.shape
    # blocks of keys end at most at the next multiple of MAX_BLOCK, blocks of queries start up to N - 1 tokens in
    token_stride = (ceil_div(num_tokens, MAX_BLOCK) + 1) * MAX_BLOCK
    buffer = torch.empty(batch, TOKEN_ROWS.value, token_stride, dtype=torch.int32, device=keep_mask.device)
    mask = keep_mask.view(torch.uint8) if keep_mask.dtype == torch.bool else keep_mask
    valid = mask if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    config = select("masked_attention_tokens", size=num_tokens, dtype=torch.float32, device=buffer.device)
    masked_attention_tokens_kernel[(batch,)](
        mask, valid, buffer, *mask.stride(), *valid.stride(), num_tokens, token_stride,
        HAS_PADDING=key_padding_mask is not None, BLOCK_T=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return buffer


def _common(query: Tensor, key: Tensor) -> dict[str, Any]:
    head_dim = query.shape[3]
    return dict(
        GROUPS=query.shape[1] // key.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=next_power_of_2(head_dim, 16),
        enable_fp_fusion=True,
    )


def masked_attention_forward_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, D] and base-2 log-sum-exp [B, H, Nq] of scale * log2(e) * q.k."""
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    batch, num_heads, num_queries, head_dim = query.shape
    output = empty_output(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    config = select_config("fwd", head_dim, query)
    with torch.cuda.device_of(query):
        tokens = token_buffer(keep_mask, key_padding_mask)
        masked_attention_fwd_kernel[(ceil_div(num_queries, config.block_m), batch * num_heads)](
            query, key, value, output, lse, tokens,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
            num_heads, num_queries, key.shape[2], tokens.shape[2], scale * LOG2_E,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, CAUSAL=is_causal, SOFT=keep_mask.dtype != torch.bool,
            HAS_PADDING=key_padding_mask is not None,
            num_warps=config.num_warps, num_stages=config.num_stages, **_common(query, key),
        )  # fmt: skip
    return output, lse


def masked_attention_backward_triton(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    key_padding_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bounded_mask_grad: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by query, key, value and keep_mask; None where ``needs`` says no."""
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    grad_output = dense_rows(grad_output)
    needs_query, needs_key, needs_value, needs_mask = needs
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    device = query.device
    row_stride = ceil_div(num_queries, MAX_BLOCK) * MAX_BLOCK
    rows = torch.empty(ROW_PLANES, batch * num_heads, row_stride, dtype=torch.float32, device=device)
    inputs = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    common = _common(query, key)
    grad_query = grad_key = grad_value = grad_mask = None
    with torch.cuda.device_of(query):
        tokens = token_buffer(keep_mask, key_padding_mask)
        sizes = (num_heads, num_queries, num_keys, tokens.shape[2], row_stride, rows.stride(0))
        config = select_config("bwd_prepare", head_dim, query)
        masked_attention_bwd_prepare_kernel[(row_stride // config.block_m, batch * num_heads)](
            query, key, value, output, grad_output, lse, rows, tokens,
            *inputs, *output.stride()[:3], *grad_output.stride()[:3], *sizes, scale * LOG2_E,
            BLOCK_M=config.block_m, num_warps=config.num_warps, num_stages=config.num_stages, **common,
        )  # fmt: skip
        shared: dict[str, Any] = dict(CAUSAL=is_causal, **common)
        if needs_key or needs_value or needs_mask:
            config = select_config("bwd_dkdv", head_dim, query)
            if needs_key:
                grad_key = torch.empty(key.shape, dtype=key.dtype, device=device)
            if needs_value:
                grad_value = torch.empty(value.shape, dtype=value.dtype, device=device)
            by_head = rows  # not written unless wanted
            if needs_mask:
                by_head = torch.empty(batch, num_kv_heads, num_keys, dtype=torch.float32, device=device)
            masked_attention_bwd_dkdv_kernel[(ceil_div(num_keys, config.block_n), batch * num_kv_heads)](
                query, key, value, grad_output,
                key if grad_key is None else grad_key, value if grad_value is None else grad_value, by_head,
                rows, tokens, *inputs, *grad_output.stride()[:3], *sizes, scale, scale * LOG2_E,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_PADDING=key_padding_mask is not None,
                NEED_DK=needs_key, NEED_DV=needs_value, NEED_DM=needs_mask, BOUNDED=bounded_mask_grad and needs_mask,
                num_warps=config.num_warps, num_stages=config.num_stages, **shared,
            )  # fmt: skip
            if needs_mask:
                grad_mask = by_head.sum(dim=1).to(keep_mask.dtype)
        if needs_query:
            config = select_config("bwd_dq", head_dim, query)
            grad_query = torch.empty(query.shape, dtype=query.dtype, device=device)
            masked_attention_bwd_dq_kernel[(ceil_div(num_queries, config.block_m), batch * num_heads)](
                query, key, value, grad_output, grad_query, rows, tokens,
                *inputs, *grad_output.stride()[:3], *sizes, scale, scale * LOG2_E,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, SOFT=keep_mask.dtype != torch.bool,
                num_warps=config.num_warps, num_stages=config.num_stages, **shared,
            )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_mask
