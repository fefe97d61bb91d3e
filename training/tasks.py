"""Tasks: samples with image, question and answer, and the per-sample metric Q in [0, 1] that becomes the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from PIL import Image

from toprl_models import tiny
from training.scenes import KINDS, SceneDataset


class Sample(NamedTuple):
    """One question about one image; ``key`` names it for caches and result files."""

    key: str
    image: Image.Image
    question: str
    answer: str


class Task(Protocol):
    """What training and evaluation need of a task."""

    name: str
    max_new_tokens: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def prompt(self, question: str) -> str: ...

    def score(self, prediction: str, sample: Sample) -> float: ...


def exact_match(prediction: str, answer: str) -> float:
    """1.0 when the two are equal up to case, surrounding space and a final full stop."""
    return float(prediction.strip().rstrip(".").lower() == answer.strip().lower())


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

    def prompt(self, question: str) -> str:
        return tiny.prompt(question)

    def score(self, prediction: str, sample: Sample) -> float:
        return exact_match(prediction, sample.answer)


def make_task(name: str, split: str, size: int, seed: int = 0) -> SceneTask:
    """The task called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in (*KINDS, "mixed"):
        raise ValueError(f"task={name!r} is unknown; known tasks: {', '.join((*KINDS, 'mixed'))}")
    return SceneTask(name, split, size, seed)


def load_model(name_or_path: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Frozen model and processor: "tiny" for the embedded one, else a Hub id or a local folder."""
    transformers.utils.logging.disable_progress_bar()  # it would tear the training bar apart
    if name_or_path == "tiny":
        return tiny.load(device=device, dtype=dtype)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype)
    model.requires_grad_(False)
    return model.to(device).eval(), AutoProcessor.from_pretrained(name_or_path, padding_side="left")


def encode(
    processor: Any, task: Task, samples: Sequence[Sample], device: str | torch.device
) -> dict[str, torch.Tensor]:
    """The left-padded model inputs of a batch of samples."""
    inputs = processor(
        images=[s.image for s in samples],
        text=[task.prompt(s.question) for s in samples],
        padding=True,
        return_tensors="pt",
    )
    return dict(inputs.to(device))


@torch.no_grad()
def answer(
    model: Any, processor: Any, task: Task, samples: Sequence[Sample], inputs: dict[str, torch.Tensor]
) -> tuple[list[str], torch.Tensor]:
    """Greedy answers of the model as it is now (attached or not), and their metric, float32 ``[B]`` on the CPU."""
    output = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
    text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [task.score(prediction, sample) for prediction, sample in zip(text, samples, strict=True)]
    return [t.strip() for t in text], torch.tensor(scores)
