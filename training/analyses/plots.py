"""How the figures look: the report's style, one colour per level of task, one file format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from training.charts import CHART_STYLE, TASK_COLOURS

STYLE: dict[Any, Any] = CHART_STYLE | {"figure.facecolor": "white", "savefig.dpi": 150, "legend.frameon": False}
# one hue per level, so that a reader sees perception and reasoning before reading names
SHADES = {
    "perception": ("#0f4658", "#1b6a85", "#3d8ba6", "#8fc1d1", "#5c677d"),
    "reasoning": ("#c8553d", "#d98a4e", "#a63d2a", "#e2b07a"),
}
METHOD_COLOURS = dict(zip(("toprl", "fastv", "pyramiddrop", "random", "untrained"), TASK_COLOURS, strict=False))


def blank(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04))


def save(figure: Figure, path: Path) -> None:
    """As PNG, without the date, so that the same result gives the same file."""
    figure.savefig(path, format="png", metadata={"Software": None})


def styled() -> Any:
    """Context in which figures are made and saved."""
    return matplotlib.rc_context(STYLE)


def colours_of(levels: dict[str, str]) -> dict[str, str]:
    """A colour for each task by its level."""
    used: dict[str, int] = {}
    found = {}
    for task, level in levels.items():
        shades = SHADES.get(level, SHADES["perception"])
        found[task] = shades[used.get(level, 0) % len(shades)]
        used[level] = used.get(level, 0) + 1
    return found


def colour_bar(image: Any, axes: Axes | Sequence[Axes], **place: float) -> None:
    """The scale of a ``heat_map``, beside ``axes``; ``place``: arguments of matplotlib's ``colorbar``."""
    bar = image.figure.colorbar(image, ax=axes, **place)
    bar.outline.set_visible(False)
    bar.set_label("% of the full model's accuracy")


def heat_map(
    axes: Axes, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], low: float, high: float
) -> Any:
    """A table of percentages whose cells are coloured; dark cells get white digits."""
    image = axes.imshow(
        [[100 * one for one in row] for row in values], vmin=low, vmax=high, cmap="YlGnBu", aspect="auto"
    )
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = 100 * value > low + 0.6 * (high - low)
            axes.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if dark else "#2b3137", size=7
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return image


def frame(place: int) -> Rectangle:
    """An outline around cell (place, place) of a heat map."""
    return Rectangle(
        (place - 0.5, place - 0.5), 1, 1, fill=False, edgecolor="#c8553d", linewidth=1.6, clip_on=False, zorder=3
    )
