"""What the trainer trains on: samples of a task and the unpruned model's quality on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.tasks import Sample, Task, answer, device_of, encode
from training.trainer.features import FeatureCache, collate, takes_features
from training.trainer.prefix import skipping
from training.trainer.quality_cache import column_path, identity_of, measure_once
from training.trainer.ranks import Ranks

FEATURE_CACHE_MB = 1024  # the default of --feature_cache_mb
ONE_PROCESS = Ranks()

Column = Callable[[list[Sample], dict[str, Any]], Tensor]  # a batch and its inputs -> float32 [B]


@dataclass
class TrainingData:
    """What episodes are made of: samples of a task, and ``quality`` Q of the unpruned model on each, float32 [n]."""

    task: Task
    samples: list[Sample]
    quality: Tensor
    features: FeatureCache = field(default_factory=lambda: FeatureCache(FEATURE_CACHE_MB))

    def inputs(self, model: Any, processor: Any, rows: Sequence[int]) -> dict[str, Any]:
        """What the model is called with for the samples of these numbers, on its device.

        With features where the model takes them (``mm_encoder_outputs``; transformers 5.23 and later), else with
        pixels; both are the same numbers up to rounding.
        """
        if not (self.features.enabled and takes_features(model)):
            return encode(processor, self.task, [self.samples[row] for row in rows], device_of(model))
        encoded = [self.features.encoded(model, processor, self.task, self.samples[row]) for row in rows]
        return collate(encoded, pad_token_of(processor), device_of(model))

    def skipping(self, model: Any, processor: Any, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Within, a prefill of the batch of these samples takes the layers before the first stage from the cache."""
        if not self.features.depth:
            return nullcontext()
        encoded = [self.features.encoded(model, processor, self.task, self.samples[row]) for row in rows]
        return skipping(model, [one.prefix for one in encoded if one.prefix])


def pad_token_of(processor: Any) -> int:
    """The id that stands before shorter prompts.

    Raises:
        ValueError: the tokenizer has none.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no pad token; set processor.tokenizer.pad_token")
    return tokenizer.pad_token_id


def unpruned_quality(
    model: Any,
    processor: Any,
    data: TrainingData,
    batch_size: int,
    cache_dir: Path | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> Tensor:
    """Q of the unpruned model for each sample, float32 ``[n]`` (Eq. 1's denominator, computed once)."""

    def quality(samples: list[Sample], inputs: dict[str, Any]) -> Tensor:
        return answer(model, processor, data.task, samples, inputs)[1]

    return measured(model, processor, data, batch_size, "quality", quality, cache_dir, ranks)


def measured(
    model: Any,
    processor: Any,
    data: TrainingData,
    batch_size: int,
    column: str,
    measure: Column,
    cache_dir: Path | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> Tensor:
    """One number per sample that depends on the unpruned model alone, float32 ``[n]``; measured once.

    Args:
        column: what it is, the first part of the file's name in ``cache_dir``.
        cache_dir: where numbers are kept; None keeps nothing.
        ranks: the processes that share the work.

    Raises:
        ValueError: a file in ``cache_dir`` is corrupt.
    """

    def batch(rows: list[int]) -> Tensor:
        with torch.no_grad():
            found = measure([data.samples[row] for row in rows], data.inputs(model, processor, rows))
        return found.float().cpu()

    identity: dict[str, Any] = {}
    path = None
    if cache_dir is not None:
        identity = identity_of(model, processor, data.task, data.samples, batch_size, column)
        identity["generation"]["features"] = data.features.enabled and takes_features(model)
        path = column_path(cache_dir, column, identity)
    return measure_once(column, path, identity, len(data.samples), batch_size, batch, ranks, device_of(model))


def training_data(
    model: Any,
    processor: Any,
    task: Task,
    batch_size: int,
    cache_dir: str | Path | None = None,
    features: FeatureCache | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> TrainingData:
    """All samples of ``task``, answered once by the unpruned model.

    Args:
        batch_size: samples that the model answers at once.
        cache_dir: where the answers' quality is kept, for this run and others; None keeps nothing.
        features: where encoded images are kept, shared with other data of the same model; a new one by default.
        ranks: the processes that share the work.

    Raises:
        ValueError: a file in ``cache_dir`` is corrupt.
    """
    samples = [task[i] for i in range(len(task))]
    features = FeatureCache(FEATURE_CACHE_MB) if features is None else features
    features.plan(model, processor, task, samples)
    data = TrainingData(task, samples, torch.zeros(len(samples)), features)
    folder = None if cache_dir is None else Path(cache_dir)
    data.quality = unpruned_quality(model, processor, data, batch_size, folder, ranks)
    return data
