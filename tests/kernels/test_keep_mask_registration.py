"""sample_keep_mask and keep_mask_log_prob as registered ops: opcheck, compilation, autocast, vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from toprl_kernels import keep_mask_log_prob, sample_keep_mask
from toprl_kernels.keep_mask.library import backward_op, forward_op

BACKENDS = ["eager", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(source: str, device: str) -> tuple[Any, ...]:
    """logits, uniform, given, seed, token_ids, previous_mask"""
    logits = torch.randn(2, 7, 2, device=device, requires_grad=True)
    uniform, previous = torch.rand(2, 7, device=device).clamp(0.01, 0.99), torch.rand(2, 7, device=device) < 0.7
    seed, ids = torch.tensor([3], device=device), torch.arange(14, device=device).view(2, 7) + 2**33
    return {
        "seed": (logits, None, None, seed, None, None),
        "token ids": (logits, None, None, seed, ids, previous),
        "uniform": (logits.detach().to(torch.bfloat16).requires_grad_(), uniform, None, None, None, None),
        "given": (logits, None, uniform > 0.5, None, None, previous),
    }[source]


SOURCES = ["seed", "token ids", "uniform", "given"]


@pytest.mark.parametrize("source", SOURCES)
def test_opcheck(source: str, backend: str, device: str) -> None:
    torch.library.opcheck(forward_op.overload, (*inputs(source, device), 0.5, backend))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("present", [(True, True, True), (False, True, False)])
def test_opcheck_backward(source: str, present: tuple[bool, ...], backend: str, device: str) -> None:
    logits, *rest = inputs(source, device)
    gradients = [torch.randn(2, 7, device=device) if has else None for has in present]
    torch.library.opcheck(backward_op.overload, (logits.detach(), *gradients, *rest, 0.5, backend))


def step(logits: Tensor, seed: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A stage, the next one on what it kept, and the PPO re-evaluation."""
    first = sample_keep_mask(logits * 2, seed=seed, backend=backend)
    kept = first.keep_mask.detach() > 0
    second = sample_keep_mask(logits + 1, seed=seed + 1, previous_mask=kept, tau=0.3, backend=backend)
    log_prob, entropy = keep_mask_log_prob(logits * 2, kept, backend=backend)
    return first.keep_mask + second.keep_mask, second.log_prob + first.log_prob, log_prob, entropy + second.entropy


def check_compiled(compiler: str, backend: str, device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    calls = []
    # a batch of 2 would be taken for the same size as the two logits
    for samples, tokens in ((3, 20), (4, 31), (5, 48)):
        logits = torch.randn(samples, tokens, 2, device=device, requires_grad=True)
        seed = torch.tensor([samples], device=device)
        want, got = step(logits, seed, backend), compiled(logits, seed, backend)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[2], want[2])
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(sum(part.sum() for part in out), logits)[0] for out in (want, got)]
        torch.testing.assert_close(*gradients)
        calls.append(counter.frame_count)
    assert calls[0] == calls[-1]  # the first compilation starts over once, to make a constant of tau; no later one


def test_compiles(backend: str, device: str) -> None:
    check_compiled("aot_eager", backend, device)


@pytest.mark.slow
def test_compiles_with_inductor(device: str) -> None:
    check_compiled("inductor", "eager", device)


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_seed_from_the_default_generator_compiles(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sample_keep_mask(x, backend=name).keep_mask, fullgraph=True, backend="aot_eager")
    logits = torch.zeros(1, 50, 2)
    assert not torch.equal(compiled(logits), compiled(logits))
    torch.manual_seed(4)
    got = compiled(logits)
    torch.manual_seed(4)
    assert torch.equal(got, sample_keep_mask(logits, backend=name).keep_mask)


def test_autocast_changes_nothing(backend: str, device: str) -> None:
    logits = torch.randn(2, 40, 2, device=device)
    plain = sample_keep_mask(logits, seed=1, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        out = sample_keep_mask(logits, seed=1, backend=backend)
    assert all(torch.equal(left, right) for left, right in zip(out, plain, strict=True))


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_vmap_is_refused(needs_gradient: bool, backend: str, device: str) -> None:
    logits = torch.randn(2, 1, 9, 2, device=device, requires_grad=needs_gradient)
    given = torch.ones(2, 1, 9, dtype=torch.bool, device=device)
    with pytest.raises(NotImplementedError, match=r"keep_mask: torch.vmap is not supported.*fold"):
        torch.vmap(lambda x, m: keep_mask_log_prob(x, m, backend=backend)[0])(logits, given)


def test_only_the_gradients_that_arrive(backend: str, device: str) -> None:
    """Each output alone has the gradient that the definition gives it; a mask alone uses no other one."""
    logits = torch.randn(1, 33, 2, device=device, requires_grad=True)
    for name in ("keep_mask", "log_prob", "entropy"):
        results = []
        for implementation in (backend, "reference"):
            out = getattr(sample_keep_mask(logits, seed=2, tau=0.5, backend=implementation), name)
            results.append(torch.autograd.grad(out.sum(), logits)[0])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
