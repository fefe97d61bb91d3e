"""Kernels as compiled for sm_80 and sm_90, executed on CPU tensors: what the interpreter cannot show.

Layouts, pipelined copies, missing barriers, code that compiles for equal sizes only. In processes of their own: this
one interprets kernels. With ``TOPRL_TESTS_COMPILED=80`` most other tests of the kernels can be run this way, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def run_compiled(capability: int, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TOPRL_TESTS_COMPILED"] = str(capability)
    command = [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-8000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_kernels(capability: int) -> None:
    run_compiled(capability, "tests/kernels/compiled_cases.py")


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "arguments",
    [
        ("compiled_cases.py", "-m", "exhaustive"),
        ("test_attention_triton.py", "-k", "not pinned and not many_heads and not interpreted"),
        ("test_topk_compact.py", "test_topk_compact_lanes.py", "-k", "triton and not 31 and not large"),
        ("test_stage.py", "test_compact_cache.py", "test_keep_mask.py", "-k", "triton and not 31"),
        ("test_actor_score.py", "-k", "triton"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_lane_compiled(arguments: tuple[str, ...], capability: int) -> None:
    """The barriers deleted one by one; and the interpreter's lanes on compiled code, but for the largest sizes."""
    run_compiled(capability, *(f"tests/kernels/{each}" if each.endswith(".py") else each for each in arguments))
