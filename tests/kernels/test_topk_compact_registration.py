"""topk_compact as a registered op: opcheck, compilation, autocast, vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from toprl_kernels import topk_compact
from toprl_kernels.topk.library import backward_op, forward_op

BACKENDS = ["eager", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make(samples: int, tokens: int, size: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.randn(samples, tokens, size, device=device, requires_grad=True), torch.randn(
        samples, tokens, device=device
    )


def cases(device: str) -> dict[str, tuple[Any, ...]]:
    hidden, scores = make(2, 9, device=device)
    flat = torch.arange(18, device=device).view(2, 9)
    rope = torch.stack([flat] * 3).to(torch.int32)
    k = torch.tensor([2, 4], device=device)
    valid = scores > 0
    return {
        "plain": (hidden, scores, None, 3, None, None, False, False),
        "positions": (hidden, scores, None, 3, None, flat, False, True),
        "ragged": (hidden, scores, k, 4, None, rope, False, True),
        "left": (hidden, scores, k, 4, valid, flat, True, False),
        "valid": (hidden, scores, None, 5, valid, None, False, True),
        "no gradient": (hidden.detach().to(torch.bfloat16), scores, None, 3, None, None, False, False),
        "nothing kept": (hidden, scores, None, 0, None, flat, False, True),
    }


@pytest.mark.parametrize("case", list(cases("cpu")))
def test_opcheck(case: str, backend: str, device: str) -> None:
    torch.library.opcheck(forward_op.overload, (*cases(device)[case], backend))


@pytest.mark.parametrize("padded", [False, True])
def test_opcheck_backward(padded: bool, backend: str, device: str) -> None:
    indices = torch.tensor([[0, 4, -1 if padded else 6], [1, 2, 3]], device=device)
    gradient = torch.randn(2, 3, 5, device=device)
    torch.library.opcheck(backward_op.overload, (gradient, indices, 7, padded, backend))


def step(hidden: Tensor, scores: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two stages, the second on what the first kept, and a ragged one with k on the device."""
    positions = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    first = topk_compact(hidden * 2, scores, scores.shape[1] // 2, position_ids=positions, backend=backend)
    again = first.hidden_states.sum(-1)
    second = topk_compact(first.hidden_states, again, 3, position_ids=first.position_ids, backend=backend)
    k = torch.arange(1, scores.shape[0] + 1, device=scores.device)
    ragged = topk_compact(
        hidden,
        scores,
        k,
        max_length=5,
        padding_side="left",
        return_inverse=True,
        valid_mask=scores < 1,
        backend=backend,
    )
    assert second.position_ids is not None
    assert ragged.inverse is not None
    return second.hidden_states.sin() + ragged.hidden_states[:, :3], second.position_ids, ragged.inverse


def check_compiled(compiler: str, backend: str, device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for samples, tokens in ((2, 20), (3, 31), (4, 48)):
        hidden, scores = make(samples, tokens, device=device)
        want, got = step(hidden, scores, backend), compiled(hidden, scores, backend)
        assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
        torch.testing.assert_close(got[0], want[0])
        weight = torch.randn_like(want[0])
        gradients = [torch.autograd.grad((out[0] * weight).sum(), hidden)[0] for out in (want, got)]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1  # compiled once for every shape


def test_compiles(backend: str, device: str) -> None:
    check_compiled("aot_eager", backend, device)


@pytest.mark.slow
def test_compiles_with_inductor(device: str) -> None:
    check_compiled("inductor", "eager", device)


def test_autocast_changes_nothing(backend: str, device: str) -> None:
    hidden, scores = make(2, 40, device=device)
    plain = topk_compact(hidden, scores, 7, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        out = topk_compact(hidden, scores, 7, backend=backend)
    assert out.hidden_states.dtype == torch.float32
    assert torch.equal(out.indices, plain.indices)
    assert torch.equal(out.hidden_states, plain.hidden_states)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_vmap_is_refused(needs_gradient: bool, backend: str, device: str) -> None:
    hidden = torch.randn(2, 1, 9, 4, device=device, requires_grad=needs_gradient)
    scores = torch.randn(2, 1, 9, device=device)
    with pytest.raises(NotImplementedError, match=r"topk_compact: torch.vmap is not supported.*fold"):
        torch.vmap(lambda h, s: topk_compact(h, s, 2, backend=backend).hidden_states)(hidden, scores)
