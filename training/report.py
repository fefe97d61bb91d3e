"""Write the report of a demo run as one self-contained HTML file: accuracy, training curves, kept patches.

    python training/demo.py --output_dir runs/demo    # trains, evaluates and leaves the inputs in runs/demo
    python training/report.py runs/demo               # (re)writes runs/demo/report.html

Reads results.json, gallery.json and <run>/metrics.jsonl of the folder. The page needs no network: its style is inline,
its charts are inline SVG and its images base64 PNG.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models.strips import draw_stage, png_uri
from training import cli
from training.charts import CHART_STYLE, CURVES, curves_figure, retained_figure, svg
from training.evaluation.methods import METHODS
from training.explained import LINKS, PAPER, explanation
from training.tasks import Sample, exact_match


class Source:
    """A parsed input file that names itself, the missing key and the remedy when something is not there."""

    def __init__(self, data: Any, name: str, remedy: str, path: str = "") -> None:
        self.data, self.name, self.remedy, self.path = data, name, remedy, path

    def __getitem__(self, key: str) -> Any:
        if not isinstance(self.data, dict) or key not in self.data:
            raise ValueError(f"{self.name}: key {self.join(key)!r} is missing; {self.remedy}")
        return self.data[key]

    def join(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def child(self, key: str) -> Source:
        return Source(self[key], self.name, self.remedy, self.join(key))

    def children(self, key: str) -> list[Source]:
        return [Source(one, self.name, self.remedy, f"{self.join(key)}[{i}]") for i, one in enumerate(self[key])]


def read(folder: Path, name: str) -> Source:
    """Parse ``folder/name`` (.json, or .jsonl as {"rows": [...]}); says what to run where that fails.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON.
    """
    path = folder / name
    remedy = f"run: python training/demo.py --output_dir {folder}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {remedy}")
    text = path.read_text()
    try:
        data = {"rows": [json.loads(line) for line in text.splitlines() if line]} if name.endswith("l") else None
        return Source(data or json.loads(text), str(path), remedy)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error


def label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def percent(values: Sequence[float]) -> str:
    """Mean of fractions in percent, with the sample deviation where there are several."""
    text = f"{100 * statistics.fmean(values):.1f}"
    return text if len(values) == 1 else f'{text}<span class="sd">± {100 * statistics.stdev(values):.1f}</span>'


# --- 1. header -----------------------------------------------------------------------------------------------------


def header_section(results: Source) -> str:
    """Title, environment line, the schedule in words and as tokens per decoder layer."""
    environment, schedule = results.child("environment"), results.child("schedule")
    cores = f"{environment['cpu_count']} CPU core{'s' if environment['cpu_count'] != 1 else ''}"
    hardware = cores if environment["device"] == "cpu" else f"{environment['device']}, {cores}"
    meta = (
        f"{environment['date']} · {hardware} · "
        f"Python {environment['python']} · torch {environment['torch']} · transformers {environment['transformers']}"
    )
    layers, keep = schedule["layers"], schedule["keep"]
    total, depth, average = schedule["num_visual"], schedule["num_layers"], schedule["average_tokens"]
    stages = [f"before layer {layer} it keeps {k}" for layer, k in zip(layers, keep, strict=True)]
    words = ", ".join(stages[:-1]) + " and " + stages[-1] if len(stages) > 1 else stages[0]
    counts = [([total, *keep])[sum(layer >= at for at in layers)] for layer in range(depth)]
    return f"""<header>
<h1>TOP-RL on the embedded tiny LLaVA</h1>
<p class="meta">{escape(meta)}</p>
<p>{PAPER}</p>
<p>A 128×128 image enters the decoder as {total} visual tokens, one per 16×16 patch. The language model is frozen; a
small actor, trained with PPO, decides at {len(layers)} stages which tokens go on: {words} of the {total}
(layers counted from 0). The table below compares pruning methods
at this budget and states the tokens of each.</p>
<div class="facts">
<div><b>{average:.1f} of {total}</b><span>visual tokens, averaged over the {depth} layers</span></div>
<div><b>{schedule["macs_ratio"]:.2f}×</b><span>decoder multiply-adds on visual tokens (Eqs. 8–9), full = 1</span></div>
</div>
<table class="schedule"><thead><tr><th>Decoder layer</th>{"".join(f"<th>{i}</th>" for i in range(depth))}</tr></thead>
<tbody><tr><th>Visual tokens seen</th>{"".join(f"<td>{n}</td>" for n in counts)}</tr></tbody></table>
</header>"""


# --- 2. accuracy ---------------------------------------------------------------------------------------------------


def accuracies(task: Source) -> dict[str, list[float]]:
    """Accuracy of each method over its seeds, in the file's order."""
    found = {row["method"]: row["accuracy"] for row in task.children("rows")}
    for method in ("full", "random", "toprl"):
        Source(found, task.name, task.remedy, f"{task.path}.rows")[method]
    return found


