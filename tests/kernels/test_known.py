"""Tensors that were examined before: what counts as the same case, and that nothing else does."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from toprl_kernels import (
    actor_score,
    compact_cache,
    keep_mask_log_prob,
    masked_attention,
    sample_keep_mask,
    topk_compact,
)
from toprl_kernels._known import MAX_CASES, KnownCalls, examined
from toprl_kernels.actor import api as actor_score_api
from toprl_kernels.actor.reference import actor_score_reference
from toprl_kernels.actor.weights import ActorWeights
from toprl_kernels.attention import api as attention_api
from toprl_kernels.cache import api as cache_api
from toprl_kernels.keep_mask import api as keep_mask_api
from toprl_kernels.testing import make_actor_weights
from toprl_kernels.topk import api as topk_api

Tensors = tuple[Tensor, ...]


def make() -> Tensors:
    """Like hidden states [B, N, d] and a weight [d, d]."""
    return torch.randn(2, 5, 4), torch.randn(4, 4)


FINDING = examined("seen", make(), requires_grad=False)


class Named:
    """KnownCalls whose findings are names, remembered at once."""

    def __init__(self) -> None:
        self.calls = KnownCalls()

    def remember(self, name: str, tensors: Tensors, any_size: tuple[int, ...] = (), times: int = 2) -> None:
        for _ in range(times):
            self.calls.remember(FINDING._replace(op=name), tensors, any_size)

    def find(self, tensors: Tensors) -> str | None:
        found = self.calls.find(tensors)
        return None if found is None else found.op


@pytest.fixture
def known() -> Named:
    cases = Named()
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
    known: Named, same: Callable[[Tensor, Tensor], Tensors]
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
def test_another_case(known: Named, other: Callable[[Tensor, Tensor], Tensors]) -> None:
    assert known.find(other(*make())) is None


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), Mode],
    ids=["inference", "cast", "mode"],
)
def test_another_context_is_another_case(known: Named, context: Callable[[], AbstractContextManager]) -> None:
    x = make()
    with context():
        assert known.find((x[0].clone(), x[1].clone())) is None
    assert known.find(x) == "seen"


def test_transforms_are_another_case(known: Named) -> None:
    x, w = make()
    found = []

    def function(sample: Tensor) -> Tensor:
        found.append(known.find((sample[None], w)))
        return sample

    torch.vmap(function)(x)
    torch.func.grad(lambda sample: function(sample).sum())(x[0])
    assert found == [None, None]


def test_grad_mode_makes_no_difference(known: Named) -> None:
    with torch.no_grad():
        assert known.find(make()) == "seen"
        x, w = make()
        assert known.find((x, w.requires_grad_())) is None


def test_of_more_cases_than_fit_the_latest_stay() -> None:
    cases = Named()
    for width in range(MAX_CASES):
        cases.remember(str(width), (torch.empty(width),))
    assert cases.find((torch.empty(0),)) == "0"  # used again, so it is not the oldest any more
    cases.remember("new", (torch.empty(99),))
    assert cases.find((torch.empty(1),)) is None
    kept = [cases.find((torch.empty(width),)) for width in (0, *range(2, MAX_CASES), 99)]
    assert kept == ["0", *map(str, range(2, MAX_CASES)), "new"]


def test_sizes_that_come_once_are_not_remembered() -> None:
    """A decoding step of a single layer: no later call is like it, and to remember it costs more than to examine it."""
    cases = Named()
    for width in (1, 2, 1, 2):
        cases.remember("seen", (torch.empty(width),), times=1)
        assert cases.find((torch.empty(width),)) is None
    cases.remember("seen", (torch.empty(2),), times=1)
    assert cases.find((torch.empty(2),)) == "seen"


def test_a_call_in_which_others_have_a_say_is_not_remembered() -> None:
    cases = KnownCalls()
    x = make()
    for _ in range(3):
        cases.remember(FINDING._replace(is_plain=False), x)
    assert cases.find(x) is None


def test_one_tensor_in_two_places_pushes_nothing_out(known: Named) -> None:
    weight = torch.randn(4, 4)
    for _ in range(MAX_CASES):
        known.remember("tied", (weight, weight))
    assert known.find(make()) == "seen"


def test_fake_tensors_leave_nothing_behind() -> None:
    """Their sizes may be symbols, whose world must not outlive its trace."""
    cases = Named()
    with FakeTensorMode():
        x = make()
        cases.remember("fake", x)
        assert cases.find(x) is None


def test_no_tensor_is_held() -> None:
    cases = Named()
    x, w = make()
    held = weakref.ref(w)
    cases.remember("seen", (x, w))
    del w
    assert held() is None


def test_a_torch_without_these_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    cases = Named()
    cases.remember("seen", make())
    assert cases.find(make()) is None


# --- the op that uses them ---


def test_sizes_of_tokens_make_no_difference_to_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_score_api, "_known", KnownCalls())
    examined = count(monkeypatch, actor_score_api, "_examine")
    weights = make_actor_weights(16, 8)
    actor_score(torch.randn(2, 5, 16), 0, weights)
    actor_score(torch.randn(2, 5, 16), 0, weights)
    assert len(examined) == 2
    for tokens in (5, 9, 1):
        for stage in (0, 2):
            actor_score(torch.randn(2, tokens, 16), stage, weights)
    assert len(examined) == 2
    actor_score(torch.randn(2, 5, 16).requires_grad_(), 0, weights)
    assert len(examined) == 3


def count(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[int]:
    calls: list[int] = []
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: calls.append(1) or function(*arguments))
    return calls


q, k, v = torch.randn(3, 2, 2, 6, 4).unbind(0)
HARD = torch.tensor([[True, False, True, True, False, True]] * 2)
OPS = {
    "masked_attention": (attention_api, lambda q, m: masked_attention(q, k, v, m), (q, HARD)),
    "topk_compact": (topk_api, lambda x, scores: topk_compact(x, scores, 3), (torch.randn(2, 6, 4), torch.randn(2, 6))),
    "compact_cache": (cache_api, lambda k, i: compact_cache(k, v, i), (k, torch.tensor([[0, 2], [1, 5]]))),
    "sample_keep_mask": (keep_mask_api, lambda logits: sample_keep_mask(logits, seed=1), (torch.randn(2, 6, 2),)),
    "keep_mask_log_prob": (keep_mask_api, lambda logits: keep_mask_log_prob(logits, HARD), (torch.randn(2, 6, 2),)),
}


def forget(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    names = (keep_mask_api.OP, keep_mask_api.OP_LOG_PROB)
    monkeypatch.setattr(
        module, "_known", {name: KnownCalls() for name in names} if module is keep_mask_api else KnownCalls()
    )


@pytest.mark.parametrize("op", OPS)
def test_what_is_known_gives_the_same(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Values, and whether there is a gradient: at the first call, at the third, in other modes in between."""
    module, call, arguments = OPS[op]
    forget(monkeypatch, module)
    examined = count(monkeypatch, module, "_examine")
    first = call(*arguments)
    for _ in range(3):
        for got, want in zip(flat(call(*arguments)), flat(first), strict=True):
            assert torch.equal(got, want) and not got.requires_grad
    assert len(examined) == 2
    with torch.inference_mode():
        assert all(result.is_inference() for result in flat(call(*arguments)))
    assert len(examined) == 3
    leaf = arguments[0].clone().requires_grad_()
    for _ in range(3):
        assert any(result.requires_grad for result in flat(call(leaf, *arguments[1:])))
        with torch.no_grad():
            assert not any(result.requires_grad for result in flat(call(leaf, *arguments[1:])))
    assert len(examined) == 4  # sizes that were met before
    assert all(torch.equal(got, want) for got, want in zip(flat(call(*arguments)), flat(first), strict=True))
    assert len(examined) == 4  # sizes that were met before


