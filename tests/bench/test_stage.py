"""The suites that attach a pruner to a tiny model: what a stage costs, generation, overhead."""

from __future__ import annotations

import pytest
import torch

from bench import generate, stage


def test_operations_of_a_stage_are_counted() -> None:
    """Both policies select and compact; the actor's network is another operation of this package."""
    rows = {row["policy"]: row for row in stage.run("tiny", "cpu")}
    assert list(rows) == ["toprl", "constant scores"]
    actor, constant = rows.values()
    assert 1 <= constant["ours_per_stage"] < actor["ours_per_stage"] <= 4
    assert constant["ours_once"] == 0 <= constant["operations_once"]
    assert constant["ours_per_stage"] <= constant["operations_per_stage"] < 100
    assert {"host_us_per_stage", "device_us_per_stage"} <= set(actor)


def test_views_and_reservations_are_not_counted() -> None:
    x = torch.ones(4, 4)
    with stage.Counter() as counter:
        (x.view(16)[1:].unsqueeze(0).expand(2, -1) + torch.empty(2, 15).fill_(1.0)).sum()
    assert (counter.operations, counter.ours) == (3, 0)  # fill, add, sum


@pytest.mark.parametrize("suite", ["generate", "overhead"])
def test_ways_are_timed_against_the_unpruned_model(suite: str) -> None:
    rows = generate.run(suite, "tiny", "cpu")
    assert [row["phase"] for row in rows[:2]] == ["prefill", "decode"]
    assert all(row["ratio_p50"] == 1 for row in rows if row["way"] == "unpruned")
    assert len(rows) == 2 * (4 if suite == "generate" else 3)


def test_a_pruner_that_moves_a_logit_is_no_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "keep_all", generate.build_methods)
    with pytest.raises(generate.WrongPrefillError, match="toy, fastv: keep-all moved the logits"):
        generate.run("overhead", "tiny", "cpu")
