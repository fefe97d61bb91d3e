"""A task whose samples are rows of a table: what the benchmarks and data sets of one's own have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.tasks.base import Sample
from training.tasks.loading import Source, Table
from training.tasks.scoring import Metric
from training.tasks.video import VideoFolder, read_frames

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def letters(choices: Sequence[str]) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(choices))]


def question_and_options(sample: Sample) -> str:
    """The question, then one line for each option: "A. text"."""
    options = (f"{letter}. {text}" for letter, text in zip(letters(sample.choices), sample.choices, strict=True))
    return "\n".join([sample.question, *options])


@dataclass(frozen=True)
class Spec:
    """What is to be known of a data set.

    Attributes:
        level: perception, reasoning, both, video or any.
        splits: the names that ``make_task`` takes and what they stand for; "test" is always the split to report.
        columns: what a row must have; ``nullable`` of them may be empty.
        fields: the columns as fields of a Sample; raises (column, problem) as ``BadCell``.
        text: what the model is asked.
        metrics: names, the default first.
        trap: what makes numbers incomparable.
        image: the column with the image; None where ``video`` names the column with the video's name or path.
        several: the column whose values are questions of their own.
        group: the columns whose rows belong together when a subset is drawn.
        join: the column with the id of an image in another table (columns id and image).
        pairs: local files test_q.json and test_a.json instead of a data set of the Hub.
        pixel_boxes: boxes are x, y, width, height in pixels instead of corners as shares of width and height.
    """

    name: str
    level: str
    splits: Mapping[str, Source]
    columns: tuple[str, ...]
    fields: Callable[[dict[str, Any]], dict[str, Any]]
    text: Callable[[Sample], str]
    metrics: tuple[str, ...]
    max_new_tokens: int = 16
    trap: str = ""
    nullable: tuple[str, ...] = ()
    image: str | None = "image"
    video: str | None = None
    several: str | None = None
    group: tuple[str, ...] = ()
    join: str | None = None
    pairs: bool = False
    pixel_boxes: bool = False


class BadCell(Exception):
    """A cell that does not hold what its column is for."""

    def __init__(self, column: str, problem: str, fix: str = "repair or drop the row") -> None:
        super().__init__(column, problem, fix)
        self.column, self.problem, self.fix = column, problem, fix


class TableTask:
    """Samples from a table, drawn deterministically.

    Args:
        spec: the data set.
        split: the name it was asked for by.
        table: its rows.
        size: at most this many samples: all, or a random subset in the table's order.
        seed: of the subset.
        metric: scores and corpus numbers.
        images: with ``spec.join``, the table of images.
        videos: where ``spec.video`` is looked up.
        num_frames: frames per video.
        options: further facts for ``describe``.
    """

    def __init__(
        self,
        spec: Spec,
        split: str,
        table: Table,
        size: int,
        seed: int,
        make_metric: Callable[[Callable[[], list[Sequence[str]]]], Metric],
        images: Table | None = None,
        videos: VideoFolder | None = None,
        num_frames: int = 8,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self.spec, self.table, self.seed, self.num_frames = spec, table, seed, num_frames
        self.name, self.max_new_tokens = spec.name, spec.max_new_tokens
        self.source, self.split = spec.splits[split], spec.splits[split].split
        self.images, self.videos, self.options = images, videos, dict(options or {})
        self._image_rows = self._ids(images) if images else {}
        self._items = self._draw(size)
        self.metric = make_metric(self._references)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} is outside 0..{len(self) - 1}")
        number, part = self._items[index]
        row = self.table.row(number, self.spec.nullable)
        fields = self._fields(number, part, row)
        key = f"{self.name}/{self.split}/{number}" + (f".{part}" if self.spec.several else "")
        sample = Sample(key=key, **self._look(number, row), **fields)
        if sample.bbox is not None:
            sample = sample._replace(bbox=self._box(number, sample))
        return sample

    def text(self, sample: Sample) -> str:
        return self.spec.text(sample)

    def score(self, prediction: str, sample: Sample) -> float:
        return self.metric.score(prediction, sample)

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        return self.metric.corpus(predictions, samples)

    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "dataset": self.table.where,
            "split": self.split,
            "samples": len(self),
            "rows": len(self.table),
            "seed": self.seed,
            "metric": self.metric.name,
            **({"num_frames": self.num_frames} if self.spec.video else {}),
            **self.options,
        }

    def _ids(self, images: Table) -> dict[str, int]:
        rows: dict[str, int] = {}
        for number, name in enumerate(images.column("id")):
            if rows.setdefault(str(name), number) != number:
                raise images.error(number, "id", f"repeats {name!r}", "image ids must be unique to be joined by")
        return rows

    def _draw(self, size: int) -> list[tuple[int, int]]:
        """(row, part) of each sample; whole groups where rows belong together."""
        items = [(row, 0) for row in range(len(self.table))]
        if self.spec.several:
            values = self.table.column(self.spec.several)
            for row, value in enumerate(values):
                if not value:
                    raise self.table.error(row, self.spec.several, "is empty", "fill it in or drop the row")
            items = [(row, part) for row, value in enumerate(values) for part in range(len(value))]
        if size >= len(items):
            return items
        groups: dict[Any, list[tuple[int, int]]] = {}
        names = list(zip(*(self.table.column(name) for name in self.spec.group), strict=True)) or items
        for name, item in zip(names, items, strict=True):
            groups.setdefault(name, []).append(item)
        chosen: list[tuple[int, int]] = []
        members = list(groups.values())
        for i in np.random.default_rng(self.seed).permutation(len(members)).tolist():
            if len(chosen) + len(members[i]) <= size or not chosen:
                chosen += members[i]
        return sorted(chosen)

    def _fields(self, number: int, part: int, row: dict[str, Any]) -> dict[str, Any]:
        if self.spec.several:
            row = {**row, self.spec.several: row[self.spec.several][part]}
        try:
            fields = self.spec.fields(row)
            if "question" in self.spec.columns and not fields["question"].strip():
                raise BadCell("question", "is blank")
            references = fields.get("answers") or (fields["answer"],)
            if "bbox" not in fields and not any(text.strip() for text in references):
                raise BadCell("answers" if fields.get("answers") else "answer", "is blank")
            return fields
        except BadCell as error:
            raise self.table.error(number, error.column, error.problem, error.fix) from error

    def _look(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """The fields of a Sample that show something."""
        if self.spec.video:
            assert self.videos is not None
            name = str(row[self.spec.video])
            try:
                path = self.videos.find((name, f"v_{name}"))  # ActivityNet's files have that prefix
                frames, metadata = read_frames(path, self.num_frames)
            except ValueError as error:
                fix = "point video_dir at the folder with the videos, or repair the file"
                raise self.table.error(number, self.spec.video, str(error), fix) from error
            return {"image": frames[0], "video": frames, "video_metadata": metadata}
        if self.spec.join:
            assert self.images is not None
            name = str(row[self.spec.join])
            if name not in self._image_rows:
                problem = f"{name!r} is no id of {self.images.where}"
                raise self.table.error(number, self.spec.join, problem, "both tables must be of the same split")
            there = self._image_rows[name]
            return {"image": self.images.image(there, "image", self.images.row(there)["image"])}
        assert self.spec.image is not None
        value = row[self.spec.image]
        if not isinstance(value, list):
            return {"image": self.table.image(number, self.spec.image, value)}
        if not value:
            raise self.table.error(number, self.spec.image, "has no image", "every sample needs one")
        images = tuple(self.table.image(number, self.spec.image, one) for one in value)
        return {"image": images[0], "images": images}

    def _box(self, number: int, sample: Sample) -> tuple[float, float, float, float]:
        """The corners as shares of width and height."""
        assert sample.bbox is not None
        x1, y1, x2, y2 = sample.bbox
        if self.spec.pixel_boxes:
            width, height = sample.image.size
            x1, y1, x2, y2 = x1 / width, y1 / height, (x1 + x2) / width, (y1 + y2) / height
        # annotators' boxes may stick out by a pixel
        if not (-0.01 <= x1 < x2 <= 1.01 and -0.01 <= y1 < y2 <= 1.01):
            problem = f"{list(sample.bbox)} is no box inside the image"
            raise self.table.error(number, "bbox", problem, "repair or drop the row")
        return x1, y1, x2, y2

    def _references(self) -> list[Sequence[str]]:
        """The references of every sample, without reading an image."""
        shown = {self.spec.image, self.spec.video}
        rows = self.table.data.select_columns([c for c in self.table.data.column_names if c not in shown])
        fields = (self._fields(number, part, rows[number]) for number, part in self._items)
        return [one.get("answers") or (one["answer"],) for one in fields]
