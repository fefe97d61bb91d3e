"""Learning curves of the objectives and ratio levels, several seeds each, with untrained and keep-all controls.

    python training/curves.py                       # docs/training/curves.json and curves.png
    python training/curves.py --seeds 0 1 --task shape --output_dir runs/curves

Every setting is a training by training/ppo.py with its default flags but those named in ``SETTINGS``; what is plotted
is its validation.jsonl, on held-out samples. Finished trainings are used again; stopped, the command goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import cli
from training.analyses import plots
from training.analyses.lab import Lab
from training.analyses.words import markdown_table
from training.evaluation.records import write_whole
from training.fingerprint import digest_of
from training.ppo import PPOConfig, main
from training.reproduce import compact, environment
from training.rewards import alphas

SETTINGS: dict[str, dict[str, Any]] = {
    "PPO, ratio per token": {},
    "PPO, mean ratio": {"ratio_level": "mean"},
    "PPO, joint ratio": {"ratio_level": "joint"},
    "straight-through": {"objective": "straight_through"},
    "hybrid": {"objective": "hybrid"},
}
COLOURS = ("#1b6a85", "#8fc1d1", "#5c677d", "#c8553d", "#e2b07a")
MEASURES = {
    "reward": "reward of the arg-max agent",
    "topk_accuracy": "accuracy at top-k, %",
    "retained": "tokens kept behind the last stage, %",
}


@dataclass
class CurvesConfig:
    """Flags of the script."""

    task: str = field(default="ocr", metadata={"help": "question kind of the embedded scenes"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "trainings of each setting"})
    iterations: int = field(default=40, metadata={"help": "per training"})
    train_size: int = field(default=2048, metadata={"help": "training samples"})
    eval_every: int = field(default=5, metadata={"help": "iterations between two points of a curve"})
    eval_size: int = field(default=256, metadata={"help": "held-out samples of a point"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    workers: int = field(default=2, metadata={"help": "processes at once, one thread each; 0 works in this process"})
    output_dir: str = field(default="docs/training", metadata={"help": "where curves.json and curves.png go"})
    work_dir: str = field(default="runs/curves", metadata={"help": "trainings, used again by their settings"})


def train(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One training; its validations and the mean seconds of its iterations."""
    output = folder / "trainings" / digest_of(arguments)
    flags = {name: value for name, value in arguments.items() if name != "made_with"}
    main(PPOConfig(output_dir=str(output), cache_dir=str(folder / "cache"), resume="auto", **flags))
    validations, metrics = (
        [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
        for name in ("validation", "metrics")
    )
    return {
        "validations": [{name: value for name, value in row.items() if name != "seconds"} for row in validations],
        "seconds_per_iteration": fmean(row["seconds"] for row in metrics),
    }


def run(config: CurvesConfig, lab: Lab) -> dict[str, Any]:
    """All settings and seeds; the file's content."""
    shared = {
        name: getattr(config, name)
        for name in ("task", "iterations", "train_size", "eval_every", "eval_size", "device")
    }
    keys = [(name, seed) for seed in config.seeds for name in SETTINGS]
    found = lab.map(train, [{**shared, **SETTINGS[name], "seed": seed} for name, seed in keys], "trainings")
    one = PPOConfig()
    return {
        "settings": {**shared, "seeds": config.seeds, "flags": SETTINGS},
        # an agent that keeps everything: Q_p = Q at every stage, and the whole retention cost
        "keep_all_reward": len(one.stage_layers) - float(alphas(len(one.stage_layers), one.eta).sum()),
        "full_accuracy": found[0]["validations"][0]["full_accuracy"],
        "untrained": [
            result["validations"][0] for (name, _), result in zip(keys, found, strict=True) if not SETTINGS[name]
        ],
        "curves": {
            name: [result["validations"] for (key, _), result in zip(keys, found, strict=True) if key == name]
            for name in SETTINGS
        },
        "seconds_per_iteration": {
            name: fmean(r["seconds_per_iteration"] for (key, _), r in zip(keys, found, strict=True) if key == name)
            for name in SETTINGS
        },
    }


def value(row: dict[str, Any], measure: str) -> float:
    """A measure of a validation; of ``retained`` the last stage."""
    found = row[measure]
    return found[-1] if isinstance(found, list) else found


def figure(result: dict[str, Any]) -> Figure:
    """A panel per measure; thin lines are seeds, thick ones their mean."""
    drawn = plots.blank(12.5, 3.9)
    keep_all = {"reward": result["keep_all_reward"], "topk_accuracy": result["full_accuracy"], "retained": 1.0}
    panels = drawn.subplots(1, len(MEASURES))
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        scale = 1 if measure == "reward" else 100
        for colour, (name, curves) in zip(COLOURS, result["curves"].items(), strict=True):
            steps = [row["iteration"] for row in curves[0]]
            lines = [[scale * value(row, measure) for row in curve] for curve in curves]
            for line in lines:
                axes.plot(steps, line, color=colour, linewidth=0.6, alpha=0.5)
            axes.plot(steps, [fmean(column) for column in zip(*lines, strict=True)], color=colour, label=name)
        axes.axhline(scale * keep_all[measure], color="#5d666f", linewidth=0.9, linestyle=(0, (2, 3)))
        label = "full model" if measure == "topk_accuracy" else "keep all"
        axes.annotate(label, (0.99, scale * keep_all[measure]), (0, 3), ("axes fraction", "data"), "offset points",
                      ha="right", fontsize=8, color="#5d666f")  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("iterations")
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 0.1), fontsize=8)
    return drawn


def spread(numbers: list[float], scale: float = 100) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = stdev(numbers) if len(numbers) > 1 else 0.0
    digits = 1 if scale == 100 else 2
    return f"{scale * fmean(numbers):.{digits}f} ± {scale * deviation:.{digits}f}"


def table(result: dict[str, Any]) -> str:
    """Where the curves end, as Markdown."""
    heads = [
        "",
        "reward",
        "arg-max accuracy, %",
        "its tokens behind each stage, %",
        "top-k accuracy, %",
        "s / iteration",
    ]

    def cells(rows: list[dict[str, Any]]) -> list[str]:
        kept = " / ".join(
            f"{100 * fmean(column):.1f}" for column in zip(*(row["retained"] for row in rows), strict=True)
        )
        return [
            spread([row["reward"] for row in rows], 1),
            spread([row["accuracy"] for row in rows]),
            kept,
            spread([row["topk_accuracy"] for row in rows]),
        ]

    lines = [["untrained actor", *cells(result["untrained"]), ""]]
    lines.append(
        [
            "keep all",
            f"{result['keep_all_reward']:.2f}",
            f"{100 * result['full_accuracy']:.1f}",
            "100 / 100 / 100",
            "",
            "",
        ]
    )
    for name, curves in result["curves"].items():
        seconds = f"{result['seconds_per_iteration'][name]:.2f}"
        lines.append([name, *cells([curve[-1] for curve in curves]), seconds])
    return markdown_table(heads, lines)


def make(config: CurvesConfig) -> None:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with Lab(Path(config.work_dir), config.workers) as lab:
        result = run(config, lab)
    write_whole(folder / "curves.json", compact({"environment": environment(config.device), **result}))
    with plots.styled():
        plots.save(figure(result), folder / "curves.png")
    print(table(result))


if __name__ == "__main__":
    cli.run(lambda arguments: make(cli.parse(CurvesConfig, __doc__, arguments)))
