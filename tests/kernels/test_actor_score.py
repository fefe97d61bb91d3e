"""actor_score: the definition against torch modules, eager and Triton against the definition."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels import ActorWeights, actor_score, fold_actor_weights
from toprl_kernels.actor import api, eager
from toprl_kernels.actor import triton as kernels
from toprl_kernels.testing import assert_within_budget, make_actor_weights

NAMES = ("hidden_states", *ActorWeights._fields)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_hidden(batch: int, tokens: int, d1: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Per-token offset and scale, so that an error in LayerNorm's mean or variance shows."""
    offset = torch.randn(batch, tokens, 1) * 3
    return ((torch.randn(batch, tokens, d1) + offset) * (1 + torch.rand(batch, tokens, 1))).to(dtype)


def plain_actor(hidden: Tensor, stage: int, w: ActorWeights, valid: Tensor | None) -> Tensor:
    """The network out of torch's own layers: the implementation whose error sets the budget."""
    if valid is not None:
        hidden = hidden * valid[..., None]
    x = F.layer_norm(hidden, hidden.shape[2:], w.norm_weight, w.norm_bias, 1e-5)
    local, shared = F.gelu(F.linear(x, w.fc1_weight, w.fc1_bias) + w.stage_bias[stage]).chunk(2, dim=-1)
    counts = torch.ones_like(shared[..., :1]) if valid is None else valid[..., None].to(shared.dtype)
    summary = (shared * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    z = F.gelu(F.linear(torch.cat([local, summary.expand_as(local)], dim=-1), w.fc2_weight, w.fc2_bias))
    return F.linear(F.gelu(F.linear(z, w.fc3_weight, w.fc3_bias)), w.head_weight, w.head_bias)


def results(
    backend: str, hidden: Tensor, stage: int, weights: ActorWeights, dtype: torch.dtype, **options
) -> list[Tensor]:
    """Logits and the gradients with respect to all twelve inputs, in a precision."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, *weights)]
    if backend == "plain":
        logits = plain_actor(leaves[0], stage, ActorWeights(*leaves[1:]), options.get("valid_mask"))
    else:
        logits = actor_score(leaves[0], stage, ActorWeights(*leaves[1:]), backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(logits.shape, generator=generator).to(logits)
    return [logits, *torch.autograd.grad(logits, leaves, direction)]


def assert_budget(backend: str, *inputs, label: str = "", **options) -> None:
    """Logits and all gradients within the budget of torch's layers and autograd in the same precision."""
    dtype = inputs[0].dtype
    oracle = results("reference", *inputs, torch.float64, **options)
    plain = results("plain" if set(options) <= {"valid_mask"} else "eager", *inputs, dtype, **options)
    got = results(backend, *inputs, dtype, **options)
    for name, left, middle, right in zip(("logits", *NAMES), got, plain, oracle, strict=True):
        assert_within_budget(left, middle, right, name=f"{label} {name}", dtype=dtype)


def test_definition_equals_torch_layers() -> None:
    weights = ActorWeights(*(tensor.double() for tensor in make_actor_weights(12, 8)))
    hidden, valid = make_hidden(2, 5, 12).double(), torch.rand(2, 5) < 0.7
    for mask in (None, valid):
        got = actor_score(hidden, 2, weights, valid_mask=mask)  # float64 goes to the definition
        torch.testing.assert_close(got, plain_actor(hidden, 2, weights, mask))


@pytest.mark.parametrize("name", ["reference", "eager"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_gradcheck(name: str, with_mask: bool) -> None:
    leaves = [t.double().requires_grad_() for t in (make_hidden(2, 3, 6), *make_actor_weights(6, 4))]
    valid = torch.tensor([[True, False, True], [False, False, False]]) if with_mask else None

    def op(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return actor_score(hidden, 1, ActorWeights(*parameters), valid_mask=valid, backend=name)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("with_mask", [False, True])
def test_pieces(with_mask: bool, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient LayerNorm runs in pieces of rows, across samples; the last one is shorter."""
    hidden, valid = make_hidden(3, 9, 20).double(), torch.rand(3, 9) < 0.5 if with_mask else None
    weights = ActorWeights(*(tensor.double() for tensor in make_actor_weights(20, 12)))
    monkeypatch.setattr(eager, "CPU_PIECE_BYTES", hidden.nbytes // pieces)
    got, want = (actor_score(hidden, 2, weights, valid_mask=valid, backend=name) for name in ("eager", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


SIZES = [
    (1, 1, 8, 2, False, torch.float32), (2, 15, 40, 24, True, torch.float16), (2, 70, 100, 64, True, torch.float32),
    (2, 129, 200, 64, True, torch.bfloat16), (1, 63, 96, 256, False, torch.float16),
    (1, 33, 96, 256, False, torch.float32),
]  # fmt: skip


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["eager", "triton"])
@pytest.mark.parametrize(("batch", "tokens", "d1", "d2", "with_mask", "dtype"), SIZES)
def test_budget(
    batch: int, tokens: int, d1: int, d2: int, with_mask: bool, dtype: torch.dtype, name: str, device: str
) -> None:
    weights = make_actor_weights(d1, d2, dtype=dtype, device=device)
    valid = None
    if with_mask:
        valid = torch.rand(batch, tokens, device=device) < 0.6
        valid[0] = False  # a sample without any valid token
    assert_budget(name, make_hidden(batch, tokens, d1, dtype).to(device), 1, weights, valid_mask=valid)


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_large_mean_is_not_lost(name: str, device: str) -> None:
    """E[x^2] - mean^2 would lose the variance of a row whose mean is 1000 times its spread."""
    weights = make_actor_weights(128, 16, device=device)
    hidden = (torch.randn(1, 4, 128) + 1000).to(device)
    wide = ActorWeights(*(tensor.double() for tensor in weights))
    oracle = actor_score(hidden.double(), 0, wide, backend="reference")
    torch.testing.assert_close(actor_score(hidden, 0, weights, backend=name).double(), oracle, rtol=0, atol=2e-3)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", ["batch", "indices", "cu_seqlens"])
def test_invalid_hidden_states_are_not_seen(form: str, poison: float, backend: str, device: str) -> None:
    """NaN in a token that does not count changes no logit and no gradient, bit for bit."""
    weights, hidden = make_actor_weights(16, 8, device=device), make_hidden(2, 6, 16).to(device)
    valid = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool, device=device)
    options: dict = {"valid_mask": valid}
    if form == "indices":
        options = {"indices": torch.arange(6, device=device).where(valid, -1)}
    poisoned = hidden.masked_fill(~valid[..., None], poison)
    if form == "cu_seqlens":
        hidden, poisoned, options["valid_mask"] = hidden.flatten(0, 1), poisoned.flatten(0, 1), valid.flatten()
        options["cu_seqlens"] = torch.tensor([0, 6, 12], device=device, dtype=torch.int32)
    clean, seen = (results(backend, states, 0, weights, torch.float32, **options) for states in (hidden, poisoned))
    for name, left, right in zip(("logits", *NAMES), clean, seen, strict=True):
        assert torch.equal(left, right), name
        assert bool(right.isfinite().all()), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_indices_pick_tokens(dtype: torch.dtype, backend: str, device: str) -> None:
    weights = make_actor_weights(24, 8, dtype=dtype, device=device)
    hidden = make_hidden(2, 90, 24, dtype).to(device)
    indices = torch.stack([torch.randperm(90)[:70].sort().values for _ in range(2)]).to(device)
    indices[1, 50:] = -1
    picked = hidden.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, 24))
    want = actor_score(picked, 1, weights, valid_mask=indices >= 0, backend=backend)
    assert torch.equal(actor_score(hidden, 1, weights, indices=indices, backend=backend), want)
    assert_budget(backend, hidden, 1, weights, indices=indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_are_those_alone(dtype: torch.dtype, backend: str, device: str) -> None:
    """Shorter and longer than a block, one of them empty; a NaN of one sequence stays there."""
    weights = make_actor_weights(24, 8, dtype=dtype, device=device)
    hidden, ends = make_hidden(1, 200, 24, dtype)[0].to(device), [0, 3, 3, 132, 200]
    valid = torch.rand(200, device=device) < 0.8
    options = dict(cu_seqlens=torch.tensor(ends, device=device, dtype=torch.int32), valid_mask=valid)
    assert_budget(backend, hidden, 1, weights, **options)
    clean = actor_score(hidden, 1, weights, backend=backend, **options)
    hidden[150], valid[150] = torch.nan, True
    got = actor_score(hidden, 1, weights, backend=backend, **options)
    assert torch.equal(got[:132], clean[:132])
    assert bool(got[132:].isnan().all())
    for start, end in ((0, 3), (3, 132)):
        alone = actor_score(hidden[None, start:end], 1, weights, valid_mask=valid[None, start:end], backend=backend)[0]
        torch.testing.assert_close(got[start:end], alone, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_folded_weights_are_a_copy(backend: str, device: str) -> None:
    """They give the same logits, in the dtype that was asked for, and stay what they were when training goes on."""
    weights, hidden = make_actor_weights(16, 8, device=device), make_hidden(2, 7, 16).to(device)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    want = [actor_score(hidden, stage, weights, backend="reference") for stage in range(3)]
    folded, half = fold_actor_weights(weights), fold_actor_weights(weights, torch.bfloat16)
    for tensor in weights:
        tensor.add_(1.0)
    for stage in range(3):
        close(actor_score(hidden, stage, folded, backend=backend), want[stage])
    low = actor_score(hidden.requires_grad_(), 0, half, backend=backend)
    assert low.dtype == torch.float32  # 16 bits would tie many tokens
    close(low, want[0], rtol=0.05, atol=0.05)
    assert torch.autograd.grad(low.sum(), hidden)[0].shape == hidden.shape


def test_kernels_do_not_fold_again(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    weights, hidden = make_actor_weights(16, 8, device=device), make_hidden(1, 7, 16).to(device)
    folded = fold_actor_weights(weights)
    monkeypatch.setattr(kernels, "fold_actor_weights", None)
    actor_score(hidden, 0, folded, backend="triton")
    with pytest.raises(TypeError):
        actor_score(hidden, 0, weights, backend="triton")


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_empty(backend: str, batch: int, tokens: int, device: str) -> None:
    weights = make_actor_weights(16, 8, device=device)
    got = results(backend, torch.zeros(batch, tokens, 16, device=device), 0, weights, torch.float32)
    assert got[0].shape == (batch, tokens, 2)
    assert not any(bool(gradient.any()) for gradient in got[1:])


def test_non_contiguous(backend: str, device: str) -> None:
    weights = make_actor_weights(16, 8, device=device)
    hidden = make_hidden(5, 2, 32).to(device).transpose(0, 1)[..., ::2]
    valid = torch.tensor([[1, 0, 1, 1, 1]] * 2, dtype=torch.bool, device=device).T.contiguous().T
    torch.testing.assert_close(
        actor_score(hidden, 0, weights, valid_mask=valid, backend=backend),
        actor_score(hidden.contiguous(), 0, weights, valid_mask=valid.contiguous(), backend=backend),
    )


def test_mixed_precision_runs_in_the_dtype_of_the_weights(backend: str, device: str) -> None:
    weights = make_actor_weights(16, 8, device=device)
    hidden = make_hidden(1, 5, 16, torch.bfloat16).to(device)
    got = actor_score(hidden, 0, weights, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, actor_score(hidden.float(), 0, weights, backend="eager"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_fuzz(name: str, device: str) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        batch, tokens, d1, d2 = rng.randint(1, 3), rng.randint(1, 70), rng.randint(1, 70), 2 * rng.randint(1, 40)
        dtype = rng.choice(DTYPES)
        weights = make_actor_weights(d1, d2, dtype=dtype, device=device, seed=seed)
        valid = torch.rand(batch, tokens, device=device) < 0.6 if rng.random() < 0.5 else None
        label = f"seed {seed}: B, N, d1, d2 = {(batch, tokens, d1, d2)}, {dtype}"
        hidden = make_hidden(batch, tokens, d1, dtype).to(device)
        assert_budget(name, hidden, rng.randrange(3), weights, valid_mask=valid, label=label)


@pytest.mark.parametrize(
    ("measured", "tokens", "want"),
    [(None, 9, "triton"), (None, 8193, "eager"), ("eager", 9, "eager"), ("triton", 8193, "triton")],
)
def test_automatic_choice(measured: str | None, tokens: int, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels at few tokens, eager at many, unless a measurement says otherwise."""
    ran = []
    monkeypatch.setattr(api.configs, "faster", lambda *arguments: measured)
    monkeypatch.setattr(eager, "actor_score_eager", lambda *arguments: ran.append("eager"))
    monkeypatch.setattr(kernels, "actor_score_triton", lambda *arguments: ran.append("triton"))
    weights = make_actor_weights(4, 2)
    api._forward(torch.zeros(1, tokens, 4), *weights, *[None] * 6, 0, api.MEASURED)
    assert ran == [want]
