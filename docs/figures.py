"""Draw README's figures from measured results, and make its tables of methods and models.

    python docs/figures.py    # docs/accuracy.png, docs/time.png and the tables between README's marks

Accuracy is read from docs/reproduction/results/main.json (`python training/reproduce.py main`), time from
bench/results/cpu/prefill.csv (`python bench/run.py --suite prefill`).
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models import METHODS
from toprl_models.check import feature_matrix, model_type_of
from toprl_models.families import FAMILIES
from training.explained import LINKS

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("toprl", "fastv", "fastv_progressive", "pyramiddrop", "sparsevlm", "visionzip", "divprune", "random")
COLOURS = ("#1b6a85", "#c8553d", "#d08c9f", "#588157", "#8a5a83", "#c1922b", "#5c677d", "#a0a6ab")
# columns of the table of models, with the names of their rows in the feature matrix
FEATURES = {
    "images": "images",
    "videos": "videos",
    "packed prompts": "several prompts packed into a row",
    "static cache": "StaticCache",
    "beams": "beam search",
    "8-bit": "8-bit weights",
}


def accuracy_figure() -> Figure:
    """Share of the full model's accuracy against average tokens, mean over six kinds of questions."""
    result = json.loads((ROOT / "docs/reproduction/results/main.json").read_text())["result"]
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100, color="#5d666f", linewidth=0.8, linestyle=":")
    for place, (method, colour) in enumerate(zip(SHOWN, COLOURS, strict=True)):
        points = []
        for budget in sorted(result["budgets"], key=float):
            rows = [
                row
                for task in result["tasks"].values()
                for row in task["rows"]
                if row["method"] == method and row["budget"] == budget
            ]
            tokens = sum(row["average_tokens"] for row in rows) / len(rows)
            points.append((tokens + 0.12 * (place - 3.5), *(100 * x for x in result["averages"][f"{method}/{budget}"])))
        tokens, means, low, high = zip(*points, strict=True)
        errors = [[m - x for m, x in zip(means, low, strict=True)], [x - m for m, x in zip(means, high, strict=True)]]
        label = result["labels"][method]
        axes.errorbar(
            tokens, means, errors, color=colour, label=label, marker="o", markersize=4, capsize=2, linewidth=1.2
        )
    axes.set_xlabel(f"visual tokens of {result['num_visual']}, averaged over the decoder layers (points set apart)")
    axes.set_ylabel("% of the full model's accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def time_figure() -> Figure:
    """Prefill time against average tokens: median, with the 20th and 80th percentile."""
    with open(ROOT / "bench/results/cpu/prefill.csv") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        low, middle, high = (float(row[name]) for name in ("ms_p20", "ms_p50", "ms_p80"))
        x = float(row["average_tokens"]) + 12 * (place - 1.5)
        label = f"{row['method']}: {float(row['speedup']):.2f}x"
        axes.errorbar(
            x, middle, [[middle - low], [high - middle]], marker="o", capsize=3, color=COLOURS[place], label=label
        )
    whole = max(float(row["average_tokens"]) for row in rows)
    axes.set_xlim(0, whole * 1.08)
    axes.set_ylim(0)
    axes.set_xlabel(f"visual tokens of {whole:.0f}, averaged over the decoder layers (points set apart)")
    axes.set_ylabel("prefill, ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    return figure


def methods_table() -> str:
    """Name, paper, where it prunes and whether it is trained, for every registered method."""
    lines = ["|method|paper|before layers, of 32|trained|", "|---|---|---|:-:|"]
    for name, method in METHODS.items():
        paper = method.paper or "–"
        paper = f"[{paper}]({LINKS[name]})" if name in LINKS else paper
        layers = ", ".join(map(str, method.stages))
        lines.append(f"|`{name}`|{paper}|{layers}|{'✓' if method.trained else ''}|")
    return "\n".join(lines)


def models_table() -> str:
    """What the tests of the families of the feature matrix found; a dash where a family lacks the feature."""
    matrix = feature_matrix()
    alike: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES.values():
        outcomes = [matrix[row].get(model_type_of(family)) for row in FEATURES.values()]
        if any(outcomes):
            marks = tuple("✓" if outcome == "pass" else "–" for outcome in outcomes)
            alike.setdefault(marks, []).append(family.title)
    rows = [f"|{', '.join(titles)}|{'|'.join(marks)}|" for marks, titles in alike.items()]
    return "\n".join([f"|families|{'|'.join(FEATURES)}|", "|---|" + ":-:|" * len(FEATURES), *rows])


def with_tables(text: str) -> str:
    """Return README's text with the tables between their marks made anew."""
    for name, table in (("methods", methods_table()), ("models", models_table())):
        marks = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)
        if not marks.search(text):
            raise ValueError(f"README.md: the marks <!-- {name} --> and <!-- end --> are missing")
        text = marks.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


if __name__ == "__main__":
    accuracy_figure().savefig(ROOT / "docs/accuracy.png", dpi=130)
    time_figure().savefig(ROOT / "docs/time.png", dpi=130)
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
