"""The tables: text for known numbers, the paper's shape, what stands in a cell without a value."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from training.evaluation.tables import blocks, columns, console_tables, html_page, markdown, p_text, percent, span

COSTS = {"average_tokens": 192.0, "tflops": 1.234, "prefill_seconds": 0.0123, "decode_seconds": 0.2, "kv_bytes": 1.5e8}


def row(task: str, method: str, budget: str, score: float, **changes: Any) -> dict[str, Any]:
    full = {"gqa": 0.5, "pope": 0.8}[task]
    return {
        "task": task,
        "method": method,
        "budget": budget,
        "score": score,
        "score_deviation": None,
        "retention": score / full,
        "difference": score - full,
        "difference_interval": [-0.2, 0.01],
        "retention_interval": [0.75, 1.02],
        "test": "mcnemar",
        "p": 0.0123,
        **COSTS,
        **changes,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    facts = {"n": 100, "dataset": "data", "split": "test", "headline_is_mean_score": True, "num_visual": 576}
    plan = {"layers": [2, 8, 16], "keep": [322, 180, 101]}
    averages = [
        {
            "method": method,
            "label": label,
            "budget": budget,
            "retention": 0.9,
            "retention_interval": [0.8, 1.0],
            **COSTS,
        }
        for method, label, budget in (
            ("full", "Full model, no pruning", "full"),
            ("argmax", "TOP-RL, arg-max", "free"),
            ("fastv", "FastV", "192"),
            ("random", "Random | patches", "192"),
        )
    ]
    return {
        "settings": {
            "model": "<model>",
            "dtype": "float32",
            "attention": "sdpa",
            "batch_size": 8,
            "torch": "2",
            "transformers": "5",
            "keep": [],
        },
        "environment": {"device_name": "2 CPU cores"},
        "tasks": {
            "gqa": {**facts, "level": "reasoning", "headline": "accuracy"},
            "pope": {**facts, "level": "perception", "headline": "f1", "headline_is_mean_score": False},
        },
        "schedules": {name: {"192": {"fastv": plan, "random": {**plan, "layers": [0]}}} for name in ("gqa", "pope")},
        "averages": averages,
        "rows": [
            row("gqa", "full", "full", 0.5, p=1.0, difference=0.0),
            row("pope", "full", "full", 0.8, p=1.0, difference=0.0),
            row("gqa", "argmax", "free", 0.4),
            row("pope", "argmax", "free", 0.7),
            row("gqa", "fastv", "192", 0.45, p=1e-9, retention_interval=None),
            row("pope", "fastv", "192", 0.6, kv_bytes=None),
            row("gqa", "random", "192", 0.2, score_deviation=0.015),
            row("pope", "random", "192", 0.64),
        ],
    }


def test_markdown(results):
    lines = markdown(results).splitlines()
    assert lines[0] == (
        "| Method | pope (perception) | gqa (reasoning) | Avg | Avg tokens | TFLOPs | Prefill ms | Decode ms | KV MB |"
    )
    assert lines[2].startswith("| **Upper bound, 576 tokens (100 %)** |")
    assert lines[3] == (
        "| Full model, no pruning | 80.0 (100.0 %) | 50.0 (100.0 %) | 90.0 % | 192.00 | 1.23 | 12.3 | 200 | 150 |"
    )
    assert lines[4].startswith("| **Retain average 192 tokens (66.7 % fewer)** |")
    assert lines[5].startswith("| FastV | 60.0 (75.0 %) | **45.0 (90.0 %)** |")  # bold: best of the block
    assert lines[6].startswith("| Random \\| patches | **64.0 (80.0 %)** | 20.0 ± 1.5 (40.0 %) |")
    assert lines[7].startswith("| **As many tokens as the method wants** |")
    widths = {line.replace("\\|", "").count("|") for line in lines[:9]}
    assert widths == {10}


def test_markdown_of_the_paired_comparison(results):
    text = markdown(results)
    paired = text[text.index("Against the unpruned run:") :].splitlines()[4:]
    cost = "192.00 | 1.23 | 12.3 | 200"
    assert paired[0] == f"| 192 | FastV | gqa | -5.0 [-20.0, +1.0] | 90.0 – | < 0.001 (mcnemar) | {cost} | 150 |"
    assert (
        paired[1] == f"| 192 | FastV | pope | -20.0 [-20.0, +1.0] | 75.0 [75.0, 102.0] | 0.012 (mcnemar) | {cost} | – |"
    )
    assert paired[4] == f"| 192 | FastV | average |  | 90.0 [80.0, 100.0] |  | {cost} | 150 |"
    assert "| own choice | TOP-RL, arg-max | gqa |" in text
    assert "headline of pope is not the mean" in text
    assert "pope: f1, n = 100 of data, test" in text
    assert "Pruning before layers: FastV: 2, 8, 16; Random | patches: 0." in text


def test_one_task_has_no_average_rows(results):
    results["tasks"].pop("pope")
    results["rows"] = [one for one in results["rows"] if one["task"] == "gqa"]
    text = markdown(results)
    assert "| average |" not in text and "headline of" not in text


def test_keep_says_the_tokens_of_each_stage(results):
    results["settings"]["keep"] = [322, 180, 101]
    for one in (*results["averages"], *results["rows"]):
        one["budget"] = one["budget"].replace("192", "322/180/101")
    for plans in results["schedules"].values():
        plans["322/180/101"] = plans.pop("192")
    assert "**Keep 322/180/101 tokens (66.7 % fewer)**" in markdown(results)


class Reader(HTMLParser):
    """Cells and colspans by row; unclosed elements."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append(0)
        elif tag in ("th", "td"):
            self.rows[-1] += int(dict(attrs).get("colspan") or 1)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html(results):
    text = html_page(results)
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert set(reader.rows) == {9, 11}  # every row of a table is as wide as its head
    assert '<th colspan="1">Perception</th><th colspan="1">Reasoning</th>' in text
    assert "&lt;model&gt;" in text and "<model>" not in text
    assert "<b>45.0 (90.0 %)</b>" in text and "<b>60.0" not in text
    assert "src=" not in text and "http" not in text  # needs no network


def test_console(results):
    out = io.StringIO()
    Console(file=out, width=120).print(*console_tables(results))
    text = out.getvalue()
    assert "Retain average 192 tokens" in text and "45.0 (90.0 %)" in text
    results["tasks"].pop("pope")
    out = io.StringIO()
    Console(file=out, width=80).print(*console_tables(results))
    lines = out.getvalue().splitlines()
    assert any(line.strip().startswith("fastv") and "150" in line and "45.0 (90.0 %)" in line for line in lines)


def test_order(results):
    assert columns(results) == ["pope", "gqa"]
    assert blocks(results) == ["full", "192", "free"]


def test_texts():
    assert percent(None) == "–" and percent(0.1234) == "12.3"
    assert span(None) == "–" and span([-0.01, 0.02], signed=True) == "[-1.0, +2.0]"
    assert p_text(0.00099) == "< 0.001" and p_text(0.001) == "0.001"
