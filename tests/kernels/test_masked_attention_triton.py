"""The masked attention kernels against the float64 definition, within the error budget, on poisoned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.test_masked_attention import run
from toprl_kernels import masked_attention
from toprl_kernels.attention import triton as launch
from toprl_kernels.testing import AttentionInputs, assert_within_budget, make_attention_inputs, max_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAMES = ["output", "grad_query", "grad_key", "grad_value", "grad_keep_mask"]


def to_device(x: AttentionInputs, device: str) -> AttentionInputs:
    return AttentionInputs(*(None if tensor is None else tensor.to(device) for tensor in x))  # type: ignore[arg-type]


def check(x: AttentionInputs, is_causal: bool, dtype: torch.dtype) -> list[Tensor]:
    got = run(x, "triton", is_causal, dtype)
    oracle = run(x, "reference", is_causal, torch.float64)
    # plain PyTorch at the same precision comes in two orders of operations; the less accurate one sets the budget
    plain = [run(x, backend, is_causal, dtype) for backend in ("reference", "eager")]
    atol = 20 * torch.finfo(dtype).eps if x.key.shape[2] == 1 else 0.0  # true gradients of 0
    for name, mine, want, *theirs in zip(NAMES, got, oracle, *plain, strict=False):
        eager = max(theirs, key=lambda tensor, want=want: max_error(tensor, want))
        assert_within_budget(mine, eager, want, name=name, atol=atol, dtype=dtype)
    return got


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and unequal sides even at short lengths."""
    table = {
        "fwd": launch.LaunchConfig(16, 32, 4, 1),
        "bwd_dkdv": launch.LaunchConfig(16, 32, 4, 1),
        "bwd_dq": launch.LaunchConfig(32, 16, 4, 1),
        "bwd_prepare": launch.LaunchConfig(16, 0, 4, 1),
    }
    monkeypatch.setattr(launch, "select_config", lambda kernel, head_dim, query: table[kernel])


