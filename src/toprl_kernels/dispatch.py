"""What all ops share: the choice of the implementation, the registration with torch.library, argument checks.

Every op has up to three implementations of the same definition:

* ``reference``: the formula, written to be read; slow, any float dtype.
* ``eager``: plain PyTorch, any device; the path for CPU tensors.
* ``triton``: the kernels; CUDA tensors, or CPU tensors under ``TRITON_INTERPRET=1`` (tests).

``backend=None`` and ``backend="auto"`` take Triton for CUDA tensors that it can handle, the reference for float64 and
eager otherwise. The environment variable ``TOPRL_KERNELS_BACKEND`` (``auto``, ``eager`` or ``triton``) replaces
``None``. A choice that names an implementation is never replaced by another: it runs, or it raises an error that says
why it cannot.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from toprl_kernels import configs

BACKENDS = ("auto", "eager", "triton", "reference")
ENVIRONMENT_VARIABLE = "TOPRL_KERNELS_BACKEND"
OPS = ("masked_attention", "topk_compact", "prune_stage", "compact_cache", "actor_score", "sample_keep_mask")
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*HALF_AND_SINGLE, torch.float64)
INTEGERS = (torch.int64, torch.int32)
LONG, BOOL = (torch.int64,), (torch.bool,)


class Choice(NamedTuple):
    """The implementation that runs (``name``) and the sentence that says why (``reason``)."""

    name: str
    reason: str
    is_automatic: bool = False  # nobody named an implementation


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # a blocked or half-removed installation counts as absent
        return False


TRITON_INSTALLED = _has_triton()  # without importing it


def interpreting() -> bool:
    """Return whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1`` before triton's import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def choose(
    op: str, backend: str | None, device: torch.device, obstacle: str | None = None, *, dtype: torch.dtype | None = None
) -> Choice:
    """Decide which implementation of ``op`` runs.

    Args:
        op: name of the op, for messages.
        backend: the caller's argument; None asks the environment variable, then ``auto``.
        device: device of the tensors.
        obstacle: why Triton cannot take these inputs (dtype, size), or None.
        dtype: precision of the call. The automatic choice for float64 is the definition.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: ``triton`` was asked for by name (argument or environment) and cannot run.
    """
    asked_by = "the backend argument"
    if backend is None:
        asked_by = f"the environment variable {ENVIRONMENT_VARIABLE}"
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} from {asked_by} is unknown; use one of {', '.join(BACKENDS)}")
    if backend in ("eager", "reference"):
        return Choice(backend, f"asked for by {asked_by}")
    if not TRITON_INSTALLED:
        obstacle = "triton is not installed (pip install triton, Linux only)"
    elif device.type != "cuda" and not (backend == "triton" and interpreting()):
        obstacle = (
            f"the tensors are on {device} and Triton needs a CUDA device (move them with .cuda(), or set "
            "TRITON_INTERPRET=1 before triton is imported to run its slow CPU interpreter)"
        )
    if backend == "triton":
        if obstacle is not None:
            raise RuntimeError(f"{op}: backend='triton' from {asked_by} cannot run: {obstacle}")
        return Choice("triton", f"asked for by {asked_by}")
    if dtype == torch.float64:
        return Choice("reference", "float64 goes to the definition", True)
    if device.type != "cuda":
        return Choice("eager", f"the tensors are on {device}; Triton is chosen automatically on CUDA only", True)
    if obstacle is not None:
        return Choice("eager", f"Triton cannot take this call: {obstacle}", True)
    return Choice("triton", "CUDA tensors", True)


def implementation(op: str, function: str, backend: str) -> Callable[..., Any]:
    """Return ``<function>_<backend>`` of an op's module ``backend``; only the modules for Triton import triton."""
    return getattr(importlib.import_module(f"toprl_kernels.{op}.{backend}"), f"{function}_{backend}")


