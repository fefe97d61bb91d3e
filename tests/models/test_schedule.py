"""Schedules: counts, segments, budgets, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from toprl_models import Schedule

LLAVA = SimpleNamespace(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)


def test_counts_are_fractions_of_the_original_or_numbers():
    assert Schedule(((2, 0.5), (8, 0.25), (16, 64))).counts(576) == (288, 144, 64)
    assert Schedule(((2, 0.5),)).counts(5) == (3,)  # half up
    assert Schedule(((2, 100), (4, 50))).counts(30) == (30, 30)
    assert Schedule(((2, 0),)).counts(576) == (0,)


def test_segments_and_average_by_hand():
    schedule = Schedule(((2, 8), (5, 4)))
    assert schedule.segments(64, 6) == ((64, 2), (8, 3), (4, 1))
    assert schedule.average_tokens(64, 6) == pytest.approx((128 + 24 + 4) / 6)


def test_pyramiddrop_default_costs_what_its_paper_says():
    """LLaVA-1.5-7B, .5/.25/.125 before layers 8/16/24: 3.82 -> 1.78 T multiply-adds."""
    schedule = Schedule(((8, 0.5), (16, 0.25), (24, 0.125)))
    assert schedule.macs(576, LLAVA) == pytest.approx(1.777e12, rel=1e-3)
    assert Schedule(((1, 1.0),)).macs(576, LLAVA) == pytest.approx(3.817e12, rel=1e-3)


@pytest.mark.parametrize(("budget", "ratio"), [(192, 0.560), (128, 0.420), (64, 0.192)])
def test_for_budget_finds_the_published_ratios(budget, ratio):
    schedule = Schedule.for_budget(budget, (2, 8, 16), num_visual=576, num_layers=32)
    assert schedule.stages[0][1] == pytest.approx(ratio, abs=1e-3)
    assert schedule.average_tokens(576, 32) == pytest.approx(budget, abs=0.5)


def test_an_impossible_budget_names_its_floor():
    with pytest.raises(ValueError, match="between 144 and 576"):
        Schedule.for_budget(64, (8, 16, 24), num_visual=576, num_layers=32)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "empty"),
        (((-1, 0.5),), "ascend from 0"),
        (((4, 0.5), (4, 0.25)), "ascend"),
        (((2, 1.5),), r"fraction in \[0, 1\]"),
        (((2, -1),), "negative"),
        (((2, 4), (3, 8)), "grows"),
    ],
)
def test_bad_stages_are_value_errors(stages, message):
    with pytest.raises(ValueError, match=message):
        Schedule(stages)


@pytest.mark.parametrize("stages", [((2, "half"),), ((2.0, 0.5),), ((2, True),)])
def test_bad_types_are_type_errors(stages):
    with pytest.raises(TypeError):
        Schedule(stages)


def test_a_stage_beyond_the_decoder():
    with pytest.raises(ValueError, match=r"layers 0\.\.31"):
        Schedule(((32, 0.5),)).segments(576, 32)
