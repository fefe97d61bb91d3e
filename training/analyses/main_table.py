"""Table 1: every method on every task at two budgets, by training/evaluate.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from toprl_models.schedule import stage_layers_for
from training.analyses import plots
from training.analyses.config import LARGE_TRAINED, Analysis, ReproduceConfig, Result, level_of
from training.analyses.lab import Lab
from training.analyses.measure import facts_of, train, training
from training.analyses.verdicts import Estimate, Verdict, bootstrap, changed, estimate, judge, runs
from training.analyses.words import listed, markdown_table
from training.evaluate import evaluate as evaluate_command
from training.evaluation.config import EvaluateConfig
from training.evaluation.methods import METHODS
from training.fingerprint import digest_of

CONTROLS = ("random", "untrained")
# rows that are not rivals of TOP-RL in the paper's table: TOP-RL itself, and variants of it
NO_RIVALS = ("full", "toprl", "oneshot", "untrained", "argmax")


def compare(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One task through training/evaluate.py; gives the score of each sample, per method, budget and run."""
    output = folder / "evaluations" / f"{arguments['task']}_{digest_of(arguments)}"
    policies = [str(folder / policy) for policy in arguments["policies"]]
    paths = [f"{arguments['task']}={arguments['path']}"] if arguments["path"] else []
    config = EvaluateConfig(
        model_name_or_path=arguments["model"]["name"],
        dtype=arguments["model"]["dtype"],
        device=arguments["model"]["device"],
        task=[arguments["task"]],
        method=arguments["methods"],
        policy=policies,
        budget=arguments["budget"],
        seeds=arguments["seeds"],
        limit=arguments["size"],
        batch_size=arguments["batch_size"],
        dataset_path=paths,
        output_dir=str(output),
    )
    results = evaluate_command(config)
    assert results is not None  # only ranks other than 0 get none
    return {
        "rows": [{name: row[name] for name in KEPT} for row in results["rows"]],
        "scores": _scores(output / "samples.jsonl"),
        "facts": results["tasks"][arguments["task"]],
        "schedules": results["schedules"][arguments["task"]],
    }


KEPT = (
    "method",
    "budget",
    "runs",
    "score",
    "score_deviation",
    "retention",
    "retention_interval",
    "average_tokens",
    "macs_ratio",
)


def _scores(path: Path) -> dict[str, list[list[float]]]:
    """ "method/budget" -> one list of scores per run, by sample."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    with open(path) as file:
        for line in file:
            one = json.loads(line)
            place = found.setdefault(f"{one['method']}/{one['budget']}", {})
            place.setdefault(one["seed"], {})[one["index"]] = one["score"]
    return {name: [[by[i] for i in sorted(by)] for by in seeds.values()] for name, seeds in found.items()}


ALL = [name for name, row in METHODS.items() if row.method is None or "images" in row.method.inputs]


def run(config: ReproduceConfig, lab: Lab) -> Result:
    """Trains the agents (one per task and seed) and compares everything."""
    found = facts_of(config, lab)
    layers = stage_layers_for(found["num_layers"])
    jobs = [(task, seed) for task in config.task for seed in config.seeds]
    trained = lab.map(train, [training(config, task, seed, layers) for task, seed in jobs], "trainings")
    policies = {
        task: [one["policy"] for key, one in zip(jobs, trained, strict=True) if key[0] == task] for task in config.task
    }
    arguments = [
        {
            "model": config.model(),
            "task": task,
            "path": config.path_of(task),
            "methods": ALL,
            "policies": policies[task],
            "budget": config.budget,
            "seeds": config.seeds,
            "size": config.size,
            "batch_size": config.batch_size,
        }
        for task in config.task
    ]
    answers = lab.map(compare, arguments, "tasks")
    return {
        "layers": list(layers),
        "num_visual": found["num_visual"],
        "budgets": [f"{budget:g}" for budget in config.budget],
        "labels": {name: METHODS[name].label for name in ALL},
        "tasks": {
            task: {"level": level_of(task), "n": one["facts"]["n"], "rows": one["rows"], "schedules": one["schedules"]}
            for task, one in zip(config.task, answers, strict=True)
        },
        "averages": averages([one["scores"] for one in answers]),
        "toprl_minus": toprl_minus(config.task, [one["scores"] for one in answers]),
    }


def retention_draws(answers: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, np.ndarray]]]:
    """For each "method/budget" and task: share of the full model's score kept, and its bootstrap draws."""
    found: dict[str, list[tuple[float, np.ndarray]]] = {}
    for number, scores in enumerate(answers):
        columns = {name: runs(values) for name, values in scores.items()}
        draws, full = bootstrap(columns, seed=number), columns["full/full"].mean()
        for name, values in columns.items():
            found.setdefault(name, []).append((values.mean() / full, draws[name] / draws["full/full"]))
    return found


