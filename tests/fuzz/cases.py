"""How many cases are drawn: 1,000 in all by default, TOPRL_FUZZ_CASES for more (`make fuzz`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("TOPRL_FUZZ_CASES", "1000"))


def share(percent: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Settings of a test that draws so much of all cases: the same ones in every run of so many cases."""
    return settings(
        max_examples=max(round(CASES * percent / 100), 1),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """The result and an empty text, or None and what a refusal says."""
    torch.manual_seed(0)
    try:
        return call(), ""
    except (TypeError, ValueError, NotImplementedError) as error:
        return None, str(error)
