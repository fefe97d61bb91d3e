"""Every shipped configuration compiles without a GPU into loops that do what the table promises.

In processes of their own: this one interprets kernels, and interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench import compile_report
from bench.compile_report import KNOWN, Kernel, Loop
from toprl_kernels import configs

ROOT = Path(__file__).parents[2]
# kernels per architecture: the lane must not shrink unnoticed
MINIMUM = {
    "masked_attention_lists": 2, "masked_attention_compact": 3, "masked_attention_fwd": 10,
    "masked_attention_decode": 1, "masked_attention_bwd_prepare": 4, "masked_attention_bwd_dkdv": 7,
    "masked_attention_bwd_dq": 10, "topk_select": 3, "topk_gather": 1,
    "actor_layer1": 3, "actor_layers23": 2, "keep_mask_fwd": 1, "keep_mask_bwd": 1,
}  # fmt: skip


def report(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "bench/compile_report.py", *arguments, "--json", str(folder / "kernels.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr[-4000:]
    return done.returncode, json.loads((folder / "kernels.json").read_text())


SHIPPED = "D=128 bf16|N=2880|^(topk|keep_mask)"  # what a change of a kernel is seen by; tables: exhaustive


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "only"),
    [
        ("sm_80", "D=128 bf16 soft"),
        ("sm_90", SHIPPED),
        *(pytest.param(name, "", marks=pytest.mark.exhaustive) for name in configs.ARCHITECTURES),
    ],
)
def test_every_shipped_kernel(architecture: str, only: str, tmp_path: Path) -> None:
    """Shared memory, spills, matrix instructions, redundancy, load widths and tiles in flight; see ``problems``."""
    status, rows = report(tmp_path, "--arch", architecture.removeprefix("sm_"), "--kernel", only)
    assert [
        f"{row['kernel']} {row['case']}: {row['problems']}" for row in rows if row["problems"] and not row["excuse"]
    ] == []
    assert status == 0 and len(rows) >= 5
    names = [row["kernel"] for row in rows]
    if not only:
        assert {name: names.count(name) for name in MINIMUM if names.count(name) < MINIMUM[name]} == {}
    for (name, pattern), _ in KNOWN.items():  # what is no exception any more must leave the table
        excused = [row for row in rows if row["kernel"] == name and re.search(pattern, f"{architecture} {row['case']}")]
        assert all(row["problems"] for row in excused), [row["case"] for row in excused if not row["problems"]]


BEFORE = {"fwd": "128,64,8,3", "bwd_dq": "128,64,8,3", "bwd_dkdv": "32,64,8,2"}
WAITS = ["loop 0: 2 buffers, wait 0"]
TWICE, OLD = (
    [f"loop {i}: {what}" for i in (0, 1)]
    for what in ("every product is computed 1.5 times", "products by HMMA.16816.F32.BF16")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configurations", "problems"),
    [
        (BEFORE, {"fwd": WAITS, "bwd_dq": WAITS, "bwd_dkdv": TWICE}),
        pytest.param({"bwd_dkdv": "64,32,8,2"}, {"bwd_dkdv": OLD}, marks=pytest.mark.exhaustive),
    ],
)
def test_what_a_configuration_costs_is_told(
    configurations: dict[str, str], problems: dict[str, list[str]], tmp_path: Path
) -> None:
    config = [f"masked_attention_{name}={numbers}" for name, numbers in configurations.items()]
    only = f"masked_attention_({'|'.join(configurations)}) D=128 bf16 listed"
    _, rows = report(tmp_path, "--arch", "90", "--kernel", only, "--config", *config)
    assert {row["kernel"].removeprefix("masked_attention_"): row["problems"] for row in rows} == problems


GOOD = Kernel(
    "sm_90", "masked_attention_fwd", "D=128 bf16 soft", "M128 N64 w8 s5", warps=8, registers=200, shared=100_000,
    half=True, in_flight=3,
    loops=[Loop(["128x64x128 bf16"], 3, 3, 1.0, "HGMMA.64x64x16.F32.BF16", 400, 0, {"LDGSTS.E.128": 8})],
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"spills": 3}, None),  # outside the loop
        ({"spills": 3, "loops": []}, "3 spills"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, the limit is 232448"),
        ({"warps": 64}, "2048 threads, the limit is 1024"),
        ({"error": "CompilationError: x"}, "does not compile: CompilationError: x"),
        ({"spills": 1, "loop": {"spills": 1}}, "loop 0: 1 spills inside"),
        ({"loop": {"redundancy": 1.5}}, "loop 0: every product is computed 1.5 times"),
        ({"loop": {"instruction": "HMMA.16816"}}, "loop 0: products by HMMA.16816"),
        ({"loop": {"loads": {"LDG.E.U16": 32, "LDGSTS.E.128": 8}}}, "loop 0: 8 loads of 16 bytes, 32 of 1 or 2"),
        ({"loop": {"loads": {"LDG.E.U16": 2, "LDGSTS.E.128": 8}}}, None),
        ({"loop": {"buffers": 2, "wait": 0}}, "loop 0: 2 buffers, wait 0"),
        ({"half": False, "in_flight": 0, "loop": {"instruction": "", "redundancy": 2.0, "buffers": 0}}, None),
    ],
)
def test_problems(changes: dict[str, Any], problem: str | None) -> None:
    changes = dict(changes)
    loop = dataclasses.replace(GOOD.loops[0], **changes.pop("loop", {}))
    kernel = dataclasses.replace(GOOD, **{"loops": [loop], **changes})
    assert kernel.problems() == ([] if problem is None else [problem])


@pytest.mark.parametrize(
    ("changes", "programs"),
    [({}, 1), ({"registers": 128}, 2), ({"registers": 129}, 1), ({"registers": 32, "shared": 0}, 8)],
)
def test_programs_per_multiprocessor(changes: dict[str, Any], programs: int) -> None:
    assert dataclasses.replace(GOOD, **changes).programs() == programs


TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
    %a:2 = scf.for %i = %c0 to %n step %c1 iter_args(%x = %y) -> (i32)  : i32 {
      %k = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
      %o = ttg.local_alloc : () -> !ttg.memdesc<2x64xi32, #shared1, #smem, mutable>
      %b = scf.for %j = %c0 to %n step %c64 iter_args(%x = %y) -> (i32)  : i32 {
        %w = ttg.async_wait %t {num = 3 : i32}
        %s = ttng.warp_group_dot %q, %k, %z : !ttg.memdesc<64x128xbf16, #shared> * !ttg.memdesc<128x64xbf16, #shared> -> tensor<64x64xf32, #mma>
        %v = ttg.async_wait %t {num = 0 : i32}
        scf.yield %s : i32
      } {tt.num_stages = 3 : i32}
      scf.yield %b : i32
    }
"""  # noqa: E501