def explain(device: torch.device | str | None = None) -> str:
    """Say in a line per op which implementation would run for ordinary inputs on ``device``, and why.

    The last line says where the kernels' launch configurations come from.

    Args:
        device: default is CUDA where there is one, else the CPU.

    Example:
        >>> print(explain("cpu"))  # doctest: +SKIP
        masked_attention: eager (the tensors are on cpu; Triton is chosen automatically on CUDA only)
    """
    where = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    lines = []
    for op in OPS:
        try:
            choice = choose(op, None, where)
            lines.append(f"{op}: {choice.name} ({choice.reason})")
        except (RuntimeError, ValueError) as error:
            lines.append(f"{op}: error ({error})")
    if where.type == "cuda" and not torch.cuda.is_available():
        lines.append("launch configurations: no CUDA device to read the architecture of")
    else:
        lines.append(configs.describe(where))
    return "\n".join(lines)


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the op ``schema`` (``"name(Tensor x, ...) -> Tensor"``) with torch.library.

    That makes the op work under torch.compile, torch.export, checkpointing, CUDA graphs and FakeTensorMode.

    Args:
        implementation: plain PyTorch or a kernel launch; its first argument is a tensor or a list of some. It sees no
            autograd and no autocast, and must not return a tensor that is, or is a view of, an argument.
        fake: same signature; returns empty tensors of the right shape, dtype and stride.
        setup_context, backward: as in torch.autograd.Function; the op is not differentiable without them.

    Returns:
        The op, to be called with all arguments by position.
    """
    name, parenthesis, rest = schema.partition("(")

    def run(*arguments: Any) -> Any:
        device_type = (arguments[0][0] if isinstance(arguments[0], list) else arguments[0]).device.type
        if not torch.is_autocast_enabled(device_type):
            return implementation(*arguments)
        with torch.autocast(device_type, enabled=False):  # autocast would round float32 operands of products
            return implementation(*arguments)

    def refuse_vmap(*arguments: Any) -> Any:
        raise NotImplementedError(
            f"{name}: torch.vmap is not supported; every argument has a batch dimension already, so fold the mapped "
            "dimension into it (x.flatten(0, 1)) and unflatten the result"
        )

    op = torch.library.custom_op(f"toprl_kernels::{name}", run, mutates_args=(), schema=parenthesis + rest)
    op.register_fake(fake)
    op.register_vmap(refuse_vmap)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling() and any(map(_has_tangent, arguments)):
            raise NotImplementedError(
                f"{name}: forward-mode differentiation is not supported, and the tangent would be lost; use reverse "
                "mode, or backend='reference'"
            )
        return op(*arguments)

    return call


def _has_tangent(argument: object) -> bool:
    if isinstance(argument, list):
        return any(map(_has_tangent, argument))
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def require(
    op: str, name: str, value: object, layout: str, shape: tuple[int, ...] | int,
    dtypes: tuple[torch.dtype, ...] = (), device: torch.device | None = None, fix: str = "",
) -> None:  # fmt: skip
    """Check an argument by shape, dtype and device alone: nothing waits for a GPU.

    Args:
        layout: the shape in words, for the message.
        shape: exact, or the number of dimensions.
        dtypes: any by default, as is the device.
        fix: what to do about a wrong dtype.

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: another shape, or on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if (value.ndim if isinstance(shape, int) else value.shape) != shape:
        wanted = f"({shape} dimensions)" if isinstance(shape, int) else f"= {shape}"
        raise ValueError(f"{op}: {name} must be {layout} {wanted}, got shape {tuple(value.shape)}")
    if dtypes and value.dtype not in dtypes:
        names = ", ".join(map(dtype_name, dtypes))
        fix = fix or f"convert it with {name}.to(...)"
        raise TypeError(f"{op}: {name} has dtype {dtype_name(value.dtype)}, expected {names}; {fix}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, the other tensors on {device}; move it with .to()")


def require_given(op: str, name: str, value: Tensor | None, *expected: Any) -> None:
    """:func:`require` for an argument that may be left out."""
    if value is not None:
        require(op, name, value, *expected)


def require_flags(op: str, **flags: object) -> None:
    """Check that options are True or False.

    Raises:
        TypeError: one is anything else.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {value!r} of type {type(value).__name__}")


def require_ints(op: str, **numbers: object) -> None:
    """Check that optional arguments are ints.

    Raises:
        TypeError: one is anything else.
    """
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{op}: {name} must be an int or None, got {value!r} of type {type(value).__name__}")


def require_float(op: str, name: str, value: object) -> None:
    """Check that an optional argument is a number.

    Raises:
        TypeError: it is anything else.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{op}: {name} must be a number or None, got {value!r} of type {type(value).__name__}")


def require_counts(op: str, k: Tensor, layout: str, shape: tuple[int, ...], device: torch.device) -> None:
    """Check a tensor of numbers of tokens, on the host or on ``device``.

    Raises:
        TypeError, ValueError: as :func:`require`.
    """
    require(op, "k", k, layout, shape, INTEGERS, device if k.device.type != "cpu" else None, "use k.long()")


def dtype_name(dtype: torch.dtype) -> str:
    """For example "float16"."""
    return str(dtype).removeprefix("torch.")
