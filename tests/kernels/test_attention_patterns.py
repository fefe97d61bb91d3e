"""masked_attention: which pairs see each other, plans, log-sum-exp, and what an invisible pair may not do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels import attention_plan, configs, masked_attention
from toprl_kernels.attention import eager
from toprl_kernels.testing import make_attention_inputs

N = 24
PATTERNS: dict[str, dict[str, Any]] = {
    "bidirectional": {},
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, window=5),
    "window both ways": dict(window=3),
    "image blocks": dict(is_causal=True, block_ids=[-1] * 3 + [4] * 6 + [5] * 4 + [-1] * 4 + [4] * 7),
    "image blocks beyond windows": dict(is_causal=True, window=4, block_ids=[-1] * 3 + [0] * 9 + [-1] * 12),
    "packed": dict(is_causal=True, cu_seqlens=[0, 1, 9, 9, 24]),
    "packed windows": dict(window=4, cu_seqlens=[0, 11, 24]),
}


def options(name: str) -> dict[str, Any]:
    given = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in PATTERNS[name].items()}
    if "block_ids" in given:
        given["block_ids"] = given["block_ids"][None]
    return given


def sees(name: str, i: int, j: int) -> bool:
    """What the pattern says, in words of the caller's arguments."""
    pattern = PATTERNS[name]
    allowed = not pattern.get("is_causal") or j <= i
    if "window" in pattern:
        allowed = allowed and abs(i - j) < pattern["window"]
    if "block_ids" in pattern:
        ids = pattern["block_ids"]
        between = ids[min(i, j) : max(i, j) + 1]
        allowed = allowed or (ids[i] >= 0 and set(between) == {ids[i]})
    if "cu_seqlens" in pattern:
        ends = pattern["cu_seqlens"]
        allowed = allowed and sum(end <= i for end in ends) == sum(end <= j for end in ends)
    return allowed


