"""masked_attention as a registered op: opcheck, torch.compile, autocast, vmap, float64, export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from toprl_kernels import masked_attention
from toprl_kernels.attention import library
from toprl_kernels.testing import AttentionInputs, make_attention_inputs

BACKENDS = ["eager", "triton"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def inputs(length: int = 12, seed: int = 0, mask: str = "mixed", padding: bool = True) -> AttentionInputs:
    return make_attention_inputs(2, 4, 2, length - 3, length, 16, mask=mask, padding=padding, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["hard", "mixed"])
def test_opcheck_forward(backend: str, mask: str) -> None:
    x = inputs(mask=mask)
    query = x.query.requires_grad_()
    keep_mask = x.keep_mask.requires_grad_() if mask == "mixed" else x.keep_mask
    for padding in (x.key_padding_mask, None):
        arguments = (query, x.key, x.value, keep_mask, padding, True, 0.25, False, backend)
        torch.library.opcheck(library.forward.overload, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [[True, True, True, True], [False, True, False, False], [False, False, False, True]])
def test_opcheck_backward(backend: str, needs: list[bool]) -> None:
    x = inputs()
    output, lse = library.forward(*x[:5], True, 0.25, False, backend)
    arguments = (x.grad_output, *x[:5], output, lse, True, 0.25, False, needs, backend)
    torch.library.opcheck(library.backward.overload, arguments)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda query: query,
    "as in models": lambda query: query.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda query: torch.cat([query, query], dim=3).transpose(1, 2).contiguous().transpose(1, 2)[..., :16],
    "head dimension not dense": lambda query: query.transpose(2, 3).contiguous().transpose(2, 3),
    "heads expanded": lambda query: query[:, :1].expand(-1, 4, -1, -1),
    "one sample": lambda query: query[:1].transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["ones", "hard", "mixed"])
@pytest.mark.parametrize(
    ("backend", "length", "causal"), [("eager", 12, True), ("eager", 160, False), ("triton", 12, True)]
)
def test_the_output_is_laid_out_like_the_query(backend: str, length: int, causal: bool, mask: str, layout: str) -> None:
    x = inputs(length, mask="hard" if mask == "ones" else mask, padding=mask == "mixed")
    query = LAYOUTS[layout](x.query)
    key, value, keep_mask = (tensor[: query.shape[0]] for tensor in (x.key, x.value, x.keep_mask))
    padding = None if x.key_padding_mask is None else x.key_padding_mask[: query.shape[0]]
    if mask == "ones":
        keep_mask = torch.ones_like(keep_mask)
        key, value = key[:, :, 3:], value[:, :, 3:]  # as many keys as queries
        keep_mask = keep_mask[:, 3:]
    arguments = (query, key, value, keep_mask, padding, causal, 0.25, False, backend)
    output, lse = library.forward(*arguments)
    dense = query if query.stride(-1) == 1 else query.contiguous()
    assert output.stride() == torch.empty_like(dense).stride() and output.stride(-1) == 1
    torch.testing.assert_close(output, library.forward(query.contiguous(), *arguments[1:])[0])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(part) if isinstance(part, Tensor) else part for part in arguments]
        fake_output, fake_lse = library.forward(*fakes)
    assert (output.stride(), lse.stride()) == (fake_output.stride(), fake_lse.stride())


def step(query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor, padding: Tensor | None, backend: str) -> Tensor:
    """Used twice in one graph, the second time on the result of the first."""
    once = masked_attention(query, key, value, keep_mask, key_padding_mask=padding, is_causal=True, backend=backend)
    twice = masked_attention(
        once + query, key, value, keep_mask > 0, key_padding_mask=padding, is_causal=True, backend=backend
    )
    return twice * 2


def gradients(function: Callable[..., Tensor], x: AttentionInputs, backend: str) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in x[:4]]
    output = function(*leaves, x.key_padding_mask, backend)
    return [output.detach(), *torch.autograd.grad(output, leaves, x.grad_output)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_with_dynamic_shapes(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for length, seed in ((12, 0), (21, 1), (40, 2)):
        x = inputs(length, seed)
        for got, want in zip(gradients(compiled, x, backend), gradients(step, x, backend), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    x = inputs()
    compiled = torch.compile(step, fullgraph=True)
    for got, want in zip(gradients(compiled, x, "eager"), gradients(step, x, "eager"), strict=True):
        torch.testing.assert_close(got, want)


def test_automatic_choice_compiles_whole() -> None:
    x = inputs()

    def automatic(query: Tensor) -> Tensor:
        return masked_attention(query, x.key, x.value, x.keep_mask, is_causal=True)

    compiled = torch.compile(automatic, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.query), automatic(x.query))


def test_exports() -> None:
    x = inputs()

    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor) -> Tensor:
            return masked_attention(query, key, value, keep_mask, is_causal=True)

    program = torch.export.export(Module(), tuple(x[:4]))
    assert any("masked_attention" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*x[:4]), Module()(*x[:4]))


def test_checkpointing() -> None:
    x = inputs()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in x[:4]]

    def block(*tensors: Tensor) -> Tensor:
        return masked_attention(*tensors, is_causal=True)

    direct = torch.autograd.grad(block(*leaves).sum(), leaves)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_vmap_is_refused(needs_gradient: bool) -> None:
    x = inputs()
    query = x.query.expand(3, *x.query.shape).clone().requires_grad_(needs_gradient)
    with pytest.raises(NotImplementedError, match=r"masked_attention: torch.vmap is not supported.*flatten"):
        torch.vmap(lambda one: masked_attention(one, x.key, x.value, x.keep_mask))(query)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_what_torch_casts(backend: str) -> None:
    """Query, key and value as in torch's own attention; the mask keeps its digits."""
    x = inputs()
    mask = x.keep_mask.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = masked_attention(x.query, x.key, x.value, mask, backend=backend)
        (inside,) = torch.autograd.grad(output.sum(), mask, retain_graph=True)
    (outside,) = torch.autograd.grad(output.sum(), mask)
    low = [tensor.bfloat16() for tensor in x[:3]]
    plain = masked_attention(*low, mask, backend=backend)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, plain)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert torch.equal(inside, torch.autograd.grad(plain.sum(), mask)[0])


def test_float64_goes_to_the_definition() -> None:
    """And with it has a second derivative."""
    x = make_attention_inputs(1, 1, 1, 3, 4, 2)
    leaves = [tensor.double().requires_grad_() for tensor in x[:4]]
    assert torch.equal(masked_attention(*leaves), masked_attention(*leaves, backend="reference"))
    assert torch.autograd.gradgradcheck(masked_attention, leaves)


def test_functional_gradient() -> None:
    x = inputs()

    def loss(mask: Tensor) -> Tensor:
        return masked_attention(x.query, x.key, x.value, mask).square().sum()

    leaf = x.keep_mask.clone().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(x.keep_mask), torch.autograd.grad(loss(leaf), leaf)[0])
