"""What the compiler makes of every kernel as it is launched; needs triton, but no GPU.

    python bench/compile_report.py                                   # sm_80, sm_90 and sm_100
    python bench/compile_report.py --arch 90 --kernel 'dkdv D=128'
    python bench/compile_report.py --arch 90 --config masked_attention_fwd=128,64,8,5

The public functions are called on CPU tensors of a 7B model's shapes while a launch compiles for the architecture and
runs nothing: arguments go through triton's binder and the op's launch code, so what is reported is what a GPU gets.

Per kernel: registers, spills (loads and stores of local memory), shared memory, programs that a multiprocessor holds.
Per innermost loop with matrix products: their instruction, how often the warps together compute each product
(redundancy), tiles in flight (buffers of a loaded tile, groups of copies that the wait at the top leaves open), spills
and load widths inside the loop, and for attention warp-instructions per 1,000 query-key pairs. The exit status is 1 if
a kernel has a problem that is not in ``KNOWN``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ``bench`` is found when this file is a script

import toprl_kernels
from bench.common import Row, table
from toprl_kernels import (
    actor_score,
    compact_cache,
    configs,
    masked_attention,
    prune_stage,
    sample_keep_mask,
    topk_compact,
)
from toprl_kernels.configs import LaunchConfig
from toprl_kernels.testing import make_actor_weights

PRODUCT = r"HG?MMA\b|UTC[A-Z]*MMA\b"  # matrix instructions; the one that a 16-bit product should become:
MATRIX = {"sm_80": r"HMMA\b", "sm_86": r"HMMA\b", "sm_90": r"HGMMA\b", "sm_100": r"UTC[A-Z]*MMA\b"}
RESIDENT_SHARED = {"sm_80": 164, "sm_86": 100, "sm_90": 228, "sm_100": 228}  # KiB per multiprocessor
MAX_THREADS = 1024
# Tiles of keys and values that must be in flight up to D = 128, where shared memory is large
IN_FLIGHT = {"masked_attention_fwd": 3, "masked_attention_bwd_dq": 3}
# (kernel, pattern of "architecture case") -> why its problems may stay
FLOAT = "float32 rows of D = 256 on the FMA units: every block size tried spills"
KNOWN = {
    ("masked_attention_decode", "sm_(90|100) .*bf16"): "16 packed rows; the instructions of sm_90 and later want 64",
    ("masked_attention_bwd_dkdv", "sm_(80|86) D=256 bf16"): "64 keys for 8 warps; 4 warps spill inside the loop",
    ("masked_attention_bwd_dq", "D=256 fp32"): FLOAT,
}


@dataclass
class Loop:
    """An innermost loop with matrix products; counts are of instructions per warp and iteration."""

    tiles: list[str]  # M x N x K of its products
    buffers: int  # of a loaded tile; 0 where tiles pass through registers
    wait: int  # groups of copies still open after the wait at the top; 0 waits in full
    redundancy: float
    instruction: str = ""
    instructions: int = 0
    spills: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    per_1k_pairs: float | None = None


@dataclass
class Kernel:
    """A compiled launch."""

    architecture: str
    kernel: str
    case: str
    launch: str  # block sizes, warps, stages
    warps: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    loops: list[Loop] = field(default_factory=list)
    half: bool = False  # whether it multiplies 16-bit matrices
    in_flight: int = 0  # tiles that must be
    error: str = ""

    def programs(self) -> int:
        """Programs that fit into a multiprocessor at once, by registers, shared memory and warps."""
        per_warp = math.ceil(self.registers * 32 / 256) * 256
        shared = (RESIDENT_SHARED[self.architecture] << 10) // (self.shared + 1024)
        return min(65536 // max(per_warp * self.warps, 1), shared, 64 // self.warps, 32)

    def problems(self) -> list[str]:
        """What must not be shipped; empty for a good kernel."""
        if self.error:
            return [f"does not compile: {self.error}"]
        limit = configs.SHARED_MEMORY[self.architecture]
        told: list[tuple[object, str]] = [
            (self.shared > limit, f"{self.shared} bytes of shared memory, the limit is {limit}"),
            (self.warps * 32 > MAX_THREADS, f"{self.warps * 32} threads, the limit is {MAX_THREADS}"),
            (self.spills and not self.loops, f"{self.spills} spills"),
        ]
        shortest = min((loop.instructions for loop in self.loops), default=0)  # the others are edges of the main loop
        for number, loop in enumerate(self.loops):
            where = f"loop {number}: "
            told.append((loop.spills, f"{where}{loop.spills} spills inside"))
            if not self.half:
                continue
            is_matrix = re.match(MATRIX[self.architecture], loop.instruction)
            wide = sum(count for name, count in loop.loads.items() if name.endswith(".128"))
            narrow = sum(count for name, count in loop.loads.items() if re.search(r"\.[US](8|16)\b", name))
            is_shallow = loop.instructions == shortest and loop.buffers < self.in_flight
            told += [
                (not is_matrix, f"{where}products by {loop.instruction or 'no matrix instruction'}"),
                (loop.redundancy > 1, f"{where}every product is computed {loop.redundancy:g} times"),
                (narrow >= wide, f"{where}{wide} loads of 16 bytes, {narrow} of 1 or 2"),  # a few of a vector are fine
                (is_shallow, f"{where}{loop.buffers} buffers, wait {loop.wait}"),
            ]
        return [text for is_wrong, text in told if is_wrong]

    def excuse(self) -> str | None:
        """The reason in ``KNOWN`` for this kernel."""
        where = f"{self.architecture} {self.case}"
        return next((why for (name, at), why in KNOWN.items() if name == self.kernel and re.search(at, where)), None)


# -- launches ------------------------------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Label and call of everything to compile, with every option on. Values mean nothing: nothing runs."""
    half, single = torch.bfloat16, torch.float32
    for size in (64, 128, 256):
        for name, dtype in (("bf16", half), ("fp32", single)):
            yield f"D={size} {name} soft", partial(_attention, dtype, size, soft=True)
        # few queries: keys are read through their list, not gathered first
        yield f"D={size} bf16 listed", partial(_attention, half, size, num_queries=768)
    yield "D=128 bf16 hard", partial(_attention, half, 128)
    yield "decode D=128 bf16", partial(_attention, half, 128, num_queries=1)
    for tokens in (576, 1500, 2880, 65536):
        yield f"N={tokens}", partial(_topk, tokens)
        yield f"stage N={tokens}", partial(_stage, tokens)
    yield "bf16", _cache
    for name, dtype, tokens in (("bf16", half, 2880), ("bf16", half, 3 * 2880), ("fp32", single, 2880)):
        yield f"N={tokens} {name}", partial(_actor, dtype, tokens)
    yield "seed", _keep_mask


