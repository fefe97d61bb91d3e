"""Which implementation of an op runs, and why.

Every op has up to three implementations of the same definition:

* ``reference``: the formula, written to be read; slow, any float dtype.
* ``eager``: plain PyTorch, any device; the path for CPU tensors.
* ``triton``: the kernels; CUDA tensors, or CPU tensors under ``TRITON_INTERPRET=1`` (tests).

``backend=None`` and ``backend="auto"`` take Triton for CUDA tensors it can handle, the reference for float64 (nobody
asks for that in a hurry) and eager otherwise. The
environment variable ``TOPRL_KERNELS_BACKEND`` (``auto``, ``eager`` or ``triton``) replaces ``None``. A choice that
names an implementation is never replaced by another one: it runs, or it raises an error that says why it cannot.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from toprl_kernels.configs import describe

BACKENDS = ("auto", "eager", "triton", "reference")
ENVIRONMENT_VARIABLE = "TOPRL_KERNELS_BACKEND"
OPS = ("masked_attention", "topk_compact", "compact_cache", "actor_score", "sample_keep_mask")
# os.environ.get of a variable that is not set raises and catches a KeyError: 0.7 us of every call, against 0.05
_ENVIRON = getattr(os.environ, "_data", os.environ)
_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)


class Choice(NamedTuple):
    """The implementation that runs (``name``) and the sentence that says why (``reason``)."""

    name: str
    reason: str
    is_automatic: bool = False  # nobody named an implementation


@functools.cache
def triton_installed() -> bool:
    """Whether ``import triton`` would find a package; does not import it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # a blocked or half-removed installation counts as absent
        return False


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1`` before the first triton import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _triton_obstacle(device: torch.device, input_obstacle: str | None, interpreted: bool) -> str | None:
    """Why Triton cannot run this call, with the way out; None when it can."""
    if not triton_installed():
        return "triton is not installed (pip install triton, Linux only)"
    if device.type != "cuda" and not interpreted:
        return (
            f"the tensors are on {device} and Triton needs a CUDA device (move them with .cuda(), or set "
            "TRITON_INTERPRET=1 before triton is imported to run its slow CPU interpreter)"
        )
    if input_obstacle is not None:
        return input_obstacle
    return None


def choose(
    op: str,
    backend: str | None,
    device: torch.device,
    input_obstacle: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    definition_because: str | None = None,
) -> Choice:
    """Decide which implementation of ``op`` runs.

    Args:
        op: name of the op, for messages.
        backend: the caller's argument; None asks the environment variable, then ``auto``.
        device: device of the tensors.
        input_obstacle: why Triton cannot take these inputs (dtype, size), or None.
        dtype: precision of the call. The automatic choice for float64 is the definition.
        definition_because: why the automatic choice on the CPU is the definition for these inputs, or None.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: ``triton`` was asked for by name (argument or environment) and cannot run.
    """
    from_environment = backend is None
    if backend is None:
        backend = (os.environ.get(ENVIRONMENT_VARIABLE) if names_implementation() else None) or "auto"
    is_double = dtype == torch.float64
    interpreted = backend == "triton" and interpreting()  # nobody else runs kernels on CPU tensors
    return _decide(op, backend, from_environment, device, input_obstacle, is_double, definition_because, interpreted)


def names_implementation() -> bool:
    """Whether the environment variable is set, maybe to nothing."""
    return _KEY in _ENVIRON


# What torch.compiler.assume_constant_result sets: the arguments are constants of a trace. The decorator itself imports
# torch._dynamo and with it triton, which must not happen on import of this package.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
names_implementation._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)  # obstacles quote sizes, of which a long run may see many
def _decide(
    op: str,
    backend: str,
    from_environment: bool,
    device: torch.device,
    input_obstacle: str | None,
    is_double: bool,
    definition_because: str | None,
    interpreted: bool,
) -> Choice:
    asked_by = f"the environment variable {ENVIRONMENT_VARIABLE}" if from_environment else "the backend argument"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} from {asked_by} is unknown; use one of {', '.join(BACKENDS)}")
    if backend in ("eager", "reference"):
        return Choice(backend, f"asked for by {asked_by}")
    obstacle = _triton_obstacle(device, input_obstacle, interpreted)
    if backend == "triton":
        if obstacle is not None:
            raise RuntimeError(f"{op}: backend='triton' from {asked_by} cannot run: {obstacle}")
        return Choice("triton", f"asked for by {asked_by}")
    if is_double:
        return Choice("reference", "float64 goes to the definition", True)
    if device.type != "cuda" and definition_because is not None:
        return Choice("reference", definition_because, True)
    if device.type != "cuda":
        return Choice("eager", f"the tensors are on {device}; Triton is chosen automatically on CUDA only", True)
    if obstacle is not None:
        return Choice("eager", f"Triton cannot take this call: {obstacle}", True)
    return Choice("triton", "CUDA tensors", True)


def explain(device: torch.device | str | None = None) -> str:
    """One line per op saying which implementation would run for ordinary inputs on ``device``, and why.

    The last line says where the kernels' launch configurations come from.

    Args:
        device: default is CUDA where there is one, else the CPU.

    Example:
        >>> print(explain("cpu"))  # doctest: +SKIP
        masked_attention: eager (the tensors are on cpu; Triton is chosen automatically on CUDA only)
    """
    where = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    is_here = where.type != "cuda" or torch.cuda.is_available()
    lines = []
    for op in OPS:
        try:
            choice = choose(op, None, where)
            lines.append(f"{op}: {choice.name} ({choice.reason})")
        except (RuntimeError, ValueError) as error:
            lines.append(f"{op}: error ({error})")
    lines.append(
        describe(where) if is_here else "launch configurations: no CUDA device here to read the architecture of"
    )
    return "\n".join(lines)
