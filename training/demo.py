"""The demo: train, evaluate and report on the embedded tiny LLaVA.

    python training/demo.py --output_dir runs/demo          # about eight minutes on two CPU cores
    python training/demo.py --tasks ocr --seeds 1 --iterations 5

Trains one policy per question kind with training/ppo.py (several seeds of the first kind), compares each with
the baselines by training/evaluate.py, and writes results.json, gallery.json and report.html.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models import Schedule, TopRLPolicy, attach
from training import cli
from training.report import gallery_entry, write_report
from training.scenes import KINDS
from training.tasks import answer, encode, load_model, make_task

ROOT = Path(__file__).resolve().parents[1]
CONTROL_SEEDS = range(5)  # runs of random pruning and of untrained actors


@dataclass
class DemoConfig:
    """Flags of the script."""

    output_dir: str = field(default="runs/demo", metadata={"help": "where everything goes"})
    tasks: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": "question kinds; the first gets all seeds"}
    )
    seeds: int = field(default=3, metadata={"help": "seeds of the first kind; the others get one"})
    iterations: int = field(default=40, metadata={"help": "PPO iterations per run"})
    train_size: int = field(default=2048, metadata={"help": "training samples per kind"})
    stage_layers: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "pruning happens before these"}
    )
    keep: list[int] = field(default_factory=lambda: [8, 4, 2], metadata={"help": "tokens kept by each stage"})
    size: int = field(default=512, metadata={"help": "test samples per kind"})
    workers: int = field(default=0, metadata={"help": "processes at once; 0 takes the number of CPU cores, at most 4"})


def run_script(name: str, arguments: list[str], log: Path) -> None:
    """Run a script of this folder in a process of its own, one thread; its output goes to ``log``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "training" / name), *arguments]
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if code:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"training/{name} {' '.join(arguments)} ended with code {code}:\n{tail}")


def summary(results: dict[str, Any], kind: str) -> dict[str, Any]:
    """What the report needs of an evaluation's results.json."""
    runs = [run for run in results["runs"] if run["method"] == "argmax"]
    schedule = next(iter(results["schedules"][kind].values()))["toprl"]
    return {
        "task": kind,
        "n": results["tasks"][kind]["n"],
        "schedule": schedule,
        "rows": [
            {"method": row["method"], "accuracy": row["scores"], "average_tokens": row["average_tokens"]}
            for row in results["rows"]
            if row["method"] != "argmax"
        ],
        "argmax": {
            "accuracy": [run["corpus"]["accuracy"] for run in runs],
            "kept": [sum(run["retained"]) / len(run["retained"]) for run in runs],
            "retained": [run["retained"] for run in runs],
        },
    }


def print_table(result: dict[str, Any]) -> None:
    """A ``summary`` as a table on the console."""
    from rich.console import Console
    from rich.table import Table

    schedule = result["schedule"]
    table = Table(
        title=f"{result['task']}, n = {result['n']}: before layers {schedule['layers']} "
        f"keep {schedule['keep']} of {schedule['num_visual']} visual tokens"
    )
    for column in ("method", "accuracy", "of full", "average tokens", "runs"):
        table.add_column(column, justify="left" if column == "method" else "right")
    full = result["rows"][0]["accuracy"][0]
    for row in result["rows"]:
        mean = sum(row["accuracy"]) / len(row["accuracy"])
        share = f"{mean / full:.1%}" if full else "-"
        table.add_row(row["method"], f"{mean:.3f}", share, f"{row['average_tokens']:.2f}", str(len(row["accuracy"])))
    kept, accuracy = result["argmax"]["kept"], result["argmax"]["accuracy"]
    table.caption = (
        f"arg-max agent: accuracy {sum(accuracy) / len(accuracy):.3f}, mean keep {sum(kept) / len(kept):.3f}"
    )
    Console().print(table)


