"""What torch.library, autograd and the compiler ask of every op, in one suite over a table of calls."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from toprl_kernels import (
    ActorWeights,
    actor_score,
    attention_plan,
    compact_cache,
    configs,
    keep_mask_log_prob,
    masked_attention,
    prune_stage,
    sample_keep_mask,
    topk_compact,
)
from toprl_kernels.testing import make_actor_weights, make_attention_inputs

Call = tuple[Callable[..., Any], list[Tensor]]  # a function of tensors with a gradient, and those
BACKENDS = ["eager", "triton"]
CALLS: dict[str, Callable[[str], Call]] = {}


def call(make: Callable[[str], Call]) -> Callable[[str], Call]:
    CALLS[make.__name__.replace("_", " ")] = make
    return make


def attention_inputs(mask: str, **options: Any) -> list[Tensor]:
    x = make_attention_inputs(1, 2, 1, 5, 7, 16, mask=mask, **options)
    return [*x[:4], torch.ones(1, 7, dtype=torch.bool) if x.key_padding_mask is None else x.key_padding_mask]


@call
def attention(backend: str) -> Call:
    *leaves, mask, _ = attention_inputs("hard")
    return lambda q, k, v: masked_attention(q, k, v, mask, is_causal=True, backend=backend), leaves


@call
def attention_with_a_mask_gradient(backend: str) -> Call:
    *leaves, padding = attention_inputs("mixed", padding=True)

    def run(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return masked_attention(q, k, v, m, key_padding_mask=padding, return_lse=True, backend=backend)

    return run, leaves


@call
def attention_with_a_plan(backend: str) -> Call:
    *leaves, mask, padding = attention_inputs("soft", padding=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = attention_plan(mask, padding, is_causal=True, window=3, backend=backend)
        return masked_attention(q, k, v, plan=plan, backend=backend)

    return run, leaves


@call
def sampling(backend: str) -> Call:
    seed, previous = torch.tensor([3]), torch.rand(2, 7) < 0.7

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(sample_keep_mask(logits, seed=seed, previous_mask=previous, tau=0.5, backend=backend))

    return run, [torch.randn(2, 7, 2)]


@call
def sampling_with_given_noise(backend: str) -> Call:
    uniform = torch.rand(2, 7).clamp(0.01, 0.99)
    return lambda logits: tuple(sample_keep_mask(logits, uniform=uniform, backend=backend)), [torch.randn(2, 7, 2)]


@call
def log_probability(backend: str) -> Call:
    given = torch.rand(2, 7) > 0.5
    return lambda logits: keep_mask_log_prob(logits, given, backend=backend), [torch.randn(2, 7, 2)]


@call
def selection(backend: str) -> Call:
    scores = torch.randn(2, 8)
    return lambda hidden: tuple(topk_compact(hidden, scores, 4, return_inverse=True, backend=backend)), [
        torch.randn(2, 8, 16)
    ]


@call
def ragged_selection(backend: str) -> Call:
    scores, k, valid = torch.randn(2, 8), torch.tensor([2, 5]), torch.rand(2, 8) < 0.8
    positions = torch.randint(0, 9, (3, 2, 8))

    def run(hidden: Tensor) -> tuple[Any, ...]:
        options = dict(position_ids=positions, valid_mask=valid, max_length=5, padding_side="left")
        return tuple(topk_compact(hidden, scores, k, **options, backend=backend))

    return run, [torch.randn(2, 8, 16)]


@call
def selection_per_segment(backend: str) -> Call:
    scores, segments = torch.randn(2, 8), torch.arange(8).expand(2, -1) // 3
    k = torch.tensor([[1, 2, 1], [0, 3, 2]])

    def run(hidden: Tensor) -> tuple[Any, ...]:
        return tuple(topk_compact(hidden, scores, k, segments=segments, max_length=5, backend=backend))

    return run, [torch.randn(2, 8, 16)]


@call
def packed_selection(backend: str) -> Call:
    scores, bounds = torch.randn(11), torch.tensor([0, 4, 4, 11])
    return lambda hidden: tuple(topk_compact(hidden, scores, 3, cu_seqlens=bounds, backend=backend)), [
        torch.randn(11, 16)
    ]


@call
def stage(backend: str) -> Call:
    columns = torch.tensor([[-1, 0, 1, 2, 3, -1], [-1, -1, 0, 1, 2, -1]])
    scores, valid, k = torch.randn(2, 4, 2), torch.ones(2, 6, dtype=torch.bool), torch.tensor([2, 1])
    table, positions = torch.randn(1, 6, 8), torch.arange(6)[None]

    def run(hidden: Tensor) -> tuple[Any, ...]:
        out = prune_stage(
            hidden, scores, columns, k, length=5, width=2, valid_mask=valid, position_ids=positions, tables=[table],
            backend=backend,
        )  # fmt: skip
        return tuple(part for part in out if isinstance(part, Tensor))

    return run, [torch.randn(2, 6, 16)]


@call
def cache(backend: str) -> Call:
    indices = torch.tensor([[0, 2, 3, 7], [1, 4, -1, -1]])
    return lambda keys, values: compact_cache(keys, values, indices, backend=backend), [
        torch.randn(2, 2, 8, 16),
        torch.randn(2, 2, 8, 12),
    ]


@call
def actor(backend: str) -> Call:
    valid = torch.rand(2, 8) < 0.8

    def run(hidden: Tensor, *weights: Tensor) -> Tensor:
        return actor_score(hidden, 1, ActorWeights(*weights), valid_mask=valid, backend=backend)

    return run, [torch.randn(2, 8, 16), *make_actor_weights(16, 8)]


@pytest.fixture(autouse=True)
def _small_blocks() -> Iterator[None]:
    """Blocks that suit a dozen tokens: the interpreter computes whole blocks."""
    names = [kernel for kernel in configs.KERNELS if kernel.startswith("masked_attention")]
    small = dict.fromkeys(names, configs.LaunchConfig(16, 16, 4, 1))
    small["masked_attention_bwd_prepare"] = configs.LaunchConfig(64, 0, 4, 1)
    with configs.override(small | {"masked_attention_lists": configs.LaunchConfig(0, 256, 4, 1)}):
        yield


@pytest.fixture(params=CALLS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def made(backend: str, name: str) -> Call:
    """A call, its tensors requiring gradients."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    run, leaves = CALLS[name](backend)
    return run, [leaf.clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]


