"""What a task is: samples with something to look at, a question and references, and the metric Q of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from PIL import Image


class Sample(NamedTuple):
    """One question; ``key`` names it for caches and result files.

    Attributes:
        image: the image, the first of several, or the first frame of a video.
        question: as the data set has it; ``Task.text`` makes the model's input of it.
        answer: the reference to show, and the only one where ``answers`` is empty.
        images: all images where there are several.
        video: the sampled frames of a video; ``video_metadata`` says which frames of what they are.
        answers: all references (annotators, captions).
        choices: the options of a multiple-choice question; ``answer`` is then the letter.
        bbox: x1, y1, x2, y2 as shares of width and height.
        info: further columns that prompt or metric need, such as category and question id.
    """

    key: str
    image: Image.Image
    question: str
    answer: str
    images: tuple[Image.Image, ...] = ()
    video: tuple[Image.Image, ...] = ()
    video_metadata: Mapping[str, Any] | None = None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    bbox: tuple[float, float, float, float] | None = None
    info: Mapping[str, Any] = {}

    @property
    def all_images(self) -> tuple[Image.Image, ...]:
        return self.images or (self.image,)

    @property
    def references(self) -> tuple[str, ...]:
        return self.answers or (self.answer,)


class Task(Protocol):
    """What training and evaluation need of a task."""

    name: str
    max_new_tokens: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def text(self, sample: Sample) -> str:
        """What the model is asked: question, options, instruction."""
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """Q of one answer, in [0, 1]: the reward."""
        ...

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """The numbers of a results table; the first one is the headline."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that a reported number depends on: data set, split, subset, metric, options (for JSON files)."""
        ...
