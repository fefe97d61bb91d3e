"""How well a compiled kernel can do at best: occupancy and a roofline. Estimates from published figures, not timings.

A multiprocessor's share of the work is bounded by each of: matrix throughput, special functions (exponentials), reads
from the L2 cache, and the chip by its memory; the bound is the slowest of them, as if all overlapped perfectly. The
first three take into account that the last wave of programs may leave multiprocessors idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from toprl_kernels.ahead_of_time import Resources


@dataclass(frozen=True)
class Chip:
    """Published figures of one product; rates in units per second."""

    name: str
    multiprocessors: int
    tensor_flops: float  # bf16, dense
    single_flops: float  # float32 without tensor cores
    memory_bandwidth: float
    clock: float  # Hz, at which the figures above are stated
    shared_memory: int  # bytes per multiprocessor
    warps: int  # per multiprocessor
    blocks: int  # per multiprocessor
    tensor_memory: int = 0  # columns per multiprocessor


# NVIDIA's data sheets (A100 80GB SXM, A40, H100 SXM, HGX B200) and the CUDA C++ programming guide's table of technical
# specifications per compute capability. Sparse figures are halved.
CHIPS = {
    "sm_80": Chip("A100 SXM", 108, 312e12, 19.5e12, 2.04e12, 1.41e9, 164 << 10, 64, 32),
    "sm_86": Chip("A40", 84, 149.7e12, 37.4e12, 0.696e12, 1.74e9, 100 << 10, 48, 16),
    "sm_90": Chip("H100 SXM", 132, 989e12, 67e12, 3.35e12, 1.83e9, 228 << 10, 64, 32),
    "sm_100": Chip("B200", 148, 2250e12, 75e12, 8.0e12, 1.85e9, 228 << 10, 64, 32, tensor_memory=512),
}
REGISTERS = 64 * 1024  # per multiprocessor, allocated in units of 256 per warp
RESERVED_SHARED = 1024  # per program, by the driver
EXPS_PER_CLOCK = 16  # special functions per multiprocessor and clock (programming guide, arithmetic throughput)
L2_BYTES_PER_CLOCK = 5120 / 108  # per multiprocessor: A100 white paper; not published for the others, taken as the same


@dataclass(frozen=True)
class Bound:
    """The estimate for one compiled case."""

    occupancy: int  # programs per multiprocessor
    limited_by: str  # what does not let one more program in
    microseconds: float  # of Work.problem
    resource: str  # the slowest: "matrix", "special", "L2" or "memory"


def bound(resources: Resources) -> Bound | None:
    """None for a chip without figures, a case without work, or one that does not compile."""
    chip, work = CHIPS.get(resources.architecture), resources.work
    if chip is None or work is None or resources.error:
        return None
    programs, limited_by = occupancy(resources, chip)
    # the busiest multiprocessor has this many times the average work
    imbalance = math.ceil(work.programs / chip.multiprocessors) * chip.multiprocessors / work.programs
    per_clock = chip.multiprocessors * chip.clock
    seconds = {
        "matrix": work.flops / (chip.single_flops if work.single else chip.tensor_flops) * imbalance,
        "special": work.exps / (EXPS_PER_CLOCK * per_clock) * imbalance,
        "L2": work.l2_bytes / (L2_BYTES_PER_CLOCK * per_clock) * imbalance,
        "memory": work.dram_bytes / chip.memory_bandwidth,
    }
    resource = max(seconds, key=lambda name: seconds[name])
    return Bound(programs, limited_by, seconds[resource] * 1e6, resource)


def occupancy(resources: Resources, chip: Chip) -> tuple[int, str]:
    """Programs that fit into a multiprocessor at once, and the resource that runs out first."""
    warps = resources.config.num_warps
    registers_per_warp = math.ceil(resources.registers * 32 / 256) * 256
    fits = {
        "registers": REGISTERS // max(registers_per_warp * warps, 1),
        "shared": chip.shared_memory // (resources.shared_bytes + RESERVED_SHARED),
        "warps": chip.warps // warps,
        "blocks": chip.blocks,
    }
    if resources.tensor_memory:
        fits["tensor memory"] = chip.tensor_memory // resources.tensor_memory
    name = min(fits, key=lambda key: fits[key])
    return fits[name], name
