"""What the compiler makes of every shipped launch configuration; needs triton, but no GPU.

    python -m toprl_kernels.report                               # sm_80, sm_90 and sm_100
    python -m toprl_kernels.report --arch 90 --kernel attention --markdown
    python -m toprl_kernels.report --arch gfx942                 # AMD MI300: does it compile?
    python -m toprl_kernels.report --arch 90 --config masked_attention_fwd=128,64,4,3

Per configuration: registers, stack and spills (loads and stores of local memory in the binary), shared memory against
the limit that the compiler does not check, matrix instructions (HMMA, HGMMA, UTC*MMA, MFMA), and two estimates from
published figures (see bounds.py): programs per multiprocessor and the least time for the stated problem. The last line
says how many configurations have a problem; the exit status is 1 if any has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from toprl_kernels import ahead_of_time, configs
from toprl_kernels.ahead_of_time import Resources, Select
from toprl_kernels.bounds import CHIPS, bound
from toprl_kernels.configs import LaunchConfig

# The exceptions, by kernel and the beginning of the label, with the reason. Nothing may spill.
WITHOUT_NEW_INSTRUCTION = {
    ("masked_attention_bwd_dkdv", f"D=256 {dtype}"): (
        "the matrix instruction of sm_90 and later needs tiles of 64 keys, whose two float32 sums of 64x256 spill; "
        "that of sm_80 is used"
    )
    for dtype in ("bf16", "fp16")
}
MAX_THREADS = 1024  # per program
COLUMNS = (
    "kernel", "case", "config", "registers", "stack", "spills", "shared KiB", "mma", "programs/SM", "bound us", "by",
    "problem", "notes",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse(arguments)
    try:
        ahead_of_time.require_compiler()
    except RuntimeError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for architecture in options.arch:
        start = time.perf_counter()
        select = _select(architecture, options.config)
        cases = ahead_of_time.all_cases(select, extended=options.all, only=options.kernel)
        if not cases:
            names = ", ".join(configs.KERNELS)
            print(f"report: --kernel {options.kernel!r} is in no case; the kernels are {names}", file=sys.stderr)
            return 2
        compiled = ahead_of_time.compile_cases(cases, architecture, jobs=options.jobs)
        chosen = [describe(resources) for resources in compiled]
        rows += chosen
        _print(architecture, chosen, options.markdown)
        print(f"compiled in {time.perf_counter() - start:.0f} s\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows)} configurations, {bad} with a problem")
    return 1 if bad else 0


def describe(resources: Resources) -> dict[str, Any]:
    """One row of the report, as written by --json."""
    row = dataclasses.asdict(resources)
    row["config"] = list(resources.config)
    row["shared_limit"] = configs.SHARED_MEMORY[resources.architecture]
    row["problems"] = problems(resources)
    row["exception"] = exception(resources)
    estimate = bound(resources)
    row["estimate"] = None if estimate is None else dataclasses.asdict(estimate)
    return row


def problems(resources: Resources) -> list[str]:
    """What must not be shipped; empty for a good configuration."""
    if resources.error:
        return [f"does not compile: {resources.error}"]
    found = []
    if resources.spills or resources.stack_bytes:
        found.append(f"{resources.spills} spills, {resources.stack_bytes} bytes of stack")
    limit = configs.SHARED_MEMORY[resources.architecture]
    if resources.shared_bytes > limit:
        found.append(f"{resources.shared_bytes} bytes of shared memory, the limit is {limit}")
    threads = resources.config.num_warps * (64 if resources.architecture.startswith("gfx") else 32)
    if threads > MAX_THREADS:
        found.append(f"{threads} threads, the limit is {MAX_THREADS}")
    if _without_matrix(resources) and exception(resources) is None:
        found.append("no matrix instruction")
    return found


def exception(resources: Resources) -> str | None:
    """Why this configuration may do without the architecture's matrix instruction, where it does; else None."""
    if not _without_matrix(resources):
        return None
    for (kernel, label), reason in WITHOUT_NEW_INSTRUCTION.items():
        if kernel == resources.kernel and resources.label.startswith(label):
            return reason
    return None