def _backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def _attention(dtype: torch.dtype, head_dim: int, *, soft: bool = False, num_queries: int = 2880) -> None:
    """Causal with padding; a hard mask without its gradient, or a soft one with the bounded gradient."""
    train = num_queries > 1
    query, key, value = (
        torch.empty(1, heads, tokens, head_dim, dtype=dtype, requires_grad=train)
        for heads, tokens in ((32, num_queries), (8, 2880), (8, 2880))
    )
    valid = torch.ones(1, 2880, dtype=torch.bool)
    keep = torch.ones(1, 2880, requires_grad=train) if soft else valid
    options: dict[str, Any] = {"is_causal": True, "bounded_mask_grad": soft, "backend": "triton"}
    output = masked_attention(query, key, value, keep, key_padding_mask=valid, **options)
    if train:
        _backward(output)


def _hidden(tokens: int) -> torch.Tensor:
    return torch.empty(1, tokens, 4096 if tokens == 2880 else 64, dtype=torch.bfloat16, requires_grad=True)


def _topk(tokens: int) -> None:
    output = topk_compact(
        _hidden(tokens), torch.zeros(1, tokens), torch.tensor([192]), position_ids=torch.zeros(3, 1, tokens).long(),
        max_length=192, valid_mask=torch.ones(1, tokens).bool(), padding_side="left", return_inverse=True,
        backend="triton",
    )  # fmt: skip
    _backward(output.hidden_states)


def _stage(tokens: int) -> None:
    visual = tokens // 2
    columns = torch.cat([torch.full((1, tokens - visual), -1), torch.arange(visual)[None]], dim=1)
    tables = [torch.zeros(1, tokens, 128, dtype=torch.bfloat16) for _ in range(2)]
    positions = torch.zeros(3, 1, tokens).long()
    scores = torch.zeros(1, visual, 2)
    output = prune_stage(
        _hidden(tokens), scores, columns, 64, position_ids=positions, tables=tables, backend="triton"
    )  # fmt: skip
    _backward(output.hidden_states)