def ranking(found: dict[str, list[float]]) -> dict[str, float]:
    """Mean accuracy in percent, best first, at the digit that is shown; the unpruned model does not compete."""
    means = {m: round(100 * statistics.fmean(values), 1) for m, values in found.items() if m != "full"}
    return dict(sorted(means.items(), key=lambda one: -one[1]))


def verdict(kind: str, n: int, found: dict[str, list[float]]) -> str:
    """One list item: who is first among the pruned methods, by how much, and whether n questions can tell."""
    means = ranking(found)
    others = [method for method in means if method != "toprl"]
    best, rival = means["toprl"], means[others[0]]
    gap = best - rival
    noise = 1.96 * math.sqrt((best * (100 - best) + rival * (100 - rival)) / n)
    name = escape(label(others[0]))
    if gap > 0:
        text = f"<b>TOP-RL first</b> with {best:.1f} %, {gap:.1f} points ahead of {name}"
    elif gap < 0:
        rank = 1 + sum(mean > best for mean in means.values())
        text = f"<b>{name} first</b> with {rival:.1f} %; TOP-RL is number {rank}, {-gap:.1f} points behind"
    else:
        text = f"<b>TOP-RL and {name} equal</b> with {best:.1f} %"
    told = "more than" if abs(gap) > noise else "within"
    return f"<li>{escape(kind)}: {text} ({told} the test set's noise of ±{noise:.1f}).</li>"


def accuracy_section(results: Source) -> str:
    """The accuracy-tokens table, the headroom and arg-max rows, and who wins where."""
    tasks = {kind: results.child("tasks").child(kind) for kind in results["tasks"]}
    found = {kind: accuracies(task) for kind, task in tasks.items()}
    tokens: dict[str, list[float]] = {}
    for task in tasks.values():
        for row in task.children("rows"):
            tokens.setdefault(row["method"], []).append(row["average_tokens"])
    argmax = {kind: task.child("argmax") for kind, task in tasks.items()}
    means = {kind: ranking(one) for kind, one in found.items()}
    best = {kind: {m for m in one if one[m] == max(one.values())} for kind, one in means.items()}
    # a column with a deviation somewhere leaves room for it everywhere, so that its digits stay aligned
    several = {kind for kind, one in found.items() if max(map(len, (*one.values(), argmax[kind]["kept"]))) > 1}

    def line(name: str, cells: dict[str, str], last: str = "", css: str = "") -> str:
        shown = "".join(
            f'<td class="{"seeds" if kind in several else ""}" data-label="{escape(kind)}">{cells[kind]}</td>'
            for kind in found
        )
        tokens = f'<td data-label="tokens">{last}</td>' if last else '<td class="none"></td>'
        return f'<tr class="{escape(css)}"><th>{escape(name)}</th>{shown}{tokens}</tr>\n'

    body = ""
    for method, counts in tokens.items():
        cells = {kind: percent(one[method]) if method in one else "–" for kind, one in found.items()}
        cells = {kind: f"<b>{cell}</b>" if method in best[kind] else cell for kind, cell in cells.items()}
        low, high = f"{min(counts):.1f}", f"{max(counts):.1f}"
        body += line(label(method), cells, low if low == high else f"{low}–{high}", method)
    gaps = {k: 100 * (statistics.fmean(one["full"]) - statistics.fmean(one["random"])) for k, one in found.items()}
    shares = {kind: np.mean(one["retained"], axis=0) for kind, one in argmax.items()}
    rest = (
        line("Headroom: full − random, points", {kind: f"{gap:.1f}".replace("-", "−") for kind, gap in gaps.items()})
        + line("Arg-max accuracy, %", {kind: percent(one["accuracy"]) for kind, one in argmax.items()})
        + line("Arg-max kept, stage mean, %", {kind: percent(one["kept"]) for kind, one in argmax.items()})
        + line("Arg-max kept by stage, %", {k: "/".join(f"{100 * x:.0f}" for x in v) for k, v in shares.items()})
    )
    heads = "".join(
        f'<th class="{"seeds" if kind in several else ""}">{escape(kind)}<small>n = {task["n"]}</small></th>'
        for kind, task in tasks.items()
    )
    won = [kind for kind in found if best[kind] == {"toprl"}]
    tied = [kind for kind in found if "toprl" in best[kind] and len(best[kind]) > 1]
    lost = [kind for kind in found if "toprl" not in best[kind]]
    parts = [f"has the highest accuracy of the pruned methods on {len(won)} of {len(found)} question kinds"]
    parts += [f"ties on {', '.join(tied)}"] if tied else []
    parts += [f"is beaten on {', '.join(lost)}"] if lost else []
    return f"""<section id="accuracy"><h2>Accuracy and tokens</h2>
<div class="wide"><table>
<thead><tr><th>Accuracy, %</th>{heads}<th>tokens<small>mean / layer</small></th></tr></thead>
<tbody>{body}</tbody>
<tbody>{rest}</tbody></table></div>
<p class="note">Share of test questions answered exactly, per question kind; the test images are made from source
images that training never saw. Where there are several runs: mean ± sample standard deviation over trainings (TOP-RL),
initialisations (untrained actor) or draws (random patches). Bold: best pruned method of the column (ties included; the
full model is the reference and does not compete). Tokens: visual tokens averaged over the decoder layers. Arg-max: the
TOP-RL agent without the budget, keeping every token that it finds more likely kept than dropped; kept is a share of the
original tokens.</p>
<p>TOP-RL {"; it ".join(parts)}.</p>
<ul>{"".join(verdict(kind, tasks[kind]["n"], one) for kind, one in found.items())}</ul>
<p class="note">Noise: the 95 % interval of a difference of two accuracies on n questions, taken as independent (the
methods answer the same questions, so it is on the wide side). It does not contain the spread over runs.</p>
</section>"""


