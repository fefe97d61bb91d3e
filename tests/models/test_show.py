"""Panels, strips and python -m toprl_models.show: each token in its place, on tiny models of many families."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.models.tiny_families import IMAGE_ID, VIDEO_ID, build_inputs, build_model, visual_mask
from toprl_models import METHODS, FastVProgressive, Schedule, attach, panels, show, strips, tiny
from toprl_models.panels import Panel, panels_of

ROOT = Path(__file__).parents[2]
# what each family makes of a prompt: rows and columns of the panels, and tokens beside them
SHAPES = {
    ("llava", "image"): [((4, 4), 0)],
    ("llava_next", "image"): [((4, 4), 0), ((4, 8), 4)],
    ("video_llava", "video"): [((4, 4), 1), ((4, 4), 1)],
    ("llava_onevision", "image"): [((4, 4), 0), ((4, 8), 4)],
    ("llava_onevision", "video"): [((2, 2), 0), ((2, 2), 0), ((2, 2), 1)],
    ("qwen2_5_vl", "image"): [((4, 4), 0)],
    ("qwen2_5_vl", "video"): [((4, 2), 0), ((4, 2), 0)],
    ("qwen3_vl", "video"): [((4, 2), 0), ((4, 2), 0)],
    ("internvl", "image"): [((4, 4), 0)],
}


@pytest.mark.parametrize(("family", "kind"), SHAPES)
def test_every_token_is_kept_by_all_and_drawn_in_its_place(family: str, kind: str) -> None:
    model, inputs = build_model(family), build_inputs(family, [(kind,)])
    panels = panels_of(model, inputs)
    assert [(panel.numbers.shape, len(panel.others)) for panel in panels] == SHAPES[family, kind]
    numbers = [number for panel in panels for number in (*panel.numbers.flatten().tolist(), *panel.others)]
    assert sorted(numbers) == list(range(int(visual_mask(inputs).sum())))
    assert all(panel.placed for panel in panels)
    with attach(model, FastVProgressive(), schedule=Schedule(((1, 0.5), (3, 0.25)))) as pruner:
        model(**inputs)
        kept = show.Answer("", 0.0, tuple(pruner.trace)).kept()
    drawings = strips.strip(panels, (1, 3), kept)
    assert [len(part) for part in kept] == [stage.counts[0] for stage in pruner.trace]
    assert len({drawing.picture.size for drawing in drawings}) == 1
    for drawing, part in zip(drawings[1:], kept, strict=True):
        assert f"{len(part)} kept" in drawing.title
        if len(panels) == 1:  # kept cells are the image's, dropped ones are faded
            (panel,), cell = panels, (drawing.picture.width - 2) // panels[0].numbers.shape[1]
            for number, (row, column) in zip(panel.numbers.flatten(), np.ndindex(panel.numbers.shape), strict=True):
                box = [1 + column * cell + 1, 1 + row * cell + 1, (column + 1) * cell, (row + 1) * cell]
                shown, whole = (np.asarray(one.picture.crop(box)) for one in (drawing, drawings[0]))
                assert np.array_equal(shown, whole) == (number in part)


def test_newlines_are_beside_the_tiles_where_the_model_packs_them() -> None:
    model, inputs = build_model("llava_next"), build_inputs("llava_next", [("image", "image")])
    panels = panels_of(model, inputs)
    features = [torch.ones(3, 16, 1)] * 2
    packed, _ = model.model.pack_image_features(features, inputs["image_sizes"], "default", torch.zeros(1))
    newlines = (torch.cat(packed)[:, 0] == 0).nonzero()[:, 0].tolist()
    assert [number for panel in panels for number in panel.others] == newlines


@pytest.mark.parametrize(("family", "kind"), [("qwen2_5_vl", "image"), ("qwen3_vl", "video"), ("internvl", "image")])
def test_the_picture_of_a_cell_is_the_pixels_of_its_token(family: str, kind: str) -> None:
    """The brightest cell is that whose pixels were made bright."""
    model, inputs = build_model(family), build_inputs(family, [(kind,)])
    name = "pixel_values_videos" if kind == "video" else "pixel_values"
    values = torch.zeros_like(inputs[name])
    if family == "internvl":  # token 6 of a tile of 4 x 4: row 1, column 2
        values[0, :, 8:16, 16:24] = 1
    else:  # four patches of a token follow each other
        values[24:28] = 1
    for panel in panels_of(model, {**inputs, name: values}):
        assert panel.picture is not None
        rows, columns = panel.numbers.shape
        pixels = np.asarray(panel.picture).mean(-1)
        cells = pixels.reshape(rows, pixels.shape[0] // rows, columns, -1).mean((1, 3))
        bright = panel.numbers[cells > 254]
        assert bright.tolist() == ([6] if 6 in panel.numbers else [])


def test_patches_that_become_one_token_are_in_their_order() -> None:
    model, inputs = build_model("qwen2_5_vl"), build_inputs("qwen2_5_vl", [("image",)])
    values = torch.zeros_like(inputs["pixel_values"])
    values[25] = 1  # of token 6, row 1 and column 2, the upper right patch: 4 x 4 pixels
    (panel,) = panels_of(model, {**inputs, "pixel_values": values})
    bright = np.argwhere(np.asarray(panel.picture)[..., 0] > 254)
    assert bright.min(0).tolist() == [8, 20] and bright.max(0).tolist() == [11, 23]


def test_the_image_stands_under_the_tokens_of_families_that_see_it_whole() -> None:
    model, inputs = build_model("llava_next"), build_inputs("llava_next", [("image",)])
    image = Image.new("RGB", (64, 32), "red")
    overview, tiles = panels_of(model, inputs, [image])
    assert overview.picture is not image and tiles.picture is image
    assert "Grey" in strips.remark(panels_of(model, inputs)) and "Grey" not in strips.remark([overview, tiles])


def test_tokens_of_unknown_places_are_listed_and_said_to_be() -> None:
    model, inputs = build_model("llava"), build_inputs("llava", [("image",)])
    (panel,) = panels_of(model, {"input_ids": inputs["input_ids"]})
    assert not panel.placed and panel.numbers.tolist() == np.arange(16).reshape(4, 4).tolist()
    assert "in reading order" in strips.remark([panel])


def test_panels_refuse_what_is_not_one_prompt_with_an_image() -> None:
    model = build_model("llava")
    with pytest.raises(ValueError, match=r"input_ids is \(2, \d+\), but panels are those of one prompt"):
        panels_of(model, build_inputs("llava", [("image",), ("image",)]))
    with pytest.raises(ValueError, match="no visual token"):
        panels_of(model, {"input_ids": torch.tensor([[3, 4, 5]])})
    assert IMAGE_ID != VIDEO_ID


def test_panels_are_laid_out_in_rows() -> None:
    panels = [Panel(f"tile {i}", np.arange(4).reshape(2, 2) + 4 * i) for i in range(5)]
    drawn = strips.draw_panels(panels, range(20))
    assert drawn.width > drawn.height  # 3 and 2
    page = strips.strip_png(strips.strip(panels, (1,), [[0, 19]]))
    assert page.width > 2 * drawn.width and page.height > drawn.height


def test_command_writes_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "which digit is in the picture ?"
    image = str(ROOT / "docs/scene.png")
    output = tmp_path / "made" / "strip"
    show.main(["tiny", image, question, "--method", "pyramiddrop", "--keep", "0.4", "--output", str(output)])
    printed = capsys.readouterr().out
    assert re.search(r"^pruned: \d$", printed, re.MULTILINE) and "25.5 of 64" in printed
    html = output.with_suffix(".html").read_text()
    assert html.count("<img ") == 4 and question in html and "before layer 3: 11 kept" in html
    assert 'name="viewport"' in html and not re.search(r"<(script|link|iframe)\b|@import|https?:", html)
    assert Image.open(output.with_suffix(".png")).width > 4 * 64


def test_colours_are_those_of_the_image() -> None:
    model, processor = tiny.load()
    image = Image.open(ROOT / "docs/scene.png").convert("RGB")
    inputs = show.encode(processor, [image], "which digit is in the picture ?", model)
    (panel,) = show.layout(model, processor, inputs, [image])
    assert panel.picture is not None and panel.picture.size == (128, 128)
    difference = np.abs(np.asarray(panel.picture).astype(int) - np.asarray(image.resize((128, 128))))
    assert difference.mean() < 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "nonesuch"], "nonesuch"),
        (["--method", "toprl"], "needs a trained policy"),
        (["--method", "fastv", "--policy", "runs/x"], "takes no trained policy"),
        (["--keep", "0.01"], "keep=0.01 is impossible"),
        (["--keep", "2"], "keep=2.0 is impossible"),
    ],
)
def test_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        show.main(["tiny", str(ROOT / "docs/scene.png"), "which digit ?", "--output", str(tmp_path / "s"), *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_names_a_file_that_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        show.main(["tiny", str(tmp_path / "broken.png"), "which digit ?"])
    assert "broken.png" in capsys.readouterr().err


def test_prepare_takes_one_budget() -> None:
    model, _ = tiny.load()
    policy, schedule = show.prepare(model, "fastv", schedule=Schedule(((2, 8),)))
    assert schedule.stages == ((2, 8),) and type(policy) is METHODS["fastv"].policy
    with pytest.raises(ValueError, match="give one of them"):
        show.prepare(model, "fastv")


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_of_any_size_are_those_that_the_released_models_pack(name: str) -> None:
    """Rows and columns of unpadded tiles, from the number of tokens alone, against the models' own packing."""
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    title = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[name]
    model = SimpleNamespace(config=getattr(transformers, f"{title}Config")())
    vision, sizes = model.config.vision_config, np.random.default_rng(0).integers(60, 2500, (25, 2)).tolist()
    side = vision.image_size // vision.patch_size
    for size in sizes:
        tiles = modeling.image_size_to_num_patches(size, model.config.image_grid_pinpoints, vision.image_size)
        options = {"vision_feature_select_strategy": "default"} if name == "llava_next" else {}
        pack = getattr(modeling, f"{title}Model").pack_image_features
        features, newline = [torch.ones(tiles, side**2, 1)], torch.zeros(1)
        ((packed,), _) = pack(model, features, torch.tensor([size]), image_newline=newline, **options)
        newlines = (packed[:, 0] == 0).nonzero()[:, 0]
        inputs = {"image_sizes": torch.tensor([size]), "pixel_values": torch.zeros(1, 1, 3, 4, 4)}
        _, grid = panels._anyres(model, inputs, [len(packed)], panels._Values(inputs, "image", None, None), [])
        assert (grid.rows, grid.columns) == (len(newlines), int(newlines[0]) - side**2), size