def _cache() -> None:
    keys, values = (torch.zeros(1, 8, 576, 128, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    _backward(*compact_cache(keys, values, torch.arange(192)[None], backend="triton"))


def _actor(dtype: torch.dtype, tokens: int) -> None:
    with torch.no_grad():
        hidden, valid = torch.empty(1, tokens, 4096, dtype=dtype), torch.ones(1, tokens).bool()
        actor_score(hidden, 0, make_actor_weights(4096, 256, dtype=dtype), valid_mask=valid, backend="triton")


def _keep_mask() -> None:
    logits, previous = torch.zeros(1, 2880, 2, requires_grad=True), torch.ones(1, 2880).bool()
    sample = sample_keep_mask(logits, seed=torch.zeros(1).long(), previous_mask=previous, backend="triton")
    _backward(sample.keep_mask, sample.log_prob, sample.entropy)


class Driver:
    """What triton's binder asks of a driver, for a GPU that is not there; each architecture is its own device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def kernel_modules() -> list[ModuleType]:
    """Import every module with kernels."""
    modules = pkgutil.walk_packages(toprl_kernels.__path__, "toprl_kernels.")
    return [importlib.import_module(each.name) for each in modules if "triton" in each.name]


def require_compiler() -> None:
    """Raise RuntimeError where kernels cannot be compiled."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("compiling the kernels needs triton (pip install triton, Linux only)")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it and start again")
    if not (_tools() / "cuobjdump").exists():
        raise RuntimeError(f"triton {configs.triton_version()} ships no cuobjdump; install a wheel")


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@contextlib.contextmanager
def compiling_for(architecture: str, seen: Callable[[str, Callable[[], Any], dict[str, Any]], None]) -> Iterator[None]:
    """Give every launch to ``seen(kernel, compile, options)`` instead of running it; ``compile`` is for a GPU."""
    require_compiler()
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernel_modules()  # decorated before the variable below is set, so not for the interpreter
    run = JITFunction.run

    def warm_up(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        name = self.fn.__name__.removesuffix("_kernel")
        seen(name, lambda: run(self, *arguments, grid=grid, warmup=True, **options), options)

    driver.set_active(Driver(int(architecture.removeprefix("sm_"))))
    # dispatch takes CPU tensors to Triton for the interpreter only
    interpreting = mock.patch.dict(os.environ, TRITON_INTERPRET="1")
    with mock.patch.object(JITFunction, "run", warm_up), interpreting, configs.cpu_stands_for(architecture):
        yield


def compile_all(architecture: str, only: str = "", replaced: dict[str, LaunchConfig] | None = None) -> list[Kernel]:
    """Every distinct kernel of every case whose name and label match ``only``, compiled and read."""
    kernels: dict[object, Kernel] = {}
    case = ""

    def seen(name: str, compile_it: Callable[[], Any], options: dict[str, Any]) -> None:
        if not re.search(only, f"{name} {case}"):
            return
        blocks = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in options.items() if k.startswith("BLOCK_"))
        launch = f"{blocks} w{options['num_warps']} s{options.get('num_stages', 3)}"
        kernel = Kernel(architecture, name, case, launch, options["num_warps"])
        try:
            compiled = compile_it()
        except Exception as error:  # the compiler raises many types; the report goes on and shows which kernel failed
            kernel.error = f"{type(error).__name__}: {str(error).strip()}"[-1500:]
            kernels[name, launch, kernel.error] = kernel
        else:
            if (name, compiled.hash) not in kernels:
                kernels[name, compiled.hash] = kernel
                read(kernel, compiled, options)

    with compiling_for(architecture, seen), configs.override(replaced or {}):
        for label, call in cases():
            case = label
            call()
    return list(kernels.values())


# -- reading -------------------------------------------------------------------------------------------------------


def read(kernel: Kernel, compiled: Any, options: dict[str, Any]) -> None:
    """Fill in what TTGIR (products, buffers, waits) and SASS (everything else) say."""
    kernel.shared = compiled.metadata.shared
    kernel.loops = loops_of_ttgir(compiled.asm["ttgir"])
    kernel.half = any(re.search("bf16|f16", tile) for loop in kernel.loops for tile in loop.tiles)
    if kernel.half and getattr(options.get("S"), "BLOCK_D", 0) <= 128 and kernel.architecture in ("sm_90", "sm_100"):
        kernel.in_flight = IN_FLIGHT.get(kernel.kernel, 0)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", file.name))
        if usage is None:
            raise RuntimeError("cannot read the output of cuobjdump -res-usage")
        kernel.registers = int(usage[1])
        if not int(usage[2]) and not kernel.loops:
            return
        sass = _cuobjdump("-sass", file.name)
    code = [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.MULTILINE)]
    kernel.spills = sum(is_spill(text) for _, text in code)
    bodies = matrix_loops(code, PRODUCT if kernel.half else r"FFMA\b")
    if len(bodies) != len(kernel.loops):
        raise RuntimeError(f"{kernel}: {len(bodies)} loops with products in SASS, {len(kernel.loops)} in TTGIR")
    for loop, body in zip(kernel.loops, bodies, strict=True):
        names = [re.sub(r"^@!?U?P\d+ +", "", text).split(" ")[0] for text in body]
        matrix = Counter(name for name in names if re.match(PRODUCT, name))
        loop.instruction = " ".join(sorted(matrix))
        loop.instructions = len(names)
        loop.spills = sum(map(is_spill, body))
        loop.loads = dict(Counter(name for name in names if name.startswith(("LDG.", "LDGSTS"))))
        if kernel.kernel.startswith("masked_attention") and "BLOCK_M" in options and "BLOCK_N" in options:
            pairs = options["BLOCK_M"] * options["BLOCK_N"]
            loop.per_1k_pairs = 1e3 * len(names) * kernel.warps / pairs