def methods_section(results: Source) -> str:
    """What each method of the table does, with a link to its paper."""
    tasks = results.child("tasks")
    names = dict.fromkeys(row["method"] for kind in tasks.data for row in tasks.child(kind).children("rows"))
    items = ""
    for name in (*names, "argmax"):
        link = f' <a href="{LINKS[name]}">paper</a>' if name in LINKS else ""
        items += f"<div><dt>{escape(label(name))}</dt><dd>{escape(explanation(name))}{link}</dd></div>\n"
    return f'<section id="methods"><h2>The methods</h2>\n<dl class="methods">{items}</dl></section>'


# --- 3. training curves --------------------------------------------------------------------------------------------


def read_runs(folder: Path, results: Source) -> dict[str, list[dict[str, np.ndarray]]]:
    """Per task and run: each metric over the iterations, ``[I]`` (retained ``[I, T]``)."""
    names = ("iteration", "retained", "seconds", *(name for name, _, _ in CURVES))
    runs: dict[str, list[dict[str, np.ndarray]]] = {}
    for kind, folders in results["runs"].items():
        for run in folders:
            source = read(folder, f"{run}/metrics.jsonl")
            rows = source.children("rows")
            if not rows:
                raise ValueError(f"{source.name} has no rows; {source.remedy}")
            runs.setdefault(kind, []).append({name: np.array([row[name] for row in rows], float) for name in names})
    if not runs:
        raise ValueError(f"{results.name}: 'runs' names no run; {results.remedy}")
    return runs


def by_width(wide: str, narrow: str) -> str:
    """Show one chart on wide screens and the other, of one column, on phones."""
    return f'<div class="wide-only">{wide}</div><div class="narrow-only">{narrow}</div>'


def curves_section(folder: Path, results: Source) -> str:
    """The training curves of every run."""
    runs, schedule = read_runs(folder, results), results.child("schedule")
    with matplotlib.rc_context(CHART_STYLE):
        budget = schedule["num_visual"], schedule["keep"]
        curves = by_width(svg(curves_figure(runs)), svg(curves_figure(runs, columns=1)))
        retained = by_width(svg(retained_figure(runs, *budget)), svg(retained_figure(runs, *budget, columns=1)))
    every = [run for seeds in runs.values() for run in seeds]
    iterations = sorted({len(run["iteration"]) for run in every})
    seconds = statistics.fmean(float(run["seconds"].sum()) for run in every)
    length = f"{iterations[0]}" if len(iterations) == 1 else f"{iterations[0]} to {iterations[-1]}"
    return f"""<section id="curves"><h2>Training</h2>
<p>{len(every)} run{"s" if len(every) != 1 else ""} of {length} PPO iterations, {seconds:.0f} s of iterations each on
average. Every value is measured on the sampled rollouts of that iteration, on training questions that the full model
answers correctly, so accuracy here is relative to the full model and includes the noise of sampling masks.</p>
<figure>{curves}<figcaption>One line per run. Reward: r<sub>t</sub> = Q<sub>p</sub>/Q − α<sub>t</sub>
L<sub>t</sub>/L (Eq. 5), summed over the stages, mean over the rollout. Entropy: of the keep decision, at most ln 2 ≈
0.69. KL and clip fraction: means over the update's minibatches (KL by the k3 estimator).</figcaption></figure>
<figure>{retained}<figcaption>Visual tokens left of {schedule["num_visual"]} after each stage, mean over the rollout
(log axis). In training the actor samples how many it keeps; the dotted lines are the counts that the schedule imposes
at evaluation.</figcaption></figure>
</section>"""


