"""Run the benchmark suites and write their results.

    python bench/run.py --suite kernels --quick
    python bench/run.py --suite all --output_dir bench/results

Every suite is a module in this folder with ``run(quick, device) -> list[dict]``. The rows go to DIR/<suite>.json and
DIR/<suite>.csv together with a description of the machine; the last line of standard output is one line of JSON.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the suites are plain modules beside this script
SUITES = ("kernels", "prefill")


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


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = columns_of(rows)
    cells = [columns, *([format_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_results(folder: Path, suite: str, rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{suite}.json").write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    columns = columns_of(rows)
    with (folder / f"{suite}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    parser.add_argument("--output_dir", type=Path, default=None, help="write JSON and CSV here (default: do not write)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    where = environment(device)
    print(" | ".join(f"{name} {value}" for name, value in where.items()))
    if device.type != "cuda":
        print(
            "No CUDA device: the eager paths are timed; Triton's CPU interpreter is not a measurement and is left out."
        )
    summary: dict[str, Any] = {"environment": where, "suites": {}}
    for suite in SUITES if options.suite == "all" else (options.suite,):
        begin = time.perf_counter()
        rows = importlib.import_module(suite).run(options.quick, device)
        seconds = time.perf_counter() - begin
        print(f"\n{suite} ({seconds:.0f} s)")
        print_table(rows)
        if options.output_dir is not None:
            write_results(options.output_dir, suite, rows, where)
        summary["suites"][suite] = {"seconds": round(seconds, 1), "rows": rows}
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
