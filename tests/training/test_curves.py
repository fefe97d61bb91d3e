"""The scripts that compare settings of the trainer: end to end on a small scale, and again without training."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from training import conditioning, curves

SMALL = {"seeds": [0], "iterations": 1, "train_size": 24, "workers": 0}


def folders(tmp_path):
    return {"output_dir": str(tmp_path / "docs"), "work_dir": str(tmp_path / "work")}


@pytest.mark.slow
def test_curves(tmp_path, monkeypatch, capsys):
    config = curves.CurvesConfig(**SMALL, **folders(tmp_path), eval_every=1, eval_size=8)
    curves.make(config)
    result = json.loads((tmp_path / "docs/curves.json").read_text())
    assert set(result["curves"]) == set(curves.SETTINGS)
    for name, (curve,) in result["curves"].items():
        assert [row["iteration"] for row in curve] == [0, 1], name
    # all settings begin with the same actor
    assert all(curve[0] == result["untrained"][0] for (curve,) in result["curves"].values())
    assert result["keep_all_reward"] == pytest.approx(3 - (0.95**2 + 0.95 + 1))
    with Image.open(tmp_path / "docs/curves.png") as figure:
        assert figure.width > 1000
    first = capsys.readouterr().out
    assert first.count("\n|") >= len(curves.SETTINGS) + 2
    monkeypatch.delattr(curves, "main")  # nothing is trained twice
    curves.make(config)
    assert capsys.readouterr().out == first[first.index("| ") :]


@pytest.mark.slow
def test_conditioning(tmp_path):
    config = conditioning.ConditioningConfig(**SMALL, **folders(tmp_path), task=["shape"], test_size=8)
    conditioning.make(config)
    assert (tmp_path / "docs/results/conditioning.json").is_file()
    with Image.open(tmp_path / "docs/conditioning.png") as figure:
        assert figure.width > 500
    folders_of = sorted((tmp_path / "work/trainings").iterdir())
    found = {json.loads((folder / "config.json").read_text())["condition_on"] for folder in folders_of}
    saved = {json.loads((folder / "policy/config.json").read_text())["condition_on"] for folder in folders_of}
    assert found == saved == {"none", "text"}
