"""The embedded scenes as tasks: no download, exact answers, train and test split from different source images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.metrics import exact_match
from training.scenes import SceneDataset
from training.tasks.base import Sample


@dataclass
class SceneTask:
    """A question kind of the embedded scenes.

    Args:
        kind: ocr, shape, colour, exist, count, compare or mixed.
        split: "train", "validation" (training sources, other scenes) or "test" (unseen source images).
        size: number of samples.
        seed: seed of the scenes.
    """

    kind: str
    split: str
    size: int
    seed: int = 0
    max_new_tokens: int = 2  # the answer and the end token

    def __post_init__(self) -> None:
        if self.split not in ("train", "validation", "test"):
            raise ValueError(f"split={self.split!r} must be train, validation or test")
        self.name = self.kind
        source = "train" if self.split == "validation" else self.split
        offset = 1_000_000 if self.split == "validation" else 0
        self._data = SceneDataset(self.kind, source, self.size, self.seed + offset)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        return Sample(
            f"{self.kind}/{self.split}/{self.seed}/{index}", sample.scene.image, sample.question, sample.answer
        )

    def text(self, sample: Sample) -> str:
        return sample.question

    def score(self, prediction: str, sample: Sample) -> float:
        return exact_match(prediction, sample.answer)

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        scores = [self.score(p, s) for p, s in zip(predictions, samples, strict=True)]
        return {"accuracy": sum(scores) / len(scores)}

    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "dataset": "embedded scenes",
            "split": self.split,
            "samples": self.size,
            "seed": self.seed,
            "metric": "exact_match",
        }
