"""actor_score in two kernels, forward only: h -> z1 and partial sums of its second half; z1 -> logits.

The cut is where the mean over the sample is needed. LayerNorm is folded into the first product: with W' = gamma * W1
(rounded), c1 = row sums of the rounded W' and b' = W1 beta + b1 + stage bias,

    fc1(LayerNorm(x)) = (x W'^T - mean * c1) * rstd + b'

Mean and squared deviation are merged block by block (Chan), never as E[x^2] - mean^2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels._triton_common import ceil_div, dot, host_int, next_power_of_2
from toprl_kernels.actor_score.weights import LAYER_NORM_EPS, ActorWeights


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def actor_layer1_kernel(
    h_ptr, weight_ptr, colsum_ptr, bias_ptr, valid_ptr, z_ptr, partial_ptr, count_ptr,
    stride_hb, stride_hn, stride_hd, stride_vb, stride_vn,
    num_tokens, d1, num_blocks, eps,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One half of z1 for one block of tokens. Grid (token blocks, B, 2): program 0 local half, 1 averaged half.

    The halves are separate programs: twice the reads of h (from L2), half the accumulator, twice the programs.
    """
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < num_tokens
    features = tl.arange(0, BLOCK_HALF)
    feature_ok = features < HALF
    outputs = which * HALF + features  # rows of W'
    h_rows = h_ptr + sample * stride_hb + rows.to(tl.int64)[:, None] * stride_hn
    acc = tl.zeros([BLOCK_M, BLOCK_HALF], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)  # sum of squared deviations from the mean so far
    for start in range(0, host_int(d1), BLOCK_K):
        dims = start + tl.arange(0, BLOCK_K)
        dim_ok = dims < d1
        x = tl.load(
            h_rows + dims.to(tl.int64)[None, :] * stride_hd, mask=in_range[:, None] & dim_ok[None, :], other=0.0
        )
        x = x.to(weight_ptr.dtype.element_ty)  # [M, K]
        w = tl.load(
            weight_ptr + outputs[:, None] * d1 + dims[None, :], mask=feature_ok[:, None] & dim_ok[None, :], other=0.0
        )  # [HALF, K]
        acc = dot(x, tl.trans(w), acc)
        wide = x.to(tl.float32)
        seen = start * 1.0
        new = tl.minimum(d1 - start, BLOCK_K) * 1.0
        block_mean = tl.sum(wide, 1) / new
        deviation = tl.where(dim_ok[None, :], wide - block_mean[:, None], 0.0)
        shift = block_mean - mean
        mean += shift * (new / (seen + new))
        squares += tl.sum(deviation * deviation, 1) + shift * shift * (seen * new / (seen + new))

    rstd = 1.0 / tl.sqrt(squares / d1 + eps)
    colsum = tl.load(colsum_ptr + outputs, mask=feature_ok, other=0.0)
    bias = tl.load(bias_ptr + outputs, mask=feature_ok, other=0.0)
    z = gelu((acc - mean[:, None] * colsum[None, :]) * rstd[:, None] + bias[None, :])  # [M, HALF]
    if which == 0:
        target = z_ptr + (sample * num_tokens + rows)[:, None] * HALF + features[None, :]
        tl.store(target, z.to(z_ptr.dtype.element_ty), mask=in_range[:, None] & feature_ok[None, :])
    else:
        counted = in_range
        if HAS_VALID:
            valid = tl.load(valid_ptr + sample * stride_vb + rows.to(tl.int64) * stride_vn, mask=in_range, other=0)
            counted = counted & (valid != 0)
        slot = sample * num_blocks + block
        tl.store(partial_ptr + slot * HALF + features, tl.sum(tl.where(counted[:, None], z, 0.0), 0), mask=feature_ok)
        tl.store(count_ptr + slot, tl.sum(counted.to(tl.float32), 0))


