"""The embedded data set: scenes composed from real third-party images, with six kinds of question.

A scene is a 2x2 grid of 64-pixel cells (128x128 pixels, so 64 patches of 16 pixels). One to three cells hold a shape
from *easy-vqa* (1 shape, 8 colours, 3 forms, free size and place in the cell), one other cell holds one handwritten
digit of scikit-learn's *digits* on exactly one patch (moved by up to a pixel, ink from 75 to 100 %), the rest are
background. Train and test scenes never share a source image: easy-vqa keeps its own split, and the digits are split
by index.

Question kinds, after the paper's two levels: ``ocr``, ``shape``, ``colour``, ``exist`` (perception) and ``count``,
``compare`` (reasoning). Every answer is one word of the tiny tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image

KINDS = ("ocr", "shape", "colour", "exist", "count", "compare")
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
SPLITS = ("train", "test")

CELL = 64
PATCH = 16
SCENE = 2 * CELL
PATCHES_PER_SIDE = SCENE // PATCH
NUM_PATCHES = PATCHES_PER_SIDE**2
# Digits of scikit-learn are in writer order, so a cut by index also keeps most writers apart.
DIGITS_TRAIN = 1500
# A patch belongs to a shape when at least this share of its pixels does.
SHAPE_COVER = 0.05


class Question(NamedTuple):
    """One question about one scene, with its one-word answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """One composed image and what is in it.

    Attributes:
        pixels: uint8 ``[128, 128, 3]``.
        shapes: per cell (top left, top right, bottom left, bottom right) the index into SHAPES, -1 for none.
        colours: per cell the index into COLOURS, -1 for none.
        digit: the digit's value, 0-9.
        digit_patch: raster index of the patch that holds it, 0-63.
        patch_cells: int ``[64]``, the cell whose shape covers the patch, -1 for background.
    """

    pixels: np.ndarray
    shapes: tuple[int, ...]
    colours: tuple[int, ...]
    digit: int
    digit_patch: int
    patch_cells: np.ndarray

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


class Sources(NamedTuple):
    """Source images of one split: shapes ``[n, 64, 64, 3]`` uint8 with labels, digits ``[m, 16, 16]`` in [0, 1]."""

    images: np.ndarray
    shapes: np.ndarray
    colours: np.ndarray
    cover: np.ndarray  # [n, 4, 4] bool: patch touches the shape
    backgrounds: np.ndarray  # [n, 3] uint8
    digits: np.ndarray
    digit_labels: np.ndarray


def _easy_vqa_labels(questions: list[list]) -> dict[int, tuple[int, int]]:
    """Shape and colour of each easy-vqa image, read from its questions and answers; images that leave one open go."""
    shape: dict[int, int] = {}
    colour: dict[int, int] = {}
    for text, answer, image_id in questions:
        words = text.rstrip("?").split()
        if answer in SHAPES:
            shape[image_id] = SHAPES.index(answer)
            for word in words:  # "what is the blue shape?" tells the colour as well
                if word in COLOURS:
                    colour[image_id] = COLOURS.index(word)
        elif answer in COLOURS:
            colour[image_id] = COLOURS.index(answer)
            for word in words:
                if word in SHAPES:
                    shape[image_id] = SHAPES.index(word)
        elif answer == ("no" if "not" in words or "no" in words else "yes"):  # "is no red shape present?"
            for word in words:
                if word in SHAPES:
                    shape[image_id] = SHAPES.index(word)
                if word in COLOURS:
                    colour[image_id] = COLOURS.index(word)
    return {i: (shape[i], colour[i]) for i in sorted(shape.keys() & colour.keys())}


