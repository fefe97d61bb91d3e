"""The charts of the report: training curves as inline SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Panels of the first figure: metric, title, shown in percent.
CURVES = (
    ("reward", "Reward, summed over stages", False),
    ("accuracy", "Accuracy of the rollouts", True),
    ("entropy", "Entropy per token (nats)", False),
    ("kl_k3", "KL(old ‖ new) per token", False),
    ("clip_fraction", "Clip fraction", True),
)
TASK_COLOURS = ("#1b6a85", "#c8553d", "#588157", "#8a5a83", "#c1922b", "#5c677d", "#d08c9f")
STAGE_COLOURS = ("#8fc1d1", "#3d8ba6", "#0f4658", "#082530")
PANEL_WIDTH = 11 / 3  # inches; a phone shows one panel at about this width
CHART_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # the page's own font, selectable text
    "svg.hashsalt": "report",  # the same inputs give the same file
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b9bec4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef0",
    "text.color": "#2b3137",
    "xtick.color": "#5d666f",
    "ytick.color": "#5d666f",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.labelcolor": "#5d666f",
}


def svg(figure: Figure) -> str:
    """The figure as an inline <svg>: no prolog, no metadata, and no namespaces, which HTML implies."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])


def task_colours(runs: dict[str, Any]) -> dict[str, str]:
    return {kind: TASK_COLOURS[i % len(TASK_COLOURS)] for i, kind in enumerate(runs)}


def curves_figure(runs: dict[str, list[dict[str, np.ndarray]]], columns: int = 3) -> Figure:
    """One panel per metric, one colour per task, one line per run; the legend has the last cell, or stands above."""
    rows = math.ceil((len(CURVES) + (columns > 1)) / columns)
    size = (PANEL_WIDTH * columns, 2.45 * rows)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.03))
    panels = figure.subplots(rows, columns).flat
    colours = task_colours(runs)
    for axes, (name, title, share) in zip(panels, CURVES, strict=False):
        for kind, seeds in runs.items():
            for run in seeds:
                width = 0.8 if len(seeds) > 1 else 1.5
                axes.plot(run["iteration"] + 1, run[name], color=colours[kind], linewidth=width)
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if share:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    lines = [Line2D([], [], color=colours[k], linewidth=1 if len(runs[k]) > 1 else 1.8) for k in runs]
    names = [f"{kind} ({len(seeds)} seeds)" if len(seeds) > 1 else kind for kind, seeds in runs.items()]
    if columns > 1:
        last = figure.axes[-1]
        last.axis("off")
        last.legend(lines, names, loc="center left", frameon=False, fontsize=9.5, labelspacing=0.7)
    else:
        figure.legend(lines, names, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("iteration", fontsize=8.5, color="#5d666f")
    return figure


def retained_figure(
    runs: dict[str, list[dict[str, np.ndarray]]], num_visual: int, keep: Sequence[int], columns: int = 3
) -> Figure:
    """One panel per task: visual tokens left after each stage, one line per stage and run, log axis."""
    rows = math.ceil(len(runs) / columns)
    layout = ConstrainedLayoutEngine(hspace=0.06, wspace=0.03)
    figure = Figure(figsize=(PANEL_WIDTH * columns, 2.1 * rows + 0.35), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    tokens_left = np.concatenate([num_visual * run["retained"].ravel() for seeds in runs.values() for run in seeds])
    least = tokens_left[tokens_left > 0].min(initial=1.0)
    shades = [STAGE_COLOURS[min(i, len(STAGE_COLOURS) - 1)] for i in range(len(keep))]
    for axes, (kind, seeds) in zip(grid.flat, runs.items(), strict=False):
        for stage, (shade, budget) in enumerate(zip(shades, keep, strict=True)):
            axes.axhline(budget, color=shade, linewidth=0.9, linestyle=(0, (2, 3)))
            for run in seeds:
                width = 0.8 if len(seeds) > 1 else 1.5
                tokens = num_visual * run["retained"][:, stage]
                axes.plot(run["iteration"] + 1, tokens, color=shade, linewidth=width, label=f"stage {stage + 1}")
        axes.set_title(f"{kind} ({len(seeds)} seeds)" if len(seeds) > 1 else kind)
        axes.set_yscale("log", base=2, nonpositive="clip")
        axes.set_ylim(0.85 * min(least, *keep), 1.15 * num_visual)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    for axes in list(grid.flat)[len(runs) :]:
        axes.axis("off")
    handles = [Line2D([], [], color=shade, linewidth=1.8) for shade in shades]
    handles.append(Line2D([], [], color="#5d666f", linewidth=0.9, linestyle=(0, (2, 3))))
    names = [*(f"after stage {i + 1}" for i in range(len(keep))), "the schedule's k"]
    figure.legend(
        handles, names, loc="outside upper left", ncols=len(handles) if columns > 1 else 2, frameon=False, fontsize=9
    )
    figure.supxlabel("iteration", fontsize=8.5, color="#5d666f")
    return figure
