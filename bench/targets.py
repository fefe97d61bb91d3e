"""What the ops are meant to reach, and whether the rows of a run show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from bench.attention import BASE_KEEP, BASE_SIZE
from bench.common import MIB, Row, our_name

HARD, SOFT_BACKWARD = ("hard fwd", "hard fwd+bwd"), "soft fwd+bwd+mask"
LINEAR = 1.15  # exponent of memory over N that still counts as linear: fixed costs bend it, N^2 would be near 2
EAGER, DENSE = "torch eager (Eq. 7)", "sdpa dense (bound)"
SDPA_MASKS, FLEX = ("sdpa bool mask", "sdpa float mask"), ("flex mask_mod",)
MEMORY_PROVIDERS = ("sdpa bool mask", "sdpa float mask + build", EAGER)

Value = float | str  # a measured value, or the reason why there is none
Measure = Callable[[list[Row]], Value]


class Target(NamedTuple):
    """``is_larger`` says which side of ``bar`` is good."""

    name: str
    device_type: str
    is_larger: bool
    bar: float
    unit: str
    measure: Measure


def verdict(name: str, is_larger: bool, bar: float, value: Value, unit: str = "") -> Row:
    """The row of a target: bar, measured value, and met, missed by how much, or why it was not measured."""
    row: Row = {"target": name, "bar": f"{'>=' if is_larger else '<='} {bar:g}{unit}", "measured": None, "met": None}
    if isinstance(value, str):
        return {**row, "verdict": f"not measured: {value}"}
    is_met, share = (value >= bar) if is_larger else (value <= bar), abs(value / bar - 1)
    text = f"met, {share:.0%} to spare" if is_met else f"missed by {share:.0%}"
    return {**row, "measured": value, "met": is_met, "verdict": text}


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(column) == value for column, value in wanted.items())]


def worst_ratio(rows: list[Row], providers: tuple[str, ...], **wanted: object) -> Value:
    """The smallest ratio_to_ours of any of the providers over the cases that match."""
    matching = [row for row in select(rows, **wanted) if row["provider"] in providers]
    if timed := [row["ratio_to_ours"] for row in matching if row["ratio_to_ours"] is not None]:
        return min(timed)
    notes = {row["note"] for row in matching} - {"", None}
    return "; ".join(sorted(notes)) or f"no row of {' or '.join(providers)} in this run"


def versus(*providers: str, **wanted: object) -> Measure:
    return lambda rows: worst_ratio(rows, providers, **wanted)


def memory_table(rows: list[Row], device: torch.device) -> list[Row]:
    """Peak memory over N: one row per mode and provider, one column per size, and the exponent between its ends."""
    lines = []
    for mode in (*HARD, SOFT_BACKWARD):
        sweep = [
            row
            for row in select(rows, op="masked_attention", mode=mode, batch=1)
            if row["keep"] in (None, BASE_KEEP) and row["pattern"] != "clustered" and row["peak_mib"] is not None
        ]
        for provider in (our_name(device), *MEMORY_PROVIDERS):
            points: dict[int, float] = {}
            for row in select(sweep, provider=provider):
                points.setdefault(row["num_tokens"], row["peak_mib"])  # the sweep comes before the other layouts
            if points:
                sizes = {f"N={size} MiB": round(points[size], 2) for size in sorted(points)}
                lines.append({"mode": mode, "provider": provider, **sizes, "exponent": exponent(points)})
    return lines


def exponent(points: dict[int, float]) -> float | None:
    """a in memory ~ N^a between the smallest and the largest size."""
    low, high = min(points), max(points)
    if low == high or points[low] <= 0 or points[high] <= 0:
        return None
    return math.log(points[high] / points[low]) / math.log(high / low)


def our_exponent(*modes: str) -> Measure:
    def measure(rows: list[Row]) -> Value:
        cpu = torch.device("cpu")
        matching = [row for row in select(memory_table(rows, cpu), provider=our_name(cpu)) if row["mode"] in modes]
        known = [row["exponent"] for row in matching if row["exponent"] is not None]
        return max(known, default="fewer than two sizes in this run")

    return measure


def mask_gradient_cost(rows: list[Row]) -> Value:
    """Backward with the mask's gradient over backward without it, worst case; the forward is subtracted from both."""
    costs = []
    for row in select(rows, op="masked_attention", mode=SOFT_BACKWARD, role="ours"):
        names = ("ours, forward only", "ours, no mask gradient")
        times = [part["p50_ms"] for name in names for part in select(rows, provider=name, case=row["case"])]
        if len(times) == 2 and all(times):
            costs.append((row["p50_ms"] - times[0]) / (times[1] - times[0]))
    return max(costs, default="no soft mask with all three timings in this run")


