"""The tables made of the rows: targets with their verdicts, memory over N."""

from __future__ import annotations

import pytest
import torch

from bench.targets import TARGETS, memory_table, targets_table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BASE = dict(
    op="masked_attention", mode="hard fwd", shape="B1 H8/2 N2048 D64", dtype="float32", batch=1, num_tokens=2048,
    keep=0.25, pattern="random", role="peer", note="", case="base", p50_ms=1.0, ratio_to_ours=None, peak_mib=None,
)  # fmt: skip


def table(rows, device=CPU):
    """Verdicts by the position in TARGETS, as a name may serve two devices."""
    found = targets_table(rows, device)
    assert [row["target"] for row in found] == [target.name for target in TARGETS]
    return found


def verdict_of(rows, words, device=CPU):
    return next(row for row in table(rows, device) if row["device"] == device.type and words in row["target"])


def test_without_rows_nothing_is_measured():
    for row in table([]):
        assert row["met"] is None and row["measured"] is None
        here = "not measured: no" if row["device"] == "cpu" else "not measured: no CUDA device"
        assert row["verdict"].startswith((here, "not measured: fewer than two sizes"))


@pytest.mark.parametrize(("ratio", "met", "verdict"), [(3.0, True, "met, 20% to spare"), (2.0, False, "missed by 20%")])
def test_the_faster_of_the_masks_decides(ratio, met, verdict):
    rows = [
        {**BASE, "provider": "sdpa bool mask", "ratio_to_ours": 9.0},
        {**BASE, "provider": "sdpa float mask", "ratio_to_ours": ratio},
        {**BASE, "provider": "sdpa float mask", "ratio_to_ours": 0.1, "keep": 0.5},  # another case
    ]
    found = verdict_of(rows, "forward against SDPA")
    assert (found["bar"], found["measured"], found["met"], found["verdict"]) == (">= 2.5x", ratio, met, verdict)


def test_a_peer_without_a_time_passes_its_reason_on():
    rows = [{**BASE, "provider": "flex mask_mod", "note": "cannot run: no compiler"}]
    assert verdict_of(rows, "FlexAttention")["verdict"] == "not measured: cannot run: no compiler"


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_actor_is_compared_in_both_modes(device):
    row = {**BASE, "op": "actor_score", "provider": "nn.Sequential"}
    rows = [{**row, "mode": "fwd", "ratio_to_ours": 1.2}, {**row, "mode": "fwd+bwd", "ratio_to_ours": 0.9}]
    found = verdict_of(rows, "actor_score against nn.Sequential", device)
    assert (found["measured"], found["verdict"]) == (0.9, "missed by 10%")


def test_memory_table_and_its_targets():
    rows = [
        {**BASE, "mode": mode, "num_tokens": n, "provider": "toprl (eager)", "peak_mib": (n / 576) ** power}
        for mode, power in (("hard fwd", 1.0), ("hard fwd+bwd", 1.1), ("soft fwd+bwd+mask", 2.0))
        for n in (576, 2304)
    ]
    found = memory_table(rows, CPU)
    assert [row["mode"] for row in found] == ["hard fwd", "hard fwd+bwd", "soft fwd+bwd+mask"]
    assert [row["exponent"] for row in found] == pytest.approx([1.0, 1.1, 2.0])
    assert (found[2]["N=576 MiB"], found[2]["N=2304 MiB"]) == (1.0, 16.0)
    assert verdict_of(rows, "memory, hard mask")["met"] is True
    assert verdict_of(rows, "memory with mask gradient")["met"] is False


OURS = {"role": "ours", "provider": "toprl (triton)"}
TOPK = {"op": "topk_compact", "mode": "fwd", "hidden_size": 4096, **OURS}


@pytest.mark.parametrize(
    ("words", "rows", "measured", "is_met"),
    [
        ("flash backend of SDPA over all tokens",
         [{"dtype": "bfloat16", "provider": "sdpa dense (bound)", "ratio_to_ours": 3.3}], 3.3, True),
        ("all-ones mask",
         [{"shape": "B1 H32/8 N2048 D128", "keep": 1.0, "provider": "sdpa dense (bound)", "ratio_to_ours": 0.9}],
         0.9, False),
        ("backward with mask gradient",
         [{"mode": "soft fwd+bwd+mask", **OURS, "p50_ms": 3.1},
          {"mode": "soft fwd+bwd+mask", "provider": "ours, forward only", "p50_ms": 1.0},
          {"mode": "soft fwd+bwd+mask", "provider": "ours, no mask gradient", "p50_ms": 3.0}], 1.05, True),
        ("copy bandwidth",  # small sizes are bound by their launches
         [{**TOPK, "batch": 32, "num_tokens": 2880, "floor_percent": 85.0},
          {**TOPK, "num_tokens": 576, "floor_percent": 3.0}], 85.0, True),
        ("actor_score of its floor",
         [{"op": "actor_score", "mode": "fwd", "num_tokens": 2880, **OURS, "floor_percent": 60.0}], 60.0, False),
    ],
)  # fmt: skip
def test_targets_of_a_gpu(words, rows, measured, is_met):
    found = verdict_of([{**BASE, **row} for row in rows], words, CUDA)
    assert found["measured"] == pytest.approx(measured) and found["met"] is is_met
