"""Rollouts in parts: a large model need not hold the caches of all episodes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.rollout import Rollout, Step


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout of the episodes of several, in their order.

    Parts differ in the number of visual tokens that survive in their longest row: shorter rows are padded at the end,
    with ``valid_mask`` False, as within one part.

    Raises:
        ValueError: no rollout, or a different number of stages.
    """
    if not rollouts:
        raise ValueError("rollouts is empty; at least one is needed")
    if len({len(one.steps) for one in rollouts}) > 1:
        raise ValueError(f"rollouts have {[len(one.steps) for one in rollouts]} stages; all must have as many")
    if len(rollouts) == 1:
        return rollouts[0]
    steps = [_join(steps) for steps in zip(*(one.steps for one in rollouts), strict=True)]
    values = {f.name: [getattr(one, f.name) for one in rollouts] for f in fields(Rollout) if f.name != "steps"}
    return Rollout(steps=steps, **{name: _stack(parts) for name, parts in values.items()})


def _join(steps: Sequence[Step]) -> Step:
    return Step(**{f.name: _stack([getattr(step, f.name) for step in steps]) for f in fields(Step)})


def _stack(parts: list[Any]) -> Any:
    """Rows below each other: tensors padded to the same second dimension, lists as they are; None stays None."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], list):
        return [one for part in parts for one in part]
    width = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
    return torch.cat([_widen(part, width) for part in parts])


def _widen(part: Tensor, width: int) -> Tensor:
    if part.ndim == 1 or part.shape[1] == width:
        return part
    return pad(part, (0,) * 2 * (part.ndim - 2) + (0, width - part.shape[1]))
