"""actor_score in two kernels: h -> z1 and partial sums of its second half; z1 -> logits.

The cut is where the mean over the sample is needed. LayerNorm is folded into the first product: with W' = gamma * W1
(rounded), c1 = row sums of the rounded W' and b' = W1 beta + b1 + stage bias,

    fc1(LayerNorm(x)) = (x W'^T - mean * c1) * rstd + b'

Mean and squared deviation are merged block by block (Chan), never as E[x^2] - mean^2.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels import configs
from toprl_kernels.actor.weights import LAYER_NORM_EPS, ActorWeights
from toprl_kernels.triton_common import ceil_div, dot, host_int, next_power_of_2


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def actor_layer1_kernel(
    h_ptr, weight_ptr, colsum_ptr, bias_ptr, valid_ptr, z_ptr, partial_ptr, count_ptr,
    stride_hb, stride_hn, stride_hd, stride_vb, stride_vn,
    num_tokens, d1, num_blocks, eps,
    HALF: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_VALID: tl.constexpr,
):  # fmt: skip
    """z1 of one block of tokens: its first half per token, the sum of its second half over the block.

    Grid (token blocks of all samples, feature blocks). With one feature block h is read once.
    """
    sample = (tl.program_id(0) // num_blocks).to(tl.int64)
    block = tl.program_id(0) % num_blocks
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < num_tokens
    features = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # rows of W'
    feature_ok = features < 2 * HALF
    h_rows = h_ptr + sample * stride_hb + rows.to(tl.int64)[:, None] * stride_hn
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
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
            weight_ptr + features[:, None] * d1 + dims[None, :], mask=feature_ok[:, None] & dim_ok[None, :], other=0.0
        )  # [F, K]
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
    colsum = tl.load(colsum_ptr + features, mask=feature_ok, other=0.0)
    bias = tl.load(bias_ptr + features, mask=feature_ok, other=0.0)
    z = gelu((acc - mean[:, None] * colsum[None, :]) * rstd[:, None] + bias[None, :])  # [M, F]
    target = z_ptr + (sample * num_tokens + rows)[:, None] * HALF + features[None, :]
    tl.store(target, z.to(z_ptr.dtype.element_ty), mask=in_range[:, None] & (features < HALF)[None, :])
    counted = in_range
    if HAS_VALID:
        valid = tl.load(valid_ptr + sample * stride_vb + rows.to(tl.int64) * stride_vn, mask=in_range, other=0)
        counted = counted & (valid != 0)
    slot = sample * num_blocks + block
    total = tl.sum(tl.where(counted[:, None], z, 0.0), 0)  # [F]
    tl.store(partial_ptr + slot * HALF + features - HALF, total, mask=feature_ok & (features >= HALF))
    if tl.program_id(1) == 0:
        tl.store(count_ptr + slot, tl.sum(counted.to(tl.float32), 0))


@triton.jit
def actor_layers23_kernel(
    z_ptr, partial_ptr, count_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, head_weight_ptr, head_bias_ptr, out_ptr,
    num_tokens, num_blocks, num_row_blocks,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits of one block of tokens from z1. Grid (token blocks of all samples,).

    fc2's outputs are produced BLOCK_C at a time and consumed by fc3 at once, so neither matrix is held whole.
    """
    sample = (tl.program_id(0) // num_row_blocks).to(tl.int64)
    rows = tl.program_id(0) % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
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


class FoldedWeights(NamedTuple):
    """LayerNorm's parameters folded into fc1; ``bias`` has a row per stage."""

    weight: Tensor  # W' = W1 * gamma, rounded to the dtype of the weights, [d2, d1]
    colsum: Tensor  # float32, sums of the rows of the rounded W', [d2]
    bias: Tensor  # float32, W1 beta + b1 + stage bias, [T, d2]


def fold(weights: ActorWeights) -> FoldedWeights:
    """Compute :class:`FoldedWeights`; five small launches."""
    folded = (weights.fc1_weight.float() * weights.norm_weight.float()).to(weights.fc1_weight.dtype)
    bias = weights.fc1_weight.float() @ weights.norm_bias.float() + weights.fc1_bias.float()
    return FoldedWeights(folded.contiguous(), folded.float().sum(dim=1), bias + weights.stage_bias.float())


class _FoldedEntry(NamedTuple):
    sources: tuple[weakref.ref[Tensor], ...]  # held for their callbacks: an id must not outlive its tensor
    state: tuple[tuple[int, int, torch.dtype], ...]
    folded: FoldedWeights


_folded: dict[tuple[int, ...], _FoldedEntry] = {}


def folded_weights(weights: ActorWeights) -> FoldedWeights:
    """:func:`fold`, remembered until one of the tensors is written to, replaced or freed.

    Known by identity, memory and version counter, which every write through autograd's API bumps (optimizers,
    ``load_state_dict``). A write into ``tensor.data`` does not: call :func:`forget_folded_weights` after one. Inference
    tensors have no counter, and a CUDA graph replays memory as it will be then: both fold anew.
    """
    sources = (weights.fc1_weight, weights.fc1_bias, weights.norm_weight, weights.norm_bias, weights.stage_bias)
    if any(tensor.is_inference() for tensor in sources) or (
        sources[0].is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return fold(weights)
    key = tuple(map(id, sources))
    state = tuple((tensor._version, tensor.data_ptr(), tensor.dtype) for tensor in sources)
    entry = _folded.get(key)
    if entry is not None and entry.state == state:
        return entry.folded
    folded = fold(weights)

    def forget(_: object) -> None:
        _folded.pop(key, None)

    _folded[key] = _FoldedEntry(tuple(weakref.ref(tensor, forget) for tensor in sources), state, folded)
    return folded


def forget_folded_weights() -> None:
    """Drop everything that :func:`folded_weights` remembers."""
    _folded.clear()


def actor_score_triton(hidden_states: Tensor, valid_mask: Tensor | None, weights: ActorWeights, stage: int) -> Tensor:
    """Logits; arguments already checked, no gradient. Two launches once the weights are folded."""
    dtype, device = weights.fc1_weight.dtype, hidden_states.device
    batch, num_tokens, d1 = hidden_states.shape
    width = weights.fc1_weight.shape[0]
    half = width // 2
    logits = torch.empty(batch, num_tokens, 2, dtype=dtype, device=device)
    if logits.numel() == 0:
        return logits

    folded = folded_weights(weights)
    layer1, layers23 = (
        configs.select(kernel, size=batch * num_tokens, dtype=dtype, device=device)
        for kernel in ("actor_layer1", "actor_layers23")
    )
    block_width = next_power_of_2(width, 16)
    block_features = max(16, block_width // layer1.splits)
    num_blocks = ceil_div(num_tokens, layer1.block_m)
    num_row_blocks = ceil_div(num_tokens, layers23.block_m)
    z = torch.empty(batch, num_tokens, half, dtype=dtype, device=device)
    partial = torch.empty(batch, num_blocks, half, dtype=torch.float32, device=device)
    count = torch.empty(batch, num_blocks, dtype=torch.float32, device=device)
    valid = count if valid_mask is None else valid_mask.view(torch.uint8)
    fc2, fc3, head = (tensor.contiguous() for tensor in (weights.fc2_weight, weights.fc3_weight, weights.head_weight))
    biases = (weights.fc2_bias.contiguous(), weights.fc3_bias.contiguous(), weights.head_bias.contiguous())
    with torch.cuda.device_of(hidden_states):
        actor_layer1_kernel[(num_blocks * batch, ceil_div(width, block_features))](
            hidden_states, folded.weight, folded.colsum, folded.bias[stage], valid, z, partial, count,
            *hidden_states.stride(), *valid.stride(), num_tokens, d1, num_blocks, LAYER_NORM_EPS,
            HALF=half, BLOCK_F=block_features, BLOCK_M=layer1.block_m, BLOCK_K=layer1.block_n,
            HAS_VALID=valid_mask is not None, num_warps=layer1.num_warps, num_stages=layer1.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
        actor_layers23_kernel[(num_row_blocks * batch,)](
            z, partial, count, fc2, biases[0], fc3, biases[1], head, biases[2], logits,
            num_tokens, num_blocks, num_row_blocks,
            HALF=half, BLOCK_HALF=next_power_of_2(half, 16), BLOCK_WIDTH=block_width,
            BLOCK_M=layers23.block_m, BLOCK_C=layers23.block_n,
            num_warps=layers23.num_warps, num_stages=layers23.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return logits
