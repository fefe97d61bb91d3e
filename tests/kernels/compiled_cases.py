"""Every kernel as compiled for sm_80, run without a GPU, against the definition. Run by test_compiled_lane.py.

TOPRL_TESTS_COMPILED=1 python -m pytest tests/kernels/compiled_cases.py
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.ptx_machine import AddressError, RaceError
from tests.kernels.ptx_simulator import Launched, launched_kernels, parsed
from toprl_kernels import (
    ActorWeights,
    actor_score,
    compact_cache,
    configs,
    keep_mask_log_prob,
    masked_attention,
    sample_keep_mask,
    topk_compact,
)
from toprl_kernels.configs import LaunchConfig
from toprl_kernels.testing import assert_within_budget, make_actor_weights, make_attention_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# blocks that are small against the cases below, so that all loops turn; pipelines of up to three copies in flight
SMALL = {
    "masked_attention_fwd": LaunchConfig(32, 16, 2, 3),
    "masked_attention_bwd_prepare": LaunchConfig(32, 0, 2, 1),
    "masked_attention_bwd_dkdv": LaunchConfig(16, 32, 2, 2),
    "masked_attention_bwd_dq": LaunchConfig(32, 16, 2, 3),
    "masked_attention_tokens": LaunchConfig(0, 64, 2, 1),
    "topk_select_chunked": LaunchConfig(1, 1024, 4, 1),
    "topk_gather": LaunchConfig(8, 64, 2, 1),
    "topk_scatter": LaunchConfig(8, 64, 2, 1),
    "compact_cache": LaunchConfig(0, 512, 2, 1),
    "compact_cache_bwd": LaunchConfig(0, 512, 2, 1),
    "actor_layer1": LaunchConfig(32, 32, 4, 3, splits=2),
    "actor_layers23": LaunchConfig(16, 16, 2, 2),
    "keep_mask": LaunchConfig(0, 64, 1, 1),
}
if os.environ["TOPRL_TESTS_COMPILED"] == "90":  # four warps and 64 rows: asynchronous products from shared memory
    SMALL |= {
        "masked_attention_fwd": LaunchConfig(64, 32, 4, 3),
        "masked_attention_bwd_dkdv": LaunchConfig(64, 64, 4, 2),
        "masked_attention_bwd_dq": LaunchConfig(64, 32, 4, 3),
        "actor_layer1": LaunchConfig(64, 32, 4, 3),
        "actor_layers23": LaunchConfig(64, 32, 4, 2),
    }
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Op = Callable[..., tuple[Tensor, ...]]  # (backend, *inputs) -> results


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with configs.override(SMALL):
        yield


def evaluate(op: Op, backend: str, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Results and the gradients of all floating-point inputs, those in 32 bits at least at that precision."""
    widest = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(widest if x.dtype == torch.float32 else dtype) if x.is_floating_point() else x for x in inputs]
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in leaves]
    results = op(backend, *leaves)
    generator = torch.Generator().manual_seed(1)
    differentiable = [result for result in results if result.requires_grad]
    weights = [torch.randn(result.shape, generator=generator).bfloat16().to(result.dtype) for result in differentiable]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(differentiable, wanted, weights) if differentiable else ()
    return [result.detach() for result in (*results, *gradients)]


