"""Settings of further methods that are refused, and the list of all methods."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.tiny_families import build_model
from toprl_models import METHODS, Schedule, attach
from toprl_models.methods import DART, GPrune, HiPrune, HoloV, PruMergePlus, ToMe, VisPruner, VScan, __main__


@pytest.mark.parametrize("make", [ToMe, PruMergePlus, VScan])
def test_shares_of_images_do_not_go_with_merging(make: Any) -> None:
    stages = ((0, 9), (3, 4)) if make is VScan else ((0, 9),)
    with pytest.raises(ValueError, match=r"share='image', but .* merges tokens"):
        attach(build_model("llava"), make(), schedule=Schedule(stages, share="image"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DART(visual_pivots=0), "visual_pivots=0 and|visual_pivots=0 must"),
        (lambda: GPrune(temperature=0), "temperature=0 must be positive"),
        (lambda: GPrune(steps=0), "steps=0 must be at least 1"),
        (lambda: VisPruner(1.5), "important_ratio=1.5 must be in"),
        (lambda: HoloV(crops=0), "crops=0 must be at least 1"),
        (lambda: HiPrune(alpha=2), "alpha=2 and depth=None must be in"),
        (lambda: VScan(windows=0), "windows=0 must be at least 1"),
        (lambda: VScan(local_ratio=-1), "local_ratio=-1 must be in"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_list_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main([])
    text = capsys.readouterr().out
    assert f"{len(METHODS)} methods" in text and all(f"{name}: {one.title}" in text for name, one in METHODS.items())
    __main__.main(["evs"])
    assert "before the language model; renumbered positions; training-free; videos\n  Qwen2.5-VL" in (
        capsys.readouterr().out
    )