# In eager sampling is plain torch. What the heaviest tests leave out of Triton's calls has a sibling of the same op.
SAMPLING = ("sampling", "sampling with given noise", "log probability")
REGISTERED = [(backend, name) for backend in BACKENDS for name in CALLS if backend == "triton" or name not in SAMPLING]
SIBLINGS = ("attention", "sampling with given noise", "selection", "packed selection")
registered = pytest.mark.parametrize(("backend", "name"), REGISTERED)
one_per_op = pytest.mark.parametrize(
    ("backend", "name"), [pair for pair in REGISTERED if pair not in [("triton", name) for name in SIBLINGS]]
)


def outputs(run: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """The tensors among the results."""
    results = run(*leaves)
    return [part for part in (results if isinstance(results, tuple) else (results,)) if isinstance(part, Tensor)]


def differentiable(results: list[Tensor]) -> Tensor:
    return sum(
        (result * torch.linspace(1, 2, result.numel()).view(result.shape)).sum()
        for result in results
        if result.requires_grad
    )


class Recorder(TorchDispatchMode):
    """The calls of registered ops, and the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        if function.name().startswith("toprl_kernels::"):
            self.calls.append((function, arguments))
        return function(*arguments, **(options or {}))


@one_per_op
def test_opcheck(made: Call) -> None:
    """Of every registered op that the call and its gradient run, with the arguments that they ran with."""
    run, leaves = made
    with Recorder() as recorder:
        torch.autograd.grad(differentiable(outputs(run, leaves)), leaves, allow_unused=True)
        with torch.no_grad():  # some run in plain torch when a gradient is needed
            if not recorder.calls:
                run(*leaves)
    assert recorder.calls
    memory = {leaf.data_ptr() for leaf in leaves}
    for function, arguments in recorder.calls:
        is_backward = re.search("backward|scatter", function.name())

        def given(part: Any, is_backward: bool = bool(is_backward)) -> Any:
            if not isinstance(part, Tensor):
                return part
            return part.detach().requires_grad_(not is_backward and part.data_ptr() in memory)

        torch.library.opcheck(function, torch.utils._pytree.tree_map(given, tuple(arguments)))


def test_compiles_whole(made: Call) -> None:
    run, leaves = made
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = outputs(run, leaves), outputs(compiled, leaves)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(differentiable(results), leaves) for results in (want, got)]
    torch.testing.assert_close(*gradients)


def test_dynamic_shapes_compile_once() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, backend: str) -> Tensor:
        once = masked_attention(q, k, v, mask, is_causal=True, backend=backend)
        return masked_attention(once + q, k, v, mask > 0, is_causal=True, backend=backend)

    for backend in BACKENDS:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
        for length in (12, 21, 40) if backend == "eager" else (6, 9):
            x = make_attention_inputs(2, 4, 2, length - 3, length, 16)
            torch.testing.assert_close(compiled(*x[:4], backend), run(*x[:4], backend))
        assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager"])
@pytest.mark.parametrize("name", ["attention with a plan", "ragged selection", "stage", "cache", "actor", "sampling"])
def test_compiles_with_inductor(made: Call) -> None:
    run, leaves = made
    torch.testing.assert_close(outputs(torch.compile(run, fullgraph=True), leaves), outputs(run, leaves))


@registered
def test_exports(made: Call) -> None:
    run, leaves = made

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return run(*tensors)

    plain = tuple(leaf.detach() for leaf in leaves)
    program = torch.export.export(Module(), plain)
    assert any("toprl_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(outputs(program.module(), list(plain)), outputs(run, list(plain)), rtol=0, atol=0)


def test_fake_tensors_have_the_layout_of_real_ones(made: Call) -> None:
    run, leaves = made
    real = outputs(run, leaves)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = outputs(run, [mode.from_tensor(leaf) for leaf in leaves])
    for got, want in zip(fake, real, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@one_per_op
def test_each_input_gets_its_gradient_alone(made: Call) -> None:
    run, leaves = made
    together = torch.autograd.grad(differentiable(outputs(run, leaves)), leaves)
    for position, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (gradient,) = torch.autograd.grad(differentiable(outputs(run, leaves)), [leaf])
        torch.testing.assert_close(gradient, together[position], rtol=1e-4, atol=1e-5)
        assert gradient.abs().sum() > 0


def test_checkpointing(made: Call) -> None:
    run, leaves = made
    want = torch.autograd.grad(differentiable(outputs(run, leaves)), leaves)
    again = torch.utils.checkpoint.checkpoint(lambda *tensors: run(*tensors), *leaves, use_reentrant=False)
    results = [part for part in (again if isinstance(again, tuple) else (again,)) if isinstance(part, Tensor)]
    torch.testing.assert_close(torch.autograd.grad(differentiable(results), leaves), want, rtol=0, atol=0)


def test_without_grad_mode_there_is_no_graph(made: Call) -> None:
    run, leaves = made
    with torch.no_grad():
        assert not any(result.requires_grad for result in outputs(run, leaves))


class Box:
    """A saved tensor that can be referred to weakly."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_a_graph_goes_with_its_last_result(made: Call) -> None:
    """No reference cycle: activations would stay until the garbage collector comes by."""
    run, leaves = made
    boxes: list[weakref.ref[Box]] = []

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor.detach())
        boxes.append(weakref.ref(box))
        return box

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            results = outputs(run, leaves)
        assert boxes and boxes[0]() is not None
        del results
        assert not any(box() for box in boxes)
    finally:
        gc.enable()


