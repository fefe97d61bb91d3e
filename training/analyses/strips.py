"""Figure 4: which visual tokens the agent keeps, on pictures and as numbers."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from toprl_models import Schedule, TopRLPolicy, attach
from toprl_models.schedule import stage_layers_for
from toprl_models.strips import draw_stage
from training.analyses.config import LARGE_TRAINED, Analysis, ReproduceConfig, Result
from training.analyses.lab import Lab
from training.analyses.measure import facts_of, model_of, stages_for, task_of, train, training
from training.analyses.verdicts import Estimate, Verdict, all_of, bootstrap, estimate, judge, runs
from training.analyses.words import markdown_table
from training.report import gallery_entry
from training.scenes import KINDS, SceneDataset
from training.tasks import answer, encode

PICTURES = 2  # per task
INTACT = 0.95
SEED = 100  # of the first task, one more for each other: other scenes than those of the tables


def keep(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Kept tokens of every stage, answers with and without pruning, and pictures of the first samples."""
    model, processor = model_of(arguments["model"])
    task = task_of(arguments["task"], "test", arguments["size"], arguments["seed"], arguments["path"])
    samples = [task[i] for i in range(len(task))]
    inputs = encode(processor, task, samples, model.device)
    policy = TopRLPolicy.from_pretrained(folder / arguments["policy"]).to(model.device).eval()
    schedule = Schedule(tuple((int(layer), keep) for layer, keep in arguments["stages"]))
    before, _ = answer(model, processor, task, samples, inputs)
    with attach(model, policy, schedule=schedule) as pruner:
        after, _ = answer(model, processor, task, samples, inputs)
        kept = [[[i for i in row if i >= 0] for row in stage.indices.tolist()] for stage in pruner.trace]
        totals = pruner.trace[0].num_visual
    pictures = []
    for row in range(min(PICTURES, len(samples))):
        sample, side = samples[row], math.isqrt(totals[row])
        if side**2 != totals[row]:
            raise ValueError(
                f"strips: {totals[row]} visual tokens are no square grid; pictures need a model with one, as LLaVA-1.5"
            )
        size = side * max(1, 128 // side)
        shown, stages = ImageOps.fit(sample.image.convert("RGB"), (size, size)), [stage[row] for stage in kept]
        pictures.append({**gallery_entry(shown, sample, before[row], after[row], stages), "side": side})
    return {"pictures": pictures, "last": kept[-1]}


def relevant(task: str, seed: int, last: list[list[int]]) -> dict[str, list[int]] | None:
    """For scenes, per sample, given the tokens kept at last: how many there are, how many of them lie on a shape or the
    digit, how many of all tokens do; objects that the question may be about (ocr: the digit, else every shape), and
    those of them that keep a token.

    None for a task whose pictures nobody labelled.
    """
    if task not in KINDS:
        return None
    data = SceneDataset(task, "test", len(last), seed)
    found: dict[str, list[int]] = {name: [] for name in ("kept", "kept_on_object", "on_object", "asked", "asked_kept")}
    for i, tokens in enumerate(last):
        scene, kept = data[i].scene, set(tokens)
        shapes = [set(np.flatnonzero(scene.patch_cells == cell).tolist()) for cell in range(4)]
        shapes = [patches for patches in shapes if patches]
        objects = set().union(*shapes) | {scene.digit_patch}
        asked = [{scene.digit_patch}] if task == "ocr" else shapes
        found["kept"].append(len(kept))
        found["kept_on_object"].append(len(objects & kept))
        found["on_object"].append(len(objects))
        found["asked"].append(len(asked))
        found["asked_kept"].append(sum(bool(patches & kept) for patches in asked))
    return found


def run(config: ReproduceConfig, lab: Lab) -> Result:
    """The first training of each task, at the tighter budget."""
    found = facts_of(config, lab)
    layers = stage_layers_for(found["num_layers"])
    stages = stages_for(config.budget[-1], layers, found)
    trained = lab.map(train, [training(config, task, config.seeds[0], layers) for task in config.task], "trainings")
    arguments = [
        {
            "model": config.model(),
            "task": task,
            "path": config.path_of(task),
            "size": min(config.size, 128),
            "seed": SEED + number,
            "policy": one["policy"],
            "stages": stages,
        }
        for number, (task, one) in enumerate(zip(config.task, trained, strict=True))
    ]
    answers = lab.map(keep, arguments, "tasks")
    return {
        "layers": list(layers),
        "num_visual": found["num_visual"],
        "tasks": {
            task: {"pictures": one["pictures"], "relevant": relevant(task, SEED + number, one["last"])}
            for number, (task, one) in enumerate(zip(config.task, answers, strict=True))
        },
    }


def share(one: dict[str, Any], part: str, whole: str) -> Estimate:
    """Sum of ``part`` over sum of ``whole``."""
    columns = {name: runs(one["relevant"][name]) for name in (part, whole)}
    draws = bootstrap(columns)
    return estimate(columns[part].mean() / columns[whole].mean(), draws[part] / draws[whole])


def enrichment(one: dict[str, Any]) -> Estimate:
    """Share of kept tokens that lie on an object over the share of all tokens that do."""
    columns = {name: runs(one["relevant"][name]) for name in ("kept_on_object", "kept", "on_object")}
    draws, total = bootstrap(columns), one["pictures"][0]["side"] ** 2
    means = {name: column.mean() for name, column in columns.items()}
    value = means["kept_on_object"] / means["kept"] / (means["on_object"] / total)
    return estimate(value, draws["kept_on_object"] / draws["kept"] / (draws["on_object"] / total))


def verdicts(result: Result) -> list[Verdict]:
    known = {task: one for task, one in result["tasks"].items() if one["relevant"] is not None}
    if not known:
        return []
    ratios = {task: enrichment(one) for task, one in known.items()}
    intact = {task: share(one, "asked_kept", "asked") for task, one in known.items()}
    left, asked = (fmean(fmean(one["relevant"][name]) for one in known.values()) for name in ("kept", "asked"))
    return [
        Verdict(
            "What remains after the last stage lies on objects, not on background.",
            all_of([judge(one, above=1.0) for one in ratios.values()]),
            "Share of the kept tokens that lie on a shape or the digit, over the share of all tokens that do (1 is "
            f"chance): {', '.join(f'{task} {one.text()}' for task, one in ratios.items())}.",
        ),
        Verdict(
            "Tokens relevant to the question remain intact: each object that it may be about keeps one (95 of 100).",
            all_of([judge(one, above=INTACT) for one in intact.values()]),
            "Objects (ocr: the digit, else every shape) that keep a token at last, in %: "
            f"{', '.join(f'{task} {one.percent()}' for task, one in intact.items())}. On average {left:.1f} tokens "
            f"are left for {asked:.1f} such objects.",
        ),
    ]


def table(result: Result) -> str:
    rows = []
    for task, one in result["tasks"].items():
        found = one["relevant"]
        if found is None:
            continue
        cells = [
            f"{fmean(found['kept']):.1f}",
            f"{100 * fmean(found['on_object']) / result['num_visual']:.1f}",
            share(one, "kept_on_object", "kept").percent(),
            enrichment(one).text(),
            share(one, "asked_kept", "asked").percent(),
        ]
        rows.append([task, str(len(found["kept"])), *cells])
    heads = [
        "task",
        "n",
        "tokens kept at last",
        "all tokens on an object, %",
        "kept ones on an object, % [95 %]",
        "ratio [95 %]",
        "objects asked about that keep a token, % [95 %]",
    ]
    return markdown_table(heads, rows) if rows else "No labelled pictures."


def figure(result: Result) -> Figure:
    pictures = [(task, one) for task, mine in result["tasks"].items() for one in mine["pictures"]]
    wide = 1 + len(pictures[0][1]["stages"])
    columns = PICTURES
    rows = math.ceil(len(pictures) / columns)
    drawn = Figure(figsize=(1.28 * columns * wide + 0.5, 1.62 * rows))
    grid = drawn.add_gridspec(rows, columns, wspace=0.08, hspace=0.24, left=0.01, right=0.99, top=0.97, bottom=0.01)
    for number, (task, one) in enumerate(pictures):
        image = Image.open(io.BytesIO(base64.b64decode(one["image"])))
        cells = grid[number // columns, number % columns].subgridspec(1, wide, wspace=0.04)
        for place, kept in enumerate([list(range(one["side"] ** 2)), *one["stages"]]):
            axes = drawn.add_subplot(cells[place])
            axes.imshow(np.asarray(draw_stage(image, kept, one["side"])))
            axes.axis("off")
            if not place:
                text = f"{task}: {one['question']}  {one['reference']} | {one['pruned_answer']}"
                axes.set_title(text, fontsize=8, loc="left", pad=3)
            axes.text(
                0.5,
                -0.02,
                "image" if not place else f"{len(kept)} kept",
                transform=axes.transAxes,
                ha="center",
                va="top",
                size=7,
            )
    return drawn


ANALYSIS = Analysis(
    name="strips",
    title="Figure 4: what each stage keeps",
    minutes=2,
    flags=("task", "dataset_path", "size", "budget", "seeds", "iterations", "train_size", "actor_size"),
    paper='Pictures with the tokens left after each of three stages. "Even in the final stage ... the tokens '
    'relevant to the question remain intact."',
    protocol="Test scenes with the tokens that the agent of the question kind keeps; behind each question the "
    'reference | the pruned model\'s answer. Scenes are labelled, so that "relevant" can be counted.',
    command=f"{LARGE_TRAINED} --task textvqa scienceqa gqa --budget 192",
    run=run,
    figure=figure,
    table=table,
    verdicts=verdicts,
)
