"""Every kernel as compiled for sm_80 or sm_90, run without a GPU, against the definition. Run by test_compiled_lane.py.

TOPRL_TESTS_COMPILED=80 python -m pytest tests/kernels/compiled_cases.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.compile_report import kernel_modules
from tests.kernels.ptx_machine import AddressError, RaceError
from tests.kernels.ptx_simulator import Launched, launched_kernels, parsed
from toprl_kernels import (
    ActorWeights,
    actor_score,
    compact_cache,
    configs,
    fold_actor_weights,
    keep_mask_log_prob,
    masked_attention,
    prune_stage,
    sample_keep_mask,
    topk_compact,
)
from toprl_kernels.configs import LaunchConfig
from toprl_kernels.testing import assert_within_budget, make_actor_weights, make_attention_inputs
from toprl_kernels.topk import triton as topk_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_blocks")

# blocks that are small against the cases below, so that all loops turn; pipelines of up to three copies in flight
C = LaunchConfig
SMALL = {
    "masked_attention_lists": C(0, 64, 2, 1),
    "masked_attention_compact": C(0, 0, 2, 1),
    "masked_attention_fwd": C(32, 16, 2, 7),
    "masked_attention_fwd_compact": C(32, 16, 2, 3),
    "masked_attention_decode": C(16, 16, 2, 5),
    "masked_attention_merge": C(0, 0, 2, 1),
    "masked_attention_bwd_prepare": C(32, 0, 2, 1),
    "masked_attention_bwd_dkdv": C(16, 32, 2, 3),
    "masked_attention_bwd_finish": C(0, 16, 2, 1),
    "masked_attention_bwd_dq": C(32, 16, 2, 7),
    "masked_attention_bwd_dq_compact": C(32, 16, 2, 3),
    "topk_select": C(1, 1024, 4, 1),
    "topk_gather": C(8, 64, 2, 1),
    "topk_scatter": C(8, 64, 2, 1),
    "actor_layer1": C(32, 32, 4, 3, splits=2),
    "actor_layers23": C(16, 16, 2, 2),
    "keep_mask": C(0, 64, 1, 1),
}
if os.environ["TOPRL_TESTS_COMPILED"] == "90":  # four warps and 64 rows: asynchronous products from shared memory
    SMALL |= {
        "masked_attention_fwd": C(64, 32, 4, 5),
        "masked_attention_fwd_compact": C(64, 32, 4, 3),
        "masked_attention_bwd_dkdv": C(32, 64, 4, 3),
        "masked_attention_bwd_dq": C(64, 32, 4, 5),
        "masked_attention_bwd_dq_compact": C(64, 32, 4, 3),
        "actor_layer1": C(64, 32, 4, 3),
        "actor_layers23": C(64, 32, 4, 2),
    }
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Op = Callable[..., tuple[Tensor, ...]]  # (backend, *inputs) -> results


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(topk_kernels, "MAX_REGISTER_TOKENS", 128)
    monkeypatch.setattr(topk_kernels, "CHUNK", 64)
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


def attention(
    dtype: torch.dtype, mask: str, num_queries: int, num_keys: int, head_dim: int, *, value_dim: int = 0,
    heads: tuple[int, int] = (2, 1), padding: bool = False, bounded: bool = False, **patterns: Any,
) -> None:  # fmt: skip
    x = make_attention_inputs(1, *heads, num_queries, num_keys, head_dim, mask=mask, padding=padding, dtype=dtype)

    def op(backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = dict(key_padding_mask=x.key_padding_mask, bounded_mask_grad=bounded, **patterns)
        return (masked_attention(*inputs, **options, backend=backend),)

    agrees(op, (x.query, x.key, x.value[..., : value_dim or head_dim], x.keep_mask), dtype)


def topk(tokens: int, form: str) -> None:
    hidden, scores = torch.randn(2, tokens, 7), torch.randn(2, tokens).round(decimals=1)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    scores[1, ::3] = special.repeat(tokens)[: len(range(0, tokens, 3))]
    k: Any = tokens // 3
    options: dict[str, Any] = {}
    if form == "ragged":
        k, options["valid_mask"] = torch.tensor([k, tokens - 5]), torch.rand(2, tokens) < 0.9
        options |= dict(position_ids=torch.randint(0, 99, (3, 2, tokens)), padding_side="left", return_inverse=True)
    elif form == "segments":
        k, options["threshold"] = torch.tensor([[5, 0, 40], [9, 12, 7]]), -0.5
        options |= dict(segments=torch.randint(-1, 4, (2, tokens)), return_inverse=True)
    elif form == "packed":
        hidden, scores, k = hidden.flatten(0, 1), scores.flatten(), torch.tensor([30, 0, 20, 9])
        options["cu_seqlens"] = torch.tensor([0, 51, 51, tokens - 1, 2 * tokens])

    def op(backend: str, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in topk_compact(hidden, scores, k, backend=backend, **options) if x is not None)

    agrees(op, (hidden,), FP32)


def stage(tokens: int, side: str) -> None:
    """All that may travel along; scores and logits, with and without padding."""
    hidden, before = torch.randn(2, tokens, 24), tokens + 9
    scored = torch.rand(2, tokens) < 0.7
    columns = torch.where(scored, scored.cumsum(1) - 1, -1)
    scores = torch.randn(2, int(scored.sum(1).max()), 2).round(decimals=1)
    options: dict[str, Any] = dict(
        length=tokens, width=tokens // 2, valid_mask=torch.rand(2, tokens) < 0.9, padding_side=side,
        origins=torch.stack([torch.randperm(before)[:tokens].sort().values for _ in range(2)]),
        position_ids=torch.randint(0, 99, (3, 1, before)), raster=torch.randint(0, 99, scores.shape[:2]),
        tables=[torch.randn(1, before, 6), torch.randn(2, before, 3).bfloat16(), torch.randn(1, before, 1).half()],
    )  # fmt: skip

    def op(backend: str, hidden: Tensor) -> tuple[Tensor, ...]:
        out = prune_stage(hidden, scores, columns, torch.tensor([tokens // 2, 5]), backend=backend, **options)
        return (*(x for x in out[:-1] if isinstance(x, Tensor)), *out.tables)

    agrees(op, (hidden,), FP32)


def cache(dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, 3, 4, *range(10, 40), -1], [2, 5, *range(17, 47), -1, -1]])
    keys, values = torch.randn(2, 2, 50, 24).to(dtype), torch.randn(2, 2, 50, 40).to(dtype)
    agrees(lambda backend, k, v: compact_cache(k, v, indices, backend=backend), (keys, values), dtype)


def actor(dtype: torch.dtype, form: str, tokens: int = 70) -> None:
    hidden = torch.randn(2, tokens, 72) + torch.randn(2, tokens, 1) * 3
    hidden = (hidden * (1 + torch.rand(2, tokens, 1))).to(dtype)
    weights = make_actor_weights(72, 48, dtype=dtype)
    options: dict[str, Any] = {}
    if form == "valid":
        options["valid_mask"] = torch.rand(2, tokens) < 0.7
    elif form == "indices":
        options["indices"] = torch.stack([torch.randperm(70)[:40].sort().values for _ in range(2)])
        options["indices"][1, 33:] = -1
    elif form == "packed":
        hidden, options["cu_seqlens"] = hidden.flatten(0, 1), torch.tensor([0, 3, 3, 72, 140])

    def op(backend: str, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            given = ActorWeights(*parameters)
            # the definition takes folded weights as they are, too
            folded = fold_actor_weights(given) if form == "folded" else given
            return (actor_score(hidden, 1, folded, **options, backend=backend),)

    agrees(op, (hidden, *weights), dtype)


def keep_mask(dtype: torch.dtype, source: str) -> None:
    logits, previous = (torch.randn(2, 70, 2) * 4).to(dtype), torch.rand(2, 70) < 0.7
    given = torch.rand(2, 70) < 0.5
    noise: dict[str, Any] = dict(uniform=torch.rand(2, 70).clamp(1e-6, 1 - 1e-6), previous_mask=previous)
    if source == "seed":
        noise = dict(seed=7, token_ids=torch.randint(0, 2**40, (2, 70)))

    def op(backend: str, logits: Tensor) -> tuple[Tensor, ...]:
        if source == "given":
            return keep_mask_log_prob(logits, given, previous, backend=backend)
        sample = sample_keep_mask(logits, tau=0.3, backend=backend, **noise)
        return tuple(x for x in sample if isinstance(x, Tensor))

    agrees(op, (logits,), dtype)


BLOCKS = torch.tensor([[-1] * 9 + [0] * 20 + [-1] * 11])
CASES: dict[str, Callable[[], None]] = {
    "attention": partial(attention, BF16, "mixed", 40, 40, 32, is_causal=True, padding=True),
    "attention-hard": partial(attention, FP16, "hard", 33, 70, 16, is_causal=True, heads=(3, 1)),
    "attention-whole": partial(attention, FP16, "soft", 40, 40, 16, padding=True, bounded=True, value_dim=32),
    "attention-window": partial(attention, BF16, "soft", 40, 40, 16, is_causal=True, window=11, block_ids=BLOCKS),
    "attention-compact": partial(attention, BF16, "hard", 40, 70, 40, value_dim=24),
    "attention-compact-ranges": partial(attention, FP16, "mixed", 20, 70, 24, window=20),
    "attention-decode": partial(attention, BF16, "mixed", 1, 90, 32, is_causal=True),
    "attention-decode-window": partial(attention, FP16, "hard", 3, 90, 24, is_causal=True, window=60, heads=(2, 2)),
    "attention-float32": partial(attention, FP32, "mixed", 33, 40, 16, is_causal=True),
    "topk": partial(topk, 100, "plain"),
    "topk-ragged": partial(topk, 100, "ragged"),
    "topk-segments": partial(topk, 100, "segments"),
    "topk-packed": partial(topk, 60, "packed"),
    "topk-radix": partial(topk, 300, "ragged"),
    "topk-radix-segments": partial(topk, 150, "segments"),
    "topk-radix-packed": partial(topk, 150, "packed"),
    "stage": partial(stage, 100, "right"),
    "stage-radix": partial(stage, 200, "left"),
    **{f"cache-{dtype}": partial(cache, dtype) for dtype in (BF16, FP32)},
    "actor-valid": partial(actor, BF16, "valid"),
    "actor-indices": partial(actor, FP16, "indices"),
    "actor-packed": partial(actor, BF16, "packed"),
    "actor-folded": partial(actor, FP16, "folded"),
    "actor-float32": partial(actor, FP32, "valid", tokens=35),
    "keep_mask-seed": partial(keep_mask, BF16, "seed"),
    "keep_mask-uniform": partial(keep_mask, FP16, "uniform"),
    "keep_mask-given": partial(keep_mask, FP32, "given"),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees(name: str) -> None:
    CASES[name]()


@pytest.mark.parametrize("num_queries", [1, None])
def test_attention_of_another_length_is_the_same_code(num_queries: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled again, whether lengths are multiples of 16 or not."""
    codes: dict[int, set[tuple[str, str]]] = {33: set(), 48: set()}
    for tokens, seen in codes.items():
        monkeypatch.setattr(Launched, "run", lambda launched, ptx, seed, seen=seen: seen.add((launched.name, ptx)))
        x = make_attention_inputs(1, 2, 1, num_queries or tokens, tokens, 16, dtype=BF16)
        leaves = [tensor.clone().requires_grad_() for tensor in (x.query, x.key, x.value, x.keep_mask)]
        masked_attention(*leaves, is_causal=True, backend="triton").sum().backward()
    assert len(codes[33]) >= 4 and codes[33] == codes[48]


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


def test_every_kernel_ran() -> None:
    """Last: the cases above launch all kernels of all ops."""
    defined = {
        name
        for module in kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert len(defined) > 10 and defined - launched_kernels == set()


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
        parsed.cache_clear()  # the mutants are not needed again
        for storage, content in zip(tensors, expected, strict=True):
            storage.copy_(content)

    monkeypatch.setattr(Launched, "run", run_mutants)
    for case in CASES.values():
        case()
    for name, seen in sorted(counts.items()):
        print(f"{name}: {sum(seen)} of {len(seen)}")
    assert all(sum(seen) >= 2 / 3 * len(seen) for seen in counts.values())