@pytest.fixture(params=["reference", "eager", "eager in blocks", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An implementation; "in blocks" is what the eager path does with many pairs."""
    name, _, blocks = request.param.partition(" ")
    if blocks:
        for constant, number in (("SMALL", 0), ("FEWEST_ROWS", 4), ("FEWEST_TILE_ROWS", 4), ("TILE_BYTES", 0)):
            monkeypatch.setattr(eager, constant, number)
    kernels = [kernel for kernel in configs.KERNELS if kernel.startswith("masked_attention")]
    small = dict.fromkeys(kernels, configs.LaunchConfig(16, 16, 4, 1))
    small["masked_attention_bwd_prepare"] = configs.LaunchConfig(64, 0, 4, 1)
    with configs.override(small | {"masked_attention_lists": configs.LaunchConfig(0, 256, 4, 1)}):
        yield name


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, backend: str) -> None:
    """Output, log-sum-exp and gradients, with value dims of their own, are those of ordinary attention with a bias."""
    x = make_attention_inputs(1, 2, 1, N - 3, N, 16)
    value = torch.randn(1, 1, N, 8)
    leaves = [tensor.clone().requires_grad_() for tensor in (x.query, x.key, value, x.keep_mask)]
    padding = torch.ones(1, N, dtype=torch.bool)
    padding[:, 7] = False
    plan = attention_plan(leaves[3], padding, **options(name), backend=backend)
    output, lse = masked_attention(*leaves[:3], plan=plan, return_lse=True, backend=backend)

    visible = torch.tensor([[sees(name, i, j) for j in range(N)] for i in range(3, N)]) & padding
    visible[7 - 3] = torch.arange(N) == 7  # any finite row will do: it is padding
    gate = torch.where(torch.arange(3, N)[:, None] == torch.arange(N), 1.0, leaves[3][0])
    key, values = (tensor.repeat_interleave(2, dim=1) for tensor in leaves[1:3])
    weights = ((leaves[0] @ key.transpose(-1, -2)) / 4).exp() * gate * visible
    is_padding = (torch.arange(3, N) == 7)[:, None]
    expected = (weights / weights.sum(dim=-1, keepdim=True) @ values).masked_fill(is_padding, 0.0)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, weights.sum(dim=-1).log().masked_fill(is_padding[:, 0], torch.inf))
    assert not lse.requires_grad
    grad_output = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, grad_output)
    torch.testing.assert_close(torch.autograd.grad(output, leaves, grad_output), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "eager", "eager in blocks"], indirect=True)  # kernels: their own file
@pytest.mark.parametrize("mask", ["bool", "float", "with gradient"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["dropped", "padding", "later", "window"])
def test_an_invisible_token_changes_nothing(where: str, mask: str, bad: float, backend: str) -> None:
    """The last tokens hold NaN or infinity in query, key and value; for padding in the output's gradient too.

    Rows without a gradient (dropped and later tokens here) may hold what they like in their query.
    """
    x = make_attention_inputs(2, 2, 1, N, N, 16, mask="hard")
    keep_mask, padding = x.keep_mask.clone(), torch.ones(2, N, dtype=torch.bool)
    keep_mask[:, -2:] = where != "dropped"
    if where == "padding":
        padding[:, -2:] = False
    patterns = dict(is_causal=where in ("later", "window"), window=6 if where == "window" else None)
    rows = slice(0, N - 2)
    grad_output = x.grad_output.clone()
    grad_output[:, :, -2:] = bad if where == "padding" else 0.0

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        gate = keep_mask if mask == "bool" else keep_mask.float().requires_grad_(mask == "with gradient")
        output = masked_attention(*leaves, gate, key_padding_mask=padding, **patterns, backend=backend)
        wanted = leaves + [gate] * (mask == "with gradient")
        gradients = torch.autograd.grad(output, wanted, grad_output)
        return [output[:, :, rows], *(gradient[..., rows, :] for gradient in gradients[:3])] + [
            gradient[:, rows] for gradient in gradients[3:]
        ]

    dirty = [tensor.clone() for tensor in x[:3]]
    for tensor in dirty:
        tensor[:, :, -2:] = bad
    for got, want in zip(run(*dirty), run(*x[:3]), strict=True):
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got, want)


def test_a_visible_nan_arrives(backend: str) -> None:
    x = make_attention_inputs(1, 2, 2, N, N, 16, mask="hard")
    x.keep_mask[:, 9] = True
    for tensor in x[1:3]:
        dirty = [part.clone().requires_grad_() for part in x[:3]]
        with torch.no_grad():
            dirty[1 if tensor is x.key else 2][:, :, 9, 3] = torch.nan
        output = masked_attention(*dirty, x.keep_mask, is_causal=True, backend=backend)
        assert bool(output[:, :, 9:].isnan().any(dim=-1).all()) and bool(output[:, :, :9].isfinite().all())
        (gradient,) = torch.autograd.grad(output.nan_to_num().sum() + 0 * output[:, :, :1].sum(), dirty[0])
        assert bool(gradient[:, :, :9].isfinite().all())


def test_samples_that_keep_all_and_some(backend: str) -> None:
    """One sample keeps everything, and the other's list is as long as the sequence, but not in its order."""
    x = make_attention_inputs(2, 2, 1, N, N, 16, mask="hard")
    x.keep_mask[0], x.keep_mask[1, :5] = True, False
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in x[:3]]
        output = masked_attention(*leaves, x.keep_mask, is_causal=True, backend=name)
        results.append([output, *torch.autograd.grad(output, leaves, x.grad_output.to(dtype))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_a_plan_is_a_mask(backend: str) -> None:
    x = make_attention_inputs(2, 2, 1, N, N, 16, padding=True)
    arguments = dict(key_padding_mask=x.key_padding_mask, is_causal=True)
    plan = attention_plan(x.keep_mask, **arguments, backend=backend)
    direct = masked_attention(*x[:4], **arguments, backend=backend)
    for _ in range(2):
        assert torch.equal(masked_attention(*x[:3], plan=plan, backend=backend), direct)


def test_ranges_are_a_pattern(backend: str) -> None:
    """Chunks of five tokens, causal, which no other argument says."""
    x, tokens = make_attention_inputs(2, 2, 1, N, N, 16), torch.arange(N)
    ranges = torch.stack([tokens // 5 * 5, tokens + 1], 1).int().expand(2, -1, -1)
    plan = attention_plan(x.keep_mask > 0, ranges=ranges, backend=backend)
    got = masked_attention(*x[:3], plan=plan, backend=backend)
    seen = (tokens[:, None] // 5 == tokens // 5) & (tokens <= tokens[:, None]) & (x.keep_mask > 0)[:, None]
    seen = (seen | torch.eye(N, dtype=torch.bool))[:, None]
    expected = F.scaled_dot_product_attention(*x[:3], attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ranges=torch.zeros(2, N, 2)), "ranges has dtype float32"),
        (dict(ranges=torch.zeros(2, N, 2, dtype=torch.int32), window=3), "window given beside ranges"),
        (dict(window=0), "window=0 must be an int >= 1"),
        (dict(block_ids=torch.zeros(1, 4)), r"block_ids must be \[B, N\] = \(2, 24\)"),
        (dict(block_ids=torch.zeros(2, N)), "block_ids has dtype float32"),
        (dict(cu_seqlens=torch.tensor([0, N])), "cu_seqlens needs one row .* got B=2"),
        (dict(cu_seqlens=torch.zeros(1, 2, dtype=torch.int32)), r"cu_seqlens must be \[S \+ 1\]"),
    ],
)
def test_errors_of_a_plan(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        attention_plan(torch.ones(2, N), **arguments)


def test_a_plan_beside_a_mask_is_refused() -> None:
    x = make_attention_inputs(1, 2, 2, N, N, 16)
    with pytest.raises(ValueError, match="keep_mask and is_causal given beside plan"):
        masked_attention(*x[:4], plan=attention_plan(x.keep_mask), is_causal=True)
    with pytest.raises(ValueError, match="keep_mask is missing"):
        masked_attention(*x[:3])


def test_everything_kept_and_packed_is_ordinary_attention_per_sequence() -> None:
    x = make_attention_inputs(1, 2, 2, N, N, 16)
    ends = [0, 10, N]
    mask = torch.ones(1, N, dtype=torch.bool)
    got = masked_attention(*x[:3], mask, is_causal=True, cu_seqlens=torch.tensor(ends))
    parts = [
        F.scaled_dot_product_attention(*(tensor[:, :, first:last] for tensor in x[:3]), is_causal=True)
        for first, last in itertools.pairwise(ends)
    ]
    torch.testing.assert_close(got, torch.cat(parts, dim=2))
