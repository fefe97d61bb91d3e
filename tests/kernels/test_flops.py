"""Eqs. 8-12 against the figures of the paper's Table 3 and of PyramidDrop's paper."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from toprl_kernels import flops
from toprl_kernels.flops import MISTRAL_7B, VICUNA_7B

TERA = 1e12
N = 2880  # visual tokens of LLaVA-NeXT


def test_layer_terms() -> None:
    # n=2, d=3, m=5: 4*2*9 + 2*4*3 + 3*2*3*5
    assert flops.layer_macs(2, 3, 5) == 72 + 24 + 90
    assert flops.layer_macs(2, 3, 5, kv_ratio=0.5) == 54 + 24 + 90


def test_baseline_needs_mistral_widths() -> None:
    assert flops.schedule_macs(N, (), MISTRAL_7B) / TERA == pytest.approx(24.594, abs=5e-4)  # printed: 24.6
    assert flops.schedule_macs(N, (), VICUNA_7B) / TERA == pytest.approx(20.83, abs=5e-3)


def test_fastv() -> None:
    stages = ((2, 319),)
    assert flops.schedule_macs(N, stages, MISTRAL_7B) / TERA == pytest.approx(3.890, abs=5e-4)
    assert flops.average_tokens(N, stages, 32) == pytest.approx(479, abs=0.5)  # not the 320 of the table's caption


@pytest.mark.parametrize(("ratio", "macs", "average"), [(0.191, 2.638, 319.44), (0.1916, 2.643, 320.02)])
def test_pyramiddrop_and_toprl(ratio: float, macs: float, average: float) -> None:
    stages = flops.keep_ratio_stages(N, (2, 8, 16), ratio)
    assert flops.schedule_macs(N, stages, MISTRAL_7B) / TERA == pytest.approx(macs, abs=5e-4)  # printed: 2.64
    assert flops.average_tokens(N, stages, 32) == pytest.approx(average, abs=0.01)


def test_pyramiddrop_on_llava_15() -> None:
    stages = ((8, 288), (16, 144), (24, 72))
    assert flops.schedule_macs(576, (), VICUNA_7B) / TERA == pytest.approx(3.817, abs=5e-4)  # printed: 3.82
    assert flops.schedule_macs(576, stages, VICUNA_7B) / TERA == pytest.approx(1.777, abs=5e-4)  # printed: 1.78


def test_visionzip_row_is_not_320_tokens() -> None:
    assert flops.schedule_macs(320, (), MISTRAL_7B) / TERA == pytest.approx(2.52, abs=5e-3)
    assert flops.schedule_macs(240, (), MISTRAL_7B) / TERA == pytest.approx(1.88, abs=5e-3)  # printed: 1.88


def test_actor_and_units() -> None:
    assert flops.actor_flops(1, 4096, 256) == 2 * (4096 * 256 + 2 * 256**2)  # Eq. 11
    stages = flops.keep_ratio_stages(N, (2, 8, 16), 0.1916)
    cost = flops.schedule_cost(N, stages, MISTRAL_7B, actor_width=256)
    assert 2 * cost.actor_macs / TERA == pytest.approx(0.0083, abs=5e-5)
    assert cost.actor_macs == pytest.approx(flops.actor_macs(N + stages[0][1] + stages[1][1], 4096, 256))
    assert cost.total_flops == 2 * (cost.decoder_macs + cost.actor_macs)
    assert cost.paper_units == cost.decoder_macs + 2 * cost.actor_macs
    assert flops.schedule_cost(N, stages, MISTRAL_7B).actor_macs == 0


def test_floors_of_the_late_schedule() -> None:
    """Averages of 64 of 576 and 194 of 2048 cannot come from stages 8/16/24 (Eq. 10 with nothing kept)."""
    nothing = ((8, 0), (16, 0), (24, 0))
    assert flops.average_tokens(576, nothing, 32) == 144
    assert flops.average_tokens(2048, nothing, 32) == 512


def test_kv_cache() -> None:
    mib = 2**20
    assert flops.kv_cache_bytes(N, (), num_layers=32, num_key_value_heads=8, head_dim=128) == 360 * mib
    assert flops.kv_cache_bytes(N, (), num_layers=32, num_key_value_heads=32, head_dim=128) == 1440 * mib
    pruned = flops.kv_cache_bytes(N, ((16, 0),), num_layers=32, num_key_value_heads=8, head_dim=128)
    assert pruned == 180 * mib


def test_segments_cover_all_layers() -> None:
    parts = flops.segments(10, ((0, 8), (2, 4)), 5)
    assert [(part.num_layers, part.num_tokens) for part in parts] == [(0, 10), (2, 8), (3, 4)]


def test_any_config_object_works() -> None:
    config = SimpleNamespace(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    assert flops.schedule_macs(N, (), config) == flops.schedule_macs(N, (), MISTRAL_7B)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (((8, 5), (8, 4)), r"stages\[1\] has layer=8; layers must strictly increase"),
        (((32, 5),), r"stages\[0\] has layer=32"),
        (((-1, 5),), r"stages\[0\] has layer=-1"),
        (((2, 5), (4, 6)), r"stages\[1\] has count=6; it must be within 0..5"),
        (((2, 11),), r"stages\[0\] has count=11"),
    ],
)
def test_bad_schedules(stages: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flops.segments(10, stages, 32)
