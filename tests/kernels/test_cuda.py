"""What only a GPU can show: real races, real low-precision products, no synchronisation, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_masked_attention import run
from toprl_kernels import actor_score, masked_attention, sample_keep_mask, topk_compact
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


def test_cuda_graph_replays_on_new_data() -> None:
    hidden = torch.randn(4, 576, 512, device="cuda", dtype=torch.bfloat16)
    scores = torch.randn(4, 576, device="cuda")
    topk_compact(hidden, scores, 192)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = topk_compact(hidden, scores, 192)
    hidden.normal_()
    scores.normal_()
    graph.replay()
    want = topk_compact(hidden, scores, 192, backend="eager")
    assert torch.equal(out.indices, want.indices)
    assert torch.equal(out.hidden_states, want.hidden_states)
