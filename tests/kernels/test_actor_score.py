"""actor_score: the definition against torch modules, eager and Triton against the definition."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels import ActorWeights, actor_score
from toprl_kernels.actor import eager, library
from toprl_kernels.testing import assert_within_budget, make_actor_weights


def widen(weights: ActorWeights) -> ActorWeights:
    return ActorWeights(*(tensor.double() for tensor in weights))


def make_hidden(batch: int, tokens: int, d1: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Per-token offset and scale, so that an error in LayerNorm's mean or variance shows."""
    offset = torch.randn(batch, tokens, 1) * 3
    return ((torch.randn(batch, tokens, d1) + offset) * (1 + torch.rand(batch, tokens, 1))).to(dtype)


def test_definition_equals_torch_layers() -> None:
    weights = widen(make_actor_weights(12, 8))
    hidden = make_hidden(2, 5, 12).double()
    x = F.layer_norm(hidden, (12,), weights.norm_weight, weights.norm_bias, 1e-5)
    z = F.gelu(x @ weights.fc1_weight.T + weights.fc1_bias + weights.stage_bias[2])
    z = torch.cat([z[..., :4], z[..., 4:].mean(dim=1, keepdim=True).expand(-1, 5, -1)], dim=-1)
    z = F.gelu(F.linear(z, weights.fc2_weight, weights.fc2_bias))
    z = F.gelu(F.linear(z, weights.fc3_weight, weights.fc3_bias))
    want = F.linear(z, weights.head_weight, weights.head_bias)
    torch.testing.assert_close(actor_score(hidden, 2, weights, backend="reference"), want)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_gradcheck(backend: str, with_mask: bool) -> None:
    weights = widen(make_actor_weights(6, 4))
    leaves = [make_hidden(2, 3, 6).double().requires_grad_(), *(tensor.requires_grad_() for tensor in weights)]
    valid = torch.tensor([[True, False, True], [False, False, False]]) if with_mask else None

    def op(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return actor_score(hidden, 1, ActorWeights(*parameters), valid_mask=valid, backend=backend)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("with_mask", [False, True])
def test_eager_equals_definition(with_mask: bool) -> None:
    weights = widen(make_actor_weights(20, 12))
    hidden = make_hidden(3, 9, 20).double()
    valid = torch.rand(3, 9) < 0.5 if with_mask else None
    torch.testing.assert_close(
        actor_score(hidden, 0, weights, valid_mask=valid, backend="eager"),
        actor_score(hidden, 0, weights, valid_mask=valid, backend="reference"),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("with_mask", [False, True])
def test_explicit_backward_and_pieces(with_mask: bool, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of autograd LayerNorm runs in pieces of rows, across samples; the last one is shorter."""
    hidden, valid = make_hidden(3, 9, 20).double(), torch.rand(3, 9) < 0.5 if with_mask else None
    monkeypatch.setattr(eager, "CPU_PIECE_BYTES", hidden.nbytes // pieces)
    assert len(eager._pieces(hidden, torch.float64)) == pieces
    leaves = [hidden.requires_grad_(), *(tensor.requires_grad_() for tensor in widen(make_actor_weights(20, 12)))]
    weights = ActorWeights(*leaves[1:])
    want = actor_score(hidden, 2, weights, valid_mask=valid, backend="reference")
    direction = torch.randn_like(want)
    gradients = torch.autograd.grad(want, leaves, direction)
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        close(actor_score(hidden, 2, weights, valid_mask=valid, backend="eager"), want)
        close(library.backward_op(direction, hidden, *weights, valid, 2, [True] * 12), gradients)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "d1", "d2", "with_mask"),
    [
        (1, 1, 8, 2, False),
        (2, 15, 40, 24, True),
        (2, 129, 200, 64, True),
        (1, 63, 96, 256, False),
        (2, 70, 64, 80, True),
    ],
)
def test_triton(batch: int, tokens: int, d1: int, d2: int, with_mask: bool, dtype: torch.dtype, device: str) -> None:
    weights = make_actor_weights(d1, d2, dtype=dtype, device=device)
    hidden = make_hidden(batch, tokens, d1, dtype).to(device)
    valid = None
    if with_mask:
        valid = torch.rand(batch, tokens, device=device) < 0.6
        valid[0] = False  # a sample without any valid token
    oracle = actor_score(hidden.double(), 1, widen(weights), valid_mask=valid, backend="reference")
    plain = actor_score(hidden, 1, weights, valid_mask=valid, backend="eager")
    got = actor_score(hidden, 1, weights, valid_mask=valid, backend="triton")
    assert got.dtype == dtype
    assert_within_budget(got, plain, oracle, name="logits")


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_large_mean_is_not_lost(backend: str, device: str) -> None:
    """E[x^2] - mean^2 would lose the variance of a row whose mean is 1000 times its spread."""
    weights = make_actor_weights(128, 16, device=device)
    hidden = (torch.randn(1, 4, 128) + 1000).to(device)
    oracle = actor_score(hidden.double(), 0, widen(weights), backend="reference")
    got = actor_score(hidden, 0, weights, backend=backend)
    torch.testing.assert_close(got.double(), oracle, rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_invalid_tokens_do_not_move_the_others(backend: str, device: str) -> None:
    weights = make_actor_weights(16, 8, device=device)
    hidden = make_hidden(1, 6, 16).to(device)
    valid = torch.tensor([[True, True, True, True, False, False]], device=device)
    full = actor_score(hidden, 0, weights, valid_mask=valid, backend=backend)
    short = actor_score(hidden[:, :4], 0, weights, backend=backend)
    torch.testing.assert_close(full[:, :4], short)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_stage_changes_the_logits(backend: str, device: str) -> None:
    weights = make_actor_weights(16, 8, device=device)
    hidden = make_hidden(1, 6, 16).to(device)
    first, second = (actor_score(hidden, stage, weights, backend=backend) for stage in (0, 2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_empty(backend: str, batch: int, tokens: int, device: str) -> None:
    weights = make_actor_weights(16, 8, device=device)
    hidden = torch.zeros(batch, tokens, 16, device=device)
    assert actor_score(hidden, 0, weights, backend=backend).shape == (batch, tokens, 2)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_non_contiguous(backend: str, device: str) -> None:
    weights = make_actor_weights(16, 8, device=device)
    hidden = make_hidden(5, 2, 32).to(device).transpose(0, 1)[..., ::2]
    valid = torch.tensor([[1, 0, 1, 1, 1]] * 2, dtype=torch.bool, device=device).T.contiguous().T
    torch.testing.assert_close(
        actor_score(hidden, 0, weights, valid_mask=valid, backend=backend),
        actor_score(hidden.contiguous(), 0, weights, valid_mask=valid.contiguous(), backend=backend),
    )


def test_mixed_precision_runs_in_the_dtype_of_the_weights(device: str) -> None:
    weights = make_actor_weights(16, 8, device=device)
    hidden = make_hidden(1, 5, 16, torch.bfloat16).to(device)
    for backend in ("reference", "eager", "triton"):
        got = actor_score(hidden, 0, weights, backend=backend)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, actor_score(hidden.float(), 0, weights, backend="eager"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": torch.zeros(4, 16)}, ValueError, r"hidden_states must be \[B, N, d1\]"),
        ({"hidden_states": torch.zeros(1, 4, 12)}, ValueError, r"weights.norm_weight must be.*d1=12.*\(16,\)"),
        ({"stage": 3}, ValueError, r"stage=3 is outside 0..2"),
        ({"stage": -1}, ValueError, r"stage=-1 is outside 0..2"),
        ({"stage": 1.0}, TypeError, r"stage must be an int"),
        ({"weights": tuple(make_actor_weights(16, 8))}, TypeError, r"ActorWeights, got tuple"),
        ({"weights": make_actor_weights(16, 7)}, ValueError, r"d2=7 rows; d2 must be even"),
        ({"weights": make_actor_weights(16, 8)._replace(fc3_bias=torch.zeros(9))}, ValueError, r"weights.fc3_bias"),
        (
            {"weights": make_actor_weights(16, 8)._replace(head_bias=torch.zeros(2).half())},
            TypeError,
            r"weights.head_bias has dtype float16.*share one dtype",
        ),
        ({"valid_mask": torch.ones(1, 5, dtype=torch.bool)}, ValueError, r"valid_mask must be \[B, N\] = \(1, 4\)"),
        ({"valid_mask": torch.ones(1, 4)}, TypeError, r"valid_mask has dtype float32"),
    ],
)
def test_errors(changes: dict, error: type[Exception], message: str) -> None:
    arguments: dict = dict(hidden_states=torch.zeros(1, 4, 16), stage=0, weights=make_actor_weights(16, 8)) | changes
    with pytest.raises(error, match=message):
        actor_score(**arguments)


def test_width_limit_of_the_kernels() -> None:
    with pytest.raises(RuntimeError, match=r"d2=258.*d2 <= 256"):
        actor_score(torch.zeros(1, 4, 16), 0, make_actor_weights(16, 258), backend="triton")