# (queries, keys, query heads per key/value head, head dim, dtype, mask, causal, padding): every length, group size,
# head dim and dtype with every mask kind at least once; the full product is the exhaustive lane below
LENGTHS = (1, 15, 63, 127, 129, 577)
GROUPS = (1, 4, 7, 8)
HEAD_DIMS = (64, 80, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LANE = [
    (1, 1, 1, 64, torch.float32, "hard", False, False),
    (1, 1, 8, 96, torch.bfloat16, "mixed", True, False),
    (15, 15, 4, 80, torch.float32, "mixed", True, True),
    (15, 15, 7, 128, torch.float16, "hard", False, False),
    (63, 63, 7, 64, torch.float32, "hard", True, True),
    (63, 63, 1, 96, torch.float16, "soft", True, True),
    (1, 63, 8, 80, torch.bfloat16, "hard", True, True),
    (127, 127, 1, 128, torch.float32, "mixed", False, False),
    (127, 127, 4, 64, torch.bfloat16, "hard", True, False),
    (17, 127, 8, 96, torch.float32, "hard", True, True),
    (129, 129, 4, 96, torch.float32, "soft", True, False),
    (129, 129, 8, 128, torch.bfloat16, "mixed", True, True),
    (40, 129, 7, 80, torch.float16, "mixed", False, True),
    (577, 577, 1, 80, torch.float32, "hard", True, True),
    (577, 577, 1, 64, torch.float16, "mixed", True, False),
    (33, 577, 4, 128, torch.float32, "soft", False, False),
]


def run_case(
    case: tuple[int, int, int, int, torch.dtype, str, bool, bool], device: str, *, seed: int | None = None
) -> None:
    num_queries, num_keys, groups, head_dim, dtype, mask, is_causal, padding = case
    x = make_attention_inputs(
        1, groups, 1, num_queries, num_keys, head_dim, mask=mask, padding=padding, dtype=dtype,
        seed=num_keys * 7 + num_queries if seed is None else seed,
    )  # fmt: skip
    check(to_device(x, device), is_causal, dtype)


@pytest.mark.parametrize("case", LANE, ids=str)
def test_lane(case: tuple[int, int, int, int, torch.dtype, str, bool, bool], device: str) -> None:
    run_case(case, device)


@pytest.mark.parametrize("case", [case for case in LANE if case[1] < 129], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_lane_in_many_small_blocks(case: tuple[int, int, int, int, torch.dtype, str, bool, bool], device: str) -> None:
    run_case(case, device, seed=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["hard", "soft", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_combination(
    length: int, groups: int, head_dim: int, dtype: torch.dtype, mask: str, is_causal: bool, device: str
) -> None:
    run_case((length, length, groups, head_dim, dtype, mask, is_causal, length % 2 == 1), device)


@pytest.mark.parametrize("head_dim", [3, 16, 200, 256])
def test_other_head_dims(head_dim: int, device: str) -> None:
    # several samples: the largest error of a handful of numbers is too noisy a measure of the budget
    check(to_device(make_attention_inputs(4, 2, 1, 20, 33, head_dim), device), True, torch.float32)


@pytest.mark.parametrize("mask_value", [0.0, 1.0, 1e-30])
@pytest.mark.usefixtures("small_blocks")
def test_constant_masks(mask_value: float, device: str) -> None:
    x = make_attention_inputs(2, 2, 2, 40, 40, 16)
    x = to_device(x._replace(keep_mask=torch.full((2, 40), mask_value)), device)
    check(x, False, torch.float32)
    hard = x._replace(keep_mask=x.keep_mask > 0.5)
    check(hard, True, torch.float32)


@pytest.mark.parametrize("magnitude", [40, 300, 1000])
@pytest.mark.usefixtures("small_blocks")
def test_extreme_logits(magnitude: float, device: str) -> None:
    """Up to +-1e3 and more. A softmax that subtracts the maximum over all keys, dropped ones too, is NaN here."""
    x = make_attention_inputs(1, 2, 2, 40, 40, 16)
    x = to_device(x._replace(query=x.query * magnitude), device)
    assert all(bool(tensor.isfinite().all()) for tensor in run(x, "triton", True, torch.float32))
    got = masked_attention(x.query, x.key, x.value, x.keep_mask, backend="triton")
    want = masked_attention(*(t.double() for t in x[:3]), x.keep_mask, backend="reference")
    eager = masked_attention(x.query, x.key, x.value, x.keep_mask, backend="eager")
    assert_within_budget(got, eager, want, name="output")


@pytest.mark.usefixtures("small_blocks")
def test_strides_and_expanded_gradients(device: str) -> None:
    x = to_device(make_attention_inputs(2, 4, 2, 21, 37, 16, padding=True), device)
    views = [
        x.query.transpose(1, 2).contiguous().transpose(1, 2),  # [B, N, H, D] storage, as models have it
        x.key.transpose(2, 3).contiguous().transpose(2, 3),  # head dimension not dense
        torch.cat([x.value, x.value], dim=1).transpose(1, 2).contiguous().transpose(1, 2)[:, ::2],
    ]
    views[2].copy_(x.value)
    leaves = [view.detach().requires_grad_() for view in views]
    mask = x.keep_mask.repeat_interleave(2, dim=1)[:, ::2].detach().requires_grad_()
    valid = None if x.key_padding_mask is None else x.key_padding_mask.repeat_interleave(2, dim=1)[:, ::2]
    output = masked_attention(*leaves, mask, key_padding_mask=valid, is_causal=True, backend="triton")
    got = torch.autograd.grad(output.sum(), [*leaves, mask])  # the gradient has stride 0
    want = run(x._replace(grad_output=torch.ones_like(x.grad_output)), "reference", True, torch.float64)
    for left, right in zip((output, *got), want, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["hard", "mixed"])
@pytest.mark.usefixtures("small_blocks")
def test_only_requested_gradients(mask: str, device: str) -> None:
    """Each gradient alone is the one of all together; without the mask's, soft masks walk the kept keys only."""
    x = to_device(make_attention_inputs(1, 2, 2, 20, 20, 16, mask=mask), device)
    full = run(x, "triton", True, torch.float32)
    for position in range(len(full) - 1):
        tensors = [x.query, x.key, x.value, x.keep_mask]
        tensors[position] = tensors[position].clone().requires_grad_()
        output = masked_attention(*tensors, is_causal=True, backend="triton")
        (gradient,) = torch.autograd.grad(output, tensors[position], x.grad_output)
        if mask == "hard":
            assert torch.equal(gradient, full[position + 1])
        else:
            torch.testing.assert_close(gradient, full[position + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_unwanted_gradients_are_not_launched(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    launched: list[str] = []

    class Spy:
        def __init__(self, name: str, kernel: object) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(self.name)
            return self.kernel[grid]  # type: ignore[index]

    names = ["fwd", "bwd_prepare", "bwd_dkdv", "bwd_dq", "tokens"]
    for name in names:
        attribute = f"masked_attention_{name}_kernel"
        monkeypatch.setattr(launch, attribute, Spy(name, getattr(launch, attribute)))
    x = to_device(make_attention_inputs(1, 1, 1, 9, 9, 16, mask="hard"), device)
    query = x.query.clone().requires_grad_()
    masked_attention(query, x.key, x.value, x.keep_mask, backend="triton").sum().backward()
    assert launched == ["tokens", "fwd", "tokens", "bwd_prepare", "bwd_dq"]
    launched.clear()
    value = x.value.clone().requires_grad_()
    masked_attention(x.query, x.key, value, x.keep_mask, backend="triton").sum().backward()
    assert launched == ["tokens", "fwd", "tokens", "bwd_prepare", "bwd_dkdv"]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.usefixtures("small_blocks")
def test_bounded_mask_gradient(backend: str, device: str) -> None:
    """R / (1 + R) where m = 0, exact where m > 0, nothing else changes."""
    x = to_device(make_attention_inputs(1, 4, 2, 37, 37, 16, padding=True), device)
    x = x._replace(query=x.query * 4)

    def grads(backend: str, dtype: torch.dtype, bounded: bool) -> list[Tensor]:
        leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in (*x[:3], x.keep_mask)]
        output = masked_attention(
            *leaves, key_padding_mask=x.key_padding_mask, is_causal=True, bounded_mask_grad=bounded, backend=backend
        )
        return list(torch.autograd.grad(output, leaves, x.grad_output.to(dtype)))

    got, exact = grads(backend, torch.float32, True), grads(backend, torch.float32, False)
    want = grads("reference", torch.float64, True)
    scale = float(want[3].abs().max())
    torch.testing.assert_close(got[3].double(), want[3], rtol=1e-4, atol=1e-5 * scale)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], exact[:3], strict=True))
    kept = x.keep_mask > 0
    torch.testing.assert_close(got[3][kept], exact[3][kept])
    assert float(got[3].abs().max()) < 0.5 * float(exact[3].abs().max())


@pytest.mark.usefixtures("small_blocks")
def test_bitwise_repeatable(device: str) -> None:
    x = to_device(make_attention_inputs(1, 2, 1, 20, 20, 16), device)
    first = run(x, "triton", True, torch.float32)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(x, "triton", True, torch.float32), strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 2, 4, 4), (2, 2, 2, 0, 4)])
def test_empty(shape: tuple[int, int, int, int, int], device: str) -> None:
    x = to_device(make_attention_inputs(*shape, 16), device)
    query = x.query.requires_grad_()
    output = masked_attention(query, x.key, x.value, x.keep_mask, backend="triton")
    assert output.shape == query.shape
    output.sum().backward()


@pytest.mark.usefixtures("small_blocks")
def test_fuzz(device: str) -> None:
    """Random sizes; the seed in the failing assertion reproduces the case."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        num_keys, kv_heads = draw(1, 70), draw(1, 2)
        x = make_attention_inputs(
            draw(1, 2), kv_heads * draw(1, 3), kv_heads, draw(1, num_keys), num_keys, draw(1, 40),
            mask=["hard", "soft", "mixed"][draw(0, 2)], padding=bool(draw(0, 1)), seed=seed,
        )  # fmt: skip
        try:
            got = run(to_device(x, device), "triton", bool(seed % 2), torch.float32)
            want = run(to_device(x, device), "reference", bool(seed % 2), torch.float64)
            for left, right in zip(got, want, strict=True):
                scale = max(float(right.abs().max()), 1.0)
                torch.testing.assert_close(left.double(), right, rtol=0, atol=1e-5 * scale)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
