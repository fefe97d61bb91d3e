"""A policy whose decisions both modes share, and fixtures of LLaVA for tests that are about no family."""

from __future__ import annotations

import pytest

from tests.models.tiny_families import build_inputs, build_model
from toprl_models import Policy

BATCHES = {
    "single": (("image",),),
    "padded": (("image",), ("image", "image"), ()),
    "padded_all": (("image", "image"), ("image",), ("image",)),
}


class HashPolicy(Policy):
    """Scores that depend on (stage, raster number) alone: the same in both modes, different at each stage."""

    uses_text = False

    def __init__(self) -> None:
        self.calls = 0

    @staticmethod
    def scores_of(visual_index, stage):
        return ((visual_index.double() + 1) * 12.9898 * (stage + 1)).sin().mul(43758.5453).frac().abs().float()

    def score(self, context):
        self.calls += 1
        return self.scores_of(context.visual_index, context.stage)


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return build_model("llava", request.param)


@pytest.fixture(params=list(BATCHES))
def inputs(request):
    return build_inputs("llava", BATCHES[request.param])
