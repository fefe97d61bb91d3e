"""The actor that sees the question against the paper's, on every question kind of the embedded scenes.

    python training/conditioning.py                                  # docs/results/conditioning.json, conditioning.png
    python training/conditioning.py --task shape colour --seeds 0 --output_dir runs/conditioning

Every training is one by training/ppo.py with its default flags and --condition_on none or text; all seeds of a kind
train on the same samples. Evaluated on unseen source images, by top-k and by arg-max. Finished trainings are used
again; stopped, the command goes on. docs/conditioning.md tells what came out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models import Policy, PyramidDrop, Schedule, TopRLPolicy, attach
from toprl_models.methods.toprl import CONDITIONS
from training import cli
from training.analyses import plots
from training.analyses.lab import Lab
from training.analyses.measure import model_of
from training.analyses.verdicts import Estimate, bootstrap, estimate, runs, shown, standard_error
from training.analyses.words import markdown_table
from training.evaluation.records import write_whole
from training.fingerprint import digest_of
from training.ppo import PPOConfig, main
from training.reproduce import compact, environment
from training.rollout import ArgmaxPolicy
from training.scenes import KINDS
from training.tasks import answer, make_task
from training.trainer.data import TrainingData, training_data

KEEPS = ((8, 4, 2), (4, 2, 1), (2, 1, 1))
ARGMAX = "arg-max"
BATCH = 128
MODEL = {"name": "tiny", "dtype": "float32", "device": "cpu"}
PAPER, TEXT = CONDITIONS
COLOURS = {PAPER: "#c8553d", TEXT: "#1b6a85"}
Result = dict[str, Any]


@dataclass
class ConditioningConfig:
    """Flags of the script."""

    task: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": "question kinds"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "trainings of each actor"})
    iterations: int = field(default=40, metadata={"help": "per training"})
    train_size: int = field(default=2048, metadata={"help": "training samples"})
    test_size: int = field(default=512, metadata={"help": "test samples"})
    workers: int = field(default=2, metadata={"help": "processes at once, one thread each; 0 works in this process"})
    output_dir: str = field(default="docs", metadata={"help": "where results/conditioning.json and the figure go"})
    work_dir: str = field(default="runs/conditioning", metadata={"help": "trainings, used again by their settings"})


def name_of(keep: tuple[int, ...]) -> str:
    return "/".join(map(str, keep))


@lru_cache(maxsize=2)
def _data(kind: str, split: str, size: int) -> TrainingData:
    model, processor = model_of(MODEL)
    return training_data(model, processor, make_task(kind, split, size), BATCH)


def answers(policy: Policy, schedule: Schedule, data: TrainingData) -> tuple[str, list[float]]:
    """Right or wrong ("1" or "0") for each sample, and the tokens kept behind each stage, mean over the samples."""
    model, processor = model_of(MODEL)
    scores: list[float] = []
    counts: list[tuple[int, ...]] = []
    with attach(model, policy, schedule=schedule) as pruner:
        for first in range(0, len(data.samples), BATCH):
            rows = list(range(first, min(first + BATCH, len(data.samples))))
            samples = [data.samples[row] for row in rows]
            scores += answer(model, processor, data.task, samples, data.inputs(model, processor, rows))[1].tolist()
            counts += zip(*(stage.counts for stage in pruner.trace), strict=True)
    return digits(scores), [fmean(stage) for stage in zip(*counts, strict=True)]


def digits(flags: list[float]) -> str:
    return "".join("1" if flag else "0" for flag in flags)


def numbers(rows: list[str]) -> np.ndarray:
    """Scores ``[R, n]`` of what ``digits`` made of R rows."""
    return runs([[float(one) for one in row] for row in rows])


def train(arguments: dict[str, Any], folder: Path) -> Result:
    """One agent: scores and kept tokens by schedule, and by its own arg-max."""
    flags = arguments["ppo"]
    output = str(folder / "trainings" / digest_of(arguments))
    config = PPOConfig(output_dir=output, eval_every=0, resume="auto", **flags)
    policy = TopRLPolicy.from_pretrained(main(config, _data(config.task, "train", config.train_size)))
    data = _data(config.task, "test", arguments["test_size"])
    plans: dict[str, tuple[Policy, tuple[float, ...]]] = {name_of(keep): (policy, keep) for keep in KEEPS}
    plans[ARGMAX] = (ArgmaxPolicy(policy), (1.0,) * len(config.stage_layers))
    found = {}
    for name, (one, keep) in plans.items():
        stages = tuple(zip(config.stage_layers, keep, strict=True))
        scores, tokens = answers(one, Schedule(stages), data)
        found[name] = {"scores": scores, "tokens": tokens}
    return found


def controls(arguments: dict[str, Any], folder: Path) -> Result:
    """What needs no training: unpruned, and by the last token's attention alone (PyramidDrop's score, positions as in
    the other columns); and which samples ask for a place in the picture.
    """
    data = _data(arguments["task"], "test", arguments["test_size"])
    layers = arguments["stage_layers"]
    by_attention = {
        name_of(keep): answers(PyramidDrop("original"), Schedule(tuple(zip(layers, keep, strict=True))), data)[0]
        for keep in KEEPS
    }
    return {
        "full": digits(data.quality.tolist()),
        "by_position": digits([" at the " in sample.question for sample in data.samples]),
        "attention": by_attention,
    }


def run(config: ConditioningConfig, lab: Lab) -> Result:
    """All kinds, actors and seeds; the file's content."""
    shared = {"iterations": config.iterations, "train_size": config.train_size}
    keys = [(kind, condition, seed) for kind in config.task for condition in CONDITIONS for seed in config.seeds]
    jobs = [
        {"ppo": {"task": kind, "condition_on": condition, "seed": seed, **shared}, "test_size": config.test_size}
        for kind, condition, seed in keys
    ]
    found = dict(zip(keys, lab.map(train, jobs, "trainings"), strict=True))
    layers = PPOConfig().stage_layers
    plain = [{"task": kind, "test_size": config.test_size, "stage_layers": layers} for kind in config.task]

    def rows(kind: str, condition: str, name: str) -> Result:
        mine = [found[kind, condition, seed][name] for seed in config.seeds]
        return {"scores": [one["scores"] for one in mine], "tokens": [one["tokens"] for one in mine]}

    names = [*map(name_of, KEEPS), ARGMAX]
    return {
        "settings": {**shared, "seeds": config.seeds, "test_size": config.test_size},
        "tasks": {
            kind: {**one, **{c: {name: rows(kind, c, name) for name in names} for c in CONDITIONS}}
            for kind, one in zip(config.task, lab.map(controls, plain, "controls"), strict=True)
        },
    }


