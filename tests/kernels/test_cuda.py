"""What only a GPU can show: real races, real low-precision products, no synchronisation, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_masked_attention import run
from toprl_kernels import (
    actor_score,
    attention_plan,
    compact_cache,
    fold_actor_weights,
    masked_attention,
    prune_stage,
    sample_keep_mask,
    topk_compact,
)
from toprl_kernels.testing import assert_within_budget, make_actor_weights, make_attention_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mask", ["hard", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "head_dim"), [(577, 64), (577, 80), (1030, 128), (300, 256)])
def test_attention(mask: str, dtype: torch.dtype, length: int, head_dim: int) -> None:
    x = make_attention_inputs(2, 8, 2, length, length, head_dim, mask=mask, padding=True, dtype=dtype, device="cuda")
    got = run(x, "triton", True, dtype)
    oracle = run(x, "reference", True, torch.float64)
    eager = run(x, "reference", True, dtype)
    for name, *tensors in zip(("o", "dq", "dk", "dv", "dm"), got, eager, oracle, strict=False):
        assert_within_budget(*tensors, name=name, dtype=dtype)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(got, run(x, "triton", True, dtype), strict=True))


@pytest.mark.parametrize("pattern", ["window", "images", "packed", "decoding"])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 96), (512, 512)])
def test_patterns(pattern: str, head_dim: int, value_dim: int) -> None:
    num_queries = 2 if pattern == "decoding" else 700
    x = make_attention_inputs(1, 4, 1, num_queries, 700, head_dim, mask="hard", dtype=torch.bfloat16, device="cuda")
    value = torch.randn(1, 1, 700, value_dim, device="cuda", dtype=torch.bfloat16)
    blocks = torch.full((1, 700), -1, device="cuda")
    blocks[:, 100:420] = 0
    patterns = {
        "window": dict(is_causal=True, window=129),
        "images": dict(is_causal=True, window=300, block_ids=blocks),
        "packed": dict(is_causal=True, cu_seqlens=torch.tensor([0, 1, 300, 700], device="cuda")),
        "decoding": dict(is_causal=True),
    }[pattern]
    results = []
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x.query, x.key, value)]
        output = masked_attention(*leaves, x.keep_mask, **patterns, backend=backend)
        gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
        results.append([output, *gradients])
    for name, *tensors in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert_within_budget(*tensors, name=name, dtype=torch.bfloat16)


def test_automatic_choice_runs_without_synchronisation() -> None:
    x = make_attention_inputs(1, 4, 2, 300, 300, 64, mask="hard", dtype=torch.bfloat16, device="cuda")
    weights = make_actor_weights(256, 64, dtype=torch.bfloat16, device="cuda")
    hidden = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        logits = actor_score(hidden, 0, weights)
        kept = topk_compact(hidden, logits[..., 0].float(), 100)
        sample_keep_mask(logits)
        return masked_attention(x.query, x.key, x.value, x.keep_mask, is_causal=True).sum() + kept.hidden_states.sum()

    step()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_are_equal_and_a_cuda_graph_replays_on_new_data() -> None:
    hidden = torch.randn(4, 576, 512, device="cuda", dtype=torch.bfloat16)
    scores = torch.randn(4, 576, device="cuda")
    keys, values = torch.randn(2, 4, 8, 576, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    query = torch.randn(4, 8, 576, 64, device="cuda", dtype=torch.bfloat16)
    keep_mask = torch.rand(4, 576, device="cuda") < 0.3
    weights = fold_actor_weights(make_actor_weights(512, 64, device="cuda"), torch.bfloat16)
    columns = torch.arange(576, device="cuda").expand(4, -1) - 5  # five tokens of text, then visual ones
    columns = columns.where(columns >= 0, -1)

    def step() -> tuple[torch.Tensor, ...]:
        out = topk_compact(hidden, scores, 192)
        short_keys, short_values = compact_cache(keys, values, out.indices)
        plan = attention_plan(keep_mask, is_causal=True)
        attended = masked_attention(query, keys, values, plan=plan)
        logits = actor_score(hidden, 0, weights)[:, 5:]
        pruned = prune_stage(hidden, logits, columns, 192, tables=[hidden])
        stage = (pruned.hidden_states, pruned.columns, pruned.tables[0])
        return out.indices, out.hidden_states, short_keys, short_values, attended, *stage

    first = step()
    for _ in range(20):
        assert all(map(torch.equal, first, step()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (hidden, scores, keys, values, query):
        tensor.normal_()
    keep_mask.copy_(torch.rand(4, 576, device="cuda") < 0.6)
    graph.replay()
    for replayed, fresh in zip(captured, step(), strict=True):
        assert torch.equal(replayed, fresh)


@pytest.mark.parametrize("mask", ["hard", "mixed"])
def test_compiled_by_inductor_and_by_cuda_graphs(mask: str) -> None:
    x = make_attention_inputs(2, 8, 2, 300, 300, 64, mask=mask, dtype=torch.bfloat16, device="cuda")

    def step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return masked_attention(query * 2, key, value, x.keep_mask, is_causal=True).float()

    want = step(*x[:3])
    for compile_mode in ("default", "reduce-overhead"):
        compiled = torch.compile(step, fullgraph=True, mode=compile_mode)
        for _ in range(3):
            torch.testing.assert_close(compiled(*x[:3]), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("num_tokens", [577, 16384, 16385, 65536])
def test_long_selection_equals_the_eager_one(num_tokens: int) -> None:
    hidden = torch.randn(2, num_tokens, 64, device="cuda", dtype=torch.bfloat16)
    scores = torch.randint(0, 50, (2, num_tokens), device="cuda").float()  # mostly ties
    got = topk_compact(hidden, scores, num_tokens // 3, backend="triton")
    want = topk_compact(hidden, scores, num_tokens // 3, backend="eager")
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.hidden_states, want.hidden_states)


def test_same_random_bits_as_the_cpu() -> None:
    logits = torch.randn(3, 577, 2)
    here = sample_keep_mask(logits, seed=7)
    there = sample_keep_mask(logits.cuda(), seed=7)
    assert torch.equal(here.keep_mask, there.keep_mask.cpu())
    torch.testing.assert_close(here.log_prob, there.log_prob.cpu())
