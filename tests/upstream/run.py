"""Judge: transformers' own tests of the model families, with and without a pruner that keeps everything.

    TOPRL_TRANSFORMERS_TESTS=/path/to/transformers/tests python tests/upstream/run.py

The two runs must agree test by test; see docs/upstream.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FAMILIES = ("llava", "llava_next", "video_llava", "llava_onevision", "qwen2_5_vl", "internvl", "qwen3_vl")
WITH = ("keep-all", "gather", "drop")
# (family, pruner, test): reason; real tokens are bitwise equal in these
EXPECTED = {
    ("internvl", "gather", "test_retain_grad_hidden_states_attentions"): "hidden_states[0] comes back as a copy",
    ("qwen3_vl", "gather", "test_batching_equivalence"): "reads logits of padding, whose states come back as zeros",
}
OUTCOMES = ("passed", "failed", "skipped", "xfailed", "xpassed")

Report = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    tests: Path = args.tests.resolve()
    args.log_dir.mkdir(parents=True, exist_ok=True)
    runs = [(family, variant) for family in args.families for variant in ("none", *args.pruners)]
    print(f"transformers {installed_version()}; logs in {args.log_dir}", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        reports = dict(zip(runs, pool.map(lambda run: run_pytest(tests, *run, args), runs), strict=True))
    differences = 0
    for family in args.families:
        print(f"\n{family}")
        for variant in ("none", *args.pruners):
            print("\n".join(lines_of(variant, reports[family, variant])))
        for variant in args.pruners:
            found = differing(reports[family, "none"], reports[family, variant])
            for name, before, after in found:
                reason = EXPECTED.get((family, variant, name))
                differences += reason is None
                word = "DIFFERS" if reason is None else "differs as expected"
                print(f"  {word} with {variant}: {name}: {before} -> {after}{f' ({reason})' if reason else ''}")
            if not reports[family, variant]["counts"]["stages run"]:
                differences += 1
                print(f"  DIFFERS with {variant}: no stage has run, so the tests show nothing")
    print(f"\n{differences} difference(s)")
    return 1 if differences else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, default=os.environ.get("TOPRL_TRANSFORMERS_TESTS"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--pruners", nargs="+", choices=WITH, default=WITH[:2], help="what the models get attached")
    parser.add_argument("-k", default="", help="pytest's expression: run only the tests it selects")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--log-dir", type=Path, default=Path(tempfile.gettempdir()) / "toprl-upstream")
    args = parser.parse_args(argv)
    if args.tests is None:
        parser.error("no tests given; set TOPRL_TRANSFORMERS_TESTS to the tests/ folder of a checkout of transformers")
    args.tests = Path(args.tests)
    if not (args.tests / "generation" / "test_utils.py").exists():
        parser.error(f"{args.tests} is not the tests/ folder of transformers: it has no generation/test_utils.py")
    return args


def installed_version() -> str:
    import transformers

    return transformers.__version__


def run_pytest(tests: Path, family: str, variant: str, args: argparse.Namespace) -> Report:
    """One family's test file in a process of its own; its output goes to a log file."""
    path = args.log_dir / f"{family}_{variant}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "plugin", f"--toprl-pruner={variant}", f"--toprl-report={path}"]
    # nothing of the checkout's own pytest configuration: its conftest.py would put the checkout's src first
    command += ["-c", os.devnull, f"--rootdir={tests.parent}", f"--confcutdir={tests}", "-p", "no:cacheprovider"]
    command += ["-q", "-rf", "--tb=short", "-W", "ignore", "-k", args.k]
    command.append(str(tests / "models" / family / f"test_modeling_{family}.py"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    log, start = path.with_suffix(".log"), time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(command, cwd=tests.parent, env=environment, stdout=file, stderr=subprocess.STDOUT)
    print(f"{family}, {variant}: {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode not in (0, 1) or not path.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{family}, {variant}: pytest ended with status {done.returncode}; end of {log}:\n{tail}")
    return json.loads(path.read_text())


def lines_of(variant: str, report: Report) -> list[str]:
    lines = []
    for group in sorted({test["group"] for test in report["tests"].values()}):
        tally = Counter(test["outcome"] for test in report["tests"].values() if test["group"] == group)
        counts = ", ".join(f"{tally[name]} {name}" for name in OUTCOMES if tally[name])
        lines.append(f"  {variant:8}  {group:10}  {counts}")
    if variant != "none":
        lines.append(f"  {'':8}  {', '.join(f'{number} {name}' for name, number in report['counts'].items())}")
    return lines


def differing(before: Report, after: Report) -> list[tuple[str, str, str]]:
    """(test, outcome without, outcome with) where they are not the same."""
    first, second = before["tests"], after["tests"]
    rows = []
    for name in sorted(first.keys() | second.keys()):
        outcomes = [tests[name]["outcome"] if name in tests else "not run" for tests in (first, second)]
        if outcomes[0] != outcomes[1]:
            rows.append((name.rpartition("::")[2], *outcomes))
    return rows


if __name__ == "__main__":
    sys.exit(main())
