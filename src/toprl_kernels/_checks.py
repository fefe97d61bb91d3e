"""Argument checks shared by the ops. They read shapes, dtypes and devices only: none of them waits for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*HALF_AND_SINGLE, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def require_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise _not_a_tensor(op, name, value)


def _not_a_tensor(op: str, name: str, value: object) -> TypeError:
    return TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def require_ndim(op: str, name: str, value: object, ndim: int, layout: str) -> None:
    if not isinstance(value, Tensor):
        raise _not_a_tensor(op, name, value)
    if value.ndim != ndim:
        raise ValueError(f"{op}: {name} must be {layout} ({ndim} dimensions), got shape {tuple(value.shape)}")


def require_shape(op: str, name: str, value: object, shape: tuple[int, ...], layout: str) -> None:
    if not isinstance(value, Tensor):
        raise _not_a_tensor(op, name, value)
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must be {layout} = {shape}, got shape {tuple(value.shape)}")


def require_dtype(op: str, name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], fix: str = "") -> None:
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        hint = f"; {fix}" if fix else f"; convert it with {name}.to(...)"
        raise TypeError(f"{op}: {name} has dtype {str(value.dtype).removeprefix('torch.')}, expected {names}{hint}")


def require_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, the other tensors on {device}; move it with .to()")
