"""actor_score as a registered op, its folded weights, and the choice between kernels and eager path."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from toprl_kernels import ActorWeights, actor_score, configs
from toprl_kernels.actor import library
from toprl_kernels.actor import triton as kernels
from toprl_kernels.configs import Measurements, Times
from toprl_kernels.testing import make_actor_weights

BACKENDS = ("eager", "triton")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    kernels.forget_folded_weights()
    configs.forget()
    yield
    configs.forget()


def inputs(tokens: int = 7, d2: int = 8) -> tuple[Tensor, ActorWeights, Tensor]:
    hidden = torch.randn(2, tokens, 16)
    return hidden, make_actor_weights(16, d2), torch.rand(2, tokens) < 0.7


# --- registration ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_training", [False, True])
def test_opcheck_forward(backend: str, is_training: bool) -> None:
    hidden, weights, valid = inputs()
    leaves = [tensor.requires_grad_(is_training) for tensor in weights]
    for mask in (valid, None):
        torch.library.opcheck(library.logits_op.overload, (hidden, *leaves, mask, 1, backend))


@pytest.mark.parametrize("needs", [[True] * 12, [True] + [False] * 11, [False] * 3 + [True] + [False] * 8])
def test_opcheck_backward(needs: list[bool]) -> None:
    hidden, weights, valid = inputs()
    arguments = (torch.randn(2, 7, 2), hidden, *weights, valid, 1, needs)
    torch.library.opcheck(library.backward_op.overload, arguments)


def step(hidden: Tensor, weights: ActorWeights, valid: Tensor | None, backend: str) -> Tensor:
    """Used twice in one graph."""
    first = actor_score(hidden, 0, weights, valid_mask=valid, backend=backend)
    second = actor_score(hidden * first.sigmoid().sum(), 2, weights, backend=backend)
    return (first + second) * 2


def gradients(function: Callable[..., Tensor], tokens: int, backend: str) -> list[Tensor]:
    torch.manual_seed(tokens)
    hidden, weights, valid = inputs(tokens)
    leaves = [hidden.requires_grad_(), *(tensor.requires_grad_() for tensor in weights)]
    output = function(hidden, ActorWeights(*leaves[1:]), valid, backend)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_with_dynamic_shapes(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = set()
    for tokens in (7, 12, 33):
        for got, want in zip(gradients(compiled, tokens, backend), gradients(step, tokens, backend), strict=True):
            torch.testing.assert_close(got, want)
        compilations.add(counter.frame_count)  # dynamo may trace the first call twice: LayerNorm's eps is a float
    assert len(compilations) == 1


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    compiled = torch.compile(step, fullgraph=True)
    for got, want in zip(gradients(compiled, 9, "eager"), gradients(step, 9, "eager"), strict=True):
        torch.testing.assert_close(got, want)


def test_exports() -> None:
    hidden, weights, _ = inputs()

    class Scorer(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return actor_score(hidden, 1, weights)

    exported = torch.export.export(Scorer(), (hidden,))
    torch.testing.assert_close(exported.module()(hidden), actor_score(hidden, 1, weights))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_vmap_is_refused(needs_gradient: bool) -> None:
    hidden, weights, _ = inputs()
    if needs_gradient:
        weights[3].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"actor_score\w*: torch.vmap is not supported.*flatten"):
        torch.vmap(lambda x: actor_score(x, 0, weights))(hidden[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    hidden, weights, valid = inputs()
    hidden.requires_grad_()
    plain = actor_score(hidden, 0, weights, valid_mask=valid, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        under = actor_score(hidden, 0, weights, valid_mask=valid, backend=backend)
    assert under.dtype == torch.float32
    assert torch.equal(under, plain)
    first, second = (torch.autograd.grad(output.sum(), hidden)[0] for output in (plain, under))
    assert torch.equal(first, second)


def test_second_derivative_is_refused() -> None:
    hidden, weights, _ = inputs()
    hidden.requires_grad_()
    logits = actor_score(hidden, 0, weights, backend="triton")
    (gradient,) = torch.autograd.grad(logits.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), hidden)


def test_float64_goes_to_the_definition() -> None:
    hidden, weights, valid = inputs()
    wide = ActorWeights(*(tensor.double() for tensor in weights))
    got = actor_score(hidden, 0, wide, valid_mask=valid)
    assert torch.equal(got, actor_score(hidden, 0, wide, valid_mask=valid, backend="reference"))


# --- folded weights ---


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[ActorWeights]:
    """What was folded, in order."""
    seen: list[ActorWeights] = []
    fold = kernels.fold

    def counting(weights: ActorWeights) -> kernels.FoldedWeights:
        seen.append(weights)
        return fold(weights)

    monkeypatch.setattr(kernels, "fold", counting)
    return seen


def assert_right(hidden: Tensor, weights: ActorWeights, stage: int = 0) -> None:
    want = actor_score(hidden, stage, weights, backend="eager")
    torch.testing.assert_close(actor_score(hidden, stage, weights, backend="triton"), want, rtol=1e-4, atol=1e-5)


def test_weights_are_folded_once_for_all_stages(folds: list[ActorWeights]) -> None:
    hidden, weights, _ = inputs()
    for stage in (0, 1, 2, 0):
        assert_right(hidden, ActorWeights(*weights), stage)  # a new tuple of the same tensors
    assert len(folds) == 1


@pytest.mark.parametrize("name", ["fc1_weight", "fc1_bias", "norm_weight", "norm_bias", "stage_bias"])
def test_a_written_weight_is_folded_again(name: str, folds: list[ActorWeights]) -> None:
    hidden, weights, _ = inputs()
    assert_right(hidden, weights)
    with torch.no_grad():
        getattr(weights, name).add_(0.5)
    assert_right(hidden, weights)
    assert len(folds) == 2


def test_an_optimizer_step_is_seen(folds: list[ActorWeights]) -> None:
    hidden, weights, _ = inputs()
    parameters = [torch.nn.Parameter(tensor) for tensor in weights]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        loss = actor_score(hidden, 0, ActorWeights(*parameters), backend="triton").square().sum()
        loss.backward()
        optimizer.step()
    assert_right(hidden, ActorWeights(*parameters))
    assert len(folds) == 3


def test_a_replaced_weight_is_folded_again(folds: list[ActorWeights]) -> None:
    hidden, weights, _ = inputs()
    assert_right(hidden, weights)
    assert_right(hidden, weights._replace(norm_weight=weights.norm_weight * 2))
    assert_right(hidden, weights)  # the first ones are still remembered
    assert len(folds) == 2


def test_a_converted_module_is_folded_again(folds: list[ActorWeights]) -> None:
    """module.to(...) sets parameter.data: the same object, the same version, other memory and another type."""
    hidden, weights, _ = inputs()
    parameters = [torch.nn.Parameter(tensor) for tensor in weights]
    with torch.no_grad():
        assert_right(hidden, ActorWeights(*parameters))
        for parameter in parameters:
            parameter.data = parameter.data * 2
        assert_right(hidden, ActorWeights(*parameters))
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
        assert actor_score(hidden, 0, ActorWeights(*parameters), backend="triton").dtype == torch.bfloat16
    assert len(folds) == 3


def test_weights_are_held_weakly() -> None:
    for _ in range(3):
        hidden, weights, _ = inputs()
        assert_right(hidden, weights)
    assert len(kernels._folded) <= 1 + 2  # what the loop still holds, and reference cycles not yet collected
    del hidden, weights
    gc.collect()
    assert not kernels._folded


def test_inference_tensors_are_folded_every_time(folds: list[ActorWeights]) -> None:
    with torch.inference_mode():
        hidden, weights, _ = inputs()
        assert_right(hidden, weights)
        weights.fc1_weight.mul_(2.0)  # not counted by any version
        assert_right(hidden, weights)
    assert len(folds) == 2


# --- dispatch ---


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which implementation ran, in order."""
    names: list[str] = []
    for name, module, function in (("triton", kernels, "actor_score_triton"), ("eager", library, "actor_score_eager")):
        original = getattr(module, function)

        def recording(*arguments, name=name, original=original):  # type: ignore[no-untyped-def]
            names.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, function, recording)
    return names


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, path: Path, times: dict) -> None:
    """CPU tensors that ask about a GPU of capability 9.0 with these measurements."""
    monkeypatch.setattr(configs, "capability_of", lambda device: (9, 0))
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(path))
    configs.write(path, "sm_90", Measurements("NVIDIA Test", {}, times))
    faster = configs.faster
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(
        library, "configs", SimpleNamespace(faster=lambda op, sizes, dtype, device: faster(op, sizes, dtype, cuda))
    )


