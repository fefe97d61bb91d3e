"""Synthetic clips for the video analysis: a scene that is shown in one frame only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from training.scenes import CELL, SPLITS, Scene
from training.tasks import Sample, SceneTask

PREFIX = "clip-"
FRAMES = 4


def empty_frame(scene: Scene) -> Image.Image:
    """The scene's four backgrounds with nothing on them."""
    pixels = np.empty_like(scene.pixels)
    for cell in range(4):
        y, x = (CELL * place for place in divmod(cell, 2))
        area = scene.pixels[y : y + CELL, x : x + CELL]
        # a shape may cover one corner
        pixels[y : y + CELL, x : x + CELL] = np.median(area[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    return Image.fromarray(pixels)


@dataclass
class ClipTask(SceneTask):
    """Questions about clips of FRAMES frames: a scene is shown in one of them, at random; the others are empty.

    The model gets the frames as images of one prompt. The embedded model never saw more than one image in training.
    Arguments are those of ``SceneTask``; the task's name is PREFIX and the kind.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = PREFIX + self.kind

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        shown = int(np.random.default_rng([7, self.seed, SPLITS.index(self.split), index]).integers(FRAMES))
        empty = empty_frame(sample.scene)
        frames = tuple(sample.scene.image if frame == shown else empty for frame in range(FRAMES))
        key = f"{self.name}/{self.split}/{self.seed}/{index}"
        return Sample(key, frames[0], sample.question, sample.answer, images=frames, info={"shown": shown})

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "dataset": "embedded scenes as clips"}
