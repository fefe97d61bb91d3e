"""What the page computes and refuses, without a browser and without gradio."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
from PIL import Image

from toprl_models import page, tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trial() -> page.Trial:
    return page.Trial(*tiny.load(), new_tokens=2)


def test_results_hold_answers_tokens_and_strips(trial: page.Trial) -> None:
    image = page.open_image(ROOT / "docs/scene.png")
    html = trial.run(image, "which digit is in the picture ?", [("fastv", 0.4), ("divprune", 0.25)])
    assert re.findall("<h3>(.*?)</h3>", html) == ["Without pruning", "FastV", "DivPrune"]
    assert len(re.findall("<dt>answer</dt><dd>[^<]+</dd>", html)) == 3
    assert re.findall("<dd>([0-9.]+) of 64", html) == ["64.0", "25.7", "16.0"]
    assert "before layer 0: 16 kept" in html and html.count("<img ") == 4 and "100%" in html


def test_question_is_shown_nowhere_unescaped_and_must_be_asked(trial: page.Trial) -> None:
    image = Image.new("RGB", (128, 128))
    assert "<script" not in trial.run(image, "<script>alert(1)</script>", [("random", 0.5)])
    with pytest.raises(ValueError, match="the question has 0 characters"):
        trial.run(image, "  ", [("random", 0.5)])
    with pytest.raises(ValueError, match="the question has 501 characters"):
        trial.run(image, 501 * "a", [("random", 0.5)])
    with pytest.raises(ValueError, match=r"keep=0\.05 is impossible"):
        trial.run(image, "which digit ?", [("fastv", 0.05)])


def test_methods_that_need_a_policy_are_not_offered(trial: page.Trial) -> None:
    assert "fastv" in trial.methods and "toprl" not in trial.methods and "oneshot" not in trial.methods


def test_uploads_are_measured_before_they_are_decoded(tmp_path: Path) -> None:
    large, wide, broken, other = (tmp_path / name for name in ("large.png", "wide.png", "broken.png", "other.gif"))
    large.write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match=r"the file has 1\.0 MB, at most 1 are taken"):
        page.open_image(large, max_megabytes=1)
    Image.new("RGB", (100, 50)).save(wide)
    with pytest.raises(ValueError, match="100 x 50 pixels, at most 4999 are taken"):
        page.open_image(wide, max_pixels=4999)
    broken.write_bytes(wide.read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(other)
    for path in (broken, other):
        with pytest.raises(ValueError, match="no image that can be read"):
            page.open_image(path)
    with pytest.raises(ValueError, match="choose or upload an image first"):
        page.open_image(None)


def test_a_bomb_is_not_decoded(tmp_path: Path) -> None:
    """A few kilobytes that say 60000 x 60000 pixels."""
    chunks = b"IHDR" + (60000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + chunks + zlib.crc32(chunks).to_bytes(4))
    with pytest.raises(ValueError, match=r"can be read|pixels"):
        page.open_image(path)
