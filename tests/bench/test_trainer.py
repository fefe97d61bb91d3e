"""The trainer's phases as the metrics of a run tell them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import trainer


def test_phases_of_a_run(monkeypatch):
    """Medians over the iterations, shares of all of them; time before the first iteration is setup."""
    rollouts, updates = [3.0, 1.0, 2.0], [1.0, 1.0, 1.0]
    clock = iter([10.0, 30.0])
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))

    def run(config):
        assert (config.iterations, config.train_size, config.device) == (3, 256, "cpu")
        rows = [
            {"seconds": 1.0 + a + b, "seconds_rollout": a, "seconds_update": b, "reward": 0.5}
            for a, b in zip(rollouts, updates, strict=True)
        ]
        (Path(config.output_dir) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(trainer, "main", run)
    setup, iteration, rollout, update = trainer.phases(3, 256, torch.device("cpu"))
    assert setup["part"] == "setup" and setup["seconds"] == pytest.approx(20 - 12)
    assert iteration["seconds"] == 4.0 and iteration["samples_per_second"] == 128 / 4.0
    assert (rollout["part"], rollout["seconds"], rollout["share"]) == ("rollout", 2.0, pytest.approx(6 / 9))
    assert (update["part"], update["seconds"], update["share"]) == ("update", 1.0, pytest.approx(3 / 9))
