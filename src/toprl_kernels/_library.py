"""Registration of the ops with torch.library, shared by all of them.

An op is one schema in the namespace ``toprl_kernels``, an implementation, a fake (shapes and dtypes only) and, where it
is differentiable, ``setup_context`` and ``backward``, the latter made of registered ops again. That makes it work under
torch.compile, torch.export, checkpointing, CUDA graphs and FakeTensorMode.

The dispatcher costs 4 us of CPU per call with a dozen arguments and its autograd wrapper 25 us more, as long as a small
kernel runs. On plain tensors, outside of compilation, transforms and modes, it has nothing to do: there
:class:`RegisteredOp` calls the implementation itself, through an autograd.Function made of the same two functions when
a gradient is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "toprl_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class RegisteredOp:
    """A registered op; calling it is calling ``torch.ops.toprl_kernels.<name>`` with less overhead."""

    def __init__(
        self,
        name: str,
        overload: Any,
        implementation: Callable[..., Any],
        function: type[torch.autograd.Function] | None,
    ) -> None:
        self.name = name
        self.overload = overload
        self.implementation = implementation
        # Function.apply in Python looks for a setup_context of its own and unwraps functorch's tensors; there are
        # neither here, and it costs 2.5 us
        self.apply: Callable[..., Any] | None = None
        if function is not None:
            self.apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *arguments: Any) -> Any:
        """Positional arguments only, all of them, in the order of the schema."""
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or type(arguments[0]) not in _PLAIN
        ):
            return self.overload(*arguments)
        run = self.implementation
        if self.apply is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            run = self.apply
        return _without_autocast(run, arguments)

    @staticmethod
    def needs_gradient(*tensors: torch.Tensor) -> bool:
        """Whether autograd will record a call with these tensors."""
        if not torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():  # does not know the quick form
            return any(tensor.requires_grad for tensor in tensors)
        return bool(torch._C._any_requires_grad(*tensors))


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> RegisteredOp:
    """Register ``schema`` (``"name(Tensor x, ...) -> Tensor"``) for CPU and CUDA tensors.

    Args:
        implementation: plain PyTorch or a kernel launch; its first argument is a tensor. It sees no autograd and no
            autocast, and must not return a tensor that is, or is a view of, an input.
        fake: same signature; returns empty tensors of the right shape, dtype and stride.
        setup_context, backward: as in torch.autograd.Function; the op is not differentiable without them.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, lambda *arguments: _without_autocast(implementation, arguments), key)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    refuse = functools.partial(_refuse_vmap, name)
    torch.library.register_vmap(qualified, refuse, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    function = None
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
        function = _make_function(name, implementation, setup_context, backward)
    return RegisteredOp(name, overload, implementation, function)


def _without_autocast(run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Autocast would reach into an implementation and round float32 operands of its products."""
    if not torch._C._is_any_autocast_enabled():
        return run(*arguments)
    with torch.autocast(arguments[0].device.type, enabled=False):
        return run(*arguments)


def _refuse_vmap(name: str, *arguments: Any) -> Any:
    raise NotImplementedError(
        f"{name}: torch.vmap is not supported; every argument has a batch dimension already, so fold the mapped "
        "dimension into it (x.flatten(0, 1)) and unflatten the result"
    )


def _make_function(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """Everything in ``forward``: torch binds the arguments of a separate setup_context by name, 40 us per call."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = implementation(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(torch.autograd.function.once_differentiable(backward)),
    }
    return type(f"{name}_function", (torch.autograd.Function,), members)
