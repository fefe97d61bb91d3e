"""Interleaved timing: every provider runs once per round, so that drift of the machine hits all of them alike."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 * 2**20  # larger than the L2 cache of any current GPU


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """The garbage collector off, and on again afterwards only where it was on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _quantile(samples: list[float], fraction: float) -> float:
    ordered = sorted(samples)
    return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]


def time_interleaved(
    providers: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warm_up: int = 2,
) -> dict[str, Timing]:
    """Run A B C, A B C, ... for about ``seconds`` in all and return the quantiles of each provider.

    On CUDA each call is timed by events after clearing the L2 cache; on the CPU by the wall clock. ``warm_up`` untimed
    rounds come first: compilation, allocation, paging in.
    """
    on_cuda = device.type == "cuda"
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if on_cuda else None
    for _ in range(warm_up):
        for call in providers.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in providers}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
        for name, call in providers.items():
            if scratch is not None:
                scratch.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                torch.cuda.synchronize(device)
                samples[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                call()
                samples[name].append((time.perf_counter() - begin) * 1e3)
        rounds += 1
    return {
        name: Timing(_quantile(values, 0.2), statistics.median(values), _quantile(values, 0.8), rounds)
        for name, values in samples.items()
    }