def _cuobjdump(option: str, path: str) -> str:
    command = [str(_tools() / "cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def is_spill(text: str) -> bool:
    return re.search(r"\b(STL|LDL)\b", text) is not None


def loops_of_ttgir(text: str) -> list[Loop]:
    """The innermost ``scf.for`` loops with products, in order of the text."""
    layouts = {
        name: ([int(n) for n in warps.split(", ")], [int(n) for n in shape.split(", ")])
        for name, warps, shape in re.findall(
            r"^(#\w+) = #ttg.nvidia_mma<.*warpsPerCTA = \[([\d, ]+)\], instrShape = \[([\d, ]+)\]", text, re.MULTILINE
        )
    }
    finished: list[Loop] = []
    stack: list[tuple[int, Loop, list[float]]] = []  # indentation, loop, multiply-adds [needed, computed]
    buffers: list[int] = []  # of the allocations since the last loop began
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if stack and indent == stack[-1][0] and line.lstrip().startswith("}"):
            _, loop, (needed, computed) = stack.pop()
            if loop.tiles and loop.buffers >= 0:
                loop.redundancy = round(computed / needed, 2)
                finished.append(loop)
                for _, outer, _ in stack:
                    outer.buffers = -1  # not innermost
        elif "scf.for" in line:
            stack.append((indent, Loop([], min(buffers, default=0), -1, 1.0), [0, 0]))
            buffers = []
        elif alloc := re.search(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x\w+", line):
            buffers.append(int(alloc[1]))
        elif stack and (wait := re.search(r"async_wait .*\{num = (\d+)", line)) and stack[-1][1].wait < 0:
            stack[-1][1].wait = int(wait[1])
        elif stack and re.search(r"tt\.dot |warp_group_dot |tc_gen5_mma ", line):
            shapes = re.findall(r"(?:tensor|memdesc)<(\d+)x(\d+)x(\w+), (#\w+)", line)
            m, n, k, kind = int(shapes[0][0]), int(shapes[1][1]), int(shapes[0][1]), shapes[0][2]
            stack[-1][1].tiles.append(f"{m}x{n}x{k} {kind}")
            times = 1.0
            if shapes[-1][3] in layouts and "tc_gen5" not in line:
                warps, shape = layouts[shapes[-1][3]]
                times = math.prod(max(1.0, w * s / size) for w, s, size in zip(warps, shape, (m, n), strict=False))
            stack[-1][2][0] += m * n * k
            stack[-1][2][1] += m * n * k * times
    return finished


def matrix_loops(code: list[tuple[int, str]], product: str) -> list[list[str]]:
    """Instructions of each innermost natural loop that has a ``product``, by address.

    A wait that is retried out of line jumps back into the middle of a loop: that makes no loop, as the jump's source
    can be reached from the kernel's start without its target.
    """
    # a call may return, or be a far jump
    target = re.compile(r"\b(?:BRA|CALL)(?:\.\w+)* .*?(0x[0-9a-f]+)")
    jumps = {address: int(to[1], 16) for address, text in code if (to := target.search(text))}
    after = {b for (a, text), (b, _) in itertools.pairwise(code) if a in jumps or "EXIT" in text}
    number = {start: i for i, start in enumerate(sorted({code[0][0], *jumps.values(), *after}))}
    blocks: list[list[tuple[int, str]]] = [[] for _ in number]
    current = 0
    for address, text in code:
        current = number.get(address, current)
        blocks[current].append((address, text))
    before: list[set[int]] = [set() for _ in blocks]
    for i, block in enumerate(blocks):
        address, last = block[-1]
        if address in jumps:
            before[number[jumps[address]]].add(i)
        is_conditional = re.search(r"^@|CALL|BRA.*\bU?P\d", last)
        if i + 1 < len(blocks) and (is_conditional or ("EXIT" not in last and address not in jumps)):
            before[i + 1].add(i)
    loops: dict[int, set[int]] = {}
    for tail, head in [(tail, head) for head, tails in enumerate(before) for tail in tails if tail >= head]:
        body, todo = {head}, [tail]
        while todo:
            if (block_number := todo.pop()) not in body:
                body.add(block_number)
                todo += before[block_number]
        if 0 not in body or head == 0:
            loops[head] = loops.get(head, set()) | body
    texts = {head: [text for i in sorted(body) for _, text in blocks[i]] for head, body in loops.items()}
    heads = [head for head in loops if any(re.search(rf"\b({product})", text) for text in texts[head])]
    return [texts[head] for head in sorted(heads) if not any(loops[other] < loops[head] for other in heads)]


# -- command -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "kernel|case|launch|registers|spills|shared KiB|programs|loop|products|instruction|redundancy|buffers|wait|"
    "spills inside|loads|instructions|per 1k pairs|notes"
).split("|")


def rows_of(kernel: Kernel) -> Iterator[Row]:
    """One row per loop, or one."""
    notes = "; ".join(kernel.problems())
    if notes:
        notes = f"known, {kernel.excuse()}: {notes}" if kernel.excuse() else f"PROBLEM {notes}"
    shared = f"{kernel.shared / 1024:.0f} of {configs.SHARED_MEMORY[kernel.architecture] >> 10}"
    facts = [kernel.kernel, kernel.case, kernel.launch, kernel.registers, kernel.spills, shared, kernel.programs()]
    row = dict(zip(COLUMNS, facts, strict=False))
    if not kernel.loops:
        yield {**row, "notes": notes}
    for i, loop in enumerate(kernel.loops):
        products = " ".join(tile.split()[0] for tile in loop.tiles)
        loads = " ".join(f"{name}:{count}" for name, count in loop.loads.items())
        pairs = None if loop.per_1k_pairs is None else round(loop.per_1k_pairs)
        numbers = [i, products, loop.instruction, f"{loop.redundancy:g}", loop.buffers, loop.wait, loop.spills]
        more = [loads, loop.instructions, pairs, "" if i else notes]
        yield row | dict(zip(COLUMNS[len(row) :], numbers + more, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name.removeprefix("sm_") for name in configs.ARCHITECTURES]
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"], choices=known)
    parser.add_argument("--kernel", default="", metavar="PATTERN", help="only kernels whose 'name case' matches")
    parser.add_argument("--config", nargs="+", default=[], type=parse_config, metavar="KERNEL=M,N,WARPS,STAGES",
                        help="compile this instead of the pinned configuration")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the kernels to this file too")
    options = parser.parse_args(arguments)
    try:
        require_compiler()
    except RuntimeError as error:
        print(f"compile_report: {error}", file=sys.stderr)
        return 2
    every: list[Kernel] = []
    for architecture in (f"sm_{name}" for name in options.arch):
        kernels = compile_all(architecture, options.kernel, dict(options.config))
        print(f"### {architecture}\n\n{table([row for kernel in kernels for row in rows_of(kernel)], COLUMNS)}\n")
        every += kernels
    if options.json:
        rows = [{**dataclasses.asdict(k), "problems": k.problems(), "excuse": k.excuse()} for k in every]
        options.json.write_text(json.dumps(rows, indent=1))
    bad = sum(bool(kernel.problems()) and not kernel.excuse() for kernel in every)
    print(f"{len(every)} kernels, {bad} with a problem")
    return 1 if bad or not every else 0


def parse_config(text: str) -> tuple[str, LaunchConfig]:
    """KERNEL=M,N,WARPS,STAGES[,SPLITS]."""
    kernel, _, numbers = text.partition("=")
    if kernel not in configs.KERNELS:
        raise argparse.ArgumentTypeError(f"{kernel!r} is unknown; use one of {', '.join(configs.KERNELS)}")
    try:
        return kernel, LaunchConfig(*map(int, numbers.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not KERNEL=M,N,WARPS,STAGES[,SPLITS]") from error


if __name__ == "__main__":
    sys.exit(main())
