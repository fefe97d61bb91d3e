"""Fixtures of the kernel tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, so that a kernel that leaves an element unwritten is seen."""
    previous = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(previous)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@pytest.fixture
def device() -> str:
    """Where Triton kernels run in this process: a GPU, or the CPU under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "eager", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation in turn."""
    return request.param


@pytest.fixture(autouse="TOPRL_TESTS_COMPILED" in os.environ, scope="session")
def compiled() -> Iterator[None]:
    """Run kernels compiled for a GPU that is not there: test_compiled_lane.py."""
    from tests.kernels.ptx_simulator import simulated

    with simulated(int(os.environ["TOPRL_TESTS_COMPILED"])):
        yield
