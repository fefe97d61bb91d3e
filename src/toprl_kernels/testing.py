"""Input makers and the error budget shared by the tests and the benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from toprl_kernels.actor.reference import ActorWeights


class AttentionInputs(NamedTuple):
    """Arguments of masked_attention plus a gradient for its output."""

    query: Tensor  # [B, H, Nq, D]
    key: Tensor  # [B, Hkv, N, D]
    value: Tensor  # [B, Hkv, N, D]
    keep_mask: Tensor  # [B, N]
    key_padding_mask: Tensor | None  # [B, N]
    grad_output: Tensor  # [B, H, Nq, D]


def make_attention_inputs(
    batch: int = 2,
    num_heads: int = 2,
    num_kv_heads: int = 2,
    num_queries: int | None = None,
    num_keys: int = 63,
    head_dim: int = 64,
    *,
    mask: str = "mixed",
    padding: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Random inputs. ``mask``: "hard" (bool), "soft" (uniform), or "mixed" (soft with many exact zeros and ones)."""
    generator = torch.Generator().manual_seed(seed)
    num_queries = num_keys if num_queries is None else num_queries

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    query = normal(batch, num_heads, num_queries, head_dim)
    key = normal(batch, num_kv_heads, num_keys, head_dim)
    value = normal(batch, num_kv_heads, num_keys, head_dim)
    grad_output = normal(batch, num_heads, num_queries, head_dim)
    uniform = torch.rand(batch, num_keys, generator=generator)
    if mask == "hard":
        keep_mask = uniform < 0.4
    elif mask == "soft":
        keep_mask = uniform
    elif mask == "mixed":
        keep_mask = torch.where(uniform < 0.3, 0.0, torch.where(uniform > 0.7, 1.0, uniform))
    else:
        raise ValueError(f"make_attention_inputs: mask={mask!r} is unknown; use 'hard', 'soft' or 'mixed'")
    valid = None
    if padding:
        valid = (torch.rand(batch, num_keys, generator=generator) < 0.8).to(device)
    return AttentionInputs(query, key, value, keep_mask.to(device), valid, grad_output)


def make_actor_weights(
    d1: int,
    d2: int,
    num_stages: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ActorWeights:
    """Random actor weights with every parameter away from its default, at the usual 1/sqrt(fan-in) scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    def bias(*shape: int) -> Tensor:
        return normal(*shape, scale=0.1)

    return ActorWeights(
        norm_weight=1 + bias(d1),
        norm_bias=bias(d1),
        stage_bias=bias(num_stages, d2),
        fc1_weight=normal(d2, d1, scale=d1**-0.5),
        fc1_bias=bias(d2),
        fc2_weight=normal(d2, d2, scale=d2**-0.5),
        fc2_bias=bias(d2),
        fc3_weight=normal(d2, d2, scale=d2**-0.5),
        fc3_bias=bias(d2),
        head_weight=normal(2, d2, scale=d2**-0.5),
        head_bias=bias(2),
    )


def max_error(got: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, in float64; inf when ``got`` has a NaN or infinity that ``oracle`` has not."""
    if got.numel() == 0:
        return 0.0
    difference = (got.detach().double() - oracle.detach().double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())


def error_budget(eager: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """2 * (error of eager at the same precision + eps * max|oracle|): what an implementation may be off by."""
    scale = float(oracle.detach().abs().max()) if oracle.numel() else 0.0
    return 2.0 * (max_error(eager, oracle) + torch.finfo(dtype).eps * scale)


def assert_within_budget(
    got: Tensor, eager: Tensor, oracle: Tensor, *, name: str, atol: float = 0.0, dtype: torch.dtype | None = None
) -> None:
    """Raise AssertionError unless ``got`` is within the error budget.

    Args:
        oracle: the definition in float64 on the same (already rounded) inputs.
        atol: for results whose true value is 0, such as the gradients of a one-token sample.
        dtype: precision of the computation, default that of ``got``.
    """
    if got.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}")
    error, budget = max_error(got, oracle), error_budget(eager, oracle, dtype or got.dtype) + atol
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3e} exceeds the budget {budget:.3e}")
