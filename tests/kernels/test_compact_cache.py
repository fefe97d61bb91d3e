"""compact_cache on every implementation."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from toprl_kernels import compact_cache


def make_indices(samples: int, tokens: int, counts: list[int], device: str) -> Tensor:
    """Ascending, padded at the end."""
    rows = []
    for sample in range(samples):
        kept = torch.randperm(tokens)[: counts[sample]].sort().values
        rows.append(torch.cat([kept, kept.new_full((max(counts) - counts[sample],), -1)]))
    return torch.stack(rows).to(device)


def make_cache(layout: str, samples: int, heads: int, tokens: int, size: int, **options: Any) -> Tensor:
    """[B, Hkv, N, D] with the strides of ``layout``."""
    if layout == "dense":
        return torch.randn(samples, heads, tokens, size, **options)
    if layout == "transposed":  # as a projection leaves it
        return torch.randn(samples, tokens, heads, size, **options).transpose(1, 2)
    if layout == "slice":  # of a static cache
        return torch.randn(samples, heads, tokens + 9, size, **options)[:, :, 4 : tokens + 4]
    if layout == "packed":  # columns of one projection
        return torch.randn(samples, heads, tokens, 2 * size + 1, **options)[..., 1 : size + 1]
    assert layout == "columns"
    return torch.randn(samples, heads, size, tokens, **options).transpose(2, 3)


LAYOUTS = ["dense", "transposed", "slice", "packed", "columns"]


def expected(cache: Tensor, indices: Tensor) -> Tensor:
    """Row by row."""
    out = torch.zeros(*cache.shape[:2], indices.shape[1], cache.shape[3], dtype=cache.dtype, device=cache.device)
    for sample, row in enumerate(indices.tolist()):
        for slot, index in enumerate(row):
            if index >= 0:
                out[sample, :, slot] = cache[sample, :, index]
    return out


def test_hand_case(backend: str, device: str) -> None:
    keys = torch.arange(8.0, device=device).view(2, 1, 4, 1)
    values = keys.repeat(1, 1, 1, 2) + 10
    out = compact_cache(keys, values, torch.tensor([[1, 3], [2, -1]], device=device), backend=backend)
    assert out[0].flatten().tolist() == [1.0, 3.0, 6.0, 0.0]
    assert out[1].tolist() == [[[[11.0, 11.0], [13.0, 13.0]]], [[[16.0, 16.0], [0.0, 0.0]]]]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("layout", "tokens"), zip(LAYOUTS, (1, 15, 127, 577, 33), strict=True))
def test_layouts_and_sizes(layout: str, tokens: int, backend: str, device: str) -> None:
    counts = [math.ceil(0.6 * tokens), math.ceil(0.2 * tokens)]
    indices = make_indices(2, tokens, counts, device)
    keys = make_cache(layout, 2, 3, tokens, 16, device=device)
    values = make_cache(layout, 2, 3, tokens, 10, device=device)
    want = expected(keys, indices), expected(values, indices)
    got = compact_cache(keys, values, indices, validate=True, backend=backend)
    assert all(torch.equal(left, right) for left, right in zip(got, want, strict=True))
    assert all(part.is_contiguous() for part in got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e5m2])
def test_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    keys = (torch.randn(1, 2, 30, 8, device=device) * 9).to(dtype)
    values = (torch.randn(1, 2, 30, 8, device=device) * 9).to(dtype)
    indices = make_indices(1, 30, [12], device)
    got = compact_cache(keys, values, indices, backend=backend)
    for left, right in zip(got, (keys, values), strict=True):
        assert left.dtype == dtype
        assert torch.equal(left.double(), expected(right.double(), indices))


def test_gradient(backend: str, device: str) -> None:
    indices = make_indices(2, 21, [8, 3], device)
    keys = make_cache("transposed", 2, 3, 21, 8, device=device).requires_grad_()
    values = make_cache("dense", 2, 3, 21, 5, device=device).requires_grad_()
    out = compact_cache(keys, values, indices, backend=backend)
    weights = [torch.randn(part.shape[::-1], device=device).permute(3, 2, 1, 0) for part in out]
    total = (out[0] * weights[0]).sum() + (out[1] * weights[1]).sum()
    gradients = torch.autograd.grad(total, (keys, values), retain_graph=True)
    for gradient, weight in zip(gradients, weights, strict=True):
        want = torch.zeros_like(gradient)
        for sample, row in enumerate(indices.tolist()):
            for slot, index in enumerate(row):
                if index >= 0:
                    want[sample, :, index] = weight[sample, :, slot]
        assert torch.equal(gradient, want)
    (alone,) = torch.autograd.grad(total, (values,), retain_graph=True)
    assert torch.equal(alone, gradients[1])
    (ones,) = torch.autograd.grad(out[0].sum(), (keys,))
    assert ones.sum() == 11 * 3 * 8


@pytest.mark.parametrize("seed", range(10))
def test_fuzz(seed: int, device: str) -> None:
    """Eager and Triton against the definition; ``seed`` reproduces a failure."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    samples, heads, tokens = choose.randint(1, 3), choose.randint(1, 4), choose.randint(1, 200)
    sizes = [choose.choice([1, 7, 64, 80, 96, 128, 130]) for _ in range(2)]
    layout = choose.choice(LAYOUTS)
    indices = make_indices(samples, tokens, [choose.randint(0, tokens) for _ in range(samples)], device)
    keys, values = (make_cache(layout, samples, heads, tokens, size, device=device) for size in sizes)
    want = compact_cache(keys, values, indices, backend="reference")
    label = f"seed={seed} B={samples} H={heads} N={tokens} D={sizes} {layout} K={indices.shape[1]}"
    for backend in ("eager", "triton"):
        got = compact_cache(keys, values, indices, backend=backend)
        assert all(torch.equal(left, right) for left, right in zip(got, want, strict=True)), label


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_rows_more_than_2_31_elements_apart(name: str, device: str) -> None:
    """The bytes between the rows are never touched."""

    def far() -> Tensor:
        storage = torch.empty(2**32 + 2**31 + 64, dtype=torch.uint8, device=device)
        return storage.as_strided((2, 1, 3, 4), (2**32, 2**31 + 32, 2**30, 1))

    keys, values = far(), far()
    content = torch.arange(24, device=device).view(2, 1, 3, 4)
    keys.copy_(content)
    values.copy_(content + 100)
    indices = torch.tensor([[0, 2], [1, 2]], device=device)
    want = expected(keys, indices), expected(values, indices)
    got = compact_cache(keys, values, indices, backend=name)
    assert all(torch.equal(left, right) for left, right in zip(got, want, strict=True))


def test_empty(backend: str, device: str) -> None:
    keys = torch.zeros(2, 3, 5, 4, device=device)
    none = torch.zeros(2, 0, dtype=torch.int64, device=device)
    assert compact_cache(keys, keys, none, backend=backend)[0].shape == (2, 3, 0, 4)
    nobody = compact_cache(keys[:0], keys[:0], none[:0], backend=backend)
    assert nobody[0].shape == (0, 3, 0, 4)
