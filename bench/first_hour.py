"""The first hour on a GPU: tests, memory and race checkers, a sweep of configurations, tuning, suites, and one page.

    make gpu                                    # everything; goes on where an interrupted run stopped
    python bench/first_hour.py --budget_s 580   # as much as fits, for machines that limit a call; call it again
    python bench/first_hour.py --dry-run        # the same on a CPU: Triton's interpreter, tiny sizes, numbers of no use

Needs torch, triton, transformers and pytest, and downloads nothing: models have random weights. Each step is a process
of under ten minutes. State, logs, CSV files and the page (``summary.md``: every target met or missed) go to
bench/results/<gpu>/ (rehearsals: runs/rehearsal/) or --output_dir. Another commit starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without an installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench import tune
from bench.common import Row, environment, git_commit, read_csv, table
from bench.targets import Value, verdict

ROOT = Path(__file__).resolve().parents[1]
STEP_S = 580
SUITES = ("kernels", "decode", "stage", "prefill", "generate")
SWEEP_TOKENS = (576, 2880, 8192)


class Step(NamedTuple):
    """A process to run. ``tool``: an executable that it needs; ``attempts``: how often it may go on after its limit."""

    name: str
    arguments: list[str]
    tool: str = ""
    attempts: int = 1


def steps(folder: Path, dry_run: bool) -> Iterator[Step]:
    """All steps, in order."""
    output = ["--output_dir", str(folder)]
    dry = ["--dry-run"] if dry_run else []
    size = ["--tiny", "--device", "cpu"] if dry_run else []
    yield Step("cuda tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_cuda.py",
                              *(["--collect-only"] if dry_run else [])])  # fmt: skip
    small = ["bench/run.py", "--suite", "kernels", "decode", "stage", "--tiny", *size[1:]]  # every op, within minutes
    yield Step("small cases", small)
    for check in ("memcheck", "racecheck"):
        yield Step(check, ["--tool", check, "--error-exitcode", "9", sys.executable, *small], "compute-sanitizer")
    for tokens in SWEEP_TOKENS:
        # what was compiled is in triton's cache: after its limit a step goes on faster
        arguments = ["--sweep", str(tokens), "--csv", str(folder / "sweep.csv"), *dry]
        yield Step(f"sweep {tokens}", ["bench/tune.py", *arguments], attempts=6)
    for kernel in [*tune.CANDIDATES, "actor_score"]:
        arguments = ["--kernel", f"^{kernel}$", "--output", str(folder / "tuned.json"), *dry]
        yield Step(f"tune {kernel}", ["bench/tune.py", *arguments], attempts=3)
    for suite in SUITES:
        more = ["--resume"] if suite in ("kernels", "decode") else []
        arguments = ["bench/run.py", "--suite", suite, *output, *more, *size]
        yield Step(f"suite {suite}", arguments, attempts=8 if more else 1)


def run_steps(folder: Path, dry_run: bool, budget_s: float, only: str = "") -> dict[str, Row]:
    """Run what is not done, and return name -> status, seconds, note of all steps.

    A status is "done", "missing" (the tool is not there), "failed", "unfinished" or "to do"; the last three are run at
    the next call.
    """
    path = folder / "state.json"
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if state.get("commit") != git_commit():
        state = {"commit": git_commit(), "steps": {}}
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget_s
    for step in steps(folder, dry_run):
        known = state["steps"].setdefault(step.name, {"status": "to do", "seconds": 0.0, "note": ""})
        if known["status"] in ("done", "missing") or not re.search(only, step.name):
            continue
        for _ in range(step.attempts):
            seconds = min(STEP_S, end - time.monotonic())
            if seconds < 10:
                break
            begin = time.monotonic()
            print(f"{step.name} ...", flush=True)
            known["status"], known["note"] = run_step(step, folder / "logs", seconds, dry_run)
            known["seconds"] += round(time.monotonic() - begin, 1)
            print(f"{step.name}: {known['status']} {known['note']}", flush=True)
            path.write_text(json.dumps(state, indent=1))
            if known["status"] != "unfinished":
                break
    steps_done: dict[str, Row] = state["steps"]
    return steps_done


def run_step(step: Step, logs: Path, seconds: float, dry_run: bool) -> tuple[str, str]:
    """Status and note. The output goes to a log, whose end is the note of a failure."""
    command = [sys.executable]
    if step.tool:
        program = shutil.which(step.tool) or shutil.which(step.tool, path="/usr/local/cuda/bin")
        if program is None:
            return "missing", f"{step.tool} is not on this machine (it comes with the CUDA toolkit)"
        command = [program]
    variables = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    if dry_run:
        variables |= {"TRITON_INTERPRET": "1", "TOPRL_KERNELS_BACKEND": "triton"}
    log = logs / f"{step.name.replace(' ', '_')}.log"
    with log.open("w") as file:
        try:
            code = launch([*command, *step.arguments], variables, seconds, file)
        except subprocess.TimeoutExpired:
            return "unfinished", f"stopped after {seconds:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines()
    return ("done", "") if code == 0 else ("failed", f"exit status {code}: {lines[-1][-300:] if lines else ''}")


def launch(command: list[str], variables: dict[str, str], seconds: float, output: Any) -> int:
    """Exit status of a process. Raises subprocess.TimeoutExpired after ``seconds``."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, timeout=seconds, stdout=output, stderr=subprocess.STDOUT
    )
    return done.returncode