def averages(answers: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """Mean retention over the tasks, by "method/budget"; over samples and, where there are several, runs."""
    found = retention_draws(answers)
    return {
        name: estimate(fmean(value for value, _ in mine), np.mean([draws for _, draws in mine], axis=0))
        for name, mine in found.items()
    }


def toprl_minus(tasks: Sequence[str], answers: Sequence[dict[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """Retention of TOP-RL minus that of every other method at its budget: by task, and "average"."""
    found = retention_draws(answers)
    result: dict[str, dict[str, Estimate]] = {}
    for name, mine in found.items():
        method, budget = name.split("/")
        ours = found.get(f"toprl/{budget}")
        if ours is None or method == "toprl":
            continue
        pairs = list(zip(ours, mine, strict=True))
        result[name] = {
            task: estimate(our[0] - their[0], our[1] - their[1])
            for task, (our, their) in zip(tasks, pairs, strict=True)
        }
        mean = fmean(our[0] - their[0] for our, their in pairs)
        result[name]["average"] = estimate(mean, np.mean([our[1] - their[1] for our, their in pairs], axis=0))
    return result


# -- from results ----------------------------------------------------------------------------------------------------


def rivals(result: Result, budget: str) -> list[str]:
    """Methods that TOP-RL is compared with at a budget."""
    names = [name.split("/")[0] for name in result["toprl_minus"] if name.endswith(f"/{budget}")]
    return [name for name in names if name not in NO_RIVALS]


def row_of(result: Result, task: str, method: str, budget: str) -> dict[str, Any]:
    return next(row for row in result["tasks"][task]["rows"] if (row["method"], row["budget"]) == (method, budget))


def gap_to_best(result: Result, budget: str, column: str) -> tuple[str, Estimate]:
    """The best rival of a column (a task or "average") and TOP-RL's retention minus its own."""
    best = min(rivals(result, budget), key=lambda name: result["toprl_minus"][f"{name}/{budget}"][column][0])
    return best, Estimate(*result["toprl_minus"][f"{best}/{budget}"][column])


def without_one(result: Result, budget: str) -> tuple[str, Estimate, str] | None:
    """The task that TOP-RL owes most to, the average gap without it, and to which rival, chosen anew.

    Tasks have samples of their own, so the variances of their gaps add up. None for a single task.
    """
    tasks = list(result["tasks"])
    if len(tasks) < 2:
        return None

    def mean(name: str, spared: str) -> Estimate:
        found = [Estimate(*result["toprl_minus"][f"{name}/{budget}"][task]) for task in tasks if task != spared]
        value = fmean(one.value for one in found)
        half = sum(((one.high - one.low) / 2) ** 2 for one in found) ** 0.5 / len(found)
        return Estimate(value, value - half, value + half)

    best = {spared: min((mean(name, spared), name) for name in rivals(result, budget)) for spared in tasks}
    spared = min(best, key=lambda task: best[task][0].value)
    return spared, *best[spared]


def verdicts(result: Result) -> list[Verdict]:
    found = []
    for budget in result["budgets"]:
        best, gap = gap_to_best(result, budget, "average")
        won, lost = [], []
        for task in result["tasks"]:
            _, one = gap_to_best(result, budget, task)
            if one.low > 0:
                won.append(task)
            elif one.high < 0:
                lost.append(task)
        spared = without_one(result, budget)
        rest = f" Without {spared[0]}: {spared[1].percent(True)} (to {result['labels'][spared[2]]})." if spared else ""
        where = f"Clearly first on {listed(won) if won else 'no task'}; clearly behind another method on "
        found.append(
            Verdict(
                f"At {budget} average tokens TOP-RL keeps more accuracy, averaged over tasks, than every other method.",
                judge(gap),
                f"TOP-RL minus {result['labels'][best]}, the best of the {len(rivals(result, budget))} others: "
                f"{gap.percent(signed=True)} points of retention.{rest} "
                f"{where}{listed(lost) if lost else 'none'}.",
                changed(judge(gap), spared[:2] if spared else None),
            )
        )
    loose, tight = result["budgets"][0], result["budgets"][-1]
    if loose != tight:
        control = Estimate(*result["toprl_minus"][f"untrained/{tight}"]["average"])
        found.append(
            Verdict(
                "What the agent learned matters (control, not in the paper): TOP-RL beats its own untrained actor.",
                judge(control),
                f"At {tight} average tokens {control.percent(signed=True)} points of retention.",
            )
        )
    return found


def table(result: Result) -> str:
    tasks = list(result["tasks"])
    heads = [
        "method",
        *(f"{task} ({result['tasks'][task]['level']})" for task in tasks),
        "Avg retention [95 %]",
        "average tokens",
    ]
    rows = [_line(result, "full", "full", tasks)]
    for budget in result["budgets"]:
        rows.append([f"**{budget} average tokens**", *[""] * (len(heads) - 1)])
        methods = [one["method"] for one in result["tasks"][tasks[0]]["rows"] if one["budget"] == budget]
        rows += [_line(result, method, budget, tasks) for method in methods]
    rows.append(["**as many as the agent wants**", *[""] * (len(heads) - 1)])
    rows.append(_line(result, "argmax", "free", tasks))
    n = min(one["n"] for one in result["tasks"].values())
    note = (
        f"Accuracy in % (± deviation over runs), behind it the percentage of the full model's; n = {n} per column. "
        f"Tokens: counted from what was kept, of {result['num_visual']}."
    )
    return f"{markdown_table(heads, rows)}\n\n{note}"


def _line(result: Result, method: str, budget: str, tasks: Sequence[str]) -> list[str]:
    rows = [row_of(result, task, method, budget) for task in tasks]
    cells = []
    for row in rows:
        spread = "" if row["score_deviation"] is None else f" ± {100 * row['score_deviation']:.1f}"
        cells.append(f"{100 * row['score']:.1f}{spread} ({100 * row['retention']:.1f})")
    average = Estimate(*result["averages"][f"{method}/{budget}"])
    label = result["labels"][method]
    return [
        f"**{label}**" if method == "toprl" else label,
        *cells,
        average.percent(),
        f"{fmean(row['average_tokens'] for row in rows):.2f}",
    ]


def figure(result: Result) -> Figure:
    budgets = result["budgets"]
    drawn = plots.blank(9.6, 3.6)
    panels = drawn.subplots(1, len(budgets), squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        mine = {
            name.split("/")[0]: Estimate(*one)
            for name, one in result["averages"].items()
            if name.endswith(f"/{budget}")
        }
        names = sorted(mine, key=lambda name: mine[name].value)
        for place, name in enumerate(names):
            one = mine[name]
            colour = "#1b6a85" if name == "toprl" else "#b9bec4" if name in (*CONTROLS, "oneshot") else "#c8553d"
            axes.barh(place, 100 * one.value, 0.66, color=colour)
            axes.plot([100 * one.low, 100 * one.high], [place, place], color="#2b3137", linewidth=1)
            axes.text(2, place, f"{100 * one.value:.1f}", va="center", size=7, color="white")
        axes.set_yticks(range(len(names)), [result["labels"][name] for name in names])
        axes.set_xlim(0, max(101, 100 * max(one.high for one in mine.values()) + 1))
        axes.grid(axis="y", visible=False)
        axes.set_title(f"{budget} of {result['num_visual']} tokens on average")
        axes.set_xlabel("mean retention over the tasks, %")
    return drawn


ANALYSIS = Analysis(
    name="main",
    title="Table 1: main comparison",
    minutes=7,
    flags=("task", "dataset_path", "size", "budget", "seeds", "iterations", "train_size", "actor_size"),
    paper='LLaVA-1.5-7B, nine benchmarks, 192 and 64 of 576 tokens "on average". Average retention at 192: TOP-RL '
    "97.6 %, VisionZip 94.3, DivPrune 93.9, SparseVLM 91.3, PDrop 91.2, FastV 87.7; at 64: 91.0, 87.9, 87.1, 78.0, "
    "76.0, 66.5. TOP-RL is best in all columns but RefCOCO at 192. (The mean of its own row is 97.4, not 97.6.)",
    protocol="Every method by its authors' rule, at the same average tokens over all layers, counted; TOP-RL with "
    "one agent per question kind and seed. The paper's second budget, one ninth, is below what methods that prune "
    "inside so shallow a model can reach, so the tighter one is near their floor.",
    command=f"{LARGE_TRAINED} --task textvqa gqa scienceqa --budget 192 64",
    run=run,
    figure=figure,
    table=table,
    verdicts=verdicts,
    constants={"methods": ALL},
)
