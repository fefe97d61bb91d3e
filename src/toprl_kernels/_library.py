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
PLAIN = (torch.Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# looked up once: each of these runs before every kernel
is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_any_requires_grad = torch._C._any_requires_grad
any_autocast = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active
_number_of_modes = torch._C._len_torch_dispatch_stack


class RegisteredOp:
    """A registered op; calling it is calling ``torch.ops.toprl_kernels.<name>`` with less overhead."""

    def __init__(
        self,
        name: str,
        overload: Any,
        implementation: Callable[..., Any],
        recorded: Any,
    ) -> None:
        self.name = name
        self.overload = overload
        self.implementation = implementation
        self.recorded = recorded  # the implementation as a node of autograd's graph; None if not differentiable

    def __call__(self, *arguments: Any) -> Any:
        """Positional arguments only, all of them, in the order of the schema."""
        needs_gradient = self.recorded is not None and _any_requires_grad(*arguments)
        return self.route(is_plain_call(arguments[0]), needs_gradient, arguments[0])(*arguments)

    def route(self, is_plain: bool, requires_grad: bool, tensor: Any) -> Callable[..., Any]:
        """What to call with all arguments.

        Args:
            is_plain: what :func:`is_plain_call` says.
            requires_grad: whether an argument that may have a gradient requires it.
            tensor: the first argument.
        """
        if not is_plain and _is_dispatched(tensor):
            return self.overload
        run = self.recorded if requires_grad and _is_grad_enabled() else self.implementation
        return run if is_plain else functools.partial(without_autocast, run)


def _is_dispatched(tensor: torch.Tensor) -> bool:
    """Whether somebody other than autograd and the implementation has a say in a call with ``tensor``."""
    return is_compiling() or _are_transforms_active() or _number_of_modes() > 0 or type(tensor) not in PLAIN


def is_transformed() -> bool:
    """Whether a transform such as torch.vmap looks at every operation; not in traced code."""
    return not is_compiling() and _are_transforms_active()


def is_plain_call(tensor: torch.Tensor) -> bool:
    """Whether a call with ``tensor`` may go straight to ``implementation`` or ``recorded`` of its op."""
    return not (_is_dispatched(tensor) or any_autocast())


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    num_inputs: int = 0,
    only_first: bool = False,
) -> RegisteredOp:
    """Register ``schema`` (``"name(Tensor x, ...) -> Tensor"``) for CPU and CUDA tensors.

    Args:
        implementation: plain PyTorch or a kernel launch; its first argument is a tensor. It sees no autograd and no
            autocast, and must not return a tensor that is, or is a view of, an input.
        fake: same signature; returns empty tensors of the right shape, dtype and stride.
        setup_context, backward: as in torch.autograd.Function; the op is not differentiable without them.
        num_inputs: that many arguments, the first ones, may have a gradient; given with ``backward``.
        only_first: only the first result has a gradient, and ``backward`` gets no other.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, functools.partial(without_autocast, implementation), key)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    refuse = functools.partial(_refuse_vmap, name)
    torch.library.register_vmap(qualified, refuse, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    recorded = None
    if backward is not None:
        assert setup_context is not None and num_inputs > 0  # with 0 all gradients would be lost in silence
        recorded = _make_recorded(name, implementation, setup_context, backward, num_inputs, only_first)
        if only_first:
            setup_context, backward = _with_others(setup_context, backward)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return RegisteredOp(name, overload, implementation, recorded)


def without_autocast(run: Callable[..., Any], *arguments: Any) -> Any:
    """Autocast would reach into an implementation and round float32 operands of its products."""
    if not any_autocast():
        return run(*arguments)
    with torch.autocast(arguments[0].device.type, enabled=False):
        return run(*arguments)


def _refuse_vmap(name: str, *arguments: Any) -> Any:
    raise NotImplementedError(
        f"{name}: torch.vmap is not supported; every argument has a batch dimension already, so fold the mapped "
        "dimension into it (x.flatten(0, 1)) and unflatten the result"
    )


def _with_others(
    setup_context: Callable[..., None], backward: Callable[..., Any]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """The same for the dispatcher, to which the other results are results too."""

    def mark_and_set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        setup_context(ctx, inputs, output)

    return mark_and_set_up, lambda ctx, gradient, *others: backward(ctx, gradient)


def _make_recorded(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    num_inputs: int,
    only_first: bool,
) -> Callable[..., Any]:
    """``implementation`` with a node in autograd's graph, as cheap as one gets.

    The node sees what may have a gradient and nothing else: another argument would cost it 0.1 us, another result 0.5.
    The rest passes it by in its last argument, and comes back in it. torch binds the arguments of a separate
    setup_context by name, 40 us per call; Function.apply in Python looks for one and unwraps functorch's tensors, of
    which there are none here, for 2.5 us.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        arguments = inputs[-1]
        output = implementation(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def forward_of_first(ctx: Any, *inputs: Any) -> Any:
        call = inputs[num_inputs]
        arguments = call[0]
        call[0] = output = implementation(*arguments)
        setup_context(ctx, arguments, output)
        return output[0]

    def node_backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return *backward(ctx, *gradients)[:num_inputs], None

    members = {
        "forward": staticmethod(forward_of_first if only_first else forward),
        "backward": staticmethod(torch.autograd.function.once_differentiable(node_backward)),
    }
    function = type(f"{name}_function", (torch.autograd.Function,), members)
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    has_one = num_inputs == 1

    def recorded(*arguments: Any) -> Any:
        return apply(arguments[0], arguments) if has_one else apply(*arguments[:num_inputs], arguments)

    def recorded_first(*arguments: Any) -> Any:
        call = [arguments]
        first = apply(arguments[0], call) if has_one else apply(*arguments[:num_inputs], call)
        return (first, *call[0][1:])

    return recorded_first if only_first else recorded
