"""Every family: inputs, schedules and what the two modes must agree on."""

from __future__ import annotations

import pytest
import torch

from tests.models.conftest import HashPolicy
from tests.models.features import feature
from tests.models.tiny_families import TINY, build_inputs, build_model
from toprl_models import Schedule, attach


def schedule_of(family: str) -> Schedule:
    """Three stages, the first as early as the family allows."""
    first = TINY[family].min_stage
    return Schedule(((first, 0.5), (first + 1, 0.25), (5, 2)))


@feature("keep-all = unattached, bitwise")
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_keep_all_is_the_unattached_model(family: str, attn_implementation: str) -> None:
    model = build_model(family, attn_implementation)
    inputs = build_inputs(family, (("image",), ("image", "image"), ()))
    valid = inputs["attention_mask"].bool()
    logits = model(**inputs).logits[valid]
    keep_all = Schedule(((TINY[family].min_stage, 1.0), (5, 1.0)))
    with attach(model, HashPolicy(), schedule=keep_all):
        assert torch.equal(model(**inputs).logits[valid], logits)
