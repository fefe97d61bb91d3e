"""actor_score's explicit backward: against autograd of the definition, and only what was asked for."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels import ActorWeights, actor_score
from toprl_kernels.actor import eager
from toprl_kernels.testing import assert_within_budget, make_actor_weights

NAMES = ("hidden_states", *ActorWeights._fields)
BACKENDS = ("eager", "triton")


def leaves_of(hidden: Tensor, weights: ActorWeights, dtype: torch.dtype, wanted: set[str]) -> list[Tensor]:
    return [
        tensor.detach().to(dtype).requires_grad_(name in wanted)
        for name, tensor in zip(NAMES, (hidden, *weights), strict=True)
    ]


def run(
    leaves: list[Tensor], stage: int, valid: Tensor | None, backend: str, grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the leaves that want one."""
    weights = ActorWeights(*leaves[1:])
    if backend == "plain":
        logits = plain_actor(leaves[0], stage, weights, valid)
    else:
        logits = actor_score(leaves[0], stage, weights, valid_mask=valid, backend=backend)
    wanted = [name for name, leaf in zip(NAMES, leaves, strict=True) if leaf.requires_grad]
    tensors = [leaf for leaf in leaves if leaf.requires_grad]
    return logits, dict(zip(wanted, torch.autograd.grad(logits, tensors, grad.to(logits.dtype)), strict=True))


