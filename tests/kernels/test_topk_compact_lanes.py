"""topk_compact at odd and at large sizes, under fuzz, repeated, and with far apart rows."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from toprl_kernels import TopkCompactOutput, topk_compact
from toprl_kernels.topk import triton as kernels

BACKENDS = ["eager", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def equal(left: TopkCompactOutput, right: TopkCompactOutput) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("tokens", "keep"), [(1, 1.0), (1, 0.0), (15, 0.3), (63, 0.0), (127, 1.0), (129, 0.3), (577, 0.3)]
)
def test_odd_sizes(tokens: int, keep: float, backend: str, device: str) -> None:
    scores = torch.randn(2, tokens, device=device).round(decimals=1)
    hidden = torch.randn(2, tokens, 7, device=device)
    positions = torch.randint(0, 99, (3, 2, tokens), device=device)
    options = dict(position_ids=positions, return_inverse=True)
    k = math.ceil(keep * tokens)
    got = topk_compact(hidden, scores, k, backend=backend, **options)  # type: ignore[arg-type]
    assert equal(got, topk_compact(hidden, scores, k, backend="reference", **options))  # type: ignore[arg-type]


def adversarial(tokens: int, device: str) -> Tensor:
    """Ties across the chunks of the kernel, both zeros, infinities, NaN."""
    scores = torch.randn(2, tokens, device=device).round(decimals=1)
    scores[1, ::3] = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf], device=device).repeat(tokens)[
        : len(range(0, tokens, 3))
    ]
    return scores


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("tokens", "ragged"),
    [(kernels.MAX_REGISTER_TOKENS, True), (kernels.MAX_REGISTER_TOKENS + 1, True), (3 * kernels.CHUNK, False)],
)
def test_around_the_chunk_size(tokens: int, ragged: bool, backend: str, device: str) -> None:
    scores = adversarial(tokens, device)
    hidden = torch.arange(2 * tokens, dtype=torch.float32, device=device).view(2, tokens, 1)
    k: int | Tensor = torch.tensor([tokens // 3, tokens - 5], device=device) if ragged else tokens // 2
    valid = torch.rand(2, tokens, device=device) < 0.9 if ragged else None
    positions = torch.arange(tokens, device=device).expand(2, -1)
    options = dict(valid_mask=valid, position_ids=positions, return_inverse=True, padding_side="left")
    want = topk_compact(hidden, scores, k, backend="reference", **options)  # type: ignore[arg-type]
    assert equal(topk_compact(hidden, scores, k, backend=backend, **options), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["segments", "packed"])
def test_several_problems_beyond_the_registers(form: str, backend: str, device: str) -> None:
    """Flags of many programs, and their compaction by others."""
    tokens = kernels.MAX_REGISTER_TOKENS + 300
    scores = adversarial(tokens, device)
    hidden = torch.arange(2 * tokens, dtype=torch.float32, device=device).view(2, tokens, 1)
    options: dict = dict(return_inverse=True)
    k = torch.tensor([[1500, 90], [2100, 5]], device=device)
    if form == "segments":
        options["segments"] = torch.arange(tokens, device=device).expand(2, -1) % 2
    else:
        options["cu_seqlens"] = torch.tensor([0, 2100, tokens], device=device)
        hidden, scores, k = hidden[1], scores[1], k[0]
    want = topk_compact(hidden, scores, k, backend="reference", **options)
    assert equal(topk_compact(hidden, scores, k, backend=backend, **options), want)


@pytest.mark.parametrize("tokens", [16385, pytest.param(65536, marks=pytest.mark.slow)])
def test_large(tokens: int, backend: str, device: str) -> None:
    scores = adversarial(tokens, device)[1:]
    hidden = torch.arange(tokens, device=device)[None, :, None].expand(1, -1, 2)  # stride 0
    want = topk_compact(hidden, scores, tokens // 4, backend="reference")
    assert equal(topk_compact(hidden, scores, tokens // 4, backend=backend), want)


@pytest.mark.parametrize("seed", range(24))
def test_fuzz(seed: int, backend: str, device: str) -> None:
    """Every option at random, against the definition; ``seed`` reproduces a failure."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    samples, tokens, size = choose.randint(1, 4), choose.randint(1, 150), choose.choice([1, 3, 8, 33])
    scores = (torch.randn(samples, tokens) * 2).round(decimals=choose.randint(0, 2))
    special = torch.rand(samples, tokens)
    for low, value in ((0.9, math.nan), (0.92, math.inf), (0.94, -math.inf), (0.96, -0.0), (0.98, 0.0)):
        scores[(special > low) & (special < low + 0.02)] = value
    scores = scores.to(choose.choice([torch.float32, torch.float16, torch.bfloat16])).to(device)
    hidden = torch.randn(samples, tokens, size, device=device, requires_grad=True)
    k: int | Tensor = choose.randint(0, tokens)
    options: dict = dict(padding_side=choose.choice(["left", "right"]), return_inverse=choose.random() < 0.5)
    if choose.random() < 0.5:
        k = torch.randint(-1, tokens + 2, (samples,), device=device)
        options["max_length"] = choose.choice([None, choose.randint(0, tokens)])
    if choose.random() < 0.3:
        options["threshold"] = choose.choice([-0.5, 0.3])
    form = choose.choice(["plain", "segments", "packed"])
    if form == "segments":
        options["segments"] = torch.randint(-1, 4, (samples, tokens), device=device)
        k = torch.randint(-1, tokens, (samples, 3), device=device)
        options["max_length"] = choose.choice([None, choose.randint(0, tokens)])
    if form == "packed":
        samples, scores, hidden = 1, scores[0], hidden[0]
        cuts = sorted(choose.randint(0, tokens) for _ in range(choose.randint(0, 4)))
        options = {"cu_seqlens": torch.tensor([0, *cuts, tokens], device=device)} | options
        options["padding_side"] = "right"
        options["max_length"] = choose.choice([None, choose.randint(0, tokens)])
        k = choose.choice([choose.randint(0, tokens), torch.randint(0, 30, (len(cuts) + 1,), device=device)])
    if choose.random() < 0.5:
        options["valid_mask"] = torch.rand(scores.shape, device=device) < choose.random()
    if choose.random() < 0.5:
        shape = (3, *scores.shape) if choose.random() < 0.5 else tuple(scores.shape)
        options["position_ids"] = torch.randint(0, 1000, shape, device=device)
    label = f"seed={seed} B={samples} N={tokens} d={size} k={k} {scores.dtype} {sorted(options)}"
    got = topk_compact(hidden, scores, k, backend=backend, **options)
    want = topk_compact(hidden, scores, k, backend="reference", **options)
    assert equal(got, want), label
    weight = torch.randn_like(want.hidden_states)
    gradients = [torch.autograd.grad((out.hidden_states * weight).sum(), hidden)[0] for out in (got, want)]
    assert torch.equal(*gradients), label


