"""Run the benchmark suites and write their results as CSV.

    python bench/run.py --suite kernels --quick
    python bench/run.py --suite all --output_dir bench/results

Suites: kernels (every op against its peers), decode (attention of one query over a cache), stage (what one pruning
stage costs), prefill, generate, overhead (a pruner that removes nothing), trainer, serving (vLLM, where it is
installed). The rows of a suite go to DIR/<suite>.csv together with a description of the machine, further tables to
DIR/<suite>_<table>.csv; kernels and decode write after every case, so that ``--resume`` can go on where a run was cut
off. The last line of standard output is one line of JSON.

CPU threads are bound to cores (OMP_PROC_BIND=spread, OMP_PLACES=threads, unless the environment says otherwise), and
every provider runs before it is timed: threads that share a core for the first seconds of a process make an op with
many parallel regions slow, and ratios meaningless.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Read when torch is imported: where its threads run; the profiler that meters memory would write two lines per use
os.environ.setdefault("OMP_PROC_BIND", "spread")
os.environ.setdefault("OMP_PLACES", "threads")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ``bench`` is found when this file is a script

from bench.common import Report, environment, table

SUITES = ("kernels", "decode", "stage", "prefill", "generate", "overhead", "trainer", "serving")
MODULES = {"decode": "kernels", "overhead": "generate"}  # the others are in a module of their name
# What a terminal has room for; the files have every column
PRINTED = dict.fromkeys(
    ("kernels", "decode"),
    "op mode shape keep pattern provider p50_ms ratio_to_ours tflops gbps floor_percent error_ratio peak_mib "
    "note".split(),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "all"], default=["all"])
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full",
                        help="small sizes and few repetitions")  # fmt: skip
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="sizes of a rehearsal")
    parser.add_argument("--output_dir", type=Path, default=None, help="write CSV files here (default: do not write)")
    parser.add_argument("--resume", action="store_true", help="keep the finished cases of an interrupted run there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    where = environment(device, options.size)
    print(" | ".join(f"{name} {value}" for name, value in where.items()))
    if device.type != "cuda":
        print("No CUDA device: the eager paths are timed; Triton's CPU interpreter is not a measurement.")
    summary: dict[str, Any] = {"environment": where, "suites": {}}
    for suite in SUITES if "all" in options.suite else options.suite:
        begin = time.perf_counter()
        report = Report(suite, where, options.output_dir, resume=options.resume)
        importlib.import_module(f"bench.{MODULES.get(suite, suite)}").run(options.size, device, report)
        seconds = time.perf_counter() - begin
        print(f"\n{suite} ({seconds:.0f} s)\n\n{table(report.rows, PRINTED.get(suite))}")
        for name, rows in report.tables.items():
            print(f"\n{suite}: {name}\n\n{table(rows)}")
        summary["suites"][suite] = {"seconds": round(seconds, 1), "rows": report.rows, **report.tables}
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
