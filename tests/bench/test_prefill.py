"""The prefill suite on a toy LLaVA: its rows, its ratios, and that its correctness check can fail."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bench import prefill
from bench.common import Report
from toprl_models import Schedule, attach
from toprl_models.runtime.compact import Compact

CPU = torch.device("cpu")
# two crops of 8 x 8 patches, grouped queries
TOY = prefill.Case("toy", 64, 96, 6, 4, 2, 128, 48, num_images=2, text_tokens=9, vocab_size=100, actor_size=8,
                   dtype=torch.float32)  # fmt: skip


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(prefill, "cases", lambda size, device: [TOY])


def quick_rows():
    report = Report("prefill", {})
    prefill.run("quick", CPU, report)
    return report.rows


def test_rows(toy):
    """Stages before layers 1, 2 and 3 of 6; r = .529 makes 128 (1 + r + r^2 + 3 r^3) / 6 = 48."""
    rows = quick_rows()
    assert [row["method"] for row in rows] == ["unpruned", "fastv", "pyramiddrop", "toprl"]
    unpruned, fastv, _, toprl = rows
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["repeats"] == 5
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert row["speedup"] == unpruned["ms_p50"] / row["ms_p50"]
        # 2 (keys and values) x 2 heads x 16 wide x 4 bytes, per layer and token
        assert row["kv_bytes"] == 256 * 6 * (row["average_tokens"] + 9)
    assert (unpruned["stages"], unpruned["macs_ratio"], unpruned["average_tokens"]) == ("", 1, 128)
    assert fastv["average_tokens"] == pytest.approx(48, abs=1) and 1 < fastv["macs_ratio"] < fastv["macs_ratio_visual"]
    assert toprl["stages"] == "1:68 2:36 3:19" and toprl["average_tokens"] == (128 + 68 + 36 + 3 * 19) / 6

    def layer(n):
        # q and o 64 x 64, k and v 64 x 32, Q K^T and A V over n^2 pairs, gate, up and down 64 x 96
        return n * (2 * 64 * 64 + 2 * 64 * 32) + 2 * n * n * 64 + n * 3 * 64 * 96

    def visual(n):  # Eq. 8: no grouping
        return 4 * n * 64**2 + 2 * n**2 * 64 + 3 * n * 64 * 96

    pruned = layer(128 + 9) + layer(68 + 9) + layer(36 + 9) + 3 * layer(19 + 9)
    assert toprl["macs_ratio"] == pytest.approx(6 * layer(128 + 9) / pruned, rel=1e-12)
    pruned = visual(128) + visual(68) + visual(36) + 3 * visual(19)
    assert toprl["macs_ratio_visual"] == pytest.approx(6 * visual(128) / pruned, rel=1e-12)


@pytest.mark.parametrize(
    ("case", "progressive", "fastv"),
    [
        (prefill.LLAVA_1_5_7B, (322, 180, 101), 166),
        (prefill.LLAVA_NEXT_7B, (552, 106, 20), 149),
        (prefill.LLAVA_100M, (562, 309, 170), 204),
    ],
)
def test_all_methods_of_a_case_have_the_same_budget(case, progressive, fastv):
    stages = case.schedule(case.stage_layers)
    once = case.schedule((prefill.FASTV_STAGE,))
    assert stages.layers == ((2, 8, 16) if case.num_layers == 32 else (1, 3, 6))
    assert (stages.counts(case.visual_tokens), once.counts(case.visual_tokens)) == (progressive, (fastv,))
    for schedule in (stages, once):
        average = schedule.average_tokens(case.visual_tokens, case.num_layers)
        assert average == pytest.approx(case.average_tokens, abs=0.5)


def test_narrow_copy_keeps_what_matters():
    narrow = prefill.LLAVA_NEXT_7B.narrow()
    assert (narrow.num_heads, narrow.num_kv_heads, narrow.hidden_size) == (4, 1, 512)  # head width 128, groups of 4
    assert narrow.intermediate_size / narrow.hidden_size == 14336 / 4096
    assert (narrow.num_layers, narrow.visual_tokens, narrow.dtype) == (32, 2880, torch.float32)


def test_prompt_of_a_square_of_patches():
    inputs = prefill.build_inputs(TOY, prefill.build_model(TOY, CPU))
    assert inputs["input_ids"].shape == (1, 128 + 9) and (inputs["input_ids"] == prefill.IMAGE_ID).sum() == 128
    with pytest.raises(ValueError, match="times a square"):
        prefill.build_model(dataclasses.replace(TOY, num_images=3), CPU)


def test_pixel_values_where_features_are_not_taken(toy, monkeypatch):
    monkeypatch.setattr(prefill, "TAKES_FEATURES", False)
    assert {row["vision_tower"] for row in quick_rows()} == {"timed"}


def drop_nothing(monkeypatch):
    """An attach that ignores the schedule's keeps."""

    def wrong(model, policy, *, schedule, **options):
        return attach(model, policy, schedule=Schedule(tuple((layer, 1.0) for layer in schedule.layers)), **options)

    monkeypatch.setattr(prefill, "attach", wrong)


def test_a_broken_pruner_is_found_before_timing(toy, monkeypatch):
    """It touches the states even where it drops nothing."""
    right = Compact.at_stage
    monkeypatch.setattr(Compact, "at_stage", lambda self, *args: right(self, *args) * 1.01)
    monkeypatch.setattr(prefill, "time_case", lambda *args: pytest.fail("timed a broken pruner"))
    with pytest.raises(prefill.WrongPrefillError, match="toy: wrong: keep-all = unattached"):
        quick_rows()


def test_a_timed_prefill_that_skips_its_stages_is_found(monkeypatch):
    drop_nothing(monkeypatch)
    with pytest.raises(prefill.WrongPrefillError, match="the timed prefill kept"), torch.no_grad():
        prefill.time_case(TOY, CPU, repeats=1)
