"""sample_keep_mask and keep_mask_log_prob."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from toprl_kernels import keep_mask_log_prob, sample_keep_mask
from toprl_kernels.testing import max_error


def make_logits(*shape: int, device: str = "cpu", spread: float = 4.0) -> Tensor:
    return torch.randn(*shape, 2, device=device) * spread


def test_hand_case(backend: str, device: str) -> None:
    # difference log 3: p(keep) = 3/4. u = 0.2 is noise log(1/4) -> log(3/4) < 0: drop. u = 0.3: log(9/7) > 0: keep
    logits = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0]]], device=device)
    out = sample_keep_mask(logits, uniform=torch.tensor([[0.2, 0.3]], device=device), backend=backend)
    assert out.keep_mask.tolist() == [[0.0, 1.0]]
    torch.testing.assert_close(out.log_prob.cpu(), torch.tensor([[math.log(0.25), math.log(0.75)]]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(out.entropy.cpu(), torch.full((1, 2), entropy))


def test_frequency_is_the_probability(backend: str, device: str) -> None:
    for difference in (-2.0, 0.0, 1.0):
        logits = torch.tensor([difference, 0.0], device=device).expand(4, 10000, 2)
        generator = torch.Generator(device=device).manual_seed(1)
        kept = sample_keep_mask(logits, generator=generator, tau=0.05, backend=backend).keep_mask.mean()
        assert abs(float(kept) - 1 / (1 + math.exp(-difference))) < 0.01  # 4 standard deviations


def test_generator_decides_the_sample(backend: str, device: str) -> None:
    logits = make_logits(2, 50, device=device)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator(device=device).manual_seed(seed)
        return sample_keep_mask(logits, generator=generator, backend=backend).keep_mask

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("name", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_definition(name: str, dtype: torch.dtype, device: str) -> None:
    logits = make_logits(3, 129, device=device).to(dtype)
    uniform = torch.rand(3, 129, device=device).clamp(1e-6, 1 - 1e-6)
    previous = torch.rand(3, 129, device=device) < 0.7
    weights = torch.randn(3, 3, 129, device=device)

    def run(backend: str, precision: torch.dtype) -> list[Tensor]:
        leaf = logits.to(precision).requires_grad_()
        out = sample_keep_mask(leaf, uniform=uniform, tau=0.3, previous_mask=previous, backend=backend)
        total = sum((weight * part).sum() for weight, part in zip(weights, out, strict=True))
        assert isinstance(total, Tensor)
        return [*out, *torch.autograd.grad(total, leaf)]

    got, want = run(name, dtype), run("reference", torch.float64)
    for left, right in zip(got[:3], want[:3], strict=True):
        assert left.dtype == torch.float32
        assert max_error(left, right) < 2e-6
    assert max_error(got[3], want[3]) < (5e-6 if dtype == torch.float32 else 2e-2)
    assert bool((got[3][~previous] == 0).all())


def test_gradcheck() -> None:
    logits = make_logits(1, 5).double().requires_grad_()
    mask = torch.tensor([[True, False, True, False, True]])
    previous = torch.tensor([[True, True, False, True, True]])
    assert torch.autograd.gradcheck(lambda x: keep_mask_log_prob(x, mask, previous), logits)


def test_straight_through_gradient(backend: str, device: str) -> None:
    logits = make_logits(2, 9, device=device).requires_grad_()
    uniform, tau = torch.rand(2, 9, device=device).clamp(0.01, 0.99), 0.7
    keep = sample_keep_mask(logits, uniform=uniform, tau=tau, backend=backend).keep_mask
    (got,) = torch.autograd.grad(keep.sum(), logits, retain_graph=False)
    relaxed = torch.sigmoid((logits[..., 0] - logits[..., 1] + torch.logit(uniform)) / tau)
    (want,) = torch.autograd.grad(relaxed.sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", [0.05, 1.0, 10.0])
def test_temperature_does_not_change_the_sample(tau: float, backend: str, device: str) -> None:
    logits, uniform = make_logits(2, 40, device=device), torch.rand(2, 40, device=device).clamp(1e-5)
    base = sample_keep_mask(logits, uniform=uniform, backend=backend)
    assert torch.equal(sample_keep_mask(logits, uniform=uniform, tau=tau, backend=backend).keep_mask, base.keep_mask)


def test_mask_is_exactly_zero_or_one(backend: str, device: str) -> None:
    keep = sample_keep_mask(make_logits(2, 500, device=device), backend=backend).keep_mask
    assert set(keep.flatten().tolist()) == {0.0, 1.0}


def test_reevaluation_is_bitwise_equal(backend: str, device: str) -> None:
    logits = make_logits(2, 200, device=device)
    previous = torch.rand(2, 200, device=device) < 0.8
    out = sample_keep_mask(logits, previous_mask=previous, backend=backend)
    for mask in (out.keep_mask, out.keep_mask.bool()):
        log_prob, entropy = keep_mask_log_prob(logits, mask, previous, backend=backend)
        assert torch.equal(log_prob, out.log_prob)
        assert torch.equal(entropy, out.entropy)


def test_dropped_tokens_stay_dropped(backend: str, device: str) -> None:
    logits = torch.full((1, 3, 2), 0.0, device=device)
    logits[..., 0] = 50.0
    previous = torch.tensor([[True, False, True]], device=device)
    out = sample_keep_mask(logits, previous_mask=previous, backend=backend)
    assert out.keep_mask.tolist() == [[1.0, 0.0, 1.0]]
    assert out.log_prob[0, 1] == 0
    assert out.entropy[0, 1] == 0


@pytest.mark.parametrize("magnitude", [20.0, 100.0, 1000.0])
def test_confident_logits_stay_finite(magnitude: float, backend: str, device: str) -> None:
    logits = torch.tensor([[[magnitude, 0.0], [0.0, magnitude]]], device=device, requires_grad=True)
    given = torch.tensor([[True, True]], device=device)
    log_prob, entropy = keep_mask_log_prob(logits, given, backend=backend)
    torch.testing.assert_close(log_prob.detach().cpu()[0, 1], torch.tensor(-magnitude))
    (gradient,) = torch.autograd.grad((log_prob + entropy).sum(), logits)
    assert bool(gradient.isfinite().all())
    assert bool((entropy >= 0).all())


@pytest.mark.usefixtures("poisoned_memory")
def test_views_and_empty(backend: str, device: str) -> None:
    logits = make_logits(40, 2, device=device).transpose(0, 1)[:, ::2]
    uniform = torch.rand(20, 2, device=device).clamp(1e-5).T
    previous = (torch.rand(20, 2, device=device) < 0.5).T
    got = sample_keep_mask(logits, uniform=uniform, previous_mask=previous, backend=backend)
    want = sample_keep_mask(
        logits.contiguous(), uniform=uniform.contiguous(), previous_mask=previous.contiguous(), backend=backend
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert sample_keep_mask(make_logits(0, 4, device=device), backend=backend).keep_mask.shape == (0, 4)
