"""Appendix C: gamma, eta, reward terms, number of stages, dense or terminal reward, one stage or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from toprl_models.schedule import PAPER_LAYERS, PAPER_STAGES, stage_layers_for
from training.analyses import plots
from training.analyses.config import LARGE_TRAINED, Analysis, ReproduceConfig, Result
from training.analyses.lab import Lab
from training.analyses.measure import answering, evaluate, facts_of, one_run, stages_for, train, training
from training.analyses.verdicts import Estimate, Verdict, all_of, bootstrap, estimate, judge, runs, standard_error
from training.analyses.words import markdown_table, plural

PAPER = "paper"
ROBUST = 0.05  # share of the full model's accuracy that a robust setting may cost


class Setting(NamedTuple):
    """One row: which of the appendix's five questions it belongs to, flags of training/ppo.py, number of stages."""

    group: str
    label: str
    flags: dict[str, Any]
    stages: int = 3


SETTINGS = {
    PAPER: Setting("the paper's setting", "gamma 0.9, eta 0.95, both terms, dense, T = 3", {}),
    "gamma 0.5": Setting("(1) gamma", "gamma 0.5", {"gamma": 0.5}),
    "gamma 1": Setting("(1) gamma", "gamma 1", {"gamma": 1.0}),
    "eta 0.5": Setting("(1) eta", "eta 0.5", {"eta": 0.5}),
    "eta 1": Setting("(1) eta", "eta 1 (no temporal scaling)", {"eta": 1.0}),
    "quality": Setting("(2) reward terms", "r^Q alone", {"reward_terms": "quality"}),
    "retention": Setting("(2) reward terms", "retention alone", {"reward_terms": "retention"}),
    "T 1": Setting("(3) stages", "T = 1", {}, 1),
    "T 2": Setting("(3) stages", "T = 2", {}, 2),
    "T 4": Setting("(3) stages", "T = 4", {}, 4),
    "terminal": Setting("(4) terminal reward", "r^Q at the last stage alone", {"reward": "terminal"}),
}
ONE_SHOT = "one-shot"
Trained = Mapping[tuple[str, str, int], dict[str, Any]]  # by task, setting and seed: what ``train`` gave


def layers_of(stages: int, num_layers: int) -> tuple[int, ...]:
    """The first ``stages`` of the paper's layers; the fourth is as far behind the third as that behind the second."""
    wanted = (*PAPER_STAGES, 24)[:stages]
    assert wanted[-1] < PAPER_LAYERS
    return stage_layers_for(num_layers, 1, wanted)


def run(config: ReproduceConfig, lab: Lab) -> Result:
    """Every setting and seed trained on each ablation task, evaluated by top-k at one budget and by arg-max."""
    found = facts_of(config, lab, config.ablation_task[0])
    depth, budget = found["num_layers"], config.budget[-1]
    keys = [(task, name, seed) for task in config.ablation_task for seed in config.seeds for name in SETTINGS]
    jobs = [
        training(config, task, seed, layers_of(SETTINGS[name].stages, depth), **SETTINGS[name].flags)
        for task, name, seed in keys
    ]
    trained = dict(zip(keys, lab.map(train, jobs, "trainings"), strict=True))
    pairs = [(task, seed) for task in config.ablation_task for seed in config.seeds]
    wanted = [_runs(task, seed, trained, budget, found) for task, seed in pairs]
    questions = [answering(config, task, some) for (task, _), some in zip(pairs, wanted, strict=True)]
    answers = dict(zip(pairs, lab.map(evaluate, questions, "tasks and seeds"), strict=True))
    return {
        "num_visual": found["num_visual"],
        "layers": {name: list(layers_of(setting.stages, depth)) for name, setting in SETTINGS.items()},
        "tasks": {
            task: {
                "full": answers[task, config.seeds[0]]["full"]["scores"],
                "settings": _rows(task, answers, trained, config.seeds),
            }
            for task in config.ablation_task
        },
    }


