"""Figure 2: FastV once against FastV at three layers (FastV-P)."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from toprl_kernels import flops
from toprl_models import Schedule
from toprl_models.schedule import stage_layers_for
from training.analyses import plots
from training.analyses.config import LARGE, Analysis, ReproduceConfig, Result, level_of
from training.analyses.lab import Lab
from training.analyses.measure import answering, dims, evaluate, facts_of, one_run
from training.analyses.verdicts import Estimate, Verdict, all_of, bootstrap, estimate, judge, runs
from training.analyses.words import markdown_table

PAPER_ROWS = (8, 16, 24)  # of 32
KEPT = 0.5  # of each stage of FastV-P: 0.5, 0.25, 0.125 of all tokens
CURVE = (0.75, 0.5, 0.35, 0.2, 0.1)  # the same at other budgets
MINIMAL_LOSS = -0.02  # what "minimal accuracy loss" is taken to mean
FASTV_R = (0.5, 0.8)


def progressive(layers: list[int], kept: float) -> list[list[float]]:
    """FastV-P: ``kept`` of what is left, at each of the layers."""
    return [[layer, kept ** (stage + 1)] for stage, layer in enumerate(layers)]


def _method(plan: str) -> str:
    return "fastv_progressive" if plan.startswith("fastv-p") else "fastv"


def matched(layers: list[int], kept: float, found: dict[str, Any]) -> list[list[float]]:
    """FastV at the first layer with the average tokens of ``progressive``."""
    average = Schedule(tuple((int(layer), keep) for layer, keep in progressive(layers, kept))).average_tokens(
        found["num_visual"], found["num_layers"]
    )
    once = Schedule.for_budget(average, (layers[0],), num_visual=found["num_visual"], num_layers=found["num_layers"])
    return [list(stage) for stage in once.stages]


def run(config: ReproduceConfig, lab: Lab) -> Result:
    """FastV at r = .5 and .8, FastV-P, and both at five equal budgets."""
    found = facts_of(config, lab)
    layers = list(stage_layers_for(found["num_layers"], stages=PAPER_ROWS))
    plans = {f"fastv r={r}": [[layers[0], 1 - r]] for r in FASTV_R}
    for kept in CURVE:
        plans[f"fastv-p {kept}"] = progressive(layers, kept)
        plans[f"fastv {kept}"] = matched(layers, kept, found)
    wanted = [one_run("full"), *(one_run(name, _method(name), stages) for name, stages in plans.items())]
    answers = lab.map(evaluate, [answering(config, task, wanted) for task in config.task], "tasks")
    full = flops.schedule_macs(found["num_visual"], [], dims(found))
    return {
        "layers": layers,
        "num_visual": found["num_visual"],
        "curve": list(CURVE),
        "plans": {
            name: {
                "stages": stages,
                "average_tokens": fmean(one[name]["average_tokens"] for one in answers),
                "macs": Schedule(tuple((int(layer), keep) for layer, keep in stages)).macs(
                    found["num_visual"], dims(found)
                )
                / full,
            }
            for name, stages in plans.items()
        },
        "tasks": {
            task: {"level": level_of(task), "scores": {name: one["scores"] for name, one in mine.items()}}
            for task, mine in zip(config.task, answers, strict=True)
        },
    }


def mean_accuracy(result: Result, name: str) -> tuple[float, np.ndarray]:
    """Mean accuracy over the tasks, and its bootstrap draws (paired between names)."""
    values, draws = [], []
    for number, one in enumerate(result["tasks"].values()):
        scores = runs(one["scores"][name])
        values.append(scores.mean())
        draws.append(bootstrap({name: scores}, seed=number)[name])
    return fmean(values), np.mean(draws, axis=0)


def difference(result: Result, name: str, other: str) -> Estimate:
    """Mean accuracy of one plan minus that of another."""
    (mine, draws), (theirs, others) = mean_accuracy(result, name), mean_accuracy(result, other)
    return estimate(mine - theirs, draws - others)


def mean_difference(result: Result) -> Estimate:
    """FastV-P minus FastV at equal tokens, mean over the budgets of the curve and the tasks."""
    values, draws = [], []
    for kept in result["curve"]:
        (ours, mine), (once, others) = (mean_accuracy(result, f"{name} {kept}") for name in ("fastv-p", "fastv"))
        values.append(ours - once)
        draws.append(mine - others)
    return estimate(fmean(values), np.mean(draws, axis=0))


def verdicts(result: Result) -> list[Verdict]:
    plans, ours = result["plans"], f"fastv-p {KEPT}"
    small = difference(result, ours, "fastv r=0.5")
    cheaper = plans["fastv r=0.5"]["macs"] - plans[ours]["macs"]
    half = Verdict(
        "FastV-P costs clearly less than FastV at r = 0.5 with minimal accuracy loss.",
        all_of([judge(Estimate(cheaper, cheaper, cheaper)), judge(small, above=MINIMAL_LOSS)]),
        f"Multiply-adds {plans[ours]['macs']:.2f} against {plans['fastv r=0.5']['macs']:.2f} of the full model; "
        f"accuracy {small.percent(signed=True)} points, mean over tasks (minimal is taken to be "
        f"{-100 * MINIMAL_LOSS:.0f} points).",
    )
    large = difference(result, ours, "fastv r=0.8")
    eighty = Verdict(
        "At r = 0.8 and similar cost FastV-P is clearly more accurate.",
        judge(large),
        f"Accuracy {large.percent(signed=True)} points at {plans[ours]['macs']:.2f} against "
        f"{plans['fastv r=0.8']['macs']:.2f} multiply-adds ({plans[ours]['average_tokens']:.1f} and "
        f"{plans['fastv r=0.8']['average_tokens']:.1f} average tokens: FastV-P is not the cheaper one).",
    )
    equal = {kept: difference(result, f"fastv-p {kept}", f"fastv {kept}") for kept in result["curve"]}
    text = "; ".join(
        f"{plans[f'fastv-p {kept}']['average_tokens']:.1f} tokens {one.percent(signed=True)}"
        for kept, one in equal.items()
    )
    mean = mean_difference(result)
    same = Verdict(
        "Stronger than the paper's figure: at equal average tokens FastV-P is more accurate, over all budgets.",
        judge(mean),
        f"FastV-P minus FastV before layer {result['layers'][0]}, mean over {len(equal)} budgets: "
        f"{mean.percent(signed=True)} points. Single budgets: {text}.",
    )
    return [half, eighty, same]


def table(result: Result) -> str:
    names = ["fastv r=0.5", "fastv r=0.8", f"fastv-p {KEPT}", f"fastv {KEPT}"]
    labels = ["FastV, r = 0.5", "FastV, r = 0.8", "FastV-P, r = 0.5, 0.75, 0.875", "FastV at the tokens of FastV-P"]
    rows = []
    for name, label in zip(names, labels, strict=True):
        plan = result["plans"][name]
        cells = [f"{100 * fmean(one['scores'][name]):.1f}" for one in result["tasks"].values()]
        mean = estimate(*mean_accuracy(result, name)).percent()
        rows.append([label, f"{plan['average_tokens']:.1f}", f"{plan['macs']:.3f}", *cells, mean])
    full = [f"{100 * fmean(one['scores']['full']):.1f}" for one in result["tasks"].values()]
    rows.insert(
        0,
        [
            "full model",
            f"{result['num_visual']:.1f}",
            "1.000",
            *full,
            estimate(*mean_accuracy(result, "full")).percent(),
        ],
    )
    n = min(len(one["scores"]["full"]) for one in result["tasks"].values())
    heads = ["accuracy, %", "average tokens", "multiply-adds", *result["tasks"], "mean [95 %]"]
    return f"{markdown_table(heads, rows)}\n\nStages before layers {result['layers']}; n = {n} per kind."


def figure(result: Result) -> Figure:
    drawn = plots.blank(9.6, 3.4)
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.5))
    for name, label, colour in (("fastv-p", "FastV-P", "#1b6a85"), ("fastv", "FastV", "#c8553d")):
        plans = [f"{name} {kept}" for kept in result["curve"]]
        found = [estimate(*mean_accuracy(result, plan)) for plan in plans]
        places = [result["plans"][plan]["average_tokens"] for plan in plans]
        errors = [[100 * (one.value - one.low) for one in found], [100 * (one.high - one.value) for one in found]]
        left.errorbar(
            places, [100 * one.value for one in found], errors, fmt="o-", ms=4, lw=1.3, color=colour, label=label
        )
    full = 100 * mean_accuracy(result, "full")[0]
    left.axhline(full, color="#5d666f", linewidth=0.9, linestyle=(0, (2, 3)), label="full model")
    left.set_xlabel("visual tokens, average over layers")
    left.set_ylabel("accuracy, %, mean over tasks")
    left.set_title("Equal average tokens")
    left.legend(loc="lower right")
    bars = (
        ("fastv r=0.5", "FastV, r = 0.5", "#e3a799"),
        (f"fastv-p {KEPT}", "FastV-P", "#1b6a85"),
        ("fastv r=0.8", "FastV, r = 0.8", "#c8553d"),
    )
    for i, (name, label, colour) in enumerate(bars):
        heights = [100 * fmean(one["scores"][name]) for one in result["tasks"].values()]
        tokens = result["plans"][name]["average_tokens"]
        right.bar(
            [x + 0.27 * (i - 1) for x in range(len(heights))],
            heights,
            0.25,
            color=colour,
            label=f"{label} ({tokens:.0f} tokens)",
        )
    right.set_xticks(range(len(result["tasks"])), list(result["tasks"]))
    right.set_ylim(0, 122)
    right.set_yticks(range(0, 101, 20))
    right.grid(axis="x", visible=False)
    right.set_title("The paper's three settings, accuracy in %")
    right.legend(loc="upper center", ncols=3, fontsize=7.5)
    return drawn


ANALYSIS = Analysis(
    name="fastv",
    title="Figure 2: progressive FastV against FastV",
    minutes=1,
    flags=("task", "dataset_path", "size"),
    paper="FastV removes r = 0.5 or 0.8 before layer 8; FastV-P removes 0.5, 0.75 and 0.875 (of all) before layers "
    '8, 16 and 24. Against r = 0.5 FastV-P saves much and loses little; against r = 0.8, "despite similar '
    'computational costs", it is clearly ahead. By the formula of the average, FastV-P has 270 and FastV with r = '
    "0.8 has 230 of 576 tokens.",
    protocol="The same at the same relative depths, and both methods at five budgets, with average "
    "tokens as equal as whole tokens allow.",
    command=f"{LARGE} --task textvqa pope scienceqa gqa",
    run=run,
    figure=figure,
    table=table,
    verdicts=verdicts,
)
