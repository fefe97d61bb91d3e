"""The programs of examples/ are short and run; the notebook's cells run in their order."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "prune": "before layer 1: ",
    "compare_methods": "divprune+fastv ",
    "own_method": "kept at last: [27, 28, 35, 36]",
    "kernels": "kept: (2, 10, 512) cache: (2, 8, 10, 64)",
    "one_image_many_questions": "is there a red one ? yes",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert EXAMPLES[name] in capsys.readouterr().out
    assert len(path.read_text().splitlines()) <= 40


def test_all_examples_are_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


def test_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT / "examples")
    cells = json.loads(Path("tour.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # stored without results, which would grow stale
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "[32, 16, 4]" in capsys.readouterr().out
