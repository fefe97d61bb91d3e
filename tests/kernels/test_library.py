"""What all registered ops share: a call goes around the dispatcher where that has nothing to do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from toprl_kernels import actor_score, compact_cache, masked_attention, sample_keep_mask, topk_compact
from toprl_kernels._library import is_plain_call
from toprl_kernels.actor import library as actor_score_library
from toprl_kernels.attention import library as masked_attention_library
from toprl_kernels.backend import OPS
from toprl_kernels.cache import library as compact_cache_library
from toprl_kernels.keep_mask import library as keep_mask_library
from toprl_kernels.testing import make_actor_weights, make_attention_inputs
from toprl_kernels.topk import library as topk_compact_library

Case = tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]


def make(op: str) -> Case:
    """A call, whose first result has a gradient, and what that gradient is by."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 8, 16, requires_grad=True)
    if op == "masked_attention":
        x = make_attention_inputs(1, 2, 2, 8, 8, 16, mask="hard")
        leaves = [tensor.requires_grad_() for tensor in (x.query, x.key, x.value)]
        return lambda: (masked_attention(*leaves, x.keep_mask, is_causal=True),), leaves
    if op == "topk_compact":
        scores = torch.randn(2, 8, requires_grad=True)  # gets none
        return lambda: tuple(topk_compact(hidden, scores, 4, return_inverse=True)[:3]), [hidden]
    if op == "compact_cache":
        leaves = list(torch.randn(2, 1, 2, 8, 16).unbind(0))
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        return lambda: tuple(compact_cache(*leaves, torch.arange(4)[None])), leaves
    if op == "actor_score":
        weights = make_actor_weights(16, 8)
        leaves = [hidden, *(weight.requires_grad_() for weight in weights)]
        # autograd records the eager path operation by operation; only the kernels are an op with a gradient
        return lambda: (actor_score(hidden, 0, weights, backend="triton"),), leaves
    logits = torch.randn(1, 8, 2, requires_grad=True)
    return lambda: tuple(sample_keep_mask(logits, seed=3)), [logits]


class Dispatched(TorchDispatchMode):
    """Under any mode the ops go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.seen.append(function.name())
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("op", OPS)
def test_around_the_dispatcher_and_through_it(op: str) -> None:
    call, leaves = make(op)
    direct = call()
    direct_gradients = torch.autograd.grad(direct[0].square().sum(), leaves, allow_unused=True)
    with Dispatched() as mode:
        dispatched = call()
        gradients = torch.autograd.grad(dispatched[0].square().sum(), leaves, allow_unused=True)
    assert [name for name in mode.seen if name.startswith("toprl_kernels::")]
    for one, other in zip(direct, dispatched, strict=True):
        assert one.requires_grad == other.requires_grad
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert any(gradient is not None for gradient in gradients)
    for one, other in zip(direct_gradients, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_results_that_are_there_for_the_backward_have_no_gradient() -> None:
    _, leaves = make("masked_attention")
    op = masked_attention_library.forward
    for call in (op, op.overload):
        first, *others = call(*leaves, torch.ones(1, 8, dtype=torch.bool), None, True, 0.25, False, "eager")
        assert first.requires_grad and others
        assert not any(other.requires_grad for other in others)


OF_OPS = {
    "masked_attention": masked_attention_library.forward,
    "topk_compact": topk_compact_library.forward_op,
    "compact_cache": compact_cache_library.forward_op,
    "actor_score": actor_score_library.logits_op,
    "sample_keep_mask": keep_mask_library.forward_op,
}


@pytest.mark.parametrize("op", OPS)
def test_who_runs(op: str) -> None:
    registered = OF_OPS[op]
    plain = torch.ones(2)

    def route(tensor: Tensor, requires_grad: bool) -> Callable[..., object]:
        return registered.route(is_plain_call(tensor), requires_grad, tensor)

    assert route(plain, False) == registered.implementation
    assert route(plain, True) == registered.recorded
    with torch.no_grad():
        assert route(plain, True) == registered.implementation
    with torch.autocast("cpu", torch.bfloat16):
        assert route(plain, True).args == (registered.recorded,)  # type: ignore[attr-defined]
    with Dispatched():
        assert route(plain, True) == registered.overload
    assert route(TwoTensor(plain, plain), True) == registered.overload


@pytest.mark.parametrize("op", OPS)
def test_without_grad_mode_there_is_no_node(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    call, _ = make(op)
    monkeypatch.setattr(OF_OPS[op], "recorded", None)
    with torch.no_grad():
        assert not any(result.requires_grad for result in call())


@pytest.mark.parametrize("op", OPS)
def test_each_input_gets_its_gradient_alone(op: str) -> None:
    call, leaves = make(op)
    for leaf in leaves:
        for other in leaves:
            other.requires_grad_(other is leaf)
        results = [result for result in call() if result.requires_grad]
        assert {result.grad_fn.name() for result in results} == {f"{OF_OPS[op].name}_functionBackward"}  # not aten's
        (gradient,) = torch.autograd.grad(sum(result.square().sum() for result in results), [leaf])
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("op", OPS)
def test_a_graph_goes_with_its_last_result(op: str) -> None:
    """No reference cycle: activations would stay until the garbage collector comes by."""
    call, _ = make(op)
    gc.collect()
    gc.disable()
    try:
        results = call()
        node = weakref.ref(results[0].grad_fn)
        assert node() is not None
        del results
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("op", OPS)
def test_what_the_backward_needs_may_not_change_before_it(op: str) -> None:
    call, leaves = make(op)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        call()
    assert saved  # through save_for_backward, which also counts versions
    if op == "masked_attention":
        result = call()[0]
        with torch.no_grad():
            leaves[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()
