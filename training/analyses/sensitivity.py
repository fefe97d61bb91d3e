"""Figure 1(b): accuracy for layers x pruning ratios, tokens chosen as FastV does."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from toprl_models.schedule import stage_layers_for
from training.analyses import plots
from training.analyses.config import LARGE, Analysis, ReproduceConfig, Result, level_of, refuse_one_level
from training.analyses.lab import Lab
from training.analyses.measure import answering, evaluate, facts_of, one_run
from training.analyses.verdicts import Verdict, bootstrap, changed, estimate, gap, judge, runs, shown, without_one
from training.analyses.words import listed, markdown_table

PAPER_ROWS = (2, 8, 16, 24)  # of 32
RATIOS = tuple(round(0.1 * i, 1) for i in range(11))


def run(config: ReproduceConfig, lab: Lab) -> Result:
    """One run per layer, ratio and task."""
    refuse_one_level(config.task)
    layers = list(stage_layers_for(facts_of(config, lab)["num_layers"], stages=PAPER_ROWS))
    wanted = [one_run("full")]
    for layer in layers:
        for ratio in RATIOS[1:]:
            wanted.append(one_run(f"{layer}/{ratio}", "fastv", [(layer, round(1 - ratio, 1))]))
    answers = lab.map(evaluate, [answering(config, task, wanted, config.grid_size) for task in config.task], "tasks")
    return {
        "layers": layers,
        "ratios": list(RATIOS),
        "tasks": {
            task: {"level": level_of(task), "scores": {name: one["scores"] for name, one in found.items()}}
            for task, found in zip(config.task, answers, strict=True)
        },
    }


def grid(result: Result, task: str) -> list[list[float]]:
    """Retention of each layer (rows) and ratio (columns)."""
    means = {name: fmean(scores) for name, scores in result["tasks"][task]["scores"].items()}
    return [
        [1.0 if ratio == 0 else means[f"{layer}/{ratio}"] / means["full"] for ratio in result["ratios"]]
        for layer in result["layers"]
    ]


def mean_retention(result: Result, task: str, layer: int, seed: int) -> tuple[float, np.ndarray]:
    """Retention at a layer averaged over the ratios 0.1 to 1, and its bootstrap draws."""
    names = [f"{layer}/{ratio}" for ratio in result["ratios"] if ratio]
    scores = result["tasks"][task]["scores"]
    columns = {name: runs(scores[name]) for name in (*names, "full")}
    draws = bootstrap(columns, seed=seed)
    value = fmean(columns[name].mean() for name in names) / columns["full"].mean()
    return value, np.mean([draws[name] for name in names], axis=0) / draws["full"]


def verdicts(result: Result) -> list[Verdict]:
    first, last = result["layers"][0], result["layers"][-1]
    found = {
        layer: {task: mean_retention(result, task, layer, i) for i, task in enumerate(result["tasks"])}
        for layer in (first, last)
    }
    of_level = {
        level: [task for task in result["tasks"] if result["tasks"][task]["level"] == level]
        for level in ("perception", "reasoning")
    }

    def mean(layer: int, tasks: list[str]) -> tuple[float, np.ndarray]:
        mine = [found[layer][task] for task in tasks]
        return fmean(value for value, _ in mine), np.mean([draws for _, draws in mine], axis=0)

    everything = list(result["tasks"])
    shallow, deep = mean(first, everything), mean(last, everything)
    depth = estimate(deep[0] - shallow[0], deep[1] - shallow[1])
    sides = (of_level["reasoning"], of_level["perception"])
    difference, spared = gap(found[first], *sides), without_one(found[first], *sides)
    without = f" Without {spared[0]}: {spared[1].percent(signed=True)}." if spared else ""
    return [
        Verdict(
            "Sensitivity to pruning depends on the layer: deeper pruning costs less.",
            judge(depth),
            f"Accuracy kept, averaged over pruning ratios 0.1 to 1 and tasks, before layer {last} minus before layer "
            f"{first}: {depth.percent(signed=True)} points.",
        ),
        Verdict(
            "At shallow layers reasoning is less sensitive than perception.",
            judge(difference),
            f"The same before layer {first}, {listed(of_level['reasoning'])} minus {listed(of_level['perception'])}: "
            f"{difference.percent(signed=True)} points.{without}",
            changed(judge(difference), spared),
        ),
    ]


def table(result: Result) -> str:
    rows = []
    for i, (task, one) in enumerate(result["tasks"].items()):
        full = runs(one["scores"]["full"])
        cells = [estimate(*mean_retention(result, task, layer, i)).percent() for layer in result["layers"]]
        rows.append([task, one["level"], str(full.size), shown(full), *cells])
    heads = ["task", "level", "n", "full model, % ± SE", *(f"before {layer}" for layer in result["layers"])]
    note = "From the fifth column on: percent of the full model's accuracy, mean over the pruning ratios 0.1 to 1."
    return f"{markdown_table(heads, rows, 2)}\n\n{note}"


def figure(result: Result) -> Figure:
    tasks = list(result["tasks"])
    rows = math.ceil(len(tasks) / 2)
    drawn = plots.blank(10, 0.42 + rows * (0.55 + 0.22 * len(result["layers"])))
    panels = list(drawn.subplots(rows, 2, squeeze=False).flat)
    image: Any = None
    for axes, task in zip(panels, tasks, strict=False):
        names = [f"before {layer}" for layer in result["layers"]]
        image = plots.heat_map(axes, grid(result, task), names, [f"{r:g}" for r in result["ratios"]], 0, 100)
        axes.set_title(f"{task} ({result['tasks'][task]['level']})")
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    drawn.supxlabel("pruning ratio (share of visual tokens removed)", fontsize=8.5, color="#5d666f")
    plots.colour_bar(image, drawn.axes, fraction=0.025, aspect=30)
    return drawn


ANALYSIS = Analysis(
    name="sensitivity",
    title="Figure 1(b): pruning sensitivity",
    minutes=1,
    flags=("task", "dataset_path", "grid_size"),
    paper='Layers 2, 8, 16 and 24 of 32 by 11 pruning ratios from 0 to 1, "following the pruning method adopted by '
    'FastV". POPE and TextVQA are sensitive until deeper layers, ScienceQA and GQA hardly even at shallow ones.',
    protocol="FastV's rule (attention of the last prompt token in the layer before) at the same relative depths.",
    command=f"{LARGE} --task textvqa pope scienceqa gqa",
    run=run,
    figure=figure,
    table=table,
    verdicts=verdicts,
)
