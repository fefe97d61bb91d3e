"""The scripts as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "training/ppo.py",
        "training/evaluate.py",
        "training/demo.py",
        "training/pretrain_tiny.py",
        "training/curves.py",
        "bench/run.py",
    ],
)
def test_help_from_any_folder(script, tmp_path):
    assert "usage:" in run(str(ROOT / script), "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_demo_on_a_small_scale(tmp_path):
    flags = "--tasks ocr shape --seeds 1 --iterations 2 --size 16 --train_size 64".split()
    output = run(str(ROOT / "training/demo.py"), "--output_dir", str(tmp_path), *flags, cwd=tmp_path)
    assert "Report:" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["tasks"]) == {"ocr", "shape"}
    assert len(json.loads((tmp_path / "gallery.json").read_text())) == 12
    assert "<html" in (tmp_path / "report.html").read_text()