def gallery(config: DemoConfig, folder: Path, runs: dict[str, list[str]], per_kind: int) -> list[dict[str, Any]]:
    """Test images with what each stage kept and the answers with and without pruning."""
    model, processor = load_model("tiny", "cpu")
    schedule = Schedule(tuple(zip(config.stage_layers, config.keep, strict=True)))
    entries = []
    for number, kind in enumerate(config.tasks):
        policy = TopRLPolicy.from_pretrained(folder / runs[kind][0] / "policy")
        task = make_task(kind, "test", per_kind, seed=100 + number)  # other scenes than the table's, and per kind
        samples = [task[i] for i in range(per_kind)]
        inputs = encode(processor, task, samples, "cpu")
        before, _ = answer(model, processor, task, samples, inputs)
        with attach(model, policy, schedule=schedule) as pruner:
            after, _ = answer(model, processor, task, samples, inputs)
            kept = [[[i for i in row if i >= 0] for row in stage.indices.tolist()] for stage in pruner.trace]
        for row, sample in enumerate(samples):
            stages = [stage[row] for stage in kept]
            entries.append({"kind": kind, **gallery_entry(sample.image, sample, before[row], after[row], stages)})
    return entries


def main(config: DemoConfig) -> None:
    began = time.perf_counter()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    workers = config.workers or min(4, os.cpu_count() or 1)
    runs = {
        kind: [f"{kind}_seed{seed}" for seed in range(config.seeds if kind == config.tasks[0] else 1)]
        for kind in config.tasks
    }
    layers = [str(layer) for layer in config.stage_layers]

    def train(kind: str, name: str) -> None:
        seed = name.rsplit("seed", 1)[1]
        flags = ["--task", kind, "--seed", seed, "--output_dir", str(folder / name), "--stage_layers", *layers]
        flags += ["--iterations", str(config.iterations), "--train_size", str(config.train_size), "--overwrite"]
        run_script("ppo.py", flags, folder / f"{name}.log")
        rows = (folder / name / "metrics.jsonl").read_text().splitlines()
        last = json.loads(rows[-1])
        kept = "/".join(f"{x:.2f}" for x in last["retained"])
        print(
            f"  trained {name}: reward {last['reward']:.3f}, kept {kept}, accuracy {last['accuracy']:.3f}", flush=True
        )

    def compare(kind: str) -> dict[str, Any]:
        policies = [str(folder / name / "policy") for name in runs[kind]]
        output = folder / f"{kind}_evaluation"
        flags = ["--task", kind, "--policy", *policies, "--keep", *map(str, config.keep), "--limit", str(config.size)]
        flags += ["--seeds", *map(str, CONTROL_SEEDS), "--output_dir", str(output), "--overwrite"]
        run_script("evaluate.py", flags, folder / f"{kind}_evaluation.log")
        return summary(json.loads((output / "results.json").read_text()), kind)

    jobs = [(kind, name) for kind in config.tasks for name in runs[kind]]
    with ThreadPoolExecutor(workers) as pool:
        print(f"training {len(jobs)} policies, {workers} at a time", flush=True)
        list(pool.map(lambda job: train(*job), jobs))
        print("evaluating", flush=True)
        evaluations = list(pool.map(compare, config.tasks))
    results = {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "cpu_count": os.cpu_count(),
            "date": datetime.date.today().isoformat(),
        },
        "schedule": evaluations[0]["schedule"],
        "tasks": {e["task"]: {k: e[k] for k in ("n", "rows", "argmax")} for e in evaluations},
        "runs": runs,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    per_kind = -(-12 // len(config.tasks))
    (folder / "gallery.json").write_text(json.dumps(gallery(config, folder, runs, per_kind)))
    report = write_report(folder)
    for evaluation in evaluations:
        print_table(evaluation)
    print(f"{time.perf_counter() - began:.0f} s. Report: {report}")


if __name__ == "__main__":
    cli.run(lambda arguments: main(cli.parse(DemoConfig, __doc__, arguments)))
