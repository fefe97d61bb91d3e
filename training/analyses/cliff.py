"""Figure 1(a): accuracy when all visual tokens are removed before one layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from training.analyses import plots
from training.analyses.config import LARGE, Analysis, ReproduceConfig, Result, level_of, refuse_one_level
from training.analyses.lab import Lab
from training.analyses.measure import answering, evaluate, facts_of, one_run
from training.analyses.verdicts import (
    Estimate,
    Verdict,
    bootstrap,
    changed,
    estimate,
    gap,
    judge,
    runs,
    shown,
    without_one,
)
from training.analyses.words import listed, markdown_table

REACHED = 0.95  # of the unpruned accuracy: from this layer on, visual tokens are hardly needed


def run(config: ReproduceConfig, lab: Lab) -> Result:
    """One run per layer and task."""
    refuse_one_level(config.task)
    layers = range(facts_of(config, lab)["num_layers"])
    wanted = [one_run("full"), *(one_run(str(layer), "random", [(layer, 0)]) for layer in layers)]
    answers = lab.map(evaluate, [answering(config, task, wanted) for task in config.task], "tasks")
    return {
        "layers": list(layers),
        "tasks": {
            task: {"level": level_of(task), "scores": {name: one["scores"] for name, one in found.items()}}
            for task, found in zip(config.task, answers, strict=True)
        },
    }


def cliff_layers(retention: np.ndarray) -> np.ndarray:
    """First layer from which on every retention is at least REACHED, for ``[layers, draws]``; else their number."""
    reached = np.logical_and.accumulate((retention >= REACHED)[::-1], axis=0)[::-1]
    return np.where(reached.any(0), reached.argmax(0), len(retention))


def cliffs(result: Result) -> dict[str, tuple[float, np.ndarray]]:
    """Cliff layer of each task and its bootstrap draws."""
    found = {}
    for number, (task, one) in enumerate(result["tasks"].items()):
        columns = {name: runs(scores) for name, scores in one["scores"].items()}
        draws = bootstrap(columns, seed=number)
        names = [str(layer) for layer in result["layers"]]
        full = columns["full"].mean()
        values = np.array([[columns[name].mean() / full] for name in names])
        found[task] = (
            float(cliff_layers(values)[0]),
            cliff_layers(np.array([draws[name] / draws["full"] for name in names])),
        )
    return found


def verdicts(result: Result) -> list[Verdict]:
    found, depth = cliffs(result), len(result["layers"])
    cliff = {task: estimate(*one) for task, one in found.items()}
    last = max(cliff.values(), key=lambda one: one.high)
    before = Estimate(depth - last.value, depth - last.high, depth - last.low)
    text = ", ".join(f"{task} {one.value:.0f} [{one.low:.0f}, {one.high:.0f}]" for task, one in cliff.items())
    exists = Verdict(
        "There is a layer beyond which removing all visual tokens has little effect.",
        judge(before, above=0.5),
        f"Layers from which on removal keeps {REACHED:.0%} of the accuracy: {text} of {depth}; {depth} would mean "
        "none.",
    )
    levels = {
        level: [task for task in found if result["tasks"][task]["level"] == level]
        for level in ("perception", "reasoning")
    }
    difference, spared = gap(found, *levels.values()), without_one(found, *levels.values())
    without = f" Without {spared[0]} it is {spared[1].text(signed=True)}." if spared else ""
    earlier = Verdict(
        "The cliff comes earlier for reasoning than for perception.",
        judge(difference),
        f"Mean cliff layer of perception ({listed(levels['perception'])}) minus that of reasoning "
        f"({listed(levels['reasoning'])}): {difference.text(signed=True)} layers.{without}",
        changed(judge(difference), spared),
    )
    return [exists, earlier]


def table(result: Result) -> str:
    rows = []
    for task, one in result["tasks"].items():
        scores = {name: runs(values) for name, values in one["scores"].items()}
        cells = [f"{100 * scores[str(layer)].mean() / scores['full'].mean():.1f}" for layer in result["layers"]]
        rows.append([task, one["level"], str(scores["full"].size), shown(scores["full"]), *cells])
    heads = ["task", "level", "n", "full model, % ± SE", *(f"before {layer}" for layer in result["layers"])]
    return markdown_table(heads, rows, 2) + "\n\nFrom the fifth column on: percent of the full model's accuracy."


def figure(result: Result) -> Figure:
    drawn = plots.blank(7.2, 3.6)
    axes = drawn.subplots()
    colours = plots.colours_of({task: one["level"] for task, one in result["tasks"].items()})
    for number, (task, one) in enumerate(result["tasks"].items()):
        columns = {name: runs(scores) for name, scores in one["scores"].items()}
        draws = bootstrap(columns, seed=number)
        full = columns["full"].mean()
        names = [str(layer) for layer in result["layers"]]
        middle = [columns[name].mean() / full for name in names] + [1.0]
        bands = [estimate(0, draws[name] / draws["full"]) for name in names]
        places = [*result["layers"], len(result["layers"])]
        axes.plot(places, [100 * x for x in middle], "o-", color=colours[task], label=f"{task} ({one['level']})", ms=4)
        axes.fill_between(
            places[:-1],
            [100 * b.low for b in bands],
            [100 * b.high for b in bands],
            color=colours[task],
            alpha=0.12,
            lw=0,
        )
    axes.axhline(100 * REACHED, color="#5d666f", linewidth=0.9, linestyle=(0, (2, 3)))
    axes.set_xticks(places, [*map(str, result["layers"]), "never"])
    axes.set_xlabel("all visual tokens removed before this decoder layer")
    axes.set_ylabel("% of the full model's accuracy")
    axes.set_ylim(0, 109)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


ANALYSIS = Analysis(
    name="cliff",
    title="Figure 1(a): information cliff",
    minutes=1,
    flags=("task", "dataset_path", "size"),
    paper="32 runs, each with all visual tokens removed at one layer. Beyond some layer this has little effect; that "
    "layer is early for reasoning (ScienceQA, GQA) and late for perception (TextVQA, POPE). No numbers are printed.",
    protocol=f"All visual tokens removed before one layer, one run per layer and question kind. The cliff is the first "
    f"layer from which on at least {REACHED:.0%} of the full model's accuracy is kept.",
    command=f"{LARGE} --task textvqa pope scienceqa gqa",
    run=run,
    figure=figure,
    table=table,
    verdicts=verdicts,
)
