"""Every shipped kernel configuration compiles for sm_80, sm_90 and sm_100 without a GPU, within its resources.

In processes of their own: this one interprets kernels, and interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from toprl_kernels import ahead_of_time, configs

pytestmark = pytest.mark.slow

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# kernel -> cases per architecture: the lane must not shrink unnoticed
CASES = {
    "masked_attention_tokens": 2,
    "masked_attention_fwd": 7,
    "masked_attention_bwd_prepare": 2,
    "masked_attention_bwd_dkdv": 7,
    "masked_attention_bwd_dq": 7,
    "topk_select": 2,
    "topk_select_chunked": 1,
    "topk_gather": 1,
    "topk_scatter": 1,
    "compact_cache": 1,
    "compact_cache_bwd": 1,
    "compact_cache_inplace": 1,
    "actor_layer1": 3,
    "actor_layers23": 3,
    "keep_mask": 2,
}
NUM_EXCEPTIONS = {"sm_80": 0, "sm_90": 1, "sm_100": 1}  # dK/dV at D = 256


def run_report(*arguments: str, output: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "toprl_kernels.report", *arguments]
    if output is not None:
        command += ["--json", str(output)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("report") / "rows.json"
    done = run_report("--arch", "80", "90", "100", output=output)
    assert done.returncode in (0, 1), done.stderr[-4000:]  # 1: a configuration has a problem, which the tests name
    result: list[dict[str, Any]] = json.loads(output.read_text())
    return result


def name(row: dict[str, Any]) -> str:
    return f"{row['architecture']} {row['kernel']} {row['label']} {row['config']}"


def test_nothing_is_left_out(rows: list[dict[str, Any]]) -> None:
    for architecture in ARCHITECTURES:
        counts = collections.Counter(row["kernel"] for row in rows if row["architecture"] == architecture)
        assert counts == CASES
        compiled = {(row["kernel"], tuple(row["config"])) for row in rows if row["architecture"] == architecture}
        shipped = {(kernel, tuple(config)) for kernel, _, _, config in configs.all_rows(architecture)}
        assert shipped - compiled == {("topk_select", (1, 2048, 8, 1, 1))}  # between two that are compiled


def test_all_compile(rows: list[dict[str, Any]]) -> None:
    assert not [f"{name(row)}: {row['error']}" for row in rows if row["error"]]


def test_shared_memory_is_within_the_limit(rows: list[dict[str, Any]]) -> None:
    """The compiler does not check it."""
    assert not [name(row) for row in rows if row["shared_bytes"] > configs.SHARED_MEMORY[row["architecture"]]]


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert not [f"{name(row)}: {row['spills']}" for row in rows if row["spills"] or row["stack_bytes"]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrix_kernels_use_the_tensor_cores(rows: list[dict[str, Any]], architecture: str) -> None:
    """HMMA on sm_80, HGMMA (wgmma) on sm_90, UTC*MMA (tcgen05) on sm_100."""
    matrix = [row for row in rows if row["matrix"] and row["architecture"] == architecture]
    assert len(matrix) == 3 * 4 + 4  # three attention kernels, soft at three head dims and hard at one; the actor
    without = [row for row in matrix if not row["matrix_instructions"]]
    assert all(row["exception"] for row in without)
    assert len(without) == NUM_EXCEPTIONS[architecture]  # one that is none any more must leave the list


def test_nothing_else_is_a_problem(rows: list[dict[str, Any]]) -> None:
    assert not [f"{name(row)}: {row['problems']}" for row in rows if row["problems"]]


def test_estimates_are_there(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["work"] is not None:
            assert row["estimate"]["occupancy"] >= 1, name(row)
            assert row["estimate"]["microseconds"] > 0, name(row)


SOFT_FORWARD = ("--kernel", "masked_attention_fwd D=128 bf16 soft")


def test_a_spilled_configuration_is_a_problem(tmp_path: Path) -> None:
    """128x64 with 4 warps holds twice the accumulator per thread."""
    output = tmp_path / "rows.json"
    done = run_report("--arch", "90", *SOFT_FORWARD, "--config", "masked_attention_fwd=128,64,4,3", output=output)
    assert done.returncode == 1
    (row,) = json.loads(output.read_text())
    assert row["spills"] > 0 and row["stack_bytes"] > 0
    assert row["problems"] == [f"{row['spills']} spills, {row['stack_bytes']} bytes of stack"]


def test_too_much_shared_memory_is_a_problem() -> None:
    """The blocks of an H100 at D = 256 do not fit into an A40."""
    case = ("--kernel", "masked_attention_fwd D=256 bf16 soft")
    done = run_report("--arch", "86", *case, "--config", "masked_attention_fwd=64,64,8,2")
    assert done.returncode == 1
    assert re.search(r"PROBLEM: \d+ bytes of shared memory, the limit is 101376", done.stdout)


def test_amd_compiles() -> None:
    """One cheap and one matrix kernel; --arch gfx942 without --kernel does all."""
    for kernel in ("keep_mask", "actor_layers23"):
        done = run_report("--arch", "gfx942", "--kernel", kernel)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"[2-9] configurations, 0 with a problem", done.stdout)


def test_this_process_cannot_compile() -> None:
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("kernels are compiled in this process: a CUDA device is there")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it"):
        ahead_of_time.compile_cases([], "sm_90")