def agrees(op: Op, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Compiled kernels are within the error budget of the definition in float64."""
    oracle = evaluate(op, "reference", inputs, torch.float64)
    eager = evaluate(op, "eager", inputs, dtype)
    compiled = evaluate(op, "triton", inputs, dtype)
    for number, (got, plain, want) in enumerate(zip(compiled, eager, oracle, strict=True)):
        if got.is_floating_point():
            assert_within_budget(got, plain, want, name=f"result {number}", dtype=dtype)
        else:
            assert torch.equal(got, want), f"result {number}"


# (dtype, mask, causal, padding, bounded gradient of the mask, queries, keys, head dim)
ATTENTION = [
    (torch.bfloat16, "mixed", True, True, False, 40, 40, 32),
    (torch.bfloat16, "hard", True, False, False, 1, 50, 64),
    (torch.float16, "hard", False, False, False, 17, 70, 40),
    (torch.float16, "soft", False, True, True, 40, 40, 16),
    (torch.float32, "mixed", True, False, False, 33, 40, 16),
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case: tuple[torch.dtype, str, bool, bool, bool, int, int, int]) -> None:
    dtype, mask, is_causal, padding, bounded, num_queries, num_keys, head_dim = case
    x = make_attention_inputs(1, 2, 1, num_queries, num_keys, head_dim, mask=mask, padding=padding, dtype=dtype)

    def op(backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = dict(is_causal=is_causal, bounded_mask_grad=bounded, backend=backend)
        return (masked_attention(*inputs, key_padding_mask=x.key_padding_mask, **options),)

    agrees(op, (x.query, x.key, x.value, x.keep_mask), dtype)


@pytest.mark.parametrize("tokens", [100, 4100])
def test_topk(tokens: int) -> None:
    hidden, scores = torch.randn(2, tokens, 7), torch.randn(2, tokens).round(decimals=1)
    scores[1, ::3] = torch.tensor([0.0, -0.0, float("nan"), float("inf")]).repeat(tokens)[: len(range(0, tokens, 3))]
    options: dict[str, Any] = dict(return_inverse=True)
    k: Any = tokens // 3
    if tokens == 100:
        k, options["valid_mask"] = torch.tensor([k, tokens - 5]), torch.rand(2, tokens) < 0.9
        options |= dict(position_ids=torch.randint(0, 99, (3, 2, tokens)), padding_side="left")

    def op(backend: str, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in topk_compact(hidden, scores, k, backend=backend, **options) if x is not None)

    agrees(op, (hidden,), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache(dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, 3, 4, *range(10, 40), -1], [2, 5, *range(17, 47), -1, -1]])
    keys, values = torch.randn(2, 2, 50, 24).to(dtype), torch.randn(2, 2, 50, 40).to(dtype)
    agrees(lambda backend, k, v: compact_cache(k, v, indices, backend=backend), (keys, values), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_actor(dtype: torch.dtype) -> None:
    hidden = ((torch.randn(2, 70, 72) + torch.randn(2, 70, 1) * 3) * (1 + torch.rand(2, 70, 1))).to(dtype)
    weights = make_actor_weights(72, 48, dtype=dtype)
    valid = None if dtype == torch.float16 else torch.rand(2, 70) < 0.7

    def op(backend: str, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (actor_score(hidden, 1, ActorWeights(*parameters), valid_mask=valid, backend=backend),)

    agrees(op, (hidden, *weights), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["seed", "uniform", "given"])
def test_keep_mask(dtype: torch.dtype, source: str) -> None:
    logits, previous = (torch.randn(2, 70, 2) * 4).to(dtype), torch.rand(2, 70) < 0.7
    given = torch.rand(2, 70) < 0.5
    noise: dict[str, Any] = {"seed": dict(seed=7), "uniform": dict(uniform=torch.rand(2, 70).clamp(1e-6, 1 - 1e-6))}

    def op(backend: str, logits: Tensor) -> tuple[Tensor, ...]:
        if source == "given":
            return keep_mask_log_prob(logits, given, previous, backend=backend)
        sample = sample_keep_mask(logits, tau=0.3, previous_mask=previous, backend=backend, **noise[source])
        return tuple(x for x in sample if isinstance(x, Tensor))

    agrees(op, (logits,), dtype)


@triton.jit
def exchange_kernel(buffer_ptr, first, BARRIER: tl.constexpr):
    """Each of 128 numbers written by one thread and read by a thread of another warp."""
    lanes = tl.arange(0, 128)
    tl.store(buffer_ptr + lanes, lanes + tl.program_id(0))
    if BARRIER:
        tl.debug_barrier()
    tl.store(buffer_ptr + 128 + lanes, tl.load(buffer_ptr + first + 127 - lanes))


def test_errors_name_the_instruction() -> None:
    buffer = torch.zeros(256, dtype=torch.int32)
    exchange_kernel[(1,)](buffer, 0, BARRIER=True)
    assert buffer[128:].tolist() == list(range(127, -1, -1))
    with pytest.raises(RaceError, match=r"exchange_kernel, PTX line \d+ .*global.* since the last barrier"):
        exchange_kernel[(1,)](buffer, 0, BARRIER=False)
    with pytest.raises(RaceError, match="another program"):
        exchange_kernel[(2,)](buffer, 0, BARRIER=True)
    with pytest.raises(AddressError, match=r"exchange_kernel, PTX line \d+ \(compiled_cases.py:\d+.*which has 1024"):
        exchange_kernel[(1,)](buffer, 160, BARRIER=True)


@pytest.mark.parametrize("op", ["attention", "topk", "cache", "actor", "keep_mask"])
def test_every_kernel_ran(op: str) -> None:
    """Last: the cases above launch all kernels of the op."""
    defined = {
        name
        for module in pkgutil.iter_modules(importlib.import_module(f"toprl_kernels.{op}").__path__)
        if module.name.startswith("triton")
        for name, value in vars(importlib.import_module(f"toprl_kernels.{op}.{module.name}")).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert {name for name in defined - launched_kernels if "inplace" not in name} == set()


@pytest.mark.exhaustive
def test_deleted_barriers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each barrier and each wait for asynchronous work that the cases reach, deleted in turn."""
    counts: dict[str, list[bool]] = {}
    codes: set[str] = set()
    run = Launched.run

    def run_mutants(launched: Launched, ptx: str, seed: int) -> None:
        tensors = [value.untyped_storage() for value, _ in launched.arguments if isinstance(value, Tensor)]
        before = [storage.clone() for storage in tensors]
        run(launched, ptx, seed)
        expected = [storage.clone() for storage in tensors]
        lines = ptx.splitlines()
        kernel = parsed(launched.name, ptx, launched.num_warps)
        reached = {number - 1 for block in kernel.ran for number in kernel.blocks[block].lines}
        places = [i for i in sorted(reached) if re.search(r"\bbar\.sync|\.wait_group", lines[i])]
        for place in places if ptx not in codes else ():
            for storage, content in zip(tensors, before, strict=True):
                storage.copy_(content)
            mutant = "\n".join([*lines[:place], "", *lines[place + 1 :]])
            try:
                run(launched, mutant, seed)
                seen = any(a.tolist() != b.tolist() for a, b in zip(tensors, expected, strict=True))
            except AssertionError:
                seen = True
            counts.setdefault(launched.name, []).append(seen)
        codes.add(ptx)
        for storage, content in zip(tensors, expected, strict=True):
            storage.copy_(content)

    monkeypatch.setattr(Launched, "run", run_mutants)
    for case in ATTENTION:
        test_attention(case)
    test_topk(100)
    test_topk(4100)
    for dtype in DTYPES:
        test_cache(dtype)
        test_actor(dtype)
        test_keep_mask(dtype, "seed")
    for name, seen in sorted(counts.items()):
        print(f"{name}: {sum(seen)} of {len(seen)}")
    assert all(sum(seen) >= 0.75 * len(seen) for seen in counts.values())
