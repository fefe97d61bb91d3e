"""Each op against the plain PyTorch a user would write instead. Correctness first: a wrong result aborts the run.

On CUDA the op under test is the Triton kernel. On the CPU it is the eager path: Triton's interpreter says nothing
about speed and is not timed. Rows of one case share their inputs and are timed interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timing import time_interleaved
from toprl_kernels import actor_score, masked_attention, topk_compact
from toprl_kernels.testing import (
    AttentionInputs,
    error_budget,
    make_actor_weights,
    make_attention_inputs,
    max_error,
)

Row = dict[str, Any]
SECONDS_PER_CASE = {True: 1.2, False: 6.0}  # by --quick


class WrongResultError(RuntimeError):
    """An implementation missed its error budget; its timing would be worthless."""


def run(quick: bool, device: torch.device) -> list[Row]:
    """All rows of the suite: one per (op, mode, shape, provider)."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for num_tokens in attention_sizes(quick, device):
        for mask in ("hard", "soft"):
            for backward in (False, True):
                rows += bench_attention(num_tokens, mask, backward, quick, device)
    for batch, num_tokens, k, hidden_size in topk_sizes(quick, device):
        rows += bench_topk(batch, num_tokens, k, hidden_size, quick, device)
    for num_tokens, d1, d2 in actor_sizes(quick, device):
        rows += bench_actor(num_tokens, d1, d2, quick, device)
    return rows


def attention_sizes(quick: bool, device: torch.device) -> list[int]:
    if device.type == "cuda":
        return [576, 2880] if quick else [576, 2048, 2880, 8192]
    return [256, 576] if quick else [256, 576, 1152]


def topk_sizes(quick: bool, device: torch.device) -> list[tuple[int, int, int, int]]:
    sizes = [(1, 576, 192, 1024), (8, 576, 192, 1024)]
    if device.type == "cuda" or not quick:
        sizes += [(1, 2880, 960, 4096), (8, 576, 192, 4096)]
    return sizes


def actor_sizes(quick: bool, device: torch.device) -> list[tuple[int, int, int]]:
    sizes = [(576, 1024, 256)]
    if device.type == "cuda" or not quick:
        sizes += [(576, 4096, 256), (2880, 4096, 256)]
    return sizes


def compare(
    op: str,
    mode: str,
    shape: str,
    dtype: torch.dtype,
    ours: tuple[str, Callable[[], object]],
    peers: dict[str, Callable[[], object]],
    error: float,
    budget: float,
    quick: bool,
    device: torch.device,
) -> list[Row]:
    """Check the error, time everything, and write the ratio of each peer's median to ours."""
    if not error <= budget:
        raise WrongResultError(f"{op} {mode} {shape}: error {error:.3e} exceeds the budget {budget:.3e}")
    name, call = ours
    timings = time_interleaved({name: call, **peers}, device, seconds=SECONDS_PER_CASE[quick])
    base = timings[name].p50_ms
    return [
        {
            "op": op,
            "mode": mode,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "provider": provider,
            "p20_ms": timing.p20_ms,
            "p50_ms": timing.p50_ms,
            "p80_ms": timing.p80_ms,
            "rounds": timing.rounds,
            "ratio_to_ours": timing.p50_ms / base,
            "error": error if provider == name else None,
            "error_budget": budget if provider == name else None,
        }
        for provider, timing in timings.items()
    ]


def our_name(device: torch.device) -> str:
    return "toprl (triton)" if device.type == "cuda" else "toprl (eager)"


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# --- masked_attention ---


