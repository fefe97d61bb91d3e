"""From records to results.json: scores, retention, intervals, tests, and what each method costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from toprl_kernels import flops
from toprl_models import Schedule
from training.evaluation.methods import row_for
from training.evaluation.records import Cell
from training.evaluation.runner import Runner
from training.evaluation.statistics import bootstrap_means, interval, paired_test, ratio
from training.tasks import Sample, Task
from training.tasks.benchmarks import BENCHMARKS

Records = Mapping[int, Mapping[str, Any]]
COSTS = ("average_tokens", "macs", "prefill_seconds", "decode_seconds", "kv_bytes")


def level_of(task: str) -> str:
    """Which group of columns a task belongs to."""
    return BENCHMARKS[task].level if task in BENCHMARKS else "any" if task == "custom" else "both"


def references(task: Task) -> list[Sample]:
    """All samples without what they show: thousands of images do not fit into memory."""
    blank = Image.new("RGB", (1, 1))
    return [task[i]._replace(image=blank, images=(), video=()) for i in range(len(task))]


def cost_of(record: Mapping[str, Any], runner: Runner, actor_size: int | None) -> flops.ScheduleCost:
    """Eqs. 8-12 for the tokens that one sample really kept."""
    layers = runner.layers_of(record["method"])
    stages = list(zip(layers, record["kept"], strict=True)) if record["kept"] else []
    return flops.schedule_cost(
        record["num_visual"], stages, runner.model.config.get_text_config(), actor_width=actor_size
    )


def summarise_cell(cell: Cell, records: Records, samples: Sequence[Sample], runner: Runner) -> dict[str, Any]:
    """Corpus numbers and mean costs of one run."""
    rows = [records[index] for index in range(len(samples))]
    trained = runner.trained(cell)
    actor_size = trained.policy.fc1.out_features if trained else None
    costs = [cost_of(row, runner, actor_size) for row in rows]
    kept = [np.divide(row["kept"], max(1, row["num_visual"])) for row in rows]
    sizes = [row["kv_bytes"] for row in rows if row["kv_bytes"] is not None]
    return {
        "task": cell.task,
        "method": cell.method,
        "budget": cell.budget,
        "seed": cell.seed,
        "policy": trained.name if trained else None,
        "n": len(rows),
        "corpus": runner.tasks[cell.task].corpus([row["prediction"] for row in rows], samples),
        "mean_score": statistics.fmean(row["score"] for row in rows),
        "retained": np.mean(kept, axis=0).tolist(),
        "average_tokens": statistics.fmean(cost.average_tokens for cost in costs),
        "macs": statistics.fmean(cost.total_macs for cost in costs),
        "prefill_seconds": statistics.fmean(row["prefill_seconds"] for row in rows),
        "decode_seconds": statistics.fmean(row["decode_seconds"] for row in rows),
        "kv_bytes": statistics.fmean(sizes) if sizes else None,
    }


def summarise_task(name: str, found: Mapping[Cell, Records], runner: Runner) -> tuple[dict, list, list, np.ndarray]:
    """One column of the table: facts of the task, runs, rows, and bootstrap draws of each row's retention."""
    task = runner.tasks[name]
    samples, cells = references(task), runner.cells(name)
    runs = [summarise_cell(cell, found[cell], samples, runner) for cell in cells]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.budget), []).append(cell)
    # several runs of a method: the mean score of each sample, so that samples stay paired
    scores = np.array(
        [
            np.mean([[found[cell][i]["score"] for i in range(len(samples))] for cell in group], axis=0)
            for group in groups.values()
        ]
    ).T
    draws = bootstrap_means(scores)
    headline = next(iter(runs[0]["corpus"]))
    full = runs[0]["corpus"][headline]
    retention = ratio(draws, draws[:, :1])
    rows = []
    for column, (method, budget) in enumerate(groups):
        mine = [run for run in runs if (run["method"], run["budget"]) == (method, budget)]
        values = [run["corpus"][headline] for run in mine]
        test, p_value = paired_test(scores[:, column], scores[:, 0])
        value = statistics.fmean(values)
        row: dict[str, Any] = {
            "task": name,
            "method": method,
            "budget": budget,
            "runs": len(mine),
            "score": value,
            "score_deviation": statistics.stdev(values) if len(values) > 1 else None,
            "scores": values,
            "retention": value / full if full else None,
            "mean_score": float(scores[:, column].mean()),
            "difference": float(scores[:, column].mean() - scores[:, 0].mean()),
            "difference_interval": interval(draws[:, column] - draws[:, 0], len(samples)),
            "retention_interval": interval(retention[:, column], len(samples)),
            "test": test,
            "p": p_value,
        }
        for cost in COSTS:
            known = [run[cost] for run in mine if run[cost] is not None]
            row[cost] = statistics.fmean(known) if known else None
        row["tflops"] = flops.FLOPS_PER_MAC * row["macs"] / 1e12
        row["macs_ratio"] = row["macs"] / runs[0]["macs"] if runs[0]["macs"] else None
        rows.append(row)
    facts = {
        **task.describe(),
        "n": len(samples),
        "level": level_of(name),
        "headline": headline,
        "headline_is_mean_score": abs(full - runs[0]["mean_score"]) < 1e-9,
        "num_visual": statistics.fmean(found[cells[0]][i]["num_visual"] for i in range(len(samples))),
    }
    return facts, runs, rows, retention


def schedule_facts(schedule: Schedule, num_visual: float, runner: Runner) -> dict[str, Any]:
    """What a schedule means for a sample with the task's mean number of visual tokens."""
    tokens = round(num_visual)
    text = runner.model.config.get_text_config()
    full = flops.schedule_macs(tokens, [], text)
    return {
        "layers": list(schedule.layers),
        "keep": list(schedule.counts(tokens)),
        "stages": [list(stage) for stage in schedule.stages],
        "num_visual": tokens,
        "num_layers": runner.num_layers,
        "average_tokens": schedule.average_tokens(tokens, runner.num_layers),
        "macs_ratio": schedule.macs(tokens, text) / full if full else None,
    }


def summarise(found: Mapping[Cell, Records], runner: Runner) -> dict[str, Any]:
    """Everything that tables are made of: tasks, schedules, runs, rows (method x budget x task) and averages."""
    tasks, runs, rows, draws = {}, [], [], {}
    for name in runner.tasks:
        tasks[name], some, column, retention = summarise_task(name, found, runner)
        runs += some
        rows += column
        draws[name] = {(row["method"], row["budget"]): retention[:, i] for i, row in enumerate(column)}
    averages = []
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
        known = [row["retention"] for row in mine if row["retention"] is not None]
        mean = np.mean([draws[name][method, budget] for name in draws], axis=0)
        average: dict[str, Any] = {
            "method": method,
            "label": row_for(method).label,
            "budget": budget,
            "retention": statistics.fmean(known) if len(known) == len(mine) else None,
            "retention_interval": interval(mean, min(facts["n"] for facts in tasks.values())),
        }
        for cost in (*COSTS, "tflops", "macs_ratio"):
            values = [row[cost] for row in mine if row[cost] is not None]
            average[cost] = statistics.fmean(values) if values else None
        averages.append(average)
    schedules: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in tasks}
    for name, facts in tasks.items():
        for (method, budget), schedule in runner.schedules(name, facts["num_visual"]).items():
            if row_for(method).scheduled:
                plan = schedule_facts(schedule, facts["num_visual"], runner)
                schedules[name].setdefault(budget, {})[method] = plan
    return {"tasks": tasks, "schedules": schedules, "rows": rows, "averages": averages, "runs": runs}
