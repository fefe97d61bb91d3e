"""actor_score in plain PyTorch: the forward, which autograd can record, and a backward that starts from the inputs.

On a CPU autograd of the forward was measured 1.0 to 1.4 times as fast as the explicit backward, at all sizes. That one
is for a forward by the kernels, which keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels.actor.weights import LAYER_NORM_EPS, ActorWeights

# LayerNorm's output is consumed at once; in pieces of about this size it stays in recycled, partly cached memory of the
# CPU. Smaller pieces make smaller products.
CPU_PIECE_BYTES = 8 << 20

INPUTS = ("hidden_states", *ActorWeights._fields)
_UP_TO_FC1 = set(INPUTS[: INPUTS.index("fc2_weight")])
_UP_TO_FC2 = set(INPUTS[: INPUTS.index("fc3_weight")])
_UP_TO_FC3 = set(INPUTS[: INPUTS.index("head_weight")])

_gelu = torch.ops.aten.gelu.default
_gelu_ = torch.ops.aten.gelu_.default
_gelu_backward = torch.ops.aten.gelu_backward.default


class Activations(NamedTuple):
    """Inputs of the three GELUs, each [B, N, d2] in the dtype of the weights."""

    first: Tensor
    second: Tensor
    third: Tensor


def actor_score_recorded(hidden_states: Tensor, valid_mask: Tensor | None, weights: ActorWeights, stage: int) -> Tensor:
    """Logits, with torch's own autograd. Arguments checked."""
    bias = weights.fc1_bias + weights.stage_bias[stage]
    return _later_layers(_layer1(hidden_states, weights, bias), valid_mask, weights, keep=True)[0]


def actor_score_eager(
    hidden_states: Tensor, valid_mask: Tensor | None, weights: ActorWeights, stage: int, keep: bool
) -> tuple[Tensor, Activations]:
    """Logits and activations, overwritten unless asked to ``keep`` them. Arguments checked; outside of autograd."""
    bias = weights.fc1_bias + weights.stage_bias[stage]
    pieces = _pieces(hidden_states, weights.fc1_weight.dtype)
    if len(pieces) == 1:
        first = _layer1(hidden_states, weights, bias)
    else:
        rows = hidden_states.flatten(0, 1)
        first = torch.cat([_layer1(rows[piece], weights, bias) for piece in pieces]).view(*hidden_states.shape[:2], -1)
    return _later_layers(first, valid_mask, weights, keep)


def _layer1(hidden_states: Tensor, w: ActorWeights, bias: Tensor) -> Tensor:
    """fc1(LayerNorm(h)) + stage bias, [..., d2]; ``bias`` [d2] is the sum of both."""
    inputs = hidden_states.to(w.fc1_weight.dtype)
    return F.linear(
        F.layer_norm(inputs, inputs.shape[-1:], w.norm_weight, w.norm_bias, LAYER_NORM_EPS), w.fc1_weight, bias
    )


def _later_layers(first: Tensor, valid_mask: Tensor | None, w: ActorWeights, keep: bool) -> tuple[Tensor, Activations]:
    gelu = _gelu if keep else _gelu_
    local, shared = gelu(first).chunk(2, dim=-1)
    by_local, by_summary = w.fc2_weight.chunk(2, dim=1)
    # the summary is the same for all tokens of a sample, so its half of fc2 is applied once per sample
    second = F.linear(local, by_local)
    second += F.linear(_masked_mean(shared, valid_mask, overwrite=not keep), by_summary, w.fc2_bias)
    third = F.linear(gelu(second), w.fc3_weight, w.fc3_bias)
    logits = F.linear(gelu(third), w.head_weight, w.head_bias)
    return logits, Activations(first, second, third)