def naive_attention(x: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Eq. 7 in a few lines of PyTorch, causal, with the maximum over the kept keys subtracted."""
    length = query.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    eye = torch.eye(length, dtype=torch.bool, device=query.device)
    gate = torch.where(eye, 1.0, mask.float()[:, None, :])[:, None] * causal
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[3])
    scores = scores - scores.masked_fill(gate == 0, -torch.inf).amax(dim=-1, keepdim=True).detach()
    weights = scores.clamp(max=60.0).exp() * gate
    return (weights / weights.sum(dim=-1, keepdim=True)).to(value.dtype) @ value


def sdpa_attention(x: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """SDPA with the float N x N mask log G. The floor under log keeps its gradient by m finite at m = 0."""
    length = query.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    eye = torch.eye(length, dtype=torch.bool, device=query.device)
    bias = (mask.float() + 1e-30).log()[:, None, :].expand(-1, length, -1)
    bias = torch.where(eye, 0.0, bias).masked_fill(~causal, -torch.inf)[:, None].to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)


def bench_attention(num_tokens: int, mask: str, backward: bool, quick: bool, device: torch.device) -> list[Row]:
    dtype = default_dtype(device)
    heads, kv_heads, head_dim = (32, 8, 128) if device.type == "cuda" else (8, 2, 64)
    x = make_attention_inputs(
        1, heads, kv_heads, num_tokens, num_tokens, head_dim, mask=mask, dtype=dtype, device=device
    )

    def op(_: AttentionInputs, query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor) -> Tensor:
        return masked_attention(query, key, value, keep_mask, is_causal=True)

    def call(implementation: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_(backward) for tensor in (x.query, x.key, x.value)]
        keep_mask = x.keep_mask
        if keep_mask.is_floating_point():
            keep_mask = keep_mask.detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            output = implementation(x, *leaves, keep_mask)
        if not backward:
            return [output]
        targets = [*leaves, keep_mask] if keep_mask.requires_grad else leaves
        return [output, *torch.autograd.grad(output, targets, x.grad_output)]

    # The oracle is the definition in float64 on one key/value head and its group of queries, to keep it affordable.
    # (The mask's gradient sums over all heads and is left to the tests.)
    group = heads // kv_heads
    wide = [tensor.double().requires_grad_(backward) for tensor in (x.query[:, :group], x.key[:, :1], x.value[:, :1])]
    oracle = [masked_attention(wide[0], wide[1], wide[2], x.keep_mask, is_causal=True, backend="reference")]
    if backward:
        oracle += torch.autograd.grad(oracle[0], wide, x.grad_output[:, :group].double())
    checks = []  # (error, budget) of the output, and of the gradients by query, key and value
    for got, eager, want in zip(call(op), call(naive_attention), oracle, strict=False):
        heads_of = slice(0, want.shape[1])
        checks.append((max_error(got[:, heads_of], want), error_budget(eager[:, heads_of], want, dtype)))
    error, budget = max(checks, key=lambda check: check[0] / check[1])
    return compare(
        "masked_attention",
        f"{mask} {'fwd+bwd' if backward else 'fwd'}",
        f"B1 H{heads}/{kv_heads} N{num_tokens} D{head_dim}",
        dtype,
        (our_name(device), lambda: call(op)),
        {"torch eager": lambda: call(naive_attention), "sdpa float mask": lambda: call(sdpa_attention)},
        error,
        budget,
        quick,
        device,
    )


# --- topk_compact ---


def bench_topk(batch: int, num_tokens: int, k: int, hidden_size: int, quick: bool, device: torch.device) -> list[Row]:
    dtype = default_dtype(device)
    hidden = torch.randn(batch, num_tokens, hidden_size, device=device).to(dtype)
    scores = torch.randn(batch, num_tokens, device=device)
    positions = torch.arange(num_tokens, device=device).expand(batch, -1)

    def ours() -> object:
        return topk_compact(hidden, scores, k, position_ids=positions)

    def torch_topk() -> tuple[Tensor, Tensor, Tensor]:
        indices = scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        return (
            hidden.gather(1, indices[:, :, None].expand(-1, -1, hidden_size)),
            positions.gather(1, indices),
            indices,
        )

    want = topk_compact(hidden, scores, k, position_ids=positions, backend="reference")
    got = topk_compact(hidden, scores, k, position_ids=positions)
    error = max(max_error(got.hidden_states, want.hidden_states), max_error(got.indices, want.indices))
    return compare(
        "topk_compact",
        "fwd",
        f"B{batch} N{num_tokens} K{k} d{hidden_size}",
        dtype,
        (our_name(device), ours),
        {"torch.topk + sort + gather": torch_topk},  # promises nothing about ties
        error,
        0.0,
        quick,
        device,
    )


# --- actor_score ---


class PlainActor(nn.Module):
    """The actor as one would write it with nn.Sequential."""

    def __init__(self, d1: int, d2: int) -> None:
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(d1), nn.Linear(d1, d2)
        self.fc2, self.fc3, self.head = nn.Linear(d2, d2), nn.Linear(d2, d2), nn.Linear(d2, 2)
        self.layer1 = nn.Sequential(self.norm, self.fc1)
        self.layers23 = nn.Sequential(self.fc2, nn.GELU(), self.fc3, nn.GELU(), self.head)
        self.stage_bias = nn.Parameter(torch.zeros(3, d2))

    def forward(self, hidden_states: Tensor, stage: int) -> Tensor:
        z = F.gelu(self.layer1(hidden_states) + self.stage_bias[stage])
        local, shared = z.chunk(2, dim=-1)
        return self.layers23(torch.cat([local, shared.mean(dim=1, keepdim=True).expand_as(local)], dim=-1))


@torch.no_grad()
def bench_actor(num_tokens: int, d1: int, d2: int, quick: bool, device: torch.device) -> list[Row]:
    dtype = default_dtype(device)
    weights = make_actor_weights(d1, d2, dtype=dtype, device=device)
    plain = PlainActor(d1, d2).to(device=device, dtype=dtype)
    layers = (plain.fc1, plain.fc2, plain.fc3, plain.head)
    targets: list[Tensor] = [plain.norm.weight, plain.norm.bias, plain.stage_bias]
    targets += [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    for parameter, value in zip(targets, weights, strict=True):
        parameter.copy_(value)
    hidden = torch.randn(1, num_tokens, d1, device=device).to(dtype)

    wide = type(weights)(*(tensor.double() for tensor in weights))
    oracle = actor_score(hidden.double(), 1, wide, backend="reference")
    return compare(
        "actor_score",
        "fwd",
        f"B1 N{num_tokens} d1={d1} d2={d2}",
        dtype,
        (our_name(device), lambda: actor_score(hidden, 1, weights)),
        {"nn.Sequential": lambda: plain(hidden, 1)},
        max_error(actor_score(hidden, 1, weights), oracle),
        error_budget(plain(hidden, 1), oracle, dtype),
        quick,
        device,
    )