def _runs(task: str, seed: int, trained: Trained, budget: float, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the agents of a task and seed answer: by top-k at the budget, and as many tokens as they want."""
    wanted = [one_run("full")]
    for name, setting in SETTINGS.items():
        layers, policy = layers_of(setting.stages, found["num_layers"]), trained[task, name, seed]["policy"]
        wanted.append(one_run(name, "toprl", stages_for(budget, layers, found), policy))
        wanted.append(one_run(f"{name}/free", "argmax", [(layer, 1.0) for layer in layers], policy))
        if name == PAPER:
            wanted.append(one_run(ONE_SHOT, "oneshot", stages_for(budget, layers[:1], found), policy))
    return wanted


def _rows(task: str, answers: dict[Any, Any], trained: Trained, seeds: Sequence[int]) -> dict[str, Any]:
    rows = {}
    for name in (*SETTINGS, ONE_SHOT):
        found = [answers[task, seed][name] for seed in seeds]
        free = [answers[task, seed][f"{name}/free"] for seed in seeds] if name != ONE_SHOT else []
        rows[name] = {
            "scores": [one["scores"] for one in found],
            "average_tokens": fmean(one["average_tokens"] for one in found),
            "kept": found[0]["kept"],
            "free_accuracy": [fmean(one["scores"]) for one in free],
            "free_tokens": [one["average_tokens"] for one in free],
            "retained": [trained[task, name, seed]["retained"] for seed in seeds] if free else [],
        }
    return rows


def difference(result: Result, name: str, other: str = PAPER) -> Estimate:
    """Accuracy of a setting minus that of another, mean over the tasks."""
    values, draws = [], []
    for number, task in enumerate(result["tasks"].values()):
        columns = {key: runs(task["settings"][key]["scores"]) for key in (name, other)}
        drawn = bootstrap(columns, seed=number)
        values.append(columns[name].mean() - columns[other].mean())
        draws.append(drawn[name] - drawn[other])
    return estimate(fmean(values), np.mean(draws, axis=0))


def minus(one: Estimate) -> Estimate:
    return Estimate(-one.value, -one.high, -one.low)


def verdicts(result: Result) -> list[Verdict]:
    full = fmean(fmean(task["full"]) for task in result["tasks"].values())
    gap = {name: difference(result, name) for name in (*SETTINGS, ONE_SHOT) if name != PAPER}

    def text(*names: str) -> str:
        return "; ".join(f"{SETTINGS[name].label} {gap[name].percent(signed=True)}" for name in names)

    knobs = [name for name, setting in SETTINGS.items() if setting.group.startswith("(1)")]
    against = f"against the paper's setting, accuracy in points at {_tokens(result)} average tokens"
    return [
        Verdict(
            f"(1) Results are robust to gamma and eta (no value costs {ROBUST:.0%} of the full model's accuracy).",
            all_of([judge(gap[name], above=-ROBUST * full) for name in knobs]),
            f"{text(*knobs)}, {against}.",
        ),
        Verdict(
            "(2) Each reward term contributes.",
            all_of([judge(minus(gap[name])) for name in ("quality", "retention")]),
            f"{text('quality', 'retention')}, {against}. {_free(result, PAPER, 'quality', 'retention')}",
        ),
        Verdict(
            "(3) Three stages are better than fewer.",
            all_of([judge(minus(gap[name])) for name in ("T 1", "T 2")]),
            f"{text('T 1', 'T 2', 'T 4')}, {against}.",
        ),
        Verdict(
            "(4) A dense reward is better than a terminal one.",
            judge(minus(gap["terminal"])),
            f"{text('terminal')}, {against}. {_free(result, PAPER, 'terminal')}",
        ),
        Verdict(
            "(5) Progressive pruning is better than one-shot pruning at the same budget.",
            all_of([judge(minus(gap[name])) for name in ("T 1", ONE_SHOT)]),
            f"The agent of three stages used once {gap[ONE_SHOT].percent(signed=True)}; an agent trained for one stage "
            f"{gap['T 1'].percent(signed=True)}, {against}.",
        ),
    ]


def _tokens(result: Result) -> str:
    found = [row["average_tokens"] for task in result["tasks"].values() for row in task["settings"].values()]
    low, high = f"{min(found):.1f}", f"{max(found):.1f}"
    return low if low == high else f"{low} to {high}"


def _free(result: Result, *names: str) -> str:
    """What agents do that may keep as many tokens as they like."""
    parts = []
    for name in names:
        rows = [task["settings"][name] for task in result["tasks"].values()]
        accuracy = fmean(value for row in rows for value in row["free_accuracy"])
        tokens = fmean(value for row in rows for value in row["free_tokens"])
        label = "the paper's setting" if name == PAPER else SETTINGS[name].label
        parts.append(f"{label}: {100 * accuracy:.1f} % with {tokens:.1f} tokens")
    return f"When the agent decides how many to keep: {'; '.join(parts)}."


def table(result: Result) -> str:
    parts = []
    for task, found in result["tasks"].items():
        rows = []
        for name, row in found["settings"].items():
            scores = runs(row["scores"])
            group, label = SETTINGS[name][:2] if name in SETTINGS else ("(5) one-shot", "the paper's agent, used once")
            gap = "" if name == PAPER else difference({"tasks": {task: found}}, name).percent(signed=True)
            free = ["", ""]
            if row["free_tokens"]:
                free = [f"{100 * fmean(row['free_accuracy']):.1f}", f"{fmean(row['free_tokens']):.1f}"]
            cells = [
                f"{100 * scores.mean():.1f} ± {100 * standard_error(scores):.1f}",
                f"{row['average_tokens']:.2f}",
                gap,
            ]
            rows.append([group, label, *cells, *free])
        heads = [
            "question",
            "setting",
            "accuracy, % ± SE",
            "average tokens",
            "difference [95 %]",
            "arg-max: accuracy",
            "its tokens",
        ]
        first = runs(found["settings"][PAPER]["scores"])
        note = (
            f"{task}: {plural(len(first), 'training')} per row, n = {first.shape[1]}, full model "
            f"{100 * fmean(found['full']):.1f} %, {result['num_visual']} visual tokens."
        )
        parts.append(f"{markdown_table(heads, rows, 2)}\n\n{note}")
    return "\n\n".join(parts)


def figure(result: Result) -> Figure:
    names = [*SETTINGS, ONE_SHOT]
    labels = [SETTINGS[n].label if n in SETTINGS else "one-shot, same agent" for n in names]
    labels[0] = "the paper's setting"
    drawn = plots.blank(4.2 + 3.4 * len(result["tasks"]), 3.8)
    panels = drawn.subplots(1, len(result["tasks"]), squeeze=False, sharey=True)[0]
    for axes, (task, found) in zip(panels, result["tasks"].items(), strict=True):
        base = 100 * runs(found["settings"][PAPER]["scores"]).mean()
        axes.axvline(base, color="#1b6a85", linewidth=0.9, linestyle=(0, (2, 3)))
        for place, name in enumerate(names):
            scores = runs(found["settings"][name]["scores"])
            colour = "#1b6a85" if name == PAPER else "#c8553d"
            axes.errorbar(100 * scores.mean(), place, xerr=196 * standard_error(scores), fmt="o", ms=5, color=colour)
            axes.plot(100 * scores.mean(1), [place + 0.22] * len(scores), "|", color="#5d666f", ms=5)
        axes.set_yticks(range(len(names)), labels)
        axes.set_title(f"{task}: accuracy, %")
    panels[0].invert_yaxis()
    return drawn


ANALYSIS = Analysis(
    name="ablations",
    title="Appendix C: ablations",
    minutes=8,
    flags=(
        "ablation_task",
        "dataset_path",
        "size",
        "budget",
        "seeds",
        "iterations",
        "train_size",
        "actor_size",
    ),
    paper="Named in the text, numbers in an appendix that is not public here: (1) gamma and eta, (2) each reward "
    "term, (3) the number of stages T, (4) dense against terminal reward, (5) progressive against one-shot pruning "
    'at the same budget, which "further validates" the method; "robustness" is claimed for all.',
    protocol="Each setting trained alone and evaluated by top-k at the tighter budget. Ticks in the figure are single "
    "trainings, bars two standard errors over samples and trainings.",
    command=f"{LARGE_TRAINED} --ablation_task gqa --budget 192",
    run=run,
    figure=figure,
    table=table,
    verdicts=verdicts,
    constants={"settings": {name: setting.flags | {"stages": setting.stages} for name, setting in SETTINGS.items()}},
)
