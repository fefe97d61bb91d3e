"""masked_attention: the definition against hand cases, eager against the definition, identities, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toprl_kernels import masked_attention
from toprl_kernels.attention import eager
from toprl_kernels.attention.reference import AttentionCall
from toprl_kernels.testing import AttentionInputs, assert_within_budget, make_attention_inputs

CPU_BACKENDS = ["reference", "eager"]


def run(inputs: AttentionInputs, backend: str | None, is_causal: bool, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients (query, key, value and, for a float mask, keep_mask)."""
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in inputs[:3]]
    mask = inputs.keep_mask
    if mask.is_floating_point():
        mask = mask.to(torch.promote_types(dtype, torch.float32)).clone().requires_grad_()
        leaves.append(mask)
    output = masked_attention(
        *leaves[:3], mask, key_padding_mask=inputs.key_padding_mask, is_causal=is_causal, backend=backend
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs.grad_output.to(dtype))]


def literal(query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor, is_causal: bool) -> Tensor:
    """Eqs. 6-7 with loops over numbers, no shift, no broadcasting. One head: [N, D], mask [N]."""
    num_queries, num_keys = len(query), len(key)
    rows = []
    for i in range(num_queries):
        token = i + num_keys - num_queries
        weights = []
        for j in range(num_keys):
            gate = 1.0 if j == token else float(keep_mask[j])
            if is_causal and j > token:
                gate = 0.0
            weights.append(math.exp(float(query[i] @ key[j]) / math.sqrt(query.shape[1])) * gate)
        rows.append(sum(weight * value[j] for j, weight in enumerate(weights)) / sum(weights))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (1, 5), (3, 7), (1, 1)])
def test_equals_the_printed_formula(backend: str, is_causal: bool, num_queries: int, num_keys: int) -> None:
    x = make_attention_inputs(2, 2, 2, num_queries, num_keys, 4)
    got = masked_attention(
        x.query.double(), x.key.double(), x.value.double(), x.keep_mask.double(), is_causal=is_causal, backend=backend
    )
    for b in range(2):
        for h in range(2):
            expected = literal(
                x.query[b, h].double(), x.key[b, h].double(), x.value[b, h].double(), x.keep_mask[b], is_causal
            )
            torch.testing.assert_close(got[b, h], expected, rtol=1e-6, atol=1e-6)


def test_hand_case() -> None:
    # two tokens, all scores 0, m = (1, 0.5): row 0 weighs (1, .5)/1.5, row 1 weighs (1, 1)/2
    zero = torch.zeros(1, 1, 2, 1)
    value = torch.tensor([3.0, 6.0]).view(1, 1, 2, 1)
    for backend in CPU_BACKENDS:
        got = masked_attention(zero, zero, value, torch.tensor([[1.0, 0.5]]), backend=backend)
        torch.testing.assert_close(got.flatten(), torch.tensor([4.0, 4.5]))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask_values", [[0.0, 0, 0, 0], [1.0, 1, 1, 1], [0.0, 1, 0.3, 0]])