def test_runs_are_bitwise_equal(made: Call) -> None:
    """Results and gradients. How many runs: as many as the interpreter does in a second or two."""
    run, leaves = made
    first: list[Tensor] = []
    for _ in range(3):
        results = outputs(run, leaves)
        results += torch.autograd.grad(differentiable(results), leaves)
        first = first or results
        assert all(map(torch.equal, first, results))


@registered
def test_vmap_and_forward_mode_are_refused(made: Call) -> None:
    run, leaves = made
    with pytest.raises(NotImplementedError, match=r"torch.vmap is not supported.*flatten"):
        torch.vmap(run)(*(leaf.detach()[None].expand(2, *leaf.shape) for leaf in leaves))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaves[0].detach(), torch.ones_like(leaves[0]))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
            run(dual, *(leaf.detach() for leaf in leaves[1:]))


def test_autocast_changes_nothing_but_what_torch_casts(made: Call, name: str) -> None:
    """Attention casts query, key and value as torch's own attention does; a mask keeps its digits."""
    run, leaves = made
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(run, leaves)
    cast = [leaf.bfloat16() for leaf in leaves[:3]] + leaves[3:] if name.startswith("attention") else leaves
    want = outputs(run, cast)
    gradients = [torch.autograd.grad(differentiable(results), leaves) for results in (got, want)]
    assert all(map(torch.equal, got, want)) and all(map(torch.equal, *gradients))


def test_negative_bits_are_resolved(made: Call) -> None:
    run, leaves = made
    want = outputs(run, leaves)
    negative = [
        torch.view_as_complex(torch.stack([leaf.detach(), -leaf.detach()], dim=-1)).conj().imag for leaf in leaves
    ]
    assert all(tensor.is_neg() for tensor in negative)
    for got, expected in zip(outputs(run, negative), want, strict=True):
        torch.testing.assert_close(got, expected)