def flat(result: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if part is not None]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", ["sizes", "dtype", "dimensions", "text"])
def test_errors_stay_where_a_case_is_known(monkeypatch: pytest.MonkeyPatch, op: str, wrong: str) -> None:
    module, call, arguments = OPS[op]
    forget(monkeypatch, module)
    for _ in range(3):
        call(*arguments)
    last: object = arguments[-1]
    if wrong == "sizes":
        last = arguments[-1].new_zeros(3, *(size + 1 for size in arguments[-1].shape[1:]))
    if wrong == "dtype":
        last = arguments[-1].to(torch.int32)
    if wrong == "dimensions":
        last = arguments[-1][0]
    if wrong == "text":
        last = "text"
    with pytest.raises((TypeError, ValueError), match=rf"{op}: "):
        call(*arguments[:-1], last)


def test_optional_arguments_are_checked_where_a_case_is_known() -> None:
    scores = torch.randn(2, 6)
    x = torch.randn(2, 6, 4)
    for _ in range(3):
        masked_attention(q, k, v, HARD)
        topk_compact(x, scores, 3)
    with pytest.raises(TypeError, match="key_padding_mask has dtype float32"):
        masked_attention(q, k, v, HARD, key_padding_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match="key_padding_mask must be"):
        masked_attention(q, k, v, HARD, key_padding_mask=HARD[:1])
    with pytest.raises(TypeError, match="key_padding_mask"):
        masked_attention(q, k, v, HARD, key_padding_mask="text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="valid_mask must be"):
        topk_compact(x, scores, 3, valid_mask=HARD[:1])
    with pytest.raises(ValueError, match="k=7 is outside"):
        topk_compact(x, scores, 7)


def test_the_environment_is_asked_where_a_case_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        masked_attention(q, k, v, HARD)
    monkeypatch.setenv("TOPRL_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="'nonsense' from the environment variable"):
        masked_attention(q, k, v, HARD)
    with pytest.raises(ValueError, match="'other' from the backend argument"):
        masked_attention(q, k, v, HARD, backend="other")


def test_data_that_changes_in_place_is_examined_again() -> None:
    mask = HARD.clone()
    for _ in range(3):
        masked_attention(q, k, v, mask)
    mask.data = mask.data.int()
    with pytest.raises(TypeError, match="keep_mask has dtype int32"):
        masked_attention(q, k, v, mask)


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
    monkeypatch.setattr(actor_score_api, "_known", KnownCalls())
    hidden, weights = torch.randn(2, 5, 16), make_actor_weights(16, 8)
    for enabled in (first, not first, first):
        weights.fc1_weight.requires_grad_(enabled)
        assert actor_score(hidden, 0, weights).requires_grad == enabled
        with torch.no_grad():
            assert not actor_score(hidden, 0, weights).requires_grad
        with torch.inference_mode():
            assert actor_score(hidden, 0, weights).is_inference()