def test_loops_of_ttgir() -> None:
    """8 warps of 16 rows for 64 rows: everything twice. The outer loop has no products of its own."""
    assert compile_report.loops_of_ttgir(TTGIR) == [Loop(["64x64x128 bf16"], 3, 3, 2.0)]


def test_loops_of_sass() -> None:
    """A retry out of line (0060) is no loop; the outer loop (0010 to 0054) is not the innermost."""
    code = [
        (0x00, "MOV R1"), (0x10, "LDG R2"), (0x20, "HGMMA.64x64x16 R3"), (0x30, "@!P1 BRA 0x60"),
        (0x40, "@P0 BRA 0x20"), (0x50, "@P2 CALL.REL.NOINC 0x58"), (0x54, "BRA 0x10"), (0x58, "EXIT"),
        (0x60, "@!P3 BRA 0x60"), (0x70, "BRA 0x40"),
    ]  # fmt: skip
    (loop,) = compile_report.matrix_loops(code, compile_report.PRODUCT)
    assert loop[:3] == ["HGMMA.64x64x16 R3", "@!P1 BRA 0x60", "@P0 BRA 0x20"] and "LDG R2" not in loop


def test_refusals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--arch", "75"], "invalid choice"),
        (["--config", "nothing=1,2,3,4"], "'nothing' is unknown"),
        (["--config", "keep_mask=1,2"], "is not KERNEL=M,N,WARPS,STAGES"),
    ):
        with pytest.raises(SystemExit):
            compile_report.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_report.main([]) == 2
    assert "TRITON_INTERPRET is set: interpreted kernels cannot be compiled" in capsys.readouterr().err