def test_measured_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: list[str]) -> None:
    def bucket(tokens: int) -> tuple[str, str, tuple[int, ...]]:
        return "actor_score", "32 bit", configs.size_bucket((2 * tokens, 16, 8))

    pretend_cuda(monkeypatch, tmp_path / "m.json", {bucket(7): Times(1.0, 2.0), bucket(20): Times(2.0, 1.0)})
    for tokens in (7, 8, 20, 100):
        hidden, weights, valid = inputs(tokens)
        library.logits_op(hidden, *weights, valid, 0, library.MEASURED)
    assert ran == ["triton", "triton", "eager", "eager"]


@pytest.mark.parametrize(
    ("backend", "needs_gradient", "passed"),
    [(None, False, "measured"), ("auto", False, "measured"), (None, True, "autograd"), ("triton", True, "triton")],
)
def test_automatic_choice_on_cuda(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, needs_gradient: bool, passed: str
) -> None:
    """Where Triton is chosen, the automatic choice measures and a gradient takes the eager path."""
    from toprl_kernels.actor import api
    from toprl_kernels.backend import Choice

    seen: list[str] = []

    def record(*arguments: object) -> None:
        seen.append(str(arguments[-1]))

    chosen = Choice("triton", "as on CUDA", is_automatic=backend != "triton")
    monkeypatch.setattr(api, "choose_for", lambda found, backend: chosen)
    monkeypatch.setattr(library.logits_op, "implementation", record)
    monkeypatch.setattr(library.logits_op, "recorded", record)
    monkeypatch.setattr(api, "actor_score_recorded", lambda *arguments: seen.append("autograd"))
    hidden, weights, _ = inputs()
    actor_score(hidden.requires_grad_(needs_gradient), 0, weights, backend=backend)
    assert seen == [passed]


def test_nothing_is_recorded_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts score with weights that require a gradient: activations are overwritten there, LayerNorm in pieces."""
    from toprl_kernels.actor import api

    monkeypatch.setattr(api, "actor_score_recorded", None)
    hidden, weights, _ = inputs()
    weights.fc1_weight.requires_grad_()
    with torch.no_grad():
        assert not actor_score(hidden, 0, weights).requires_grad
