"""Table 2: question answering on clips."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from toprl_models import METHODS, schedule_for
from toprl_models.schedule import stage_layers_for
from training.analyses import plots
from training.analyses.clips import FRAMES, PREFIX
from training.analyses.config import Analysis, ReproduceConfig, Result
from training.analyses.lab import Lab
from training.analyses.measure import answering, evaluate, facts_of, one_run, stages_for, train, training
from training.analyses.verdicts import Estimate, Verdict, bootstrap, estimate, judge, runs, shown
from training.analyses.words import markdown_table, plural

KINDS = ("ocr", "exist", "compare")
BASELINES = ("fastv", "sparsevlm", "pyramiddrop", "divprune")


def run(config: ReproduceConfig, lab: Lab) -> Result:
    """Agents trained on single images and methods without training, at one budget.

    Raises:
        ValueError: another model than the tiny one, whose clips these are.
    """
    if config.model_name_or_path != "tiny":
        raise ValueError(
            f"video: --model_name_or_path {config.model_name_or_path}: the clips are made of the tiny model's "
            "scenes; use training/evaluate.py with --task msvd_qa msrvtt_qa activitynet_qa"
        )
    found = facts_of(config, lab, PREFIX + KINDS[0])
    layers = stage_layers_for(found["num_layers"])
    budget = config.budget[-1] * FRAMES
    stages = stages_for(budget, layers, found)
    flags = [training(config, kind, seed, layers) for kind in KINDS for seed in config.seeds]
    trained = [one["policy"] for one in lab.map(train, flags, "trainings")]
    on_images = {kind: trained[i * len(config.seeds) : (i + 1) * len(config.seeds)] for i, kind in enumerate(KINDS)}
    questions = []
    for kind in KINDS:
        wanted = [one_run("full")]
        for name in BASELINES:
            plan = schedule_for(name, budget, num_visual=found["num_visual"], num_layers=found["num_layers"])
            wanted.append(one_run(name, name, plan.stages))
        wanted += [one_run(f"random/{seed}", "random", stages, seed=seed) for seed in config.seeds]
        for seed, policy in zip(config.seeds, on_images[kind], strict=True):
            wanted.append(one_run(f"toprl/{seed}", "toprl", stages, policy))
        questions.append(answering(config, PREFIX + kind, wanted))
    answers = lab.map(evaluate, questions, "tasks")
    names = ["full", *BASELINES, "random", "toprl"]
    return {
        "frames": FRAMES,
        "num_visual": found["num_visual"],
        "layers": list(layers),
        "tasks": {kind: {name: _row(mine, name) for name in names} for kind, mine in zip(KINDS, answers, strict=True)},
    }


def _row(mine: dict[str, Any], name: str) -> dict[str, Any]:
    found = [one for key, one in mine.items() if key == name or key.startswith(f"{name}/")]
    return {"scores": [one["scores"] for one in found], "average_tokens": fmean(one["average_tokens"] for one in found)}


def retentions(result: Result) -> dict[str, tuple[float, np.ndarray]]:
    """Mean share of the full model's accuracy over the kinds, by method, and its bootstrap draws."""
    values: dict[str, list[float]] = {}
    draws: dict[str, list[np.ndarray]] = {}
    for number, rows in enumerate(result["tasks"].values()):
        columns = {name: runs(row["scores"]) for name, row in rows.items()}
        drawn = bootstrap(columns, seed=number)
        for name, scores in columns.items():
            values.setdefault(name, []).append(scores.mean() / columns["full"].mean())
            draws.setdefault(name, []).append(drawn[name] / drawn["full"])
    return {name: (fmean(values[name]), np.mean(draws[name], axis=0)) for name in values}


def minus(found: dict[str, tuple[float, np.ndarray]], one: str, other: str) -> Estimate:
    return estimate(found[one][0] - found[other][0], found[one][1] - found[other][1])