def test_rows_more_than_2_31_elements_apart(backend: str, device: str) -> None:
    """The bytes between the rows are never touched."""
    far = torch.empty(2**32 + 2**31 + 16, dtype=torch.uint8, device=device).as_strided((2, 3, 5), (2**32, 2**30 + 1, 1))
    far.copy_(torch.arange(30, device=device).view(2, 3, 5))
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]], device=device)
    got = topk_compact(far, scores, 2, backend=backend)
    assert equal(got, topk_compact(far.contiguous(), scores, 2, backend="reference"))


def test_positions_more_than_2_31_elements_apart(backend: str, device: str) -> None:
    """Positions are read where they are; scores and masks are copied first unless contiguous."""
    storage = torch.empty(2**31 + 64, dtype=torch.int32, device=device)
    far = storage.as_strided((1, 3), (1, 2**30 + 16)).copy_(torch.tensor([[7, 8, 9]]))
    scores = torch.tensor([[1.0, 0.0, 2.0]], device=device)
    out = topk_compact(torch.zeros(1, 3, 1, device=device), scores, 2, position_ids=far, backend=backend)
    assert out.position_ids is not None
    assert out.position_ids.tolist() == [[7, 9]]


def test_gradient_of_a_sum(backend: str, device: str) -> None:
    """``.sum()`` has a gradient of stride 0, a transposed use one of other strides."""
    hidden = torch.randn(2, 30, 6, device=device, requires_grad=True)
    out = topk_compact(hidden, torch.randn(2, 30, device=device), 11, backend=backend)
    (ones,) = torch.autograd.grad(out.hidden_states.sum(), hidden, retain_graph=True)
    assert ones.sum(dim=(1, 2)).tolist() == [66.0, 66.0]
    weight = torch.randn(6, 11, 2, device=device)
    (mixed,) = torch.autograd.grad((out.hidden_states.permute(2, 1, 0) * weight).sum(), hidden)
    want = torch.zeros_like(mixed).scatter(1, out.indices[:, :, None].expand(-1, -1, 6), weight.permute(2, 1, 0))
    assert torch.equal(mixed, want)