# --- 4. gallery ----------------------------------------------------------------------------------------------------


def mark(answer: str, reference: str) -> str:
    right = bool(exact_match(answer, reference))
    return f'<span class="{"right" if right else "wrong"}">{escape(answer) or "(empty)"} {"✓" if right else "✗"}</span>'


def gallery_entry(
    image: Image.Image, sample: Sample, full_answer: str, pruned_answer: str, stages: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """What is stored of a picture: itself as PNG in base64, question, answers, and the tokens kept by each stage."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {
        "image": base64.b64encode(buffer.getvalue()).decode(),
        "question": sample.question,
        "reference": sample.answer,
        "full_answer": full_answer,
        "pruned_answer": pruned_answer,
        "stages": stages,
    }


def gallery_item(item: Source, num_visual: int) -> str:
    """Strip, question and answers of one test image."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(item["image"], validate=True)))
    except (binascii.Error, OSError) as error:
        raise ValueError(f"{item.name}: {item.path}.image is not a base64 PNG; {item.remedy}") from error
    names = ["image", *(f"stage {i + 1}" for i in range(len(item["stages"])))]
    tiles = ""
    for name, kept in zip(names, [list(range(num_visual)), *item["stages"]], strict=True):
        uri = png_uri(draw_stage(image, kept, math.isqrt(num_visual)))
        tiles += f'<div><img alt="{name}" src="{uri}">{name} · {len(kept)}</div>'
    reference = item["reference"]
    return f"""<div class="item"><div class="strip">{tiles}</div><dl>
<div><dt>{escape(item["kind"])}</dt><dd>{escape(item["question"])}</dd></div>
<div><dt>reference</dt><dd>{escape(reference)}</dd></div>
<div><dt>full</dt><dd>{mark(item["full_answer"], reference)}</dd></div>
<div><dt>pruned</dt><dd>{mark(item["pruned_answer"], reference)}</dd></div>
</dl></div>"""


def gallery_section(gallery: Source, num_visual: int) -> str:
    """Test images as in the paper's Figure 4."""
    items = gallery.children("items")
    right = {
        who: sum(int(exact_match(item[who], item["reference"])) for item in items)
        for who in ("full_answer", "pruned_answer")
    }
    return f"""<section id="gallery"><h2>What is kept</h2>
<p>Test images with the visual tokens that the TOP-RL agent keeps after each stage, as in the paper's Figure 4. Kept
16×16 patches are outlined and shown in full, dropped ones are faded; the number is the count of tokens left. On these
{len(items)} questions the full model is right {right["full_answer"]} times, the pruned one {right["pruned_answer"]}
times.</p>
<div class="gallery">{"".join(gallery_item(item, num_visual) for item in items)}</div>
</section>"""


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from results.json, gallery.json and <run>/metrics.jsonl; returns its path.

    Raises:
        FileNotFoundError: an input file is missing; the message says what to run.
        ValueError: an input lacks a key or is not JSON; the message names file and key.
    """
    folder = Path(folder)
    results, gallery = read(folder, "results.json"), read(folder, "gallery.json")
    gallery = Source({"items": gallery.data}, gallery.name, gallery.remedy)
    sections = (
        header_section(results),
        accuracy_section(results),
        methods_section(results),
        curves_section(folder, results),
        gallery_section(gallery, results.child("schedule")["num_visual"]),
    )
    style = Path(__file__).with_name("report.css").read_text()
    path = folder / "report.html"
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>TOP-RL on the embedded tiny LLaVA</title>\n<style>{style}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python training/report.py FOLDER (for example runs/demo)")
    cli.run(lambda arguments: print(f"report: {write_report(Path(arguments[0]))}"))