def plain_actor(hidden: Tensor, stage: int, w: ActorWeights, valid: Tensor | None) -> Tensor:
    """The network out of torch's own layers: the eager implementation whose error sets the budget."""
    x = F.layer_norm(hidden, hidden.shape[2:], w.norm_weight, w.norm_bias, 1e-5)
    local, shared = F.gelu(F.linear(x, w.fc1_weight, w.fc1_bias) + w.stage_bias[stage]).chunk(2, dim=-1)
    counts = torch.ones_like(shared[..., :1]) if valid is None else valid[..., None].to(shared.dtype)
    summary = (shared * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    z = F.gelu(F.linear(torch.cat([local, summary.expand_as(local)], dim=-1), w.fc2_weight, w.fc2_bias))
    return F.linear(F.gelu(F.linear(z, w.fc3_weight, w.fc3_bias)), w.head_weight, w.head_bias)


def make_case(
    batch: int, tokens: int, d1: int, d2: int, with_mask: bool, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, ActorWeights, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = make_actor_weights(d1, d2, dtype=dtype, device=device, seed=seed)
    hidden = (torch.randn(batch, tokens, d1, generator=generator) * 2 + 1).to(device=device, dtype=dtype)
    grad = torch.randn(batch, tokens, 2, generator=generator).to(device=device, dtype=dtype)
    valid = None
    if with_mask:
        valid = (torch.rand(batch, tokens, generator=generator) < 0.6).to(device)
        valid[0] = False  # a sample without any valid token
    return hidden, weights, valid, grad


def check(case: tuple[Tensor, ActorWeights, Tensor | None, Tensor], stage: int, backend: str, label: str = "") -> None:
    """Logits and all twelve gradients within the budget of torch's layers and autograd in the same precision."""
    hidden, weights, valid, grad = case
    dtype = hidden.dtype
    everything = set(NAMES)
    oracle = run(leaves_of(hidden, weights, torch.float64, everything), stage, valid, "reference", grad)
    plain = run(leaves_of(hidden, weights, dtype, everything), stage, valid, "plain", grad)
    got = run(leaves_of(hidden, weights, dtype, everything), stage, valid, backend, grad)
    assert_within_budget(got[0], plain[0], oracle[0], name=f"{label}logits", dtype=dtype)
    for name in NAMES:
        assert_within_budget(got[1][name], plain[1][name], oracle[1][name], name=f"{label}d {name}", dtype=dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "tokens", "d1", "d2", "with_mask"),
    [(1, 1, 8, 2, False), (2, 33, 40, 24, True), (3, 65, 96, 64, True), (2, 17, 24, 8, False)],
)
def test_gradients(
    backend: str, batch: int, tokens: int, d1: int, d2: int, with_mask: bool, dtype: torch.dtype, device: str
) -> None:
    check(make_case(batch, tokens, d1, d2, with_mask, dtype, device), 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(backend: str, name: str, device: str) -> None:
    """The same bits as together with the others, and none of the products that only the others need."""
    hidden, weights, valid, grad = make_case(2, 9, 16, 8, True, torch.float32, device)
    _, together = run(leaves_of(hidden, weights, hidden.dtype, set(NAMES)), 2, valid, backend, grad)
    _, alone = run(leaves_of(hidden, weights, hidden.dtype, {name}), 2, valid, backend, grad)
    assert set(alone) == {name}
    assert torch.equal(alone[name], together[name])


def test_backward_stops_at_the_first_layer_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the first layer's backward ran")

    monkeypatch.setattr(eager, "_backward_layer1", refuse)
    hidden, weights, valid, grad = make_case(2, 9, 16, 8, True, torch.float32, "cpu")
    wanted = {"fc2_weight", "fc2_bias", "fc3_weight", "head_bias"}
    run(leaves_of(hidden, weights, hidden.dtype, wanted), 0, valid, "triton", grad)
    with pytest.raises(AssertionError, match="first layer"):
        run(leaves_of(hidden, weights, hidden.dtype, {"stage_bias"}), 0, valid, "triton", grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision_and_stride_0_gradient(backend: str, device: str) -> None:
    """Half-precision hidden states under float32 weights; .sum() hands the backward a gradient of stride 0."""
    hidden, weights, valid, _ = make_case(2, 9, 16, 8, True, torch.float32, device)
    narrow = hidden.bfloat16().requires_grad_()
    wide = hidden.bfloat16().double().requires_grad_()
    actor_score(narrow, 0, weights, valid_mask=valid, backend=backend).sum().backward()
    wide_weights = ActorWeights(*(tensor.double() for tensor in weights))
    actor_score(wide, 0, wide_weights, valid_mask=valid, backend="reference").sum().backward()
    assert narrow.grad is not None and wide.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_empty(backend: str, batch: int, tokens: int, device: str) -> None:
    hidden, weights, _, grad = make_case(batch, tokens, 16, 8, False, torch.float32, device)
    _, gradients = run(leaves_of(hidden, weights, hidden.dtype, set(NAMES)), 0, None, backend, grad)
    for name, tensor in zip(NAMES, (hidden, *weights), strict=True):
        assert gradients[name].shape == tensor.shape
        assert not gradients[name].any()


def test_invalid_tokens_may_hold_anything(device: str) -> None:
    """NaN in a token that does not count stays in that token."""
    hidden, weights, _, _ = make_case(1, 6, 16, 8, False, torch.float32, device)
    valid = torch.tensor([[True, True, True, True, True, False]], device=device)
    clean = actor_score(hidden, 0, weights, valid_mask=valid, backend="eager")
    hidden[0, 5] = torch.nan
    for backend in BACKENDS:
        got = actor_score(hidden, 0, weights, valid_mask=valid, backend=backend)
        torch.testing.assert_close(got[:, :5], clean[:, :5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend: str, device: str) -> None:
    hidden, weights, valid, grad = make_case(2, 70, 40, 32, True, torch.float32, device)
    first = run(leaves_of(hidden, weights, hidden.dtype, set(NAMES)), 1, valid, backend, grad)
    for _ in range(20 if backend == "eager" or device == "cuda" else 3):
        again = run(leaves_of(hidden, weights, hidden.dtype, set(NAMES)), 1, valid, backend, grad)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz(backend: str, device: str) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        sizes = (rng.randint(1, 3), rng.randint(1, 70), rng.randint(1, 70), 2 * rng.randint(1, 40))
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        case = make_case(*sizes, rng.random() < 0.5, dtype, device, seed)
        label = f"seed {seed}: B, N, d1, d2 = {sizes}, {dtype}: "
        if backend == "eager":
            check(case, rng.randrange(3), backend, label)
            continue
        hidden, weights, valid, _ = case  # the backward is the same code: the forward alone
        stage = rng.randrange(3)
        wide = ActorWeights(*(tensor.double() for tensor in weights))
        oracle = actor_score(hidden.double(), stage, wide, valid_mask=valid, backend="reference")
        plain = plain_actor(hidden, stage, weights, valid)
        got = actor_score(hidden, stage, weights, valid_mask=valid, backend=backend)
        assert_within_budget(got, plain, oracle, name=f"{label}logits")
