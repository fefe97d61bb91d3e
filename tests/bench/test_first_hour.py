"""The first hour on a GPU, rehearsed: every step in this process, at tiny sizes."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import first_hour, tune
from bench.common import read_csv

pytest.importorskip("triton")
CHEAP = ("memcheck", "racecheck", "sweep 576", "tune actor_layers23", "suite decode", "suite stage")


def in_process(command: list[str], variables: dict[str, str], seconds: float, output: Any) -> int:
    """Stand in for a process, which would import torch anew: scripts of bench/ only."""
    script, *arguments = command[1:]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [script, *arguments])
        for name in ("TRITON_INTERPRET", "TOPRL_KERNELS_BACKEND"):
            patch.setenv(name, variables[name])
        try:
            runpy.run_path(str(first_hour.ROOT / script), run_name="__main__")
        except SystemExit as done:
            return int(done.code or 0)
    return 0


def status_of(name: str, page: str) -> str:
    """The second cell of the row that begins with ``name``."""
    return re.search(rf"^\| {re.escape(name)} +\| (.*?) +\|", page, re.MULTILINE)[1]


@pytest.mark.slow
@pytest.mark.skipif(first_hour.torch.cuda.is_available(), reason="rehearses what a machine with a GPU runs for real")
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State and page after an interruption and after a second call, which runs only what is not done."""
    monkeypatch.setattr(first_hour.shutil, "which", lambda name, path=None: None)
    arguments = ["--dry-run", "--output_dir", str(tmp_path), "--only", f"^({'|'.join(CHEAP)})$"]
    attempts: list[str] = []

    def interrupted(command: list[str], variables: dict[str, str], seconds: float, output: Any) -> int:
        attempts.append(command[-1])
        if "decode" in command and "stage" not in command:
            raise subprocess.TimeoutExpired(command, seconds)
        if "stage" in command and "decode" not in command:
            print("no luck", file=output)
            return 1
        return in_process(command, variables, seconds, output)

    monkeypatch.setattr(first_hour, "launch", interrupted)
    assert first_hour.main(arguments) == 1
    page = (tmp_path / "summary.md").read_text()
    assert page.startswith("# Rehearsal on a CPU") and status_of("suite decode", page) == "unfinished"
    assert status_of("memcheck", page) == "missing" and "compute-sanitizer is not on this machine" in page
    assert status_of("suite stage", page) == "failed" and "exit status 1: no luck" in page
    assert sum("decode" in name or "cpu" in name for name in attempts) >= 8  # goes on where it stopped, eight times

    monkeypatch.setattr(first_hour, "launch", in_process)
    first_hour.main(arguments)
    page = (tmp_path / "summary.md").read_text()
    for name in CHEAP:
        assert status_of(name, page) == ("missing" if name.endswith("check") else "done")
    assert status_of("launches of a stage with the actor", page) == "<= 4"
    assert re.search(r"launches of a stage with the actor .* 4.000 +\| met", page)
    assert status_of("decoding against SDPA with the mask, slowest case", page) == ">= 1"
    rows = read_csv(tmp_path / "sweep.csv")
    assert {row["kernel"] for row in rows} == {name for name in tune.CANDIDATES if name.startswith("masked_attention")}
    assert all(row["ms"] > 0 and row["tokens"] == 576 for row in rows)


def test_steps_cover_every_kernel_and_suite_and_fit_the_limit(tmp_path: Path) -> None:
    names = [step.name for step in first_hour.steps(tmp_path, False)]
    wanted = {f"tune {kernel}" for kernel in tune.CANDIDATES} | {f"sweep {tokens}" for tokens in (576, 2880, 8192)}
    wanted |= {f"suite {suite}" for suite in ("kernels", "stage", "decode", "prefill", "generate")}
    assert wanted < set(names) and len(names) == len(set(names)) and first_hour.STEP_S < 600


def test_another_commit_starts_anew_and_no_budget_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"commit": "old", "steps": {"small cases": {"status": "done"}}}')
    done = first_hour.run_steps(tmp_path, True, budget_s=0.0)
    assert {row["status"] for row in done.values()} == {"to do"}


@pytest.mark.skipif(first_hour.torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_hour.main([]) == 2
    assert "--dry-run rehearses on a CPU" in capsys.readouterr().err
