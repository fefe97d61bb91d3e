"""Tensors that were examined before: what counts as the same case, and that nothing else does."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from toprl_kernels import actor_score
from toprl_kernels._known import MAX_CASES, KnownCases
from toprl_kernels.actor_score import api
from toprl_kernels.actor_score.reference import actor_score_reference
from toprl_kernels.actor_score.weights import ActorWeights
from toprl_kernels.testing import make_actor_weights

Tensors = tuple[Tensor, ...]


def make() -> Tensors:
    """Like hidden states [B, N, d] and a weight [d, d]."""
    return torch.randn(2, 5, 4), torch.randn(4, 4)


@pytest.fixture
def known() -> KnownCases[str]:
    cases: KnownCases[str] = KnownCases()
    cases.remember("seen", make(), any_size=(0, 1))
    return cases


@pytest.mark.parametrize(
    "same",
    [
        lambda x, w: (x, w),
        lambda x, w: (x[:1], w),
        lambda x, w: (torch.randn(7, 0, 4), w),
        lambda x, w: (x.transpose(0, 1), w.T),
        lambda x, w: (x.expand(2, 5, 4)[:, ::2], w.clone()),
        lambda x, w: (x, w.mul_(2)),
    ],
)
def test_other_values_sizes_and_strides_are_the_same_case(
    known: KnownCases[str], same: Callable[[Tensor, Tensor], Tensors]
) -> None:
    assert known.find(same(*make())) == "seen"


def retyped(x: Tensor, w: Tensor) -> Tensors:
    w.data = w.data.double()  # the same object
    return x, w


def resized(x: Tensor, w: Tensor) -> Tensors:
    w.data = torch.randn(4, 3)
    return x, w


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: (x.double(), w),
        lambda x, w: (x, w.half()),
        retyped,
        resized,
        lambda x, w: (x[..., :3], w),
        lambda x, w: (x[0], w),
        lambda x, w: (x, w[None]),
        lambda x, w: (x, w.requires_grad_()),
        lambda x, w: (x.requires_grad_(), w),
        lambda x, w: (x.to("meta"), w),
        lambda x, w: (x, torch.nn.Parameter(w, requires_grad=False)),
        lambda x, w: (TwoTensor(x, x), w),
        lambda x, w: (x, w.to_sparse()),
        lambda x, w: (x, None),
        lambda x, w: ("text", w),
    ],
)
def test_another_case(known: KnownCases[str], other: Callable[[Tensor, Tensor], Tensors]) -> None:
    assert known.find(other(*make())) is None


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), Mode],
    ids=["inference", "cast", "mode"],
)
def test_another_context_is_another_case(known: KnownCases[str], context: Callable[[], AbstractContextManager]) -> None:
    x = make()
    with context():
        assert known.find((x[0].clone(), x[1].clone())) is None
    assert known.find(x) == "seen"


def test_transforms_are_another_case(known: KnownCases[str]) -> None:
    x, w = make()
    found = []

    def function(sample: Tensor) -> Tensor:
        found.append(known.find((sample[None], w)))
        return sample

    torch.vmap(function)(x)
    torch.func.grad(lambda sample: function(sample).sum())(x[0])
    assert found == [None, None]


def test_grad_mode_makes_no_difference(known: KnownCases[str]) -> None:
    with torch.no_grad():
        assert known.find(make()) == "seen"
        x, w = make()
        assert known.find((x, w.requires_grad_())) is None


def test_of_more_cases_than_fit_the_latest_stay() -> None:
    cases: KnownCases[int] = KnownCases()
    for width in range(1, MAX_CASES + 2):
        cases.remember(width, (torch.empty(width),))
    assert cases.find((torch.empty(1),)) is None
    assert [cases.find((torch.empty(width),)) for width in range(2, MAX_CASES + 2)] == list(range(2, MAX_CASES + 2))


def test_one_tensor_in_two_places_pushes_nothing_out(known: KnownCases[str]) -> None:
    weight = torch.randn(4, 4)
    for _ in range(MAX_CASES):
        known.remember("tied", (weight, weight))
    assert known.find(make()) == "seen"


def test_fake_tensors_leave_nothing_behind() -> None:
    """Their sizes may be symbols, whose world must not outlive its trace."""
    cases: KnownCases[str] = KnownCases()
    with FakeTensorMode():
        x = make()
        cases.remember("fake", x)
        assert cases.find(x) is None


def test_no_tensor_is_held() -> None:
    cases: KnownCases[str] = KnownCases()
    x, w = make()
    held = weakref.ref(w)
    cases.remember("seen", (x, w))
    del w
    assert held() is None


def test_a_torch_without_these_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    cases: KnownCases[str] = KnownCases()
    cases.remember("seen", make())
    assert cases.find(make()) is None


# --- the op that uses them ---


def test_the_second_call_examines_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_known", KnownCases())
    examined = []
    examine = api._examine
    monkeypatch.setattr(api, "_examine", lambda *arguments: examined.append(1) or examine(*arguments))
    weights = make_actor_weights(16, 8)
    for tokens in (5, 9, 1):
        for stage in (0, 2):
            actor_score(torch.randn(2, tokens, 16), stage, weights)
    assert len(examined) == 1
    actor_score(torch.randn(2, 5, 16).requires_grad_(), 0, weights)
    assert len(examined) == 2


def test_a_known_case_is_checked_for_what_it_does_not_know() -> None:
    hidden, weights = torch.randn(2, 5, 16), make_actor_weights(16, 8, 3)
    actor_score(hidden, 2, weights)
    with pytest.raises(ValueError, match=r"stage=3 is outside 0\.\.2"):
        actor_score(hidden, 3, weights)
    with pytest.raises(TypeError, match="stage must be an int, got True"):
        actor_score(hidden, True, weights)
    last = enum.IntEnum("Stage", {"LAST": 2}).LAST
    torch.testing.assert_close(actor_score(hidden, last, weights), actor_score(hidden, 2, weights))
    with pytest.raises(ValueError, match="valid_mask"):
        actor_score(hidden, 2, weights, valid_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="ActorWeights"):
        actor_score(hidden, 2, tuple(weights))  # type: ignore[arg-type]


def test_weights_that_change_in_place_are_examined_again() -> None:
    hidden, weights = torch.randn(2, 5, 16), make_actor_weights(16, 8)
    actor_score(hidden, 1, weights)
    weights.fc2_weight.data = weights.fc2_weight.data.double()
    with pytest.raises(TypeError, match=r"weights\.fc2_weight has dtype float64"):
        actor_score(hidden, 1, weights)
    for weight in weights:
        weight.data = weight.data.double()
    assert actor_score(hidden, 1, weights).dtype == torch.float64
    weights.fc2_weight.data = weights.fc2_weight.data[:, :6]
    with pytest.raises(ValueError, match=r"weights\.fc2_weight must be"):
        actor_score(hidden, 1, weights)


def test_symbolic_sizes_stay_symbolic() -> None:
    weights = make_actor_weights(16, 8)

    def score(hidden: Tensor, *tensors: Tensor) -> Tensor:
        return actor_score(hidden, 1, ActorWeights(*tensors))

    traced = make_fx(score, tracing_mode="symbolic")(torch.randn(7, 5, 16), *weights)
    hidden = torch.randn(3, 9, 16)
    torch.testing.assert_close(traced(hidden, *weights), actor_score(hidden, 1, weights))
    batch, num_tokens, _ = next(iter(traced.graph.nodes)).meta["val"].shape
    assert not isinstance(batch, int) and not isinstance(num_tokens, int)
    for size in (batch, num_tokens):
        assert size.node.shape_env.replace(size.node.expr).free_symbols  # no guard has fixed it


def test_tied_weights() -> None:
    hidden, weights = torch.randn(2, 5, 16), make_actor_weights(16, 8)
    tied = ActorWeights(*weights)._replace(fc3_weight=weights.fc2_weight, fc3_bias=weights.fc2_bias)
    leaves = {weight.requires_grad_() for weight in tied}
    for _ in range(2):
        got, want = actor_score(hidden, 1, tied), actor_score_reference(hidden, 1, tied, valid_mask=None)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(output.square().sum(), list(leaves)) for output in (got, want)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [False, True])
def test_gradients_whatever_came_before(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    monkeypatch.setattr(api, "_known", KnownCases())
    hidden, weights = torch.randn(2, 5, 16), make_actor_weights(16, 8)
    for enabled in (first, not first, first):
        weights.fc1_weight.requires_grad_(enabled)
        assert actor_score(hidden, 0, weights).requires_grad == enabled
        with torch.no_grad():
            assert not actor_score(hidden, 0, weights).requires_grad
        with torch.inference_mode():
            assert actor_score(hidden, 0, weights).is_inference()
