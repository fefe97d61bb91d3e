"""What the trainer trains on: samples of a task and the unpruned model's quality on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.tasks import Sample, Task, answer, encode


def unpruned_quality(model: Any, processor: Any, task: Any, samples: list[Sample], batch_size: int) -> Tensor:
    """Q of the unpruned model for each sample, float32 ``[n]`` (Eq. 1's denominator, computed once)."""
    parts = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        parts.append(answer(model, processor, task, batch, encode(processor, task, batch, model.device))[1])
    return torch.cat(parts)


class TrainingData(NamedTuple):
    """What episodes are made of: samples of a task, and ``quality`` Q of the unpruned model on each, float32 [n]."""

    task: Task
    samples: list[Sample]
    quality: Tensor

    def inputs(self, model: Any, processor: Any, rows: Sequence[int]) -> dict[str, Any]:
        """What the model is called with for the samples of these numbers."""
        return encode(processor, self.task, [self.samples[row] for row in rows], model.device)


def training_data(model: Any, processor: Any, task: Task, batch_size: int) -> TrainingData:
    """All samples of ``task``, answered once by the unpruned model."""
    samples = [task[i] for i in range(len(task))]
    return TrainingData(task, samples, unpruned_quality(model, processor, task, samples, batch_size))
