"""What all suites share: checked comparison of providers, memory, order of timing."""

from __future__ import annotations

import math

import pytest
import torch

from bench.common import (
    LEFT_OUT,
    Case,
    Check,
    Peaks,
    Provider,
    Settings,
    Work,
    compare,
    peak_memory,
    reason_of,
    time_interleaved,
)

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, Peaks({torch.float32: 1e11}, 1e10), seconds=0.01, min_rounds=2)


class Toy(Case):
    op, shape = "toy", "4"


def returns(value):
    return lambda: [torch.full((4,), value)]


def measured(*peers):
    """Rows of ``compare`` with an op of ours that returns 1, and its peers, by name."""
    rows = compare(
        Toy(),
        [Provider("ours", returns(1.0), "ours"), *peers],
        lambda results: Check(float((results[0] - 1).abs().max()), 0.01),
        Work(0.0, 16.0),
        SETTINGS,
    )
    return {row["provider"]: row for row in rows}


def test_peers_that_are_inexact_wrong_or_broken_become_notes():
    def broken():
        try:
            raise NotImplementedError("no backward on CPU\nand more lines")
        except NotImplementedError as error:
            raise RuntimeError("compilation failed") from error

    rows = measured(
        Provider("inexact", returns(1.02)),
        Provider("wrong", returns(3.0)),
        Provider("nan", returns(math.nan)),
        Provider("broken", broken),
        Provider("graph", broken, compiled=True),
        Provider("absent", broken, missing="not on this machine"),
        Provider("bound", returns(7.0), "bound"),
        Provider("given", returns(1.0), resident=8 * 2**20),
    )
    assert rows["inexact"]["p50_ms"] > 0 and "exceeds the budget" in rows["inexact"]["note"]
    for name in ("wrong", "nan"):
        assert rows[name]["p50_ms"] is None and rows[name]["note"].endswith("wrong result, not timed")
    assert rows["broken"]["note"] == "cannot run: NotImplementedError: no backward on CPU"
    assert rows["broken"]["p50_ms"] is None and rows["broken"]["rounds"] == 0
    assert rows["graph"]["note"] == LEFT_OUT and rows["absent"]["note"] == "not on this machine"
    assert rows["given"]["peak_mib"] == pytest.approx(8, abs=0.01) and rows["ours"]["peak_mib"] < 0.01
    assert rows["bound"]["p50_ms"] > 0 and rows["bound"]["error"] is None
    assert rows["ours"]["note"] == "" and rows["ours"]["ratio_to_ours"] == 1.0


def test_reason_inside_dynamo_s_quotation():
    found = reason_of(RuntimeError("raised exception NotImplementedError('no backward on CPU')"))
    assert found == "NotImplementedError: no backward on CPU"


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        for _ in range(3):
            a = torch.ones(2**18)  # 1 MiB each
            b = a + 1
            del a, b
        return torch.ones(2**16)

    assert peak_memory(call, CPU) == pytest.approx(2 * 2**20, rel=0.01)


def test_calls_are_timed_in_turn():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = time_interleaved(calls, CPU, seconds=0.0, min_rounds=2, warm_up=1)
    assert "".join(order) == "abc" * 3
    assert all(timing.rounds == 2 and timing.p20_ms <= timing.p50_ms <= timing.p80_ms for timing in found.values())
