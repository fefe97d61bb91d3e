"""Every shipped kernel configuration compiles for an H100 on a machine without a GPU, within its resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED_BYTES_PER_BLOCK = 227 * 1024  # of sm_90; the compiler does not check it


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run([sys.executable, str(script), "90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_compiles_within_shared_memory(compiled: list[dict[str, Any]]) -> None:
    assert len(compiled) >= 40
    too_large = [row for row in compiled if row["shared_bytes"] > SHARED_BYTES_PER_BLOCK]
    assert not too_large


@pytest.mark.slow
def test_main_kernels_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    """16-bit attention up to D = 128, the actor up to its default width, selection up to 4096 tokens."""
    exempt = ("fp32", "D=256", "N=16384")
    spilling = [row for row in compiled if row["spill_instructions"] and not any(e in row["kernel"] for e in exempt)]
    assert not spilling


@pytest.mark.slow
def test_matrix_kernels_use_the_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    matrix = [row for row in compiled if "bf16" in row["kernel"] and "prepare" not in row["kernel"]]
    assert len(matrix) >= 20
    if matrix[0]["wgmma_instructions"] is None:
        pytest.skip("this triton ships no cuobjdump to read the instructions with")
    without = [row["kernel"] for row in matrix if not row["wgmma_instructions"] and "dkdv D=256" not in row["kernel"]]
    assert not without
