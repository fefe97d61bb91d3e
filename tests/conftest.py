"""Shared setup. Without a CUDA device the whole test process runs Triton kernels in the CPU interpreter.

The variable has to be set before the first import of triton, and torch may import it; hence the order here.
"""

from __future__ import annotations

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable in the developer's shell must not change which implementation a test runs."""
    monkeypatch.delenv("TOPRL_KERNELS_BACKEND", raising=False)
