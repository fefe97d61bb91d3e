"""What a training would take (--dry_run), told by a small one."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training.survey import duration, peak_memory, survey
from training.trainer.config import PPOConfig
from training.trainer.validation import tasks_of


def dry_run(config: PPOConfig, make_trainer: Callable[[PPOConfig], Any]) -> None:
    """Read every sample, do two iterations on as many samples as one needs, and print what the run would take.

    Raises:
        ValueError: what the run would raise at its beginning.
    """
    tasks = {
        name: one for name, one in zip(("training", "validation"), tasks_of(config), strict=True) if one is not None
    }
    for task in tasks.values():
        for index in range(len(task)):
            task[index]  # raises where it is unreadable
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        trial = replace(
            config,
            dry_run=False,
            resume="never",
            output_dir=folder,
            cache_dir="",
            report_to="none",
            iterations=2,
            eval_every=0,
            train_size=min(config.train_size, config.rollout_size),
        )
        trainer = make_trainer(trial)
        trainer.train()
        seconds = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    for name, task in tasks.items():
        print(f"{name}: {survey(trainer.model, trainer.processor, task)}")
    measuring = seconds * config.train_size / config.rollout_size  # an unpruned answer takes no longer than an episode
    print(
        f"about {duration(config.iterations * seconds + measuring)}, validations apart: {config.iterations} iterations "
        f"of {seconds:.2f} seconds, and at most {duration(measuring)} for the unpruned answers before them; "
        f"peak memory {peak_memory()}"
    )
