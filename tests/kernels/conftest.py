"""Fixtures of the kernel tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture(autouse=True, scope="session")
def fast_interpreter() -> Iterator[None]:
    """Have Triton's interpreter replace the members of triton.language once per launch and module.

    It does so at every call of a helper, which takes half of its time.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch, patch, done = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        launch(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        if function.__module__ not in done:
            done.add(function.__module__)
            return patch(function)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patches.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(autouse="TOPRL_TESTS_COMPILED" in os.environ, scope="session")
def compiled() -> Iterator[None]:
    """Run kernels compiled for a GPU that is not there: test_compiled_lane.py."""
    from tests.kernels.ptx_simulator import simulated

    with simulated(int(os.environ["TOPRL_TESTS_COMPILED"])):
        yield