@triton.jit
def actor_layers23_kernel(
    z_ptr, partial_ptr, count_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, head_weight_ptr, head_bias_ptr, out_ptr,
    num_tokens, num_blocks,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits of one block of tokens from z1. Grid (token blocks, B).

    fc2's outputs are produced BLOCK_C at a time and consumed by fc3 at once, so neither matrix is held whole.
    """
    sample = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < num_tokens
    features = tl.arange(0, BLOCK_HALF)
    feature_ok = features < HALF
    width = tl.arange(0, BLOCK_WIDTH)
    width_ok = width < 2 * HALF
    dtype = w2_ptr.dtype.element_ty

    summary = tl.zeros([BLOCK_HALF], tl.float32)
    count = tl.sum(tl.zeros([BLOCK_HALF], tl.float32), 0)
    for block in range(0, host_int(num_blocks)):  # always in the same order: deterministic
        slot = sample * num_blocks + block
        summary += tl.load(partial_ptr + slot * HALF + features, mask=feature_ok, other=0.0)
        count += tl.load(count_ptr + slot)
    summary = summary / tl.maximum(count, 1.0)

    local = tl.load(
        z_ptr + (sample * num_tokens + rows)[:, None] * HALF + features[None, :],
        mask=in_range[:, None] & feature_ok[None, :],
        other=0.0,
    )  # [M, HALF]
    acc = tl.zeros([BLOCK_M, BLOCK_WIDTH], tl.float32)
    for start in range(0, 2 * HALF, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        chunk_ok = chunk < 2 * HALF
        w2_rows = w2_ptr + chunk[:, None] * (2 * HALF) + features[None, :]
        tile_ok = chunk_ok[:, None] & feature_ok[None, :]
        w2_local = tl.load(w2_rows, mask=tile_ok, other=0.0)  # [C, HALF]
        w2_shared = tl.load(w2_rows + HALF, mask=tile_ok, other=0.0).to(tl.float32)  # [C, HALF]
        offset = tl.sum(w2_shared * summary[None, :], 1)
        offset += tl.load(b2_ptr + chunk, mask=chunk_ok, other=0.0).to(tl.float32)  # [C]
        z2 = gelu(dot(local, tl.trans(w2_local), tl.zeros([BLOCK_M, BLOCK_C], tl.float32)) + offset[None, :])
        w3 = tl.load(
            w3_ptr + width[:, None] * (2 * HALF) + chunk[None, :], mask=width_ok[:, None] & chunk_ok[None, :], other=0.0
        )  # [WIDTH, C]
        acc = dot(z2.to(dtype), tl.trans(w3), acc)

    z3 = gelu(acc + tl.load(b3_ptr + width, mask=width_ok, other=0.0).to(tl.float32)[None, :])  # [M, WIDTH]
    z3 = z3.to(dtype).to(tl.float32)
    for label in tl.static_range(2):
        weight = tl.load(head_weight_ptr + label * 2 * HALF + width, mask=width_ok, other=0.0).to(tl.float32)
        logit = tl.sum(z3 * weight[None, :], 1) + tl.load(head_bias_ptr + label).to(tl.float32)
        tl.store(out_ptr + (sample * num_tokens + rows) * 2 + label, logit.to(out_ptr.dtype.element_ty), mask=in_range)


def select_config(dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Pinned block sizes of the two kernels."""
    if dtype == torch.float32:
        return {
            "layer1": dict(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=2),
            "layers23": dict(BLOCK_M=16, BLOCK_C=16, num_warps=8, num_stages=1),
        }
    return {
        "layer1": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
        "layers23": dict(BLOCK_M=64, BLOCK_C=32, num_warps=8, num_stages=2),
    }


def actor_score_triton(
    hidden_states: Tensor,
    stage: int,
    weights: ActorWeights,
    *,
    valid_mask: Tensor | None,
) -> Tensor:
    """Same contract as the public function; arguments already checked, no gradient needed."""
    weights = ActorWeights(*(tensor.detach().contiguous() for tensor in weights))
    hidden_states = hidden_states.detach()
    dtype, device = weights.fc1_weight.dtype, hidden_states.device
    batch, num_tokens, d1 = hidden_states.shape
    half = weights.fc1_weight.shape[0] // 2
    logits = torch.empty(batch, num_tokens, 2, dtype=dtype, device=device)
    if logits.numel() == 0:
        return logits

    folded = (weights.fc1_weight.float() * weights.norm_weight.float()).to(dtype)  # W'
    colsum = folded.float().sum(dim=1)
    bias = weights.fc1_weight.float() @ weights.norm_bias.float()
    bias = bias + weights.fc1_bias.float() + weights.stage_bias[stage].float()

    configs = select_config(dtype)
    layer1, layers23 = configs["layer1"], configs["layers23"]
    num_blocks = ceil_div(num_tokens, layer1["BLOCK_M"])
    z = torch.empty(batch, num_tokens, half, dtype=dtype, device=device)
    partial = torch.empty(batch, num_blocks, half, dtype=torch.float32, device=device)
    count = torch.empty(batch, num_blocks, dtype=torch.float32, device=device)
    block_half = next_power_of_2(half, 16)
    valid = partial[:, :, 0] if valid_mask is None else valid_mask.view(torch.uint8)
    with torch.cuda.device_of(hidden_states):
        actor_layer1_kernel[(num_blocks, batch, 2)](
            hidden_states, folded, colsum, bias, valid, z, partial, count,
            *hidden_states.stride(), *valid.stride(), num_tokens, d1, num_blocks, LAYER_NORM_EPS,
            HALF=half, BLOCK_HALF=block_half, HAS_VALID=valid_mask is not None, enable_fp_fusion=True, **layer1,
        )  # fmt: skip
        actor_layers23_kernel[(ceil_div(num_tokens, layers23["BLOCK_M"]), batch)](
            z, partial, count, weights.fc2_weight, weights.fc2_bias, weights.fc3_weight, weights.fc3_bias,
            weights.head_weight, weights.head_bias, logits, num_tokens, num_blocks,
            HALF=half, BLOCK_HALF=block_half, BLOCK_WIDTH=next_power_of_2(2 * half, 16), enable_fp_fusion=True,
            **layers23,
        )  # fmt: skip
    return logits
