"""Verdicts on hand-made numbers: each can come out either way."""

from __future__ import annotations

import numpy as np
import pytest

from training.analyses import ablations, cliff, efficiency, fastv, main_table, sensitivity, strips, transfer, video
from training.analyses.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    Estimate,
    all_of,
    bootstrap,
    changed,
    estimate,
    gap,
    judge,
    runs,
    standard_error,
    without_one,
)
from training.scenes import SceneDataset

N = 400


def right(share: float, n: int = N) -> list[int]:
    """Scores of which ``share`` are right, the first ones."""
    return [int(i < round(share * n)) for i in range(n)]


def outcomes(verdicts) -> list[str]:
    return [verdict.outcome for verdict in verdicts]


# -- statistics ----------------------------------------------------------------------------------------------------


def test_judge():
    assert judge(Estimate(1.0, 0.1, 2.0)) == HOLDS
    assert judge(Estimate(1.0, 0.1, 2.0), above=0.5) == OPEN
    assert judge(Estimate(1.0, 0.1, 2.0), above=2.5) == FAILS
    assert judge(Estimate(0.0, 0.0, 0.0)) == OPEN  # no difference at all is no evidence


def test_all_of():
    assert all_of([HOLDS, HOLDS]) == HOLDS
    assert all_of([HOLDS, OPEN]) == OPEN
    assert all_of([HOLDS, OPEN, FAILS]) == FAILS


def test_standard_error_by_hand():
    one = runs([1, 0, 0, 1])
    assert standard_error(one) == pytest.approx((1 / 3 / 4) ** 0.5)
    two = runs([[1, 0, 0, 1], [1, 1, 1, 1]])  # sample means 1, .5, .5, 1; run means .5 and 1
    assert standard_error(two) == pytest.approx((1 / 12 / 4 + 0.125 / 2) ** 0.5)


def test_the_bootstrap_is_paired_and_as_wide_as_theory_says():
    columns = {"a": runs(right(0.6)), "same": runs(right(0.6)), "b": runs(right(0.3))}
    draws = bootstrap(columns)
    assert (draws["a"] == draws["same"]).all()
    assert draws["a"].std() == pytest.approx(standard_error(columns["a"]), rel=0.06)
    paired = np.array(right(0.6)) - np.array(right(0.3))
    assert (draws["a"] - draws["b"]).std() == pytest.approx((paired.var() / N) ** 0.5, rel=0.06)


def test_runs_widen_the_bootstrap_as_theory_says():
    scores = runs([right(0.5), right(0.6), right(0.7)])
    assert bootstrap({"a": scores})["a"].std() == pytest.approx(standard_error(scores), rel=0.06)


def test_the_gap_of_two_groups_and_the_task_that_carries_it():
    found = {name: (value, np.full(10, value)) for name, value in {"a": 5.0, "b": 1.0, "c": 2.0, "d": 1.0}.items()}
    assert gap(found, ["a", "b"], ["c", "d"]) == Estimate(1.5, 1.5, 1.5)
    assert without_one(found, ["a", "b"], ["c", "d"]) == ("a", Estimate(-0.5, -0.5, -0.5))
    assert without_one(found, ["a"], ["c"]) is None
    assert changed(HOLDS, ("a", Estimate(-0.5, -0.5, -0.5))) == "without a it does not hold"
    assert changed(FAILS, ("a", Estimate(-0.5, -0.5, -0.5))) == changed(HOLDS, None) == ""


def test_estimate_text():
    assert estimate(0.031, np.linspace(-0.2, 0.2, 1001)).percent(signed=True) == "+3.1 [-19.0, +19.0]"
    assert Estimate(1.0, 0.5, 2.0).text() == "1.00 [0.50, 2.00]"


# -- Figure 1 ------------------------------------------------------------------------------------------------------


def test_cliff_layers_by_hand():
    retention = np.array([[0.1, 1.0, 0.0], [0.96, 1.0, 0.99], [0.9, 1.0, 0.5], [0.99, 1.0, 0.4]])
    assert cliff.cliff_layers(retention).tolist() == [3, 0, 4]


def cliff_result(perception: list[float], reasoning: list[float]) -> dict:
    tasks = {}
    for name, level, shares in (("ocr", "perception", perception), ("count", "reasoning", reasoning)):
        scores = {"full": right(0.9)} | {str(i): right(0.9 * share) for i, share in enumerate(shares)}
        tasks[name] = {"level": level, "scores": scores}
    return {"layers": list(range(len(perception))), "tasks": tasks}