def _without_matrix(resources: Resources) -> bool:
    return resources.matrix and not resources.matrix_instructions


def _select(architecture: str, tried: dict[str, LaunchConfig]) -> Select:
    def select(kernel: str, size: int, dtype: torch.dtype) -> LaunchConfig:
        return tried.get(kernel) or configs.pinned(kernel, architecture, size=size, dtype=dtype)

    return select


def _print(architecture: str, rows: list[dict[str, Any]], markdown: bool) -> None:
    chip = CHIPS.get(architecture)
    estimate = f"; estimates for {chip.name}" if chip else ""
    print(f"{'### ' if markdown else ''}{architecture}: {len(rows)} configurations{estimate}\n")
    table = [COLUMNS, *(_cells(row) for row in rows)]
    if markdown:
        for number, cells in enumerate(table):
            print("| " + " | ".join(cells) + " |")
            if number == 0:
                print("|" + " --- |" * len(COLUMNS))
    else:
        widths = [max(len(cells[column]) for cells in table) for column in range(len(COLUMNS))]
        for cells in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    print()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    estimate, work = row["estimate"], row["work"]
    remarks = "; ".join(f"PROBLEM: {problem}" for problem in row["problems"]) or row["exception"] or ""
    if row["error"]:
        return (row["kernel"], row["label"], _config_text(row["config"]), *[""] * (len(COLUMNS) - 4), remarks)
    return (
        row["kernel"],
        row["label"],
        _config_text(row["config"]),
        str(row["registers"]),
        str(row["stack_bytes"]),
        str(row["spills"]),
        f"{row['shared_bytes'] / 1024:.0f}/{row['shared_limit'] // 1024}",
        str(row["matrix_instructions"]),
        f"{estimate['occupancy']} ({estimate['limited_by']})" if estimate else "",
        f"{estimate['microseconds']:.1f}" if estimate else "",
        estimate["resource"] if estimate else "",
        work["problem"] if work else "",
        remarks,
    )


def _config_text(config: Sequence[int]) -> str:
    block_m, block_n, warps, stages, splits = config
    return f"{block_m}x{block_n} w{warps} s{stages}" + (f" /{splits}" if splits > 1 else "")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m toprl_kernels.report", description=(__doc__ or "").split("\n")[0])
    known = ", ".join(configs.ARCHITECTURES)
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"], type=_architecture, help=f"of {known}")
    parser.add_argument("--kernel", default="", help="only cases whose kernel and label contain this")
    parser.add_argument("--all", action="store_true", help="also padded head dims, float16, half the actor's width")
    parser.add_argument("--config", nargs="+", default=[], type=_tried, metavar="KERNEL=M,N,WARPS,STAGES[,SPLITS]",
                        help="compile this instead of the pinned configuration")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="compiling processes")
    options = parser.parse_args(arguments)
    options.arch = [_architecture(name) for name in options.arch]
    options.config = dict(options.config)
    return options


def _architecture(name: str) -> str:
    full = name if name in configs.ARCHITECTURES else f"sm_{name}"
    if full not in configs.ARCHITECTURES:
        raise argparse.ArgumentTypeError(f"{name!r} is unknown; use one of {', '.join(configs.ARCHITECTURES)}")
    return full


def _tried(text: str) -> tuple[str, LaunchConfig]:
    kernel, _, numbers = text.partition("=")
    try:
        config = LaunchConfig(*map(int, numbers.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not KERNEL=M,N,WARPS,STAGES[,SPLITS]") from error
    if kernel not in configs.KERNELS:
        raise argparse.ArgumentTypeError(f"{kernel!r} is unknown; use one of {', '.join(configs.KERNELS)}")
    return kernel, config


if __name__ == "__main__":
    sys.exit(main())
