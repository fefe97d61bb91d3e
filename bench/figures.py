"""One figure per op of the kernel suite: time over the number of tokens, and each provider's time over ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BASE_SIZE = 2048  # the bars show the size nearest to it
OURS, BOUND = "#c1121f", "#8d99ae"
PEERS = ("#1d3557", "#2a9d8f", "#e9a820", "#6a4c93", "#4aa3df", "#8a5a44", "#d66ba0", "#5f7f1f", "#111111", "#ff7f50")
MARKERS = "osD^vP*X<>"


def draw_figures(rows: Sequence[Row], folder: Path, device: str) -> list[Path]:
    """Write ``<op>.png`` for every op with timed rows. Needs matplotlib.

    Args:
        device: named in the title.
    """
    timed = [row for row in rows if row.get("p50_ms") is not None]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for op in dict.fromkeys(row["op"] for row in timed):
        path = folder / f"{op}.png"
        _draw_op(op, [row for row in timed if row["op"] == op], path, device)
        paths.append(path)
    return paths


def sweep_of(rows: Sequence[Row]) -> list[Row]:
    """Of the rows of one mode, the set that differs in the number of tokens only and has the most, or the base size."""

    def worth(group: list[Row]) -> tuple[int, int]:
        sizes = _unique(group, "num_tokens")
        return len(sizes), -min(abs(size - BASE_SIZE) for size in sizes)

    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        layout = re.sub(r"\b[NK]\d+\b", "", row["shape"])
        keep = None if row["keep"] is None else round(row["keep"], 2)
        groups.setdefault((layout, row["dtype"], keep, row["pattern"]), []).append(row)
    return max(groups.values(), key=worth)


def _draw_op(op: str, rows: list[Row], path: Path, device: str) -> None:
    from matplotlib.figure import Figure

    sweeps = {mode: sweep_of([row for row in rows if row["mode"] == mode]) for mode in _unique(rows, "mode")}
    several = {mode: sweep for mode, sweep in sweeps.items() if len(_unique(sweep, "num_tokens")) > 1}
    sweeps = several or sweeps
    providers = _unique([row for sweep in sweeps.values() for row in sweep], "provider")
    styles = _styles(providers, rows)
    heights = [0.3 * len(_unique(sweep, "provider")) + 1.1 for sweep in sweeps.values()]
    curves = bool(several)  # one size makes no curve
    figure = Figure(figsize=(11 if curves else 6.5, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(sweeps), 1 + curves, squeeze=False, height_ratios=heights)
    for (mode, sweep), row in zip(sweeps.items(), panels, strict=True):
        if curves:
            _draw_times(row[0], sweep, styles)
        _draw_ratios(row[-1], sweep, styles)
        row[0].set_title(f"{mode}   {_setting(sweep)}\n{row[0].get_title(loc='left')}", fontsize=9, loc="left")
    figure.suptitle(f"{op} on {device}", fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=100)


def _draw_times(axis: Any, sweep: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib import ticker

    sizes = sorted(_unique(sweep, "num_tokens"))
    for provider in _unique(sweep, "provider"):
        points = sorted((row for row in sweep if row["provider"] == provider), key=lambda row: row["num_tokens"])
        axis.plot(
            [row["num_tokens"] for row in points], [row["p50_ms"] for row in points], markersize=4, **styles[provider]
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.set_title("median ms over tokens N", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _draw_ratios(axis: Any, sweep: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    """Bars at the size nearest to the base size; names double as the legend of the curves."""
    size = min(_unique(sweep, "num_tokens"), key=lambda number: abs(number - BASE_SIZE))
    bars = [row for row in sweep if row["num_tokens"] == size and row["ratio_to_ours"] is not None]
    names = [row["provider"] for row in bars]
    ratios = [row["ratio_to_ours"] for row in bars]
    colors = [styles[name]["color"] for name in names]
    drawn = axis.barh(range(len(bars)), ratios, color=colors, height=0.7)
    axis.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
    axis.set_yticks(range(len(bars)), names, fontsize=8)
    for label, color in zip(axis.get_yticklabels(), colors, strict=True):
        label.set_color(color)
    axis.invert_yaxis()
    axis.axvline(1.0, color=OURS, linewidth=1)
    axis.set_xlim(0, 1.12 * max([1.0, *ratios]))
    axis.set_title(f"time over ours at N = {size} (above 1: ours is faster)", fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=8)


def _styles(providers: list[str], rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Ours thick and red, limits dashed, each peer its own colour in all panels."""
    role = {row["provider"]: row["role"] for row in rows}
    styles: dict[str, dict[str, Any]] = {}
    seen = {"ours": 0, "bound": 0, "peer": 0}
    for provider in providers:
        kind = role[provider]
        number = seen[kind]
        seen[kind] += 1
        if kind == "ours":
            styles[provider] = {"color": OURS, "linewidth": 2.4, "zorder": 5, "linestyle": ("-", "-.")[number % 2]}
        elif kind == "bound":
            styles[provider] = {"color": BOUND, "linewidth": 1.3, "linestyle": ("--", ":", "-.")[number % 3]}
        else:
            styles[provider] = {"color": PEERS[number % len(PEERS)], "linewidth": 1.2}
        styles[provider]["marker"] = MARKERS[len(styles) % len(MARKERS)]
    return styles


def _setting(sweep: list[Row]) -> str:
    row = sweep[0]
    layout = " ".join(re.sub(r"\b[NK]\d+\b", "", row["shape"]).split())
    keep = "" if row["keep"] is None else f", keep {row['keep']:.0%} {row['pattern'] or ''}".rstrip()
    return f"{layout}{keep}, {row['dtype']}"


def _unique(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))