def all_kept_against_flash(rows: list[Row]) -> Value:
    matching = select(rows, op="masked_attention", mode="hard fwd", keep=1.0)
    return worst_ratio([row for row in matching if "D128" in row["shape"] and row["num_tokens"] >= 2048], (DENSE,))


def copy_percent(rows: list[Row]) -> Value:
    large = [
        row["floor_percent"]
        for row in select(rows, op="topk_compact", mode="fwd", role="ours")
        if row["batch"] * row["keep"] * row["num_tokens"] * row["hidden_size"] * 2 >= 64 * MIB
    ]
    return min(large, default="no case of 64 MB in this run")


def actor_percent(rows: list[Row]) -> Value:
    matching = select(rows, op="actor_score", mode="fwd", num_tokens=2880, role="ours")
    return min((row["floor_percent"] for row in matching), default="n = 2880 is not in this run")


_attention = partial(versus, op="masked_attention", num_tokens=BASE_SIZE, keep=BASE_KEEP, pattern="random", batch=1)
_on_cpu, _on_gpu = (partial(_attention, dtype=dtype) for dtype in ("float32", "bfloat16"))
_topk = partial(versus, op="topk_compact", mode="fwd")
_actor = versus("nn.Sequential", op="actor_score")
_slowest = "actor_score against nn.Sequential, forward and forward + backward, slowest size"

TARGETS = [Target(*row) for row in (
    ("masked_attention forward against SDPA with the N x N mask (the faster of bool and float, mask given)",
     "cpu", True, 2.5, "x", _on_cpu(*SDPA_MASKS, mode="hard fwd")),
    ("masked_attention forward + backward against SDPA with the N x N mask",
     "cpu", True, 2.5, "x", _on_cpu(*SDPA_MASKS, mode="hard fwd+bwd")),
    ("masked_attention forward against compiled FlexAttention (BlockMask given)",
     "cpu", True, 2.5, "x", _on_cpu(*FLEX, mode="hard fwd")),
    ("masked_attention memory, hard mask: exponent over N", "cpu", False, LINEAR, "", our_exponent(*HARD)),
    ("masked_attention with mask gradient against eager autograd of the definition, slowest size",
     "cpu", True, 1.0, "x", versus(EAGER, op="masked_attention", mode=SOFT_BACKWARD)),
    ("masked_attention memory with mask gradient: exponent over N",
     "cpu", False, LINEAR, "", our_exponent(SOFT_BACKWARD)),
    ("topk_compact against torch.topk + sort + gather, slowest size",
     "cpu", True, 1.0, "x", _topk("torch.topk + sort + gather")),
    ("the same with index_select, which copies whole rows, in place of gather",
     "cpu", True, 1.0, "x", _topk("torch.topk + sort + index_select")),
    (_slowest, "cpu", True, 1.0, "x", _actor),
    (_slowest, "cuda", True, 1.0, "x", _actor),
    ("masked_attention, all-ones mask, D=128, N >= 2048, against the flash backend of SDPA",
     "cuda", True, 0.95, "x", all_kept_against_flash),
    ("masked_attention keep 25 % random against the flash backend of SDPA over all tokens",
     "cuda", True, 3.0, "x", _on_gpu(DENSE, mode="hard fwd")),
    ("masked_attention keep 25 % random against compiled FlexAttention (BlockMask given)",
     "cuda", True, 3.0, "x", _on_gpu(*FLEX, mode="hard fwd")),
    ("backward with mask gradient over backward without it", "cuda", False, 1.1, "x", mask_gradient_cost),
    ("topk_compact against torch.topk + sort + gather, slowest size",
     "cuda", True, 1.0, "x", _topk("torch.topk + sort + gather")),
    ("topk_compact of the copy bandwidth at 64 MB and more", "cuda", True, 80.0, "%", copy_percent),
    ("actor_score of its floor at n = 2880", "cuda", True, 70.0, "%", actor_percent),
)]  # fmt: skip


def targets_table(rows: list[Row], device: torch.device) -> list[Row]:
    """One row per target."""
    table = []
    for target in TARGETS:
        value: Value = "no CUDA device" if target.device_type == "cuda" else f"the run is on {device.type}"
        if target.device_type == device.type:
            value = target.measure(rows)
        row = verdict(target.name, target.is_larger, target.bar, value, target.unit)
        table.append({"target": row.pop("target"), "device": target.device_type, **row})
    return table