@lru_cache(maxsize=2)
def load_sources(split: str) -> Sources:
    """Read the source images of ``split`` ("train" or "test") from the installed packages.

    Raises:
        ValueError: unknown split.
        ModuleNotFoundError: easy-vqa or scikit-learn is missing; the message names the extra that installs them.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {SPLITS}")
    try:
        import easy_vqa  # noqa: F401
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the embedded scenes need {error.name!r}: pip install -c constraints.txt -e '.[demo]'", name=error.name
        ) from error
    folder = resources.files("easy_vqa") / "data" / split
    labels = _easy_vqa_labels(json.loads((folder / "questions.json").read_text()))
    images = np.stack([_read_rgb(folder / "images" / f"{i}.png") for i in labels])
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    backgrounds = np.median(corners, axis=1).astype(np.uint8)  # a shape may cover one corner
    is_shape = (images != backgrounds[:, None, None]).any(-1)
    patches = is_shape.reshape(-1, 4, PATCH, 4, PATCH).mean((2, 4))
    data = load_digits()
    chosen = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    digits = np.stack([_upscale(x) for x in data.images[chosen]])
    return Sources(
        images=images,
        shapes=np.array([s for s, _ in labels.values()]),
        colours=np.array([c for _, c in labels.values()]),
        cover=patches >= SHAPE_COVER,
        backgrounds=backgrounds,
        digits=digits,
        digit_labels=data.target[chosen],
    )


def _read_rgb(path) -> np.ndarray:
    with path.open("rb") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def _upscale(digit: np.ndarray) -> np.ndarray:
    """An 8x8 digit with values 0-16 as ``[16, 16]`` ink in [0, 1]."""
    ink = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((PATCH, PATCH), Image.Resampling.BILINEAR)
    return np.asarray(ink, dtype=np.float32) / 255


def make_scene(rng: np.random.Generator, split: str) -> Scene:
    """Compose one random scene from the sources of ``split``."""
    sources = load_sources(split)
    pixels = np.empty((SCENE, SCENE, 3), np.uint8)
    patch_cells = np.full((PATCHES_PER_SIDE, PATCHES_PER_SIDE), -1)
    shapes, colours = [-1] * 4, [-1] * 4
    cells = rng.permutation(4)
    num_shapes = int(rng.integers(1, 4))
    digit_index = int(rng.integers(len(sources.digits)))
    digit_patch = -1
    for order, cell in enumerate(cells):
        y, x = divmod(int(cell), 2)
        area = pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
        source = int(rng.integers(len(sources.images)))
        if order < num_shapes:
            area[:] = sources.images[source]
            shapes[cell], colours[cell] = int(sources.shapes[source]), int(sources.colours[source])
            patch_cells[y * 4 : y * 4 + 4, x * 4 : x * 4 + 4][sources.cover[source]] = cell
        else:
            area[:] = sources.backgrounds[source]
        if order == num_shapes:  # the first cell without a shape takes the digit
            row, column = (int(v) for v in rng.integers(0, 4, 2))
            patch = area[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            top, left = (int(v) for v in rng.integers(0, 3, 2))
            ink = np.pad(sources.digits[digit_index], 1)[top : top + PATCH, left : left + PATCH] * rng.uniform(0.75, 1)
            patch[:] = (patch * (1 - ink[..., None])).astype(np.uint8)
            digit_patch = (y * 4 + row) * PATCHES_PER_SIDE + x * 4 + column
    return Scene(
        pixels=pixels,
        shapes=tuple(shapes),
        colours=tuple(colours),
        digit=int(sources.digit_labels[digit_index]),
        digit_patch=digit_patch,
        patch_cells=patch_cells.reshape(-1),
    )


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question:
    """One random question of ``kind`` about ``scene``; yes/no answers are balanced where the scene allows it."""
    present = [c for c in range(4) if scene.shapes[c] >= 0]
    if kind == "ocr":
        return Question(kind, "which digit is in the picture ?", str(scene.digit))
    if kind in ("shape", "colour"):
        cell = int(rng.choice(present))
        answers, attributes, names = (
            (scene.shapes, scene.colours, COLOURS) if kind == "shape" else (scene.colours, scene.shapes, SHAPES)
        )
        answer = SHAPES[answers[cell]] if kind == "shape" else COLOURS[answers[cell]]
        if rng.random() < 0.5 and attributes.count(attributes[cell]) == 1:  # by attribute, when it names one shape
            return Question(kind, f"what {kind} is the {names[attributes[cell]]} one ?", answer)
        return Question(kind, f"what {kind} is at the {POSITIONS[cell]} ?", answer)
    if kind == "exist":
        return _ask_exist(rng, scene, present)
    if kind == "count":
        if rng.random() < 0.4:
            return Question(kind, "how many shapes are there ?", str(len(present)))
        form = scene.shapes[int(rng.choice(present))] if rng.random() < 0.7 else int(rng.integers(3))
        return Question(kind, f"how many {SHAPES[form]}s are there ?", str(scene.shapes.count(form)))
    if kind == "compare":
        pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
        yes = [p for p in pairs if scene.shapes.count(p[0]) > scene.shapes.count(p[1])]
        no = [p for p in pairs if p not in yes]
        choices = yes if yes and rng.random() < 0.5 else no
        a, b = choices[int(rng.integers(len(choices)))]
        return Question(kind, f"are there more {SHAPES[a]}s than {SHAPES[b]}s ?", "yes" if (a, b) in yes else "no")
    raise ValueError(f"kind={kind!r} is not one of {KINDS}")


def _ask_exist(rng: np.random.Generator, scene: Scene, present: list[int]) -> Question:
    """Ask for a form, a colour or both; the negative form of "both" changes one of the two."""
    cell = int(rng.choice(present))
    form, colour = scene.shapes[cell], scene.colours[cell]
    pairs = list(zip(scene.shapes, scene.colours, strict=True))
    template, positive = int(rng.integers(3)), bool(rng.random() < 0.5)
    if not positive:
        if template == 0:
            form = int(rng.choice([f for f in range(3) if f not in scene.shapes] or [form]))
        elif template == 1:
            colour = int(rng.choice([c for c in range(8) if c not in scene.colours]))
        else:
            one_changed = [(f, colour) for f in range(3)] + [(form, c) for c in range(8)]
            near = [pair for pair in one_changed if pair not in pairs]
            form, colour = near[int(rng.integers(len(near)))]
    if template == 0:
        return Question("exist", f"is there a {SHAPES[form]} ?", "yes" if form in scene.shapes else "no")
    if template == 1:
        return Question("exist", f"is there a {COLOURS[colour]} one ?", "yes" if colour in scene.colours else "no")
    there = "yes" if (form, colour) in pairs else "no"
    return Question("exist", f"is there a {COLOURS[colour]} {SHAPES[form]} ?", there)


def vocabulary() -> list[str]:
    """Every word of every question and answer, in a fixed order."""
    words = "which digit is in the picture ? what shape colour at one there a how many shapes are more than".split()
    words += "top bottom left right yes no".split()
    words += [*SHAPES, *(f"{s}s" for s in SHAPES), *COLOURS, *(str(i) for i in range(10))]
    return list(dict.fromkeys(words))


class SceneSample(NamedTuple):
    """One (scene, question, answer) of the data set; ``number`` names it within its split and seed."""

    number: int
    scene: Scene
    kind: str
    question: str
    answer: str


class SceneDataset:
    """A fixed list of samples: sample ``i`` depends on (split, seed, i) alone, so any subset is reproducible.

    Args:
        kind: a question kind of KINDS, or "mixed" to cycle through all of them.
        split: "train" or "test" - which source images the scenes are made of.
        size: number of samples.
        seed: the seed of the scenes.

    Raises:
        ValueError: unknown kind or split, or a size below 1.
    """

    def __init__(self, kind: str, split: str, size: int, seed: int = 0) -> None:
        if kind != "mixed" and kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {(*KINDS, 'mixed')}")
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {SPLITS}")
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self.kind, self.split, self.size, self.seed = kind, split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> SceneSample:
        if not 0 <= index < self.size:
            raise IndexError(f"index={index} is outside 0..{self.size - 1}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        scene = make_scene(rng, self.split)
        question = ask(rng, scene, KINDS[index % len(KINDS)] if self.kind == "mixed" else self.kind)
        return SceneSample(index, scene, *question)
