"""What a run would do, told before it is done (--dry_run): rows, visual tokens, seconds and gigabytes."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from toprl_models.families import count_visual
from training.tasks import Task, device_of, encode

LOOKED_AT = 64  # samples that are encoded, evenly spread


@dataclass(frozen=True)
class Survey:
    """Samples of a task, and the visual tokens of those that were looked at."""

    rows: int
    tokens: Sequence[int]

    def __str__(self) -> str:
        low, middle, high = np.percentile(self.tokens, (5, 50, 95))
        return (
            f"{self.rows} samples; visual tokens per sample: p5 {low:.0f}, p50 {middle:.0f}, p95 {high:.0f} "
            f"(of {len(self.tokens)} samples, evenly spread)"
        )


def survey(model: Any, processor: Any, task: Task) -> Survey:
    """Encode up to ``LOOKED_AT`` samples of ``task`` and count their visual tokens."""
    rows = np.linspace(0, len(task) - 1, min(LOOKED_AT, len(task))).round().astype(int).tolist()
    inputs = (encode(processor, task, [task[row]], device_of(model)) for row in rows)
    return Survey(len(task), [count_visual(model, one)[0] for one in inputs])


def duration(seconds: float) -> str:
    """Write seconds in the unit that people would choose."""
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"


def peak_memory() -> str:
    """Tell the most memory that this process has used so far, of the device where there is one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on {torch.cuda.get_device_name()}"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB of host memory"