def test_definition_gradcheck(is_causal: bool, mask_values: list[float]) -> None:
    """The definition is analytic in m, so central differences are right at m = 0 and m = 1 too."""
    x = make_attention_inputs(1, 2, 1, 3, 4, 3)
    leaves = [tensor.double().requires_grad_() for tensor in x[:3]]
    mask = torch.tensor([mask_values], dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[True, True, True, False]])

    def op(query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor) -> Tensor:
        return masked_attention(
            query, key, value, keep_mask, key_padding_mask=padding, is_causal=is_causal, backend="reference"
        )

    assert torch.autograd.gradcheck(op, (*leaves, mask))


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager path of short sequences, and that of long ones, in many blocks, at short lengths."""
    if request.param == "many blocks":
        for name, number in (("SMALL", 0), ("FEWEST_ROWS", 4), ("FEWEST_TILE_ROWS", 4), ("TILE_BYTES", 0)):
            monkeypatch.setattr(eager, name, number)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("mask", ["hard", "soft", "mixed"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 15, 15), (4, 1, 7, 33), (4, 2, 1, 9)])
def test_eager_equals_definition_in_float64(
    sizes: tuple[int, int, int, int], is_causal: bool, padding: bool, mask: str
) -> None:
    x = make_attention_inputs(2, *sizes, 8, mask=mask, padding=padding)
    expected = run(x, "reference", is_causal, torch.float64)
    for got, want in zip(run(x, "eager", is_causal, torch.float64), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("mask", ["hard", "mixed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_eager_precision(mask: str, dtype: torch.dtype, tolerance: float) -> None:
    x = make_attention_inputs(2, 4, 2, 31, 31, 16, mask=mask, padding=True, dtype=dtype)
    expected = run(x, "reference", True, torch.float64)
    for got, want in zip(run(x, "eager", True, dtype), expected, strict=True):
        error = float((got.double() - want).norm() / want.norm())
        assert error <= tolerance, error


@pytest.mark.parametrize("mask_kind", ["hard", "soft"])
@pytest.mark.parametrize("magnitude", [1e2, 1e3])
def test_extreme_logits_stay_finite(mask_kind: str, magnitude: float) -> None:
    x = make_attention_inputs(1, 2, 2, 24, 24, 16, mask=mask_kind)
    x = x._replace(query=x.query * magnitude)
    if mask_kind == "soft":
        x = x._replace(keep_mask=torch.where(x.keep_mask < 0.5, 0.0, x.keep_mask))
    results = run(x, "eager", True, torch.float32)
    assert all(bool(tensor.isfinite().all()) for tensor in results)
    expected = masked_attention(
        *(tensor.double() for tensor in x[:3]), x.keep_mask, is_causal=True, backend="reference"
    )
    # a logit of size s carries a rounding error of eps * s into the exponent
    torch.testing.assert_close(results[0].double(), expected, rtol=0, atol=1e-5 * magnitude)


@pytest.mark.parametrize("mask_value", [0.0, 1.0, None])
@pytest.mark.usefixtures("blocks")
def test_kept_keys_without_a_mask_gradient(mask_value: float | None) -> None:
    """With no key at all in some blocks, with nothing to gather, and with fractional values."""
    x = make_attention_inputs(2, 2, 1, 9, 14, 8, padding=True)
    soft = x.keep_mask if mask_value is None else torch.full((2, 14), mask_value)
    for keep_mask in (soft, soft > 0.5):
        for is_causal in (False, True):
            results = []
            for backend, dtype in (("eager", torch.float32), ("reference", torch.float64)):
                leaves = [tensor.to(dtype).requires_grad_() for tensor in x[:3]]
                output = masked_attention(
                    *leaves, keep_mask, key_padding_mask=x.key_padding_mask, is_causal=is_causal, backend=backend
                )
                results.append([output, *torch.autograd.grad(output, leaves, x.grad_output.to(dtype))])
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


class TestIdentities:
    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("num_queries", [17, 5])
    def test_everything_kept_is_ordinary_attention(self, backend: str, is_causal: bool, num_queries: int) -> None:
        x = make_attention_inputs(2, 4, 2, num_queries, 17, 8)
        visible = torch.ones(17, 17, dtype=torch.bool)
        visible = (visible.tril() if is_causal else visible)[17 - num_queries :]
        expected = F.scaled_dot_product_attention(x.query, x.key, x.value, visible, enable_gqa=True)
        for mask in (torch.ones(2, 17), torch.ones(2, 17, dtype=torch.bool)):
            got = masked_attention(x.query, x.key, x.value, mask, is_causal=is_causal, backend=backend)
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_nothing_kept_returns_the_values(self, backend: str) -> None:
        x = make_attention_inputs(2, 4, 2, 5, 9, 8)
        expected = x.value[:, :, -5:].repeat_interleave(2, dim=1)
        for mask in (torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.bool)):
            got = masked_attention(x.query, x.key, x.value, mask, backend=backend)
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_kept_rows_equal_attention_over_the_compacted_sequence(self, is_causal: bool) -> None:
        x = make_attention_inputs(1, 2, 2, 21, 21, 8, mask="hard")
        kept = x.keep_mask[0].nonzero().flatten()
        got = masked_attention(x.query, x.key, x.value, x.keep_mask, is_causal=is_causal)[:, :, kept]
        short = [tensor[:, :, kept] for tensor in (x.query, x.key, x.value)]
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*short, is_causal=is_causal))

    @pytest.mark.parametrize("mask", ["hard", "mixed"])
    def test_decoding_step_equals_last_row_of_prefill(self, mask: str) -> None:
        x = make_attention_inputs(2, 4, 2, 12, 12, 8, mask=mask)
        prefill = masked_attention(x.query, x.key, x.value, x.keep_mask, is_causal=True)
        step = masked_attention(x.query[:, :, -1:], x.key, x.value, x.keep_mask, is_causal=True)
        torch.testing.assert_close(step, prefill[:, :, -1:])

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize("mask", ["hard", "mixed"])
    def test_padding_is_invisible_and_its_rows_are_zero(self, backend: str, mask: str) -> None:
        x = make_attention_inputs(1, 2, 2, 10, 10, 8, mask=mask)
        valid = torch.arange(10)[None] >= 3
        padded = masked_attention(x.query, x.key, x.value, x.keep_mask, key_padding_mask=valid, backend=backend)
        short = [tensor[:, :, 3:] for tensor in (x.query, x.key, x.value)]
        torch.testing.assert_close(padded[:, :, 3:], masked_attention(*short, x.keep_mask[:, 3:], backend=backend))
        assert bool((padded[:, :, :3] == 0).all())

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_own_mask_value_has_no_gradient(self, backend: str) -> None:
        """With one token G is the constant 1: the gradient is exactly 0, not nearly."""
        x = make_attention_inputs(1, 1, 1, 1, 1, 4)
        assert run(x, backend, False, torch.float32)[4].item() == 0.0

    @pytest.mark.parametrize("eps", [0.0, 1e-6])
    def test_dynamic_vit(self, eps: float) -> None:
        """Its softmax_with_policy (Rao et al. 2021) on inputs that the maximum over all keys does not hurt."""
        x = make_attention_inputs(2, 2, 2, 19, 19, 8, mask="hard")
        scores = x.query @ x.key.transpose(-1, -2) * 8**-0.5
        policy = x.keep_mask.float()[:, None, None, :]
        policy = policy + (1.0 - policy) * torch.eye(19)
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * policy
        weights = (weights + eps / 19) / (weights.sum(dim=-1, keepdim=True) + eps)
        got = masked_attention(x.query, x.key, x.value, x.keep_mask)
        torch.testing.assert_close(got, weights @ x.value, rtol=1e-5, atol=1e-5 + 100 * eps)


@pytest.mark.parametrize("mask", ["hard", "mixed"])
def test_no_tensor_of_n_by_n(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the eager path allocates at once grows with N, forward and backward, mask gradient included."""
    monkeypatch.setattr(eager, "TILE_BYTES", 2**18)  # the constant part, smaller than N x N at these lengths

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    largest = []
    for length in (1024, 2048):
        x = make_attention_inputs(1, 2, 1, length, length, 16, mask=mask)
        with Largest() as recorder:
            call = AttentionCall(*x[:5], None, None, True, 0.25)
            results = eager.masked_attention_forward_eager(call, False)
            eager.masked_attention_backward_eager(
                x.grad_output, *results, call, False, [True, True, True, mask == "mixed"]
            )
        largest.append(recorder.size)
    assert largest[1] < 2048 * 2048
    assert largest[1] <= 2.3 * largest[0]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 2, 4, 4), (2, 2, 2, 0, 4), (2, 2, 1, 0, 0)])
def test_empty(backend: str, shape: tuple[int, int, int, int, int]) -> None:
    x = make_attention_inputs(*shape, 8)
    query = x.query.requires_grad_()
    output = masked_attention(query, x.key, x.value, x.keep_mask, backend=backend)
    assert output.shape == x.query.shape
    output.sum().backward()


@pytest.mark.parametrize("mask", ["hard", "mixed"])
def test_non_contiguous_inputs(mask: str) -> None:
    x = make_attention_inputs(2, 4, 2, 9, 9, 8, mask=mask)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.query, x.key)]
    value = x.value.transpose(2, 3).contiguous().transpose(2, 3)
    keep_mask = x.keep_mask.repeat_interleave(2, dim=1)[:, ::2]
    torch.testing.assert_close(
        masked_attention(*views, value, keep_mask), masked_attention(x.query, x.key, x.value, x.keep_mask)
    )


def test_budget_helper_rejects_nan() -> None:
    good = torch.ones(3)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(torch.tensor([1.0, float("nan"), 1.0]), good, good.double(), name="x")
