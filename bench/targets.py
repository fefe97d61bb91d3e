"""What the ops are meant to reach, and whether the rows of a run show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from bench.attention import BASE_KEEP, BASE_SIZE
from bench.common import MIB, Row, our_name

SOFT_BACKWARD = "soft fwd+bwd+mask"
LINEAR = 1.15  # exponent of memory over N that still counts as linear: fixed costs bend it, N^2 would be near 2
MEMORY_PROVIDERS = ("sdpa bool mask", "sdpa float mask + build", "torch eager (Eq. 7)")


@dataclass(frozen=True)
class Target:
    """``measure`` returns the value, or the reason why there is none; ``larger`` says which side of ``bar`` is good."""

    name: str
    device_type: str
    bar: float
    larger: bool
    unit: str
    measure: Callable[[list[Row]], float | str]


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(column) == value for column, value in wanted.items())]


def find(rows: list[Row], provider: str, **wanted: object) -> Row | None:
    """The first row of ``provider`` with these columns."""
    found = select(rows, provider=provider, **wanted)
    return found[0] if found else None


def worst_ratio(rows: list[Row], providers: tuple[str, ...], **wanted: object) -> float | str:
    """The smallest ratio_to_ours of any of the providers over the cases that match."""
    found = [row for provider in providers for row in select(rows, provider=provider, **wanted)]
    timed = [row["ratio_to_ours"] for row in found if row["ratio_to_ours"] is not None]
    if timed:
        return min(timed)
    notes = {row["note"] for row in found} - {"", None}
    return "; ".join(sorted(notes)) or f"no row of {' or '.join(providers)} in this run"


def at_base(providers: tuple[str, ...], mode: str, dtype: str) -> Callable[[list[Row]], float | str]:
    def measure(rows: list[Row]) -> float | str:
        return worst_ratio(
            rows,
            providers,
            op="masked_attention",
            mode=mode,
            num_tokens=BASE_SIZE,
            keep=BASE_KEEP,
            pattern="random",
            batch=1,
            dtype=dtype,
        )

    return measure


def memory_table(rows: list[Row], device: torch.device) -> list[Row]:
    """Peak memory over N: one row per mode and provider, one column per size, and the exponent between its ends."""
    ours = our_name(device)
    table = []
    for mode in ("hard fwd", "hard fwd+bwd", SOFT_BACKWARD):
        sweep = [
            row
            for row in select(rows, op="masked_attention", mode=mode, batch=1)
            if row["keep"] in (None, BASE_KEEP) and row["pattern"] != "clustered" and row["peak_mib"] is not None
        ]
        for provider in (ours, *MEMORY_PROVIDERS):
            points: dict[int, float] = {}
            for row in select(sweep, provider=provider):
                points.setdefault(row["num_tokens"], row["peak_mib"])  # the sweep comes before the other layouts
            if points:
                sizes = {f"N={size} MiB": round(points[size], 2) for size in sorted(points)}
                table.append({"mode": mode, "provider": provider, **sizes, "exponent": exponent(points)})
    return table


def exponent(points: dict[int, float]) -> float | None:
    """a in memory ~ N^a between the smallest and the largest size."""
    low, high = min(points), max(points)
    if low == high or points[low] <= 0 or points[high] <= 0:
        return None
    return math.log(points[high] / points[low]) / math.log(high / low)


def our_exponent(*modes: str) -> Callable[[list[Row]], float | str]:
    def measure(rows: list[Row]) -> float | str:
        table = memory_table(rows, torch.device("cpu"))
        found = [row["exponent"] for mode in modes for row in select(table, mode=mode, provider=our_name(CPU))]
        known = [value for value in found if value is not None]
        return max(known) if known else "fewer than two sizes in this run"

    return measure


def mask_gradient_cost(rows: list[Row]) -> float | str:
    """Backward with the mask's gradient over backward without it, worst case; the forward is subtracted from both."""
    costs = []
    for row in select(rows, op="masked_attention", mode=SOFT_BACKWARD, role="ours"):
        forward = find(rows, "ours, forward only", case=row["case"])
        without = find(rows, "ours, no mask gradient", case=row["case"])
        if forward and without and forward["p50_ms"] and without["p50_ms"]:
            costs.append((row["p50_ms"] - forward["p50_ms"]) / (without["p50_ms"] - forward["p50_ms"]))
    return max(costs) if costs else "no soft mask with all three timings in this run"


def all_kept_against_flash(rows: list[Row]) -> float | str:
    sizes = [row for row in select(rows, op="masked_attention", mode="hard fwd", keep=1.0) if "D128" in row["shape"]]
    return worst_ratio([row for row in sizes if row["num_tokens"] >= 2048], ("sdpa dense (bound)",))


