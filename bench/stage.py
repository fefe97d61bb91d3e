"""What one pruning stage costs: operations or launches, host time, device time.

    python bench/run.py --suite stage

A prefill is run without a pruner and with one and three stages that drop a single token each, so that the layers do the
same work: ``per_stage`` is (three stages - one) / 2, ``once`` what remains of one stage's prefill after the unpruned
prefill and a stage. Counted are the operations that reach the dispatcher and are no views (a custom op is one, whatever
it launches); on CUDA also the launches that the profiler sees. Host time is until the call returns, device time until
the GPU is done; medians over rounds of all three in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.common import Row, dtype_name, now
from bench.generate import Constant
from bench.prefill import LLAVA_TOY, Case, attached, build_inputs, build_model
from toprl_models import Policy, Schedule, TopRLPolicy

WARM_UP_ROUNDS = 2
# operations that launch nothing: views, and memory that is only reserved
FREE = set(
    "view _unsafe_view _reshape_alias reshape expand transpose permute slice select unsqueeze squeeze t detach alias "
    "as_strided unbind split split_with_sizes unfold lift_fresh empty empty_like empty_strided new_empty "
    "new_empty_strided".split()
)
# 7B widths with few layers, and the same at a size for CPUs
LAYERS_OF_7B = Case("7b, 8 layers", 4096, 11008, 8, 32, 32, visual_tokens=576, average_tokens=576)
SMALL = Case("d256, 8 layers", 256, 704, 8, 4, 4, 576, 576, vocab_size=512, actor_size=16, dtype=torch.float32)


class Counter(TorchDispatchMode):
    """Counts operations, and those of this package among them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.ours = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        self.ours += namespace != "aten"
        self.operations += namespace != "aten" or name.split(".")[0] not in FREE
        return func(*args, **(kwargs or {}))


def run(size: str, device: str | torch.device) -> list[Row]:
    """One row per policy."""
    device = torch.device(device)
    torch.manual_seed(0)
    case = LLAVA_TOY if size == "tiny" else LAYERS_OF_7B if device.type == "cuda" else SMALL
    rounds = {"tiny": 1, "quick": 5, "full": 31}[size]
    with torch.no_grad():
        model = build_model(case, device)
        inputs = build_inputs(case, model)

        def actor(layers: list[int]) -> Policy:
            return TopRLPolicy(case.hidden_size, layers, case.actor_size).to(device, case.dtype)

        policies: dict[str, Callable[[list[int]], Policy]] = {"toprl": actor, "constant scores": lambda _: Constant()}
        rows = []
        for name, policy in policies.items():
            differences = measure(case, lambda: model(**inputs, use_cache=True), model, policy, rounds)
            labels = {"suite": "stage", "case": case.name, "policy": name, "dtype": dtype_name(case.dtype)}
            rows.append({**labels, "rounds": rounds, **differences})
    return rows


def measure(
    case: Case, prefill: Callable[[], object], model: Any, policy: Callable[[list[int]], Policy], rounds: int
) -> Row:
    """Differences of prefills with 0, 1 and 3 stages."""
    device = model.device
    methods: dict[str, tuple[Policy, Schedule] | None] = {"0": None}
    for layers in ([1], [1, 2, 3]):
        schedule = Schedule(tuple((layer, case.visual_tokens - layer) for layer in layers))
        methods[str(len(layers))] = (policy(layers), schedule)
    counts: dict[str, dict[str, float]] = {}
    for key, method in methods.items():
        with attached(model, method):
            prefill()  # what is made once stays out of the count
            with Counter() as counter:
                prefill()
            counts[key] = {"operations": counter.operations, "ours": counter.ours}
            if device.type == "cuda":
                counts[key]["launches"] = launches(prefill)
    samples: dict[str, list[tuple[float, float]]] = {key: [] for key in methods}
    for number in range(WARM_UP_ROUNDS + rounds):
        for key, method in methods.items():
            with attached(model, method):
                before = now(device)
                prefill()
                host = time.perf_counter() * 1e3
                after = now(device)
            if number >= WARM_UP_ROUNDS:
                samples[key].append((host - before, after - before))
    for key, times in samples.items():
        host, done = (torch.tensor(times).median(dim=0).values * 1e3).tolist()
        counts[key] |= {"host_us": host, "device_us": done}
    row: Row = {}
    for what in counts["0"]:
        row[f"{what}_per_stage"] = (counts["3"][what] - counts["1"][what]) / 2
        row[f"{what}_once"] = counts["1"][what] - counts["0"][what] - row[f"{what}_per_stage"]
    return row


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that the profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
