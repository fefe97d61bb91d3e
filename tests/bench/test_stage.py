"""The suites that attach a pruner to a tiny model: what a stage costs, generation, overhead."""

from __future__ import annotations

import pytest
import torch

from bench import generate, stage
from bench.common import Report, Row

CPU = torch.device("cpu")


def rows_of(suite: str) -> list[Row]:
    report = Report(suite, {})
    (stage if suite == "stage" else generate).run("tiny", CPU, report)
    return report.rows


def test_launches_of_a_stage_are_counted() -> None:
    """Both policies select and compact in two launches; the actor's network is two more, constant scores are one."""
    actor, constant = rows_of("stage")
    assert (actor["policy"], constant["policy"]) == ("toprl", "constant scores")
    assert (actor["launches_per_stage"], constant["launches_per_stage"]) == (4, 3)
    assert actor["launches_once"] == constant["launches_once"] > 0
    assert {"host_us_per_stage", "device_us_per_stage"} <= set(actor)


def test_views_and_reservations_are_not_counted() -> None:
    x = torch.ones(4, 4)
    with stage.Counter() as counter:
        (x.view(16)[1:].unsqueeze(0).expand(2, -1) + torch.empty(2, 15).fill_(1.0)).sum()
    assert counter.launches == 3  # fill, add, sum


@pytest.mark.parametrize("suite", ["generate", "overhead"])
def test_ways_are_timed_against_the_unpruned_model(suite: str) -> None:
    rows = rows_of(suite)
    assert [row["phase"] for row in rows[:2]] == ["prefill", "decode"]
    assert all(row["ratio_p50"] == 1 for row in rows if row["way"] == "unpruned")
    assert len(rows) == 2 * (4 if suite == "generate" else 3)


def test_a_pruner_that_moves_a_logit_is_no_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "keep_all", generate.build_methods)
    with pytest.raises(generate.WrongPrefillError, match="toy, fastv: keep-all moved the logits"):
        rows_of("overhead")