def subsets(result: Result) -> dict[str, tuple[Result, np.ndarray]]:
    """Rows of the table: a kind's result and its samples, bool ``[n]``; those that ask for a place apart."""
    found = {}
    for kind, task in result["tasks"].items():
        asked = numbers([task["by_position"]])[0] > 0
        found[kind] = (task, np.ones_like(asked))
        if asked.any():
            found[f"{kind}, by position"] = (task, asked)
    return found


def gain(task: Result, chosen: np.ndarray, name: str) -> Estimate:
    """Accuracy of the actor that sees the question minus the paper's, same samples."""
    columns = {condition: numbers(task[condition][name]["scores"])[:, chosen] for condition in CONDITIONS}
    drawn = bootstrap(columns)
    return estimate(columns[TEXT].mean() - columns[PAPER].mean(), drawn[TEXT] - drawn[PAPER])


def table(result: Result) -> str:
    """Mean ± standard error in percent, and what seeing the question gains, as Markdown."""
    heads = ["", "keep", "unpruned", "attention alone", "paper's actor", "sees the question", "gain, points [95 %]"]
    rows = []
    for label, (task, chosen) in subsets(result).items():
        full = numbers([task["full"]])[:, chosen]
        for name in (*map(name_of, KEEPS), ARGMAX):
            scores = {condition: numbers(task[condition][name]["scores"])[:, chosen] for condition in CONDITIONS}
            cells = [shown(scores[condition]) for condition in CONDITIONS]
            if name == ARGMAX and chosen.all():
                kept = [np.mean(task[condition][name]["tokens"], axis=0) for condition in CONDITIONS]
                marks = ["/".join(f"{one:.1f}" for one in stages) for stages in kept]
                cells = [f"{cell} ({mark})" for cell, mark in zip(cells, marks, strict=True)]
            alone = "" if name == ARGMAX else shown(numbers([task["attention"][name]])[:, chosen])
            rows.append([label, name, shown(full), alone, *cells, gain(task, chosen, name).percent(True)])
    return markdown_table(heads, rows, 2)


def figure(result: Result) -> Figure:
    """A panel per kind: accuracy of both actors at each schedule; ticks are single trainings."""
    kinds = list(result["tasks"].items())
    drawn = plots.blank(2.3 * len(kinds) + 1.2, 3.2)
    panels = drawn.subplots(1, len(kinds), squeeze=False)[0]
    names = [name_of(keep) for keep in KEEPS]
    for axes, (kind, task) in zip(panels, kinds, strict=True):
        full = 100 * numbers([task["full"]]).mean()
        axes.axhline(full, color="#5d666f", linewidth=0.9, linestyle=(0, (2, 3)), label="unpruned")
        alone = [100 * numbers([task["attention"][name]]).mean() for name in names]
        axes.plot(range(len(names)), alone, ":", color="#8a5a83", linewidth=1.2, label="attention alone")
        for condition, label in ((PAPER, "paper's actor"), (TEXT, "sees the question")):
            scores = [numbers(task[condition][name]["scores"]) for name in names]
            means, errors = [100 * one.mean() for one in scores], [100 * standard_error(one) for one in scores]
            colour = COLOURS[condition]
            axes.errorbar(range(len(names)), means, errors, fmt="o-", ms=4, color=colour, label=label, linewidth=1.2)
            for place, one in enumerate(scores):
                axes.plot([place + 0.12] * len(one), 100 * one.mean(1), "_", color=colour, ms=5)
        axes.set_xticks(range(len(names)), names)
        axes.set_title(f"{kind}, %")
    panels[0].legend(loc="center left", fontsize=7.5)
    drawn.supxlabel("visual tokens kept behind the three stages, of 64", fontsize=8.5, color="#5d666f")
    return drawn


def make(config: ConditioningConfig) -> None:
    folder = Path(config.output_dir)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    with Lab(Path(config.work_dir), config.workers) as lab:
        result = run(config, lab)
    write_whole(folder / "results" / "conditioning.json", compact({"environment": environment("cpu"), **result}))
    draw(folder, result)


def draw(folder: Path, result: Result) -> None:
    """The figure and, printed, the table."""
    with plots.styled():
        plots.save(figure(result), folder / "conditioning.png")
    print(table(result))


if __name__ == "__main__":
    cli.run(lambda arguments: make(cli.parse(ConditioningConfig, __doc__, arguments)))