def test_cliff_verdicts():
    late, early, never = [0.1, 0.2, 0.3, 1.0], [0.1, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.2]
    assert outcomes(cliff.verdicts(cliff_result(late, early))) == [HOLDS, HOLDS]
    assert outcomes(cliff.verdicts(cliff_result(early, late))) == [HOLDS, FAILS]
    assert outcomes(cliff.verdicts(cliff_result(late, late))) == [HOLDS, OPEN]
    assert outcomes(cliff.verdicts(cliff_result(never, early))) == [FAILS, HOLDS]


def sensitivity_result(shallow: dict[str, float], deep: dict[str, float]) -> dict:
    levels = {"ocr": "perception", "count": "reasoning"}
    return {
        "layers": [1, 4],
        "ratios": [0.0, 0.5, 1.0],
        "tasks": {
            task: {
                "level": level,
                "scores": {"full": right(0.9)}
                | {f"1/{ratio}": right(0.9 * shallow[task]) for ratio in (0.5, 1.0)}
                | {f"4/{ratio}": right(0.9 * deep[task]) for ratio in (0.5, 1.0)},
            }
            for task, level in levels.items()
        },
    }


def test_sensitivity_verdicts():
    low, high = {"ocr": 0.3, "count": 0.8}, {"ocr": 1.0, "count": 1.0}
    assert outcomes(sensitivity.verdicts(sensitivity_result(low, high))) == [HOLDS, HOLDS]
    assert outcomes(sensitivity.verdicts(sensitivity_result(high, low))) == [FAILS, OPEN]
    swapped = {"ocr": 0.8, "count": 0.3}
    assert outcomes(sensitivity.verdicts(sensitivity_result(swapped, high))) == [HOLDS, FAILS]
    assert sensitivity.grid(sensitivity_result(low, high), "ocr")[0] == pytest.approx([1.0, 0.3, 0.3], abs=0.01)


# -- Figures 2 and 4 -----------------------------------------------------------------------------------------------


def fastv_result(half: float, eighty: float, progressive: float, once: float) -> dict:
    shares = {"full": 0.95, "fastv r=0.5": half, "fastv r=0.8": eighty}
    for kept in fastv.CURVE:
        shares |= {f"fastv-p {kept}": progressive, f"fastv {kept}": once}
    costs = {"fastv r=0.5": 0.66, "fastv r=0.8": 0.46}
    plans = {name: {"macs": costs.get(name, 0.49), "average_tokens": 32.0} for name in shares}
    tasks = {"ocr": {"level": "perception", "scores": {name: right(share) for name, share in shares.items()}}}
    return {"layers": [2, 3, 4], "curve": list(fastv.CURVE), "plans": plans, "tasks": tasks, "num_visual": 64}


def test_fastv_verdicts():
    assert outcomes(fastv.verdicts(fastv_result(0.9, 0.6, 0.9, 0.7))) == [HOLDS, HOLDS, HOLDS]
    assert outcomes(fastv.verdicts(fastv_result(0.9, 0.9, 0.7, 0.9))) == [FAILS, FAILS, FAILS]
    assert outcomes(fastv.verdicts(fastv_result(0.9, 0.9, 0.9, 0.9))) == [HOLDS, OPEN, OPEN]


def strips_result(intact: float, on_object: int) -> dict:
    found = {
        "kept": [4] * N,
        "kept_on_object": [on_object] * N,
        "on_object": [16] * N,
        "asked": [1] * N,
        "asked_kept": right(intact),
    }
    return {"tasks": {"ocr": {"pictures": [{"side": 8}], "relevant": found}}, "num_visual": 64}


def test_strips_verdicts():
    assert outcomes(strips.verdicts(strips_result(0.99, 3))) == [HOLDS, HOLDS]
    assert outcomes(strips.verdicts(strips_result(0.5, 0))) == [FAILS, FAILS]
    assert strips.enrichment(strips_result(1.0, 3)["tasks"]["ocr"]).value == pytest.approx((3 / 4) / (16 / 64))


