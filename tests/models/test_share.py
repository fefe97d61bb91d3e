"""Budgets shared by image: Schedule(share="image")."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.agreement import assert_agreement, model_of
from tests.models.conftest import HashPolicy
from tests.models.test_packed import ROWS, alone, packed
from tests.models.tiny_families import FAMILY_NAMES, build_inputs, visual_mask
from toprl_models import Decision, Policy, Schedule, attach
from toprl_models.runtime.state import image_shares

BATCH = (("image", "image"), ("image",), ("image", "image", "image"))


class FirstImage(Policy):
    """Prefers the first tokens: with a row's budget the last images would lose all."""

    def score(self, context: object) -> Tensor:
        return -context.visual_index.float()  # type: ignore[attr-defined]


def by_hand(sizes: list[int], keep: int) -> list[int]:
    """Sainte-Lague's shares, a token at a time."""
    shares = [0] * len(sizes)
    for _ in range(keep):
        best = max(range(len(sizes)), key=lambda i: (sizes[i] / (2 * shares[i] + 1), -i))
        shares[best] += 1
    return shares


def kept_by_image(model: object, inputs: dict[str, Tensor], schedule: Schedule, mode: str) -> list[list[list[int]]]:
    """Kept tokens of each image, by row, by stage."""
    with attach(model, FirstImage(), schedule=schedule, mode=mode) as pruner:  # type: ignore[arg-type]
        model(**inputs)  # type: ignore[operator]
    found = []
    for stage in pruner.trace:
        rows = []
        for row, kept in enumerate(stage.indices):
            mask = visual_mask(inputs)[row]
            runs = (mask & ~mask.roll(1)).cumsum(0)[mask]
            rows.append(torch.bincount(runs[kept[kept >= 0]] - 1, minlength=int(runs.max())).tolist())
        found.append(rows)
    return found


@pytest.mark.parametrize("mode", ["compact", "mask"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_image_gets_its_share(family: str, mode: str) -> None:
    model, inputs = model_of(family), build_inputs(family, BATCH)
    schedule = Schedule(((2, 0.5), (3, 9), (5, 4)), share="image")
    found = kept_by_image(model, inputs, schedule, mode)
    for row in range(len(BATCH)):
        mask = visual_mask(inputs)[row]
        runs = (mask & ~mask.roll(1)).cumsum(0)[mask]
        sizes = torch.bincount(runs - 1).tolist()
        for stage, keep in enumerate(schedule.counts(sum(sizes))):
            assert found[stage][row] == by_hand(sizes, keep)
    if mode == "compact":
        competing = kept_by_image(model, inputs, Schedule(((2, 0.5), (3, 9), (5, 4))), mode)
        assert competing != found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_both_modes_agree(family: str) -> None:
    schedule = Schedule(((2, 0.5), (3, 9), (5, 4)), share="image")
    assert_agreement(model_of(family), build_inputs(family, BATCH), schedule)


def test_packed_prompts_share_apart() -> None:
    model, schedule = model_of("llava"), Schedule(((2, 0.5), (3, 5)), share="image")
    inputs = packed("llava", model, "position_ids")
    with attach(model, HashPolicy(), schedule=schedule) as pruner:
        model(**inputs)
        together = pruner.trace
        for number, prompt in enumerate(alone("llava")):
            model(**prompt)
            for stage, trace in enumerate(pruner.trace):
                kept = together[stage].indices[number]
                assert torch.equal(kept[kept >= 0], trace.indices[0])
    assert len(ROWS) == len(together[0].counts)


def test_shares_never_grow_when_the_budget_shrinks() -> None:
    """Or a stage would want tokens of an image that an earlier stage took away."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 12, (4,), generator=generator).tolist()
        before = [0] * 4
        for keep in range(sum(sizes) + 1):
            shares = image_shares(sizes, keep)
            assert shares == by_hand(sizes, keep)
            assert sum(shares) == keep
            assert all(was <= share <= size for was, share, size in zip(before, shares, sizes, strict=True))
            before = shares


def test_a_policy_with_a_keep_mask_is_refused() -> None:
    class Half(Policy):
        def decide(self, context: object) -> Decision:
            index = context.visual_index  # type: ignore[attr-defined]
            return Decision(index.float(), index % 2 == 0)

    model = model_of("llava")
    with (
        attach(model, Half(), schedule=Schedule(((2, 0.5),), share="image")),
        pytest.raises(ValueError, match="share='image', but Half chooses by a keep mask"),
    ):
        model(**build_inputs("llava"))


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share='tile' must be"):
        Schedule(((2, 0.5),), share="tile")


@pytest.mark.parametrize("mode", ["compact", "mask"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_each_frame_of_a_video_gets_its_share(family: str, mode: str) -> None:
    """Frames follow each other in Qwen2.5-VL, and have time stamps between them in Qwen3-VL."""
    model = model_of(family)
    inputs = build_inputs(family, (("video", "image"), ("image", "video", "video")))
    keep = 6
    with attach(model, FirstImage(), schedule=Schedule(((3, keep),), share="image"), mode=mode) as pruner:
        model(**inputs)
    merge = model.config.vision_config.spatial_merge_size**2
    videos, images = ([grid.tolist() for grid in inputs[name]] for name in ("video_grid_thw", "image_grid_thw"))
    frames = [[h * w // merge] * t for t, h, w in videos]
    pictures = [[t * h * w // merge] for t, h, w in images]
    for row, sizes in enumerate(([*frames[0], *pictures[0]], [*pictures[1], *frames[1], *frames[2]])):
        kept = pruner.trace[0].indices[row]
        ends = torch.tensor(sizes).cumsum(0)
        shares = torch.bincount(torch.searchsorted(ends, kept[kept >= 0], right=True), minlength=len(sizes))
        assert shares.tolist() == by_hand(sizes, keep)
        assert len(sizes) > len(BATCH[row])  # a video has several frames
