"""The serving suite on a toy: a row for each provider, and pages that shrink with the tokens."""

from __future__ import annotations

import torch

from bench import serving
from bench.common import Report


def test_rows() -> None:
    report = Report("serving", {})
    serving.run("tiny", torch.device("cpu"), report)
    assert [(row["method"], row["where"]) for row in report.rows] == [
        ("divprune", "before"),
        ("toprl", "inside"),
        ("unpruned", ""),
    ]
    before, inside, unpruned = report.rows
    assert unpruned["speedup"] == unpruned["kv_ratio"] == unpruned["efficiency"] == 1
    assert before["stages"] == "0:16" and inside["stages"].count(":") == 3
    # 64 + 9 tokens are 3 blocks of 32 a layer; 16 + 9 are 1; inside the decoder the first of 8 layers has all
    assert before["kv_ratio"] < inside["kv_ratio"] < 1
    assert all(row["requests_per_second"] > 0 and row["ttft_ms"] > 0 for row in report.rows)
    assert before["macs_ratio"] > 2 and inside["macs_ratio"] > 2