def test_relevant_tokens_by_hand():
    """A scene with several shapes of which one keeps a token, and a digit that does."""
    data = SceneDataset("count", "test", 40, 5)
    number = next(i for i in range(40) if sum(form >= 0 for form in data[i].scene.shapes) == 3)
    scene = data[number].scene
    kept = [scene.digit_patch, int(np.flatnonzero(scene.patch_cells >= 0)[0])]
    found = strips.relevant("count", 5, [[]] * number + [kept])
    assert found is not None
    assert {name: values[number] for name, values in found.items()} == {
        "kept": 2,
        "kept_on_object": 2,
        "on_object": int((scene.patch_cells >= 0).sum()) + 1,
        "asked": 3,
        "asked_kept": 1,
    }
    digit = strips.relevant("ocr", 5, [[]] * number + [kept])
    assert digit is not None
    assert (digit["asked"][number], digit["asked_kept"][number]) == (1, 1)
    assert strips.relevant("textvqa", 5, [[0]]) is None


# -- Tables --------------------------------------------------------------------------------------------------------


def transfer_result(own: float, inside: float, outside: float) -> dict:
    levels = {"ocr": "perception", "shape": "perception", "count": "reasoning", "compare": "reasoning"}

    def share(source: str, target: str) -> float:
        return own if source == target else inside if levels[source] == levels[target] else outside

    scores = {s: {t: [right(share(s, t)), right(share(s, t) + 0.01)] for t in levels} for s in levels}
    return {"levels": levels, "full": {t: right(0.95) for t in levels}, "scores": scores}


def test_transfer_verdicts():
    assert outcomes(transfer.verdicts(transfer_result(0.9, 0.7, 0.4))) == [HOLDS, HOLDS, HOLDS]
    assert outcomes(transfer.verdicts(transfer_result(0.5, 0.6, 0.9))) == [FAILS, FAILS, FAILS]
    assert outcomes(transfer.verdicts(transfer_result(0.7, 0.7, 0.7))) == [OPEN, OPEN, OPEN]


def test_transfer_names_the_task_that_carries_it():
    result = transfer_result(0.6, 0.6, 0.6)
    result["scores"]["ocr"]["ocr"] = [right(0.9), right(0.9)]
    gain, spared = transfer.with_one_out(
        list(result["levels"]), lambda tasks: transfer.own_gain(result, transfer.draws_of(result), tasks)
    )
    assert gain.value == pytest.approx(0.295 / 4, abs=0.002)
    assert spared is not None
    assert spared[0] == "ocr"
    assert abs(spared[1].value) < 1e-9
    assert transfer.verdicts(result)[1].without == "without ocr it cannot be told"


def main_result(toprl: float, fast: float, untrained: float) -> dict:
    answers = [
        {
            "full/full": [right(0.9)],
            **{
                f"{method}/{budget}": [right(share)]
                for budget in ("192", "64")
                for method, share in (("toprl", toprl), ("fastv", fast), ("untrained", untrained), ("divprune", 0.2))
            },
        }
        for _ in range(2)
    ]
    return {
        "budgets": ["192", "64"],
        "labels": {name: name for name in ("full", "toprl", "fastv", "untrained", "divprune")},
        "tasks": {"ocr": {}, "count": {}},
        "toprl_minus": main_table.toprl_minus(["ocr", "count"], answers),
        "averages": main_table.averages(answers),
    }


def test_main_verdicts():
    won, lost = main_result(0.8, 0.6, 0.3), main_result(0.6, 0.8, 0.7)
    assert outcomes(main_table.verdicts(won)) == [HOLDS, HOLDS, HOLDS]
    assert outcomes(main_table.verdicts(lost)) == [FAILS, FAILS, FAILS]
    assert outcomes(main_table.verdicts(main_result(0.7, 0.7, 0.7))) == [OPEN, OPEN, OPEN]
    # an untrained actor is a control, not a rival
    assert outcomes(main_table.verdicts(main_result(0.7, 0.6, 0.9))) == [HOLDS, HOLDS, FAILS]
    best, gap = main_table.gap_to_best(won, "64", "average")
    assert best == "fastv"
    assert gap.value == pytest.approx(0.2 / 0.9)
    assert won["averages"]["toprl/64"].value == pytest.approx(0.8 / 0.9)


def test_main_names_the_task_that_carries_it():
    """Ahead on ocr, level on the others."""
    tasks = ["ocr", "count", "exist"]
    shares = {"full/full": [1.0] * 3, "toprl/64": [0.9, 0.6, 0.6], "fastv/64": [0.5, 0.6, 0.6]}
    answers = [{name: [right(values[i])] for name, values in shares.items()} for i in range(3)]
    result = {
        "tasks": dict.fromkeys(tasks),
        "labels": {"fastv": "FastV"},
        "toprl_minus": main_table.toprl_minus(tasks, answers),
    }
    assert main_table.without_one(result, "64") == ("ocr", Estimate(0.0, 0.0, 0.0), "fastv")


