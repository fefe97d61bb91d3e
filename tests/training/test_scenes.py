"""The embedded scenes: reproducible, labelled right, split by source image."""

from __future__ import annotations

import numpy as np
import pytest

from training.scenes import COLOURS, KINDS, SHAPES, SceneDataset, ask, load_sources, make_scene, vocabulary

RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.mark.parametrize("split", ["train", "test"])
def test_colour_labels_are_the_pixels(split):
    """easy-vqa has no label file; its questions, negated ones included, must be read right."""
    sources = load_sources(split)
    for image, colour in zip(sources.images, sources.colours, strict=True):
        assert (image == np.array(RGB[COLOURS[colour]], np.uint8)).all(-1).sum() > 10


def test_shape_labels_fit_the_silhouettes():
    """A rectangle fills its box, a triangle is wider at the bottom, a circle is neither."""
    sources = load_sources("train")
    for image, shape, background in zip(sources.images[:500], sources.shapes, sources.backgrounds, strict=False):
        mask = (image != background).any(-1)
        rows, columns = np.nonzero(mask)
        # shapes at the border are cut off, so only whole ones can be told by their outline
        if min(rows.min(), columns.min()) == 0 or max(rows.max(), columns.max()) == 63:
            continue
        full = len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        wider = mask[rows.max()].sum() > 2 * mask[rows.min()].sum()
        assert SHAPES[shape] == ("rectangle" if full else "triangle" if wider else "circle")


def test_splits_share_no_source_image():
    train, test = load_sources("train"), load_sources("test")
    assert len(train.digits) + len(test.digits) == 1797
    seen = {image.tobytes() for image in train.images}
    shared = sum(image.tobytes() in seen for image in test.images)
    assert shared == 0


def test_a_scene_holds_what_it_says():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = make_scene(rng, "test")
        assert 1 <= sum(s >= 0 for s in scene.shapes) <= 3
        assert [s >= 0 for s in scene.shapes] == [c >= 0 for c in scene.colours]
        row, column = divmod(scene.digit_patch, 8)
        cell = (row // 4) * 2 + column // 4
        assert scene.shapes[cell] == -1
        patch = scene.pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        assert patch.min() < 128 < patch.max()
        for cell, colour in enumerate(scene.colours):
            assert (colour >= 0) == (scene.patch_cells == cell).any()


def test_answers_are_true():
    """Answers recomputed from the question's words alone."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = make_scene(rng, "train")
        things = {(SHAPES[s], COLOURS[c]) for s, c in zip(scene.shapes, scene.colours, strict=True) if s >= 0}
        shapes = [SHAPES[s] for s in scene.shapes if s >= 0]
        words = ask(rng, scene, "exist").question.split()
        question = ask(rng, scene, "exist")
        words = question.question.split()
        wanted_shape = next((w for w in words if w in SHAPES), None)
        wanted_colour = next((w for w in words if w in COLOURS), None)
        there = any((wanted_shape in (None, shape)) and (wanted_colour in (None, colour)) for shape, colour in things)
        assert question.answer == ("yes" if there else "no")
        question = ask(rng, scene, "count")
        kind = question.question.split()[2]
        assert question.answer == str(len(shapes) if kind == "shapes" else shapes.count(kind[:-1]))
        question = ask(rng, scene, "compare")
        words = question.question.split()
        assert question.answer == ("yes" if shapes.count(words[3][:-1]) > shapes.count(words[5][:-1]) else "no")
        assert ask(rng, scene, "ocr").answer == str(scene.digit)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_use_the_vocabulary_and_answers_vary(kind):
    dataset = SceneDataset(kind, "train", 300)
    words = set(vocabulary())
    answers = []
    for number in range(len(dataset)):
        sample = dataset[number]
        assert set(sample.question.split()) | {sample.answer} <= words
        answers.append(sample.answer)
    share = max(answers.count(a) for a in set(answers)) / len(answers)
    assert share <= 0.6


def test_samples_depend_on_split_seed_and_number_alone():
    first, again = SceneDataset("mixed", "test", 8, seed=3), SceneDataset("mixed", "test", 100, seed=3)
    assert (first[5].scene.pixels == again[5].scene.pixels).all()
    assert first[5][2:] == again[5][2:]
    other = SceneDataset("mixed", "test", 8, seed=4)
    assert (first[5].scene.pixels != other[5].scene.pixels).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("text", "train", 1), "kind='text'"), (("ocr", "dev", 1), "split='dev'"), (("ocr", "train", 0), "size=0")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneDataset(*arguments)
    with pytest.raises(IndexError):
        SceneDataset("ocr", "train", 2)[2]
