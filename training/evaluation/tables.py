"""results.json as a table in the shape of the paper's Table 1: Markdown, one HTML file, console."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from training.evaluation.records import FREE, FULL

Results = Mapping[str, Any]
LEVELS = {
    "perception": "Perception",
    "reasoning": "Reasoning",
    "both": "Perception and reasoning",
    "video": "Video",
    "any": "Own data",
}
COST_HEADS = ("Avg tokens", "TFLOPs", "Prefill ms", "Decode ms", "KV MB")
NONE = "–"


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}"


def span(interval: Sequence[float] | None, signed: bool = False) -> str:
    """An interval in percent: "[91.2, 95.6]"."""
    if interval is None:
        return NONE
    low, high = (f"{100 * one:{'+' if signed else ''}.1f}" for one in interval)
    return f"[{low}, {high}]"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def columns(results: Results) -> list[str]:
    """The tasks, grouped by level."""
    return sorted(results["tasks"], key=lambda name: list(LEVELS).index(results["tasks"][name]["level"]))


def blocks(results: Results) -> list[str]:
    """The budgets in the table's order: unpruned, those asked for, the methods' own choice."""
    found = list(dict.fromkeys(one["budget"] for one in results["averages"]))
    return sorted(found, key=lambda budget: (budget != FULL, budget == FREE))


def block_title(results: Results, budget: str) -> str:
    """What is kept in a block, in words."""
    facts = list(results["tasks"].values())
    tokens = sum(one["num_visual"] for one in facts) / len(facts)
    if budget == FULL:
        return f"Upper bound, {tokens:.4g} tokens (100 %)"
    if budget == FREE:
        return "As many tokens as the method wants"
    mine = [one["average_tokens"] for one in results["averages"] if one["budget"] == budget]
    average = sum(mine) / len(mine)
    what = f"Keep {budget} tokens" if results["settings"]["keep"] else f"Retain average {budget} tokens"
    return f"{what} ({percent(1 - average / tokens if tokens else None)} % fewer)"


def stages_text(results: Results) -> str:
    """Where each method prunes: "TOP-RL, Random patches: 2, 8, 16; VisionZip: 0"."""
    labels = labels_of(results)
    found: dict[str, list[str]] = {}
    for method, plan in ((m, plan) for t in results["schedules"].values() for b in t.values() for m, plan in b.items()):
        names = found.setdefault(", ".join(map(str, plan["layers"])), [])
        if labels[method] not in names:
            names.append(labels[method])
    return "; ".join(f"{', '.join(names)}: {layers}" for layers, names in found.items())


def labels_of(results: Results) -> dict[str, str]:
    """Map the methods to what people call them."""
    return {average["method"]: average["label"] for average in results["averages"]}


def costs(row: Mapping[str, Any]) -> list[str]:
    """The cells of COST_HEADS."""
    size = row["kv_bytes"]
    return [
        f"{row['average_tokens']:.2f}",
        f"{row['tflops']:.3g}",
        f"{1e3 * row['prefill_seconds']:.3g}",
        f"{1e3 * row['decode_seconds']:.3g}",
        NONE if size is None else f"{size / 1e6:.3g}",
    ]


def row_of(results: Results, method: str, budget: str, task: str) -> Mapping[str, Any]:
    return next(row for row in results["rows"] if (row["method"], row["budget"], row["task"]) == (method, budget, task))


def score_text(row: Mapping[str, Any]) -> str:
    """The headline in percent, with the sample deviation over runs."""
    deviation = row["score_deviation"]
    return percent(row["score"]) + ("" if deviation is None else f" ± {percent(deviation)}")


def best(results: Results, budget: str) -> dict[str, str]:
    """The highest score of a block as shown, by task; none where there is nothing to compare."""
    methods = [one["method"] for one in results["averages"] if one["budget"] == budget]
    if len(methods) < 2:
        return {}
    rows = {task: [row_of(results, method, budget, task) for method in methods] for task in results["tasks"]}
    return {task: percent(max(row["score"] for row in mine)) for task, mine in rows.items()}


def main_rows(results: Results, bold: Callable[[str], str], name: str = "label") -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of each block; a row is label (or method), a cell per task, average, costs."""
    found = []
    for budget in blocks(results):
        tops, rows = best(results, budget), []
        for average in (one for one in results["averages"] if one["budget"] == budget):
            cells = [average[name]]
            for task in columns(results):
                row = row_of(results, average["method"], budget, task)
                text = f"{score_text(row)} ({percent(row['retention'])} %)"
                cells.append(bold(text) if percent(row["score"]) == tops.get(task) else text)
            rows.append([*cells, f"{percent(average['retention'])} %", *costs(average)])
        found.append((block_title(results, budget), rows))
    return found


def paired_rows(results: Results) -> list[list[str]]:
    """Block, method, task, score, difference with interval, retention interval, test of each pruned row."""
    found = []
    labels = labels_of(results)
    for budget in blocks(results):
        for row in (one for one in results["rows"] if one["budget"] == budget and budget != FULL):
            found.append(
                [
                    "own choice" if budget == FREE else budget,
                    labels[row["method"]],
                    row["task"],
                    f"{100 * row['difference']:+.1f} {span(row['difference_interval'], signed=True)}",
                    f"{percent(row['retention'])} {span(row['retention_interval'])}",
                    f"{p_text(row['p'])} ({row['test']})",
                    *costs(row),
                ]
            )
        for one in results["averages"]:
            if one["budget"] == budget != FULL and len(results["tasks"]) > 1:
                shown = f"{percent(one['retention'])} {span(one['retention_interval'])}"
                name = "own choice" if budget == FREE else budget
                found.append([name, one["label"], "average", "", shown, "", *costs(one)])
    return found