# -- the page ------------------------------------------------------------------------------------------------------


PAGE = {
    "sweep": "kernel tokens config ms pinned note",
    "stage": "case policy launches_per_stage profiled_per_stage launches_once host_us_per_stage device_us_per_stage",
    "decode": "shape num_tokens keep batch provider p50_ms ratio_to_ours gbps floor_percent note",
    "prefill": "case method average_tokens ms_p50 speedup macs_ratio kv_bytes",
    "generate": "case way phase ms_p50 ratio_p50",
}  # the columns of each suite that matter


def page(folder: Path, where: Row, done: dict[str, Row]) -> str:
    """Markdown: targets, steps, suites."""
    tables = {path.stem: read_csv(path) for path in sorted(folder.glob("*.csv"))}
    title = "# Rehearsal on a CPU: numbers of no use" if where["device_type"] == "cpu" else f"# {where['device']}"
    parts = [title, ", ".join(f"{name} {value}" for name, value in where.items() if value not in (None, ""))]
    parts += ["## Targets", table(targets(tables, where["device_type"], done))]
    parts += ["## Steps", table([{"step": name, **row} for name, row in done.items()])]
    for name, columns in PAGE.items():
        parts += [f"## {name}", table(tables.get(name, []), columns.split())]
    return "\n\n".join(parts) + "\n"


def targets(tables: dict[str, list[Row]], device_type: str, done: dict[str, Row]) -> list[Row]:
    """Target, bar, measured value and verdict."""
    verdicts = [row for row in tables.get("kernels_targets", []) if row["device"] == device_type]
    for name in ("cuda tests", "memcheck", "racecheck"):
        status = done.get(name, {}).get("status", "to do")
        text = {"done": "met", "failed": "missed"}.get(status, f"not measured: {status}")
        verdicts.append({"target": f"{name} without an error", "verdict": text})

    def add(target: str, bar: float, values: list[float], is_larger: bool) -> None:
        worst: Value = (min if is_larger else max)(values, default="no row of it")
        verdicts.append(verdict(target, is_larger, bar, worst))

    per_stage = "profiled_per_stage" if device_type == "cuda" else "launches_per_stage"
    actor = [row[per_stage] for row in tables.get("stage", []) if row["policy"] == "toprl"]
    add("launches of a stage with the actor", 4, actor, False)
    sdpa = [row["ratio_to_ours"] for row in tables.get("decode", []) if row["provider"] == "sdpa bool mask"]
    add("decoding against SDPA with the mask, slowest case", 1, [ratio for ratio in sdpa if ratio], True)
    timed = [row for row in tables.get("sweep", []) if row["ms"] is not None]
    fastest: dict[tuple[str, int], float] = {}
    for row in timed:
        key = row["kernel"], row["tokens"]
        fastest[key] = min(row["ms"], fastest.get(key, row["ms"]))
    ratios = [row["ms"] / fastest[row["kernel"], row["tokens"]] for row in timed if row["pinned"]]
    add("pinned configuration over the fastest of the sweep, worst case", 1.05, ratios, False)
    return [{name: row.get(name) for name in ("target", "bar", "measured", "verdict")} for row in verdicts]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 0 when every step is done, or missing its tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in Triton's interpreter, at tiny sizes")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="start no step after so many seconds")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only steps whose name matches")
    parser.add_argument("--output_dir", type=Path, help="default: bench/results/<gpu>")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("first_hour: torch.cuda.is_available() is False; --dry-run rehearses on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    where = environment(device, "tiny" if options.dry_run else "full")
    results = ROOT / "bench" / "results" / re.sub(r"\W+", "-", str(where["device"])).lower()
    folder = (options.output_dir or (ROOT / "runs" / "rehearsal" if options.dry_run else results)).resolve()
    done = run_steps(folder, options.dry_run, options.budget_s, options.only)
    (folder / "summary.md").write_text(page(folder, where, done))
    print(f"{folder / 'summary.md'}: " + ", ".join(f"{name} {row['status']}" for name, row in done.items()))
    return 0 if all(row["status"] in ("done", "missing") for row in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