def _pieces(hidden_states: Tensor, dtype: torch.dtype) -> list[slice]:
    """Equal parts of the rows [B N, d1]; one part on a GPU, whose allocator recycles memory anyway."""
    number = hidden_states.numel() * dtype.itemsize // CPU_PIECE_BYTES
    if number <= 1 or not hidden_states.is_cpu:
        return [slice(None)]
    rows = hidden_states.numel() // hidden_states.shape[-1]
    length = -(-rows // number)
    return [slice(start, start + length) for start in range(0, rows, length)]


def _masked_mean(z: Tensor, valid_mask: Tensor | None, overwrite: bool) -> Tensor:
    """Mean over the valid tokens, [B, 1, d2/2]; may ``overwrite`` z where invalid."""
    if valid_mask is None:
        return z.mean(dim=1, keepdim=True) if z.shape[1] else z.sum(dim=1, keepdim=True)
    fill = z.masked_fill_ if overwrite else z.masked_fill  # a sum of selected rows would be slower
    return fill(~valid_mask[..., None], 0.0).sum(dim=1, keepdim=True) / _count(valid_mask)[..., None]


def _count(valid_mask: Tensor) -> Tensor:
    return valid_mask.sum(dim=1, keepdim=True).clamp(min=1)


def actor_score_backward(
    grad_logits: Tensor,
    hidden_states: Tensor,
    valid_mask: Tensor | None,
    weights: ActorWeights,
    stage: int,
    activations: Activations,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients by hidden_states and the eleven weights, in that order; None where ``needs`` is False."""
    wanted = {name for name, needed in zip(INPUTS, needs, strict=True) if needed}
    gradients: dict[str, Tensor] = {}
    _backward(gradients, wanted, grad_logits, hidden_states, valid_mask, weights, stage, activations)
    return [gradients[name] if name in wanted else None for name in INPUTS]


def _backward(
    gradients: dict[str, Tensor],
    wanted: set[str],
    grad_logits: Tensor,
    hidden_states: Tensor,
    valid_mask: Tensor | None,
    w: ActorWeights,
    stage: int,
    activations: Activations,
) -> None:
    """Fill in the wanted gradients, from the last layer to the first, and stop at the first that is wanted."""
    width = w.fc1_weight.shape[0]
    half = width // 2
    batch, num_tokens = hidden_states.shape[:2]

    grad = grad_logits.reshape(-1, 2)
    third = activations.third.view(-1, width)
    _linear_backward(gradients, wanted, "head", grad, lambda: _gelu(third))
    if not wanted & _UP_TO_FC3:
        return

    grad = _gelu_backward(grad @ w.head_weight, third)
    second = activations.second.view(-1, width)
    _linear_backward(gradients, wanted, "fc3", grad, lambda: _gelu(second))
    if not wanted & _UP_TO_FC2:
        return

    grad = _gelu_backward(grad @ w.fc3_weight, second)
    per_sample = grad.view(batch, num_tokens, width).sum(dim=1)
    if "fc2_bias" in wanted:
        gradients["fc2_bias"] = per_sample.sum(dim=0)
    if "fc2_weight" in wanted:
        z = _gelu(activations.first)
        by_local = grad.T @ z[..., :half].reshape(-1, half)
        summary = _masked_mean(z[..., half:], valid_mask, overwrite=True)
        gradients["fc2_weight"] = torch.cat([by_local, per_sample.T @ summary[:, 0]], dim=1)
    if not wanted & _UP_TO_FC1:
        return

    grad_mean = per_sample @ w.fc2_weight[:, half:]  # [B, d2/2]
    grad_z = torch.empty_like(activations.first)
    grad_z[..., :half] = (grad @ w.fc2_weight[:, :half]).view(batch, num_tokens, half)
    if valid_mask is None:
        grad_z[..., half:] = (grad_mean / max(num_tokens, 1))[:, None, :]
    else:
        grad_z[..., half:] = torch.where(valid_mask[..., None], (grad_mean / _count(valid_mask))[:, None, :], 0.0)
    grad = _gelu_backward(grad_z, activations.first).view(-1, width)
    _backward_layer1(gradients, wanted, grad, hidden_states, w, stage)


def _backward_layer1(
    gradients: dict[str, Tensor], wanted: set[str], grad: Tensor, hidden_states: Tensor, w: ActorWeights, stage: int
) -> None:
    """``grad`` [B N, d2] is the gradient by fc1(LayerNorm(h)) + stage bias."""
    d1 = w.fc1_weight.shape[1]
    if "stage_bias" in wanted:
        gradients["stage_bias"] = torch.zeros_like(w.stage_bias)
        gradients["stage_bias"][stage] = grad.sum(dim=0)
    if "norm_bias" in wanted:
        gradients["norm_bias"] = grad.sum(dim=0) @ w.fc1_weight
    if not wanted & {"hidden_states", "norm_weight", "fc1_weight"}:
        _linear_backward(gradients, wanted, "fc1", grad, lambda: grad)
        return
    if "fc1_bias" in wanted:
        gradients["fc1_bias"] = grad.sum(dim=0)
    dtype = w.fc1_weight.dtype
    rows = hidden_states.reshape(-1, d1)
    needs_rows, needs_weight = "hidden_states" in wanted, "norm_weight" in wanted
    by_rows: list[Tensor] = []
    # sums over pieces would be rounded after each one in 16 bits
    for piece in _pieces(rows, dtype) if dtype.itemsize >= 4 else [slice(None)]:
        inputs = rows[piece].to(dtype)
        normed, mean, rstd = torch.native_layer_norm(inputs, (d1,), w.norm_weight, w.norm_bias, LAYER_NORM_EPS)
        if "fc1_weight" in wanted:
            _accumulate(gradients, "fc1_weight", grad[piece].T, normed)
        if needs_rows or needs_weight:
            by_inputs, by_weight, _ = torch.ops.aten.native_layer_norm_backward(
                grad[piece] @ w.fc1_weight, inputs, (d1,), mean, rstd, w.norm_weight, w.norm_bias,
                [needs_rows, needs_weight, False],
            )  # fmt: skip
            if needs_rows:
                by_rows.append(by_inputs)
            if needs_weight:
                gradients["norm_weight"] = gradients.get("norm_weight", 0) + by_weight
    if needs_rows:
        by_all = by_rows[0] if len(by_rows) == 1 else torch.cat(by_rows)
        gradients["hidden_states"] = by_all.view(hidden_states.shape).to(hidden_states.dtype)


def _accumulate(gradients: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    """Add left @ right."""
    if name in gradients:
        gradients[name].addmm_(left, right)
    else:
        gradients[name] = left @ right


def _linear_backward(
    gradients: dict[str, Tensor], wanted: set[str], layer: str, grad: Tensor, inputs: Callable[[], Tensor]
) -> None:
    """Gradients of a layer's weight and bias; its inputs are computed only for the weight."""
    if f"{layer}_weight" in wanted:
        gradients[f"{layer}_weight"] = grad.T @ inputs()
    if f"{layer}_bias" in wanted:
        gradients[f"{layer}_bias"] = grad.sum(dim=0)
