"""Run the benchmark suites and write their results.

    python bench/run.py --suite kernels --quick
    python bench/run.py --suite all --output_dir bench/results

The rows of a suite go to DIR/<suite>.json and DIR/<suite>.csv together with a description of the machine; suite
kernels writes them after every case, so that ``--resume`` can go on where a run was cut off, and draws one figure per
op. The last line of standard output is one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Read when torch is imported: the profiler that meters memory would write two lines per use
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that ``bench`` is found when this file is run as a script

from bench.report import Report, columns_of  # noqa: E402

SUITES = ("kernels", "prefill", "overhead", "trainer")
# What a terminal has room for; the files have every column
PRINTED = {
    "kernels": (
        "op mode shape keep pattern provider p50_ms ratio_to_ours tflops gbps floor_percent error_ratio peak_mib note"
    ).split()
}


def environment(device: torch.device) -> dict[str, Any]:
    """What a number means nothing without."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        pass  # no git here: the commit stays unknown
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "device_type": device.type,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "git_commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def format_cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 else f"{value:.3f}"
    return str(value)


def print_table(rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
    """Aligned columns, by default all of them."""
    columns = columns_of(rows) if columns is None else columns
    cells = [columns, *([format_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def run_suite(suite: str, quick: bool, device: torch.device, report: Report) -> None:
    """The modules are imported here because each needs packages that the other does not."""
    if suite == "kernels":
        from bench import kernels

        kernels.run(quick, device, report)
        if report.folder is not None:
            draw(report, device)
    elif suite == "prefill":
        from bench import prefill

        report.add(prefill.run(quick, device))
    elif suite == "overhead":
        from bench import overhead

        report.add(overhead.run(quick, device))
    else:
        from bench import trainer

        report.add(trainer.run(quick, device))


def draw(report: Report, device: torch.device) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("No figures: matplotlib is not installed (pip install 'toprl-kernels[viz]')")
        return
    from bench.figures import draw_figures

    assert report.folder is not None
    name = report.where["device"] if device.type == "cuda" else f"{report.where['torch_threads']} CPU threads"
    for path in draw_figures(report.rows, report.folder / "figures", name):
        print(f"wrote {path}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    parser.add_argument("--output_dir", type=Path, default=None, help="write JSON and CSV here (default: do not write)")
    parser.add_argument("--resume", action="store_true", help="keep the finished cases of an interrupted run there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    where = {**environment(device), "quick": options.quick}
    print(" | ".join(f"{name} {value}" for name, value in where.items()))
    if device.type != "cuda":
        print(
            "No CUDA device: the eager paths are timed; Triton's CPU interpreter is not a measurement and is left out."
        )
    summary: dict[str, Any] = {"environment": where, "suites": {}}
    for suite in SUITES if options.suite == "all" else (options.suite,):
        begin = time.perf_counter()
        report = Report(suite, where, options.output_dir, resume=options.resume)
        run_suite(suite, options.quick, device, report)
        seconds = time.perf_counter() - begin
        print(f"\n{suite} ({seconds:.0f} s)")
        print_table(report.rows, PRINTED.get(suite))
        for name, table in report.tables.items():
            print(f"\n{suite}: {name}")
            print_table(table)
        summary["suites"][suite] = {"seconds": round(seconds, 1), **report.content()}
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