def copy_percent(rows: list[Row]) -> float | str:
    large = [
        row["floor_percent"]
        for row in select(rows, op="topk_compact", mode="fwd", role="ours")
        if row["batch"] * row["keep"] * row["num_tokens"] * row["hidden_size"] * 2 >= 64 * MIB
    ]
    return min(large) if large else "no case of 64 MB in this run"


def actor_percent(rows: list[Row]) -> float | str:
    found = select(rows, op="actor_score", mode="fwd", num_tokens=2880, role="ours")
    return min(row["floor_percent"] for row in found) if found else "n = 2880 is not in this run"


CPU = torch.device("cpu")
SDPA_MASKS = ("sdpa bool mask", "sdpa float mask")
FLEX = ("flex mask_mod",)


def topk_ratio(peer: str) -> Callable[[list[Row]], float | str]:
    return lambda rows: worst_ratio(rows, (peer,), op="topk_compact", mode="fwd")


TARGETS = (
    Target(
        "masked_attention forward against SDPA with the N x N mask (the faster of bool and float, mask given)",
        "cpu", 2.5, True, "x", at_base(SDPA_MASKS, "hard fwd", "float32"),
    ),
    Target(
        "masked_attention forward + backward against SDPA with the N x N mask",
        "cpu", 2.5, True, "x", at_base(SDPA_MASKS, "hard fwd+bwd", "float32"),
    ),
    Target(
        "masked_attention forward against compiled FlexAttention (BlockMask given)",
        "cpu", 2.5, True, "x", at_base(FLEX, "hard fwd", "float32"),
    ),
    Target(
        "masked_attention memory, hard mask: exponent over N",
        "cpu", LINEAR, False, "", our_exponent("hard fwd", "hard fwd+bwd"),
    ),
    Target(
        "masked_attention with mask gradient against eager autograd of the definition, slowest size",
        "cpu", 1.0, True, "x",
        lambda rows: worst_ratio(rows, ("torch eager (Eq. 7)",), op="masked_attention", mode=SOFT_BACKWARD),
    ),
    Target(
        "masked_attention memory with mask gradient: exponent over N",
        "cpu", LINEAR, False, "", our_exponent(SOFT_BACKWARD),
    ),
    Target(
        "topk_compact against torch.topk + sort + gather, slowest size",
        "cpu", 1.0, True, "x", topk_ratio("torch.topk + sort + gather"),
    ),
    Target(
        "the same with index_select, which copies whole rows, in place of gather",
        "cpu", 1.0, True, "x", topk_ratio("torch.topk + sort + index_select"),
    ),
    *(
        Target(
            "actor_score against nn.Sequential, forward and forward + backward, slowest size",
            device, 1.0, True, "x", lambda rows: worst_ratio(rows, ("nn.Sequential",), op="actor_score"),
        )
        for device in ("cpu", "cuda")
    ),
    Target(
        "masked_attention, all-ones mask, D=128, N >= 2048, against the flash backend of SDPA",
        "cuda", 0.95, True, "x", all_kept_against_flash,
    ),
    Target(
        "masked_attention keep 25 % random against the flash backend of SDPA over all tokens",
        "cuda", 3.0, True, "x", at_base(("sdpa dense (bound)",), "hard fwd", "bfloat16"),
    ),
    Target(
        "masked_attention keep 25 % random against compiled FlexAttention (BlockMask given)",
        "cuda", 3.0, True, "x", at_base(FLEX, "hard fwd", "bfloat16"),
    ),
    Target("backward with mask gradient over backward without it", "cuda", 1.1, False, "x", mask_gradient_cost),
    Target(
        "topk_compact against torch.topk + sort + gather, slowest size",
        "cuda", 1.0, True, "x", topk_ratio("torch.topk + sort + gather"),
    ),
    Target("topk_compact of the copy bandwidth at 64 MB and more", "cuda", 80.0, True, "%", copy_percent),
    Target("actor_score of its floor at n = 2880", "cuda", 70.0, True, "%", actor_percent),
)  # fmt: skip


def targets_table(rows: list[Row], device: torch.device) -> list[Row]:
    """One row per target: bar, measured value, and met, missed by how much, or why it was not measured."""
    table = []
    for target in TARGETS:
        value: float | str = "no CUDA device" if target.device_type == "cuda" else f"the run is on {device.type}"
        if target.device_type == device.type:
            value = target.measure(rows)
        measured = value if isinstance(value, float) else None
        table.append(
            {
                "target": target.name,
                "device": target.device_type,
                "bar": f"{'>=' if target.larger else '<='} {target.bar:g}{target.unit}",
                "measured": measured,
                "met": None if measured is None else is_met(target, measured),
                "verdict": f"not measured: {value}" if measured is None else verdict(target, measured),
            }
        )
    return table


def is_met(target: Target, value: float) -> bool:
    return value >= target.bar if target.larger else value <= target.bar


def verdict(target: Target, value: float) -> str:
    share = abs(value / target.bar - 1)
    return f"met, {share:.0%} to spare" if is_met(target, value) else f"missed by {share:.0%}"