def verdicts(result: Result) -> list[Verdict]:
    found = retentions(result)
    best = max(BASELINES, key=lambda name: found[name][0])
    gap, control = minus(found, "toprl", best), minus(found, "toprl", "random")
    return [
        Verdict(
            "TOP-RL has the highest average retention on video.",
            judge(gap),
            f"Minus {METHODS[best].title}, the best of {len(BASELINES)} others: {gap.percent(signed=True)} points.",
        ),
        Verdict(
            "Agents of single images are of use on clips (control, not in the paper): they beat random patches.",
            judge(control),
            f"{control.percent(signed=True)} points of retention.",
        ),
    ]


def label_of(name: str) -> str:
    return {"full": "full model", "toprl": "TOP-RL, trained on images"}.get(name) or METHODS[name].title


def table(result: Result) -> str:
    found, rows = retentions(result), []
    for name in found:
        cells = []
        for task in result["tasks"].values():
            scores, full = runs(task[name]["scores"]), runs(task["full"]["scores"])
            cells.append(f"{shown(scores)} ({100 * scores.mean() / full.mean():.1f})")
        tokens = fmean(task[name]["average_tokens"] for task in result["tasks"].values())
        count = plural(len(next(iter(result["tasks"].values()))[name]["scores"]), "run")
        rows.append([label_of(name), count, *cells, estimate(*found[name]).percent(), f"{tokens:.1f}"])
    heads = ["method", "runs", *result["tasks"], "Avg retention [95 %]", "average tokens"]
    n = runs(next(iter(result["tasks"].values()))["full"]["scores"]).shape[1]
    note = (
        f"Accuracy in % ± standard error, in brackets the percentage of the full model's; n = {n} per kind; "
        f"{result['frames']} frames of {result['num_visual'] // result['frames']} tokens."
    )
    return f"{markdown_table(heads, rows, 2)}\n\n{note}"


def figure(result: Result) -> Figure:
    found = retentions(result)
    names = sorted((name for name in found if name != "full"), key=lambda name: found[name][0])
    drawn = plots.blank(6.4, 2.7)
    axes = drawn.subplots()
    for place, name in enumerate(names):
        one = estimate(*found[name])
        colour = "#1b6a85" if name == "toprl" else "#b9bec4" if name == "random" else "#c8553d"
        axes.barh(place, 100 * one.value, 0.66, color=colour)
        axes.plot([100 * one.low, 100 * one.high], [place, place], color="#2b3137", linewidth=1)
        axes.text(2, place, f"{100 * one.value:.1f}", va="center", size=7, color="white")
    axes.set_yticks(range(len(names)), [label_of(name) for name in names])
    axes.set_xlim(0, max(101, 100 * max(estimate(*found[name]).high for name in names) + 1))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("mean retention over the question kinds, %")
    return drawn


ANALYSIS = Analysis(
    name="video",
    title="Table 2: video",
    minutes=2,
    flags=("size", "budget", "seeds", "iterations", "train_size", "actor_size"),
    paper="Video-LLaVA, 2048 tokens to 194 on average. Average retention: TOP-RL 93.9 %, VisionZip 93.4, SparseVLM "
    "90.7, FastV 71.7; TOP-RL first on MSVD (94.2), MSRVTT (91.8) and ActivityNet (98.8).",
    protocol=f"No video model is embedded. Synthetic clips of {FRAMES} frames: the scene is shown in one frame, "
    "chosen at random, the others show its empty background; the tiny LLaVA, which never saw more than one image in "
    "training, gets the frames as images of one prompt, for three kinds of question that it still answers so. Its "
    "own accuracy suffers (compare with Table 1), so removing empty frames can help it: retention may exceed 100 %. "
    "Agents are those of single images. This tests pruning across frames, not video understanding.",
    command="",
    run=run,
    figure=figure,
    table=table,
    verdicts=verdicts,
    constants={"frames": FRAMES, "kinds": list(KINDS), "methods": list(BASELINES)},
)
