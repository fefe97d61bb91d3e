"""What the trainer trains on: samples of a task and the unpruned model's quality on each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.fingerprint import model_facts, processor_digest, samples_digest, versions
from training.tasks import Sample, Task, answer, device_of, encode
from training.trainer.features import FeatureCache, collate, takes_features
from training.trainer.prefix import skipping
from training.trainer.quality_cache import column_path, measure_once
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

    @cached_property
    def content(self) -> str:
        """Digest of everything that is shown, asked and compared with."""
        return samples_digest(self.task, self.samples)

    def measure_quality(
        self,
        model: Any,
        processor: Any,
        batch_size: int,
        cache_dir: str | Path | None = None,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        """Answer all samples once with the unpruned model; arguments as of ``training_data``."""
        self.features.plan(model, processor, self.task, self.samples)
        folder = None if cache_dir is None else Path(cache_dir)
        self.quality = unpruned_quality(model, processor, self, batch_size, folder, ranks)

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


def unanswered(task: Task, features: FeatureCache) -> TrainingData:
    """Read all samples of ``task``; nothing is measured yet.

    Raises:
        ValueError: a sample is unreadable; the message names file and row.
    """
    samples = [task[i] for i in range(len(task))]
    return TrainingData(task, samples, torch.zeros(len(samples)), features)


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
        identity = identity_of(model, processor, data, batch_size, column)
        path = column_path(cache_dir, column, identity)
    return measure_once(column, path, identity, len(data.samples), batch_size, batch, ranks, device_of(model))


def identity_of(model: Any, processor: Any, data: TrainingData, batch_size: int, column: str) -> dict[str, Any]:
    """Everything that the unpruned model's answers to the samples depend on, as JSON data.

    ``batch_size`` is a part of it: other batch mates are another rounding, and runs that are to be bitwise equal must
    not depend on who filled the cache.
    """
    identity = {
        "column": column,
        "model": model_facts(model),
        "data": {**data.task.describe(), "content": data.content},
        "processor": processor_digest(processor, data.task, data.samples[0]),
        "generation": {
            "max_new_tokens": data.task.max_new_tokens,
            "config": model.generation_config.to_diff_dict(),
            "batch_size": batch_size,
            "features": data.features.enabled and takes_features(model),
        },
        "versions": versions(),
    }
    return json.loads(json.dumps(identity, default=str))  # as it comes back from a file


def training_data(
    model: Any,
    processor: Any,
    task: Task,
    batch_size: int,
    cache_dir: str | Path | None = None,
    features: FeatureCache | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> TrainingData:
    """Read all samples of ``task`` and answer them once with the unpruned model.

    Args:
        batch_size: samples that the model answers at once.
        cache_dir: where the answers' quality is kept, for this run and others; None keeps nothing.
        features: where encoded images are kept, shared with other data of the same model; a new one by default.
        ranks: the processes that share the work.

    Raises:
        ValueError: a file in ``cache_dir`` is corrupt.
    """
    data = unanswered(task, FeatureCache(FEATURE_CACHE_MB) if features is None else features)
    data.measure_quality(model, processor, batch_size, cache_dir, ranks)
    return data