def video_result(toprl: float, other: float, random: float) -> dict:
    shares = dict.fromkeys(video.BASELINES, 0.1) | {"full": 0.9, "divprune": other, "random": random, "toprl": toprl}
    return {"tasks": {"ocr": {name: {"scores": [right(share)]} for name, share in shares.items()}}}


def test_video_verdicts():
    assert outcomes(video.verdicts(video_result(0.8, 0.5, 0.3))) == [HOLDS, HOLDS]
    assert outcomes(video.verdicts(video_result(0.5, 0.8, 0.6))) == [FAILS, FAILS]


def ablation_result(changed: float, paper: float = 0.8) -> dict:
    names = (*ablations.SETTINGS, ablations.ONE_SHOT)
    row = {"average_tokens": 14.0, "free_accuracy": [0.5], "free_tokens": [9.0]}
    settings = {name: row | {"scores": [right(changed), right(changed)]} for name in names}
    settings[ablations.PAPER] = row | {"scores": [right(paper), right(paper)]}
    return {"tasks": {"count": {"full": right(0.9), "settings": settings}}}


def test_ablation_verdicts():
    assert outcomes(ablations.verdicts(ablation_result(0.5))) == [FAILS, HOLDS, HOLDS, HOLDS, HOLDS]
    assert outcomes(ablations.verdicts(ablation_result(0.9))) == [HOLDS, FAILS, FAILS, FAILS, FAILS]
    assert outcomes(ablations.verdicts(ablation_result(0.8))) == [HOLDS, OPEN, OPEN, OPEN, OPEN]


def test_ablation_stages_follow_the_papers_depths():
    assert [ablations.layers_of(stages, 32) for stages in (1, 3, 4)] == [(2,), (2, 8, 16), (2, 8, 16, 24)]
    assert ablations.layers_of(4, 6) == (1, 2, 3, 4)


# -- Table 3 -------------------------------------------------------------------------------------------------------


def test_table_3_is_reconstructed():
    rows = {row["method"]: row for row in efficiency.reconstruct()}
    assert rows["LLaVA-NeXT-7B"]["computed_tera_macs"] == pytest.approx(24.594, abs=5e-4)
    assert rows["FastV"]["computed_tera_macs"] == pytest.approx(3.890, abs=5e-4)
    assert rows["FastV"]["average_tokens"] == pytest.approx(479, abs=0.5)
    assert rows["TOP-RL"]["computed_tera_macs"] == pytest.approx(2.643, abs=5e-4)
    assert rows["TOP-RL"]["average_tokens"] == pytest.approx(320, abs=0.05)
    assert rows["TOP-RL"]["actor_tera_flops"] == pytest.approx(0.0083, abs=5e-5)
    assert rows["LLaVA-NeXT-7B"]["kv_mib"] == 360


def test_a_figure_that_does_not_follow_is_an_error(monkeypatch):
    wrong = efficiency.PRINTED[1]._replace(tflops=3.5)
    monkeypatch.setattr(efficiency, "PRINTED", (wrong,))
    with pytest.raises(RuntimeError, match=r"FastV: Eqs. 8-10 give 3.8\d+ T, the paper prints 3.5"):
        efficiency.reconstruct()


def efficiency_result(**prefill: float) -> dict:
    rows = {
        name: {"prefill_ms": [ms + i for i in range(7)], "decode_ms": [5.0] * 7, "kv_bytes": size, "macs_ratio": 3.0}
        for (name, ms), size in zip(prefill.items(), (90, 30, 30, 30), strict=True)
    }
    return {"printed": efficiency.reconstruct(), "rows": rows}


def test_efficiency_verdicts():
    fast = efficiency_result(full=900, fastv=400, pyramiddrop=300, toprl=300)
    # the first two are about the paper's own numbers, which do not change
    assert outcomes(efficiency.verdicts(fast)) == [FAILS, FAILS, HOLDS, HOLDS, HOLDS, HOLDS]
    slow = efficiency_result(full=300, fastv=400, pyramiddrop=400, toprl=900)
    assert outcomes(efficiency.verdicts(slow)) == [FAILS, FAILS, FAILS, FAILS, FAILS, HOLDS]


def test_speed_up_leaves_the_extreme_rounds_out():
    rows = {"full": {"prefill_ms": [10.0] * 7}, "toprl": {"prefill_ms": [1.0, 4, 5, 5, 5, 8, 100]}}
    assert efficiency.speed_up({"rows": rows}, "toprl") == Estimate(2.0, 1.25, 2.5)
