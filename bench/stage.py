"""What one pruning stage costs: launches, host time, device time.

    python bench/run.py --suite stage

A prefill is run without a pruner and with one and three stages that drop a single token each, so that the layers do the
same work: ``per_stage`` is (three stages - one) / 2, ``once`` what remains of one stage's prefill after the unpruned
prefill and a stage. ``launches`` are operations that reach the dispatcher and do something; a custom op counts as its
kernels (up to 4,096 tokens, with folded weights). On CUDA ``profiled`` are those that the profiler sees. Host time is
until the call returns, device time until the GPU is done; medians over rounds of all three in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.common import Report, Row, dtype_name, in_turn, now
from bench.generate import Constant
from bench.prefill import LLAVA_TOY, Case, Method, attached, build_actor, build_inputs, build_model
from toprl_models import Policy, Schedule

KERNELS = {"actor_score": 2}  # launches of ops that are more than one
# beside views: memory that is only reserved, and numbers that are copied
NOTHING = set("empty empty_like new_empty empty_strided new_empty_strided detach alias lift_fresh split_with_sizes "
              "_unsafe_view _local_scalar_dense".split())  # fmt: skip
# 7B widths with few layers, and the same at a size for CPUs
LAYERS_OF_7B = Case("7b, 8 layers", 4096, 11008, 8, 32, 32, visual_tokens=576, average_tokens=576)
SMALL = Case("d256, 8 layers", 256, 704, 8, 4, 4, 576, 576, vocab_size=512, actor_size=16, dtype=torch.float32)


class Counter(TorchDispatchMode):
    """Counts launches."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].split(".")[0]
        if not func.is_view and name not in NOTHING:
            self.launches += KERNELS.get(name, 1)
        return func(*args, **(kwargs or {}))


def run(size: str, device: torch.device, report: Report) -> None:
    """One row per policy."""
    torch.manual_seed(0)
    case = LLAVA_TOY if size == "tiny" else LAYERS_OF_7B if device.type == "cuda" else SMALL
    rounds = {"tiny": 1, "quick": 5, "full": 31}[size]
    policies: dict[str, Callable[[list[int]], Policy]] = {
        "toprl": partial(build_actor, case, device=device),
        "constant scores": lambda layers: Constant(),
    }
    with torch.no_grad():
        model = build_model(case, device)
        for name, policy in policies.items():
            labels = {"suite": "stage", "case": case.name, "policy": name, "dtype": dtype_name(case.dtype)}
            report.add([{**labels, "rounds": rounds, **measure(case, model, policy, rounds)}])


def measure(case: Case, model: Any, policy: Callable[[list[int]], Policy], rounds: int) -> Row:
    """Differences of prefills with 0, 1 and 3 stages."""
    device, inputs = model.device, build_inputs(case, model)
    methods: dict[str, Method] = {"0": None}
    for layers in ([1], [1, 2, 3]):
        schedule = Schedule(tuple((layer, case.visual_tokens - layer) for layer in layers))
        methods[str(len(layers))] = (policy(layers), schedule)

    def timed(key: str) -> tuple[float, float]:
        """Microseconds until the call returns and until all is done."""
        with attached(model, methods[key]):
            before = now(device)
            model(**inputs, use_cache=True)
            host = time.perf_counter() * 1e3
            after = now(device)
        return 1e3 * (host - before), 1e3 * (after - before)

    counts: dict[str, dict[str, float]] = {}
    for key, times in in_turn({key: partial(timed, key) for key in methods}, min_rounds=rounds).items():
        with attached(model, methods[key]):
            model(**inputs, use_cache=True)  # what is made once stays out of the count
            with Counter() as counter:
                model(**inputs, use_cache=True)
            counts[key] = {"launches": counter.launches}
            if device.type == "cuda":
                counts[key]["profiled"] = profiled(lambda: model(**inputs, use_cache=True))
        host, done = torch.tensor(times).median(dim=0).values.tolist()
        counts[key] |= {"host_us": host, "device_us": done}
    row: Row = {}
    for what in counts["0"]:
        row[f"{what}_per_stage"] = (counts["3"][what] - counts["1"][what]) / 2
        row[f"{what}_once"] = counts["1"][what] - counts["0"][what] - row[f"{what}_per_stage"]
    return row


def profiled(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that the profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