PAIRED_HEADS = ("Budget", "Method", "Task", "Difference", "Retention, %", "p", *COST_HEADS)


def notes(results: Results) -> list[str]:
    """What a reader has to know of the numbers."""
    settings, environment = results["settings"], results["environment"]
    tasks = "; ".join(
        f"{name}: {facts['headline']}, n = {facts['n']} of {facts['dataset']}, {facts['split']}"
        for name, facts in results["tasks"].items()
    )
    stages = stages_text(results)
    found = [
        f"Model {settings['model']} in {settings['dtype']}, attention {settings['attention']}, batch size "
        f"{settings['batch_size']}, {environment['device_name']}, torch {settings['torch']}, transformers "
        f"{settings['transformers']}.",
        f"Scores x 100. {tasks}.",
        *([f"Pruning before layers: {stages}. Layer 0 is before the language model."] if stages else []),
        "In brackets behind a score, and Avg: percent of the unpruned model's score. ±: deviation over runs (seeds, or "
        "policies).",
        "Avg tokens: visual tokens averaged over all decoder layers, counted from what was kept. TFLOPs: twice the "
        "multiply-adds of Eqs. 8-12, visual tokens only. Prefill (with the vision tower), decode and key/value cache "
        "(all tokens): measured, per sample of a batch.",
        "Differences are of the mean sample score, in points; intervals are 95 % paired bootstrap over samples, tests "
        "are against the unpruned run (exact McNemar for right/wrong scores, else a sign-flip permutation test), not "
        "corrected for their number.",
    ]
    other = [name for name, facts in results["tasks"].items() if not facts["headline_is_mean_score"]]
    if other:
        found.append(
            f"The headline of {', '.join(other)} is not the mean of its sample scores: intervals and tests are of the "
            "latter."
        )
    return found


def markdown(results: Results) -> str:
    """Both tables and the notes."""
    names = columns(results)
    heads = ["Method", *(f"{name} ({LEVELS[results['tasks'][name]['level']].lower()})" for name in names), "Avg"]
    lines = [_line([*heads, *COST_HEADS]), _line(["---", *["--:"] * (len(heads) - 1 + len(COST_HEADS))])]
    for title, rows in main_rows(results, lambda text: f"**{text}**"):
        lines += [_line([f"**{title}**", *[""] * (len(heads) - 1 + len(COST_HEADS))]), *map(_line, rows)]
    if paired := paired_rows(results):
        lines += ["", "Against the unpruned run:", "", _line(PAIRED_HEADS)]
        lines += [_line(["---"] * 3 + ["--:"] * (len(PAIRED_HEADS) - 3)), *map(_line, paired)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(results))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html_page(results: Results) -> str:
    """One file that needs no network."""
    names, tasks = columns(results), results["tasks"]
    width = len(names) + 2 + len(COST_HEADS)
    groups = "".join(
        f'<th colspan="{sum(tasks[n]["level"] == level for n in names)}">{escape(title)}</th>'
        for level, title in LEVELS.items()
        if any(tasks[n]["level"] == level for n in names)
    )
    heads = "".join(f"<th>{escape(n)}<small>n = {tasks[n]['n']}</small></th>" for n in names)
    heads += "".join(f"<th>{head}</th>" for head in ("Avg", *COST_HEADS))
    body = ""
    for title, rows in main_rows(results, lambda text: f"\0{text}\1"):
        body += f'<tr><th class="block" colspan="{width}">{escape(title)}</th></tr>\n'
        body += "".join(_html_row(row) for row in rows)
    paired = "".join(_html_row(row) for row in paired_rows(results))
    paired_heads = "".join(f"<th>{escape(head)}</th>" for head in PAIRED_HEADS)
    style = Path(__file__).parents[1].joinpath("report.css").read_text()
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes(results))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of {escape(results["settings"]["model"])}</title>
<style>{style}main {{ max-width: 1400px; }} tbody th.block {{ font-weight: 650; padding-top: 16px; }}</style></head>
<body><main>
<h1>Visual token pruning of {escape(results["settings"]["model"])}</h1>
<div class="wide"><table><thead><tr><th></th>{groups}<th colspan="{1 + len(COST_HEADS)}"></th></tr>
<tr><th>Method</th>{heads}</tr></thead>
<tbody>{body}</tbody></table></div>
<h2>Against the unpruned run</h2>
<div class="wide"><table><thead><tr>{paired_heads}</tr></thead><tbody>{paired}</tbody></table></div>
<h2>Notes</h2><ul class="note">{listed}</ul>
</main></body></html>
"""


def _html_row(cells: Sequence[str]) -> str:
    shown = [escape(cell).replace("\0", "<b>").replace("\1", "</b>") for cell in cells]
    return f"<tr><th>{shown[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in shown[1:]) + "</tr>\n"


def console_tables(results: Results) -> list[Any]:
    """The main table for a terminal, a table per block; Avg only where there are several tasks."""
    from rich import box
    from rich.table import Table

    names, tables = columns(results), []
    single = len(names) == 1
    for title, rows in main_rows(results, lambda text: f"[bold]{text}[/bold]", name="method"):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        heads = ["Method", *names, "Avg", *COST_HEADS]
        for i, head in enumerate(heads):
            if not (single and i == 2):
                table.add_column(head, justify="right" if i else "left")
        for row in rows:
            table.add_row(*(cell for i, cell in enumerate(row) if not (single and i == 2)))
        tables.append(table)
    return tables
