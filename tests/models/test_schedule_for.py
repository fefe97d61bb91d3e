"""Methods by name, and the schedules that give them equal budgets: the authors' figures for 576 tokens in 32 layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.models.tiny_families import NUM_LAYERS, build_inputs, build_model
from toprl_kernels import flops
from toprl_models import METHODS as REGISTERED
from toprl_models import Method, Policy, Schedule, method_of, schedule_for
from toprl_models.families import FAMILIES

AUTHORS = {
    # k = (32 B - 576 K) / (32 - K) with K = 2
    "fastv": {192: (166,), 128: (98,), 64: (30,)},
    # r of r, r^2, r^3: .560, .420, .192
    "pyramiddrop": {192: (322, 180, 101), 128: (242, 101, 43), 64: (110, 21, 4)},
    "sparsevlm": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "visionzip": {192: (192,), 128: (128,), 64: (64,)},
    "divprune": {192: (192,), 128: (128,), 64: (64,)},
}
CASES = [(name, budget) for name, budgets in AUTHORS.items() for budget in budgets]


@pytest.mark.parametrize(("name", "budget"), CASES)
def test_the_authors_settings(name: str, budget: int) -> None:
    assert schedule_for(name, budget).counts(576) == AUTHORS[name][budget]


def true_average(name: str, schedule: Schedule, num_visual: int = 576, num_layers: int = 32) -> float:
    counts = REGISTERED[name].policy().counts(schedule, num_visual)
    return flops.average_tokens(num_visual, tuple(zip(schedule.layers, counts, strict=True)), num_layers)


@pytest.mark.parametrize(("budget", "average"), [(192, 206.5), (128, 145.4), (64, 82.2)])
def test_what_sparsevlm_calls_a_budget(budget: int, average: float) -> None:
    assert true_average("sparsevlm", schedule_for("sparsevlm", budget)) == pytest.approx(average, abs=0.05)


SOLVED = [name for name, one in REGISTERED.items() if not one.trained]


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize(("num_visual", "num_layers", "budget"), [(2880, 40, 900), (1024, 28, 400), (64, 6, 32)])
def test_solved_budgets_are_met(name: str, num_visual: int, num_layers: int, budget: int) -> None:
    schedule = schedule_for(name, budget, num_visual=num_visual, num_layers=num_layers)
    average = true_average(name, schedule, num_visual, num_layers)
    if name == "downsample":  # whole images only
        assert 0.75 * budget < average <= budget
    else:  # half a token per stage by rounding; merged tokens come in steps
        assert average == pytest.approx(budget, abs=3 if REGISTERED[name].merges else 1)


def test_other_layers_than_the_authors_are_solved() -> None:
    schedule = schedule_for("sparsevlm", 192, layers=(2, 6, 15))
    assert schedule.layers == (2, 6, 15)
    assert true_average("sparsevlm", schedule) == pytest.approx(192, abs=2)


def test_an_impossible_budget_states_the_floor() -> None:
    with pytest.raises(ValueError, match=r"average_tokens=64 is impossible .* between 144 and 576"):
        schedule_for("fastv_progressive", 64)
    with pytest.raises(ValueError, match=r"average_tokens=64 is impossible .* between 144 and 576"):
        schedule_for("pyramiddrop", 64, layers=(8, 16, 24))
    with pytest.raises(ValueError, match="between 0 and 576"):
        schedule_for("divprune", 577)


def keeps(schedule: Schedule) -> list[float]:
    return [keep for _, keep in schedule.stages]


@pytest.mark.parametrize("name", [*SOLVED, "divprune+fastv", "sparsevlm+toprl"])
def test_a_share_of_the_tokens_of_a_model(name: str) -> None:
    """Shares, whatever the authors state, at layers that the model has."""
    model = build_model("llava")
    schedule = schedule_for(model, name, keep=0.4)
    method = method_of(name)
    assert schedule.layers == method.layers(NUM_LAYERS) and all(isinstance(keep, float) for keep in keeps(schedule))
    policy = method.make(schedule.layers, Policy())
    for num_visual in (576, 2304):
        counts = zip(schedule.layers, policy.counts(schedule, num_visual), strict=True)
        average = flops.average_tokens(num_visual, tuple(counts), NUM_LAYERS)
        assert average <= 0.4 * num_visual + 3
        if name != "downsample":  # whole images; merged tokens come in steps
            assert average == pytest.approx(0.4 * num_visual, rel=0.05 if method.merges else 0.01)


def test_a_share_is_the_budget_of_a_share() -> None:
    assert schedule_for("fastv", keep=1 / 3).stages[0][1] == pytest.approx(schedule_for("fastv", 192).stages[0][1])
    assert keeps(schedule_for("sparsevlm", keep=192 / 576)) == pytest.approx([300 / 576, 200 / 576, 110 / 576])
    assert schedule_for("fastv", keep=0.5, num_layers=28).layers == (2,)


def test_stages_begin_where_the_family_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("qwen3_vl")
    row = replace(FAMILIES["Qwen3VLForConditionalGeneration"], min_stage=2)
    monkeypatch.setitem(FAMILIES, "Qwen3VLForConditionalGeneration", row)
    assert schedule_for(model, "fastv", keep=0.5).layers == (2,)
    assert schedule_for(model, "pyramiddrop", keep=0.5).layers == (2, 3, 4)
    assert schedule_for(model, "fastv", keep=0.75, layers=(4,)).layers == (4,)


def test_tokens_are_counted_in_the_inputs() -> None:
    model = build_model("llava")
    alike = build_inputs("llava", (("image",), ("image",), ()))
    assert schedule_for(model, "fastv", average_tokens=8, inputs=alike) == schedule_for(
        "fastv", 8, num_visual=16, num_layers=NUM_LAYERS
    )
    assert schedule_for(model, "fastv", average_tokens=8, num_visual=16) == schedule_for(
        model, "fastv", average_tokens=8, inputs=alike
    )
    # 16 and 48 tokens: the mean of 32 meets the budget, and each prompt keeps the same share
    several = build_inputs("llava", (("image",), ("image", "image", "image")))
    schedule = schedule_for(model, "divprune", average_tokens=8, inputs=several)
    assert keeps(schedule) == [0.25] and schedule.counts(16) == (4,) and schedule.counts(48) == (12,)


def test_what_a_schedule_needs() -> None:
    model = build_model("llava")
    with pytest.raises(
        ValueError, match=r"average_tokens=8: of how many visual tokens\? Pass inputs= .* or num_visual="
    ):
        schedule_for(model, "fastv", average_tokens=8)
    for budget in ({}, {"keep": 0.5, "average_tokens": 8}):
        with pytest.raises(ValueError, match="give one of them"):
            schedule_for(model, "fastv", **budget)
    with pytest.raises(ValueError, match=r"keep=0.1 is impossible with stages at \(1,\): .* between 0.167 and 1"):
        schedule_for(model, "fastv", keep=0.1)
    with pytest.raises(ValueError, match="keep=25 is impossible"):
        schedule_for(model, "fastv", keep=25)
    with pytest.raises(ValueError, match="no prompt has a visual token"):
        schedule_for(model, "fastv", keep=0.5, inputs=build_inputs("llava", ((),)))
    with pytest.raises(ValueError, match="no input_ids"):
        schedule_for(model, "fastv", keep=0.5, inputs={"pixel_values": None})
    with pytest.raises(ValueError, match="Pass the model first"):
        schedule_for("fastv", 8, inputs=build_inputs("llava"))
    with pytest.raises(ValueError, match="not a model's name"):
        schedule_for("llava", "fastv")


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match=r"method 'fastvv' is unknown; known methods: toprl, fastv, .*random"):
        schedule_for("fastvv", 192)


def test_the_registry() -> None:
    assert all(isinstance(method, Method) and method.name == name for name, method in REGISTERED.items())
    assert all(isinstance(REGISTERED[name].policy(), Policy) for name in SOLVED)


@pytest.mark.parametrize("num_layers", [6, 24, 28, 32, 40, 80])
def test_default_layers_scale_with_the_depth(num_layers: int) -> None:
    for one in REGISTERED.values():
        layers = one.layers(num_layers)
        assert len(layers) == len(one.stages) and layers == tuple(sorted(set(layers))) and layers[-1] < num_layers
        assert (layers == (0,)) == (one.stages == (0,))
        if one.stages[0] != 0:
            assert one.layers(num_layers, first=3)[0] >= 3 or num_layers < 7
    assert REGISTERED["pyramiddrop"].layers(32) == (2, 8, 16)


def test_the_page_on_methods_has_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(REGISTERED)
    for row, one in zip(rows, REGISTERED.values(), strict=True):
        assert row.rstrip("| ").rsplit("| ", 1)[1] == ", ".join(map(str, one.stages))
