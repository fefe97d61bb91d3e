"""Compile the kernels for a GPU that is not there, and read what the compiler made of them.

Each op lists its cases (``<op>/cases.py``): a kernel, the types of its pointers, its constants and its launch
configuration. :func:`compile_cases` builds them for one architecture and reads registers, stack, spill and
matrix instructions from the binary with the tools that triton ships. Needs triton but no GPU, and a process without
``TRITON_INTERPRET``: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toprl_kernels import configs
from toprl_kernels.backend import interpreting, triton_installed
from toprl_kernels.configs import LaunchConfig

OPS_WITH_KERNELS = ("attention", "topk", "cache", "actor", "keep_mask")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# (kernel, size, dtype) -> configuration; configs.pinned for one architecture, unless a caller tries something else
Select = Callable[[str, int, torch.dtype], LaunchConfig]

# Scalar arguments that are not integers, and those that the launcher finds divisible by 16 in ordinary calls.
FLOAT_SCALARS = {"scale", "scale_log2", "eps", "tau"}
DIVISIBLE_SCALARS = {"d1", "hidden_size", "token_stride", "row_stride", "plane_stride"}

# The instruction that a matrix product should become, per architecture.
MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bHMMA\b",
    "sm_86": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\bUTC[A-Z]*MMA\b",
    "gfx942": r"\bv_mfma_",
}


@dataclass(frozen=True)
class Work:
    """What one launch of a problem has to do; :mod:`toprl_kernels.bounds` turns it into a time."""

    problem: str  # for the reader
    programs: int
    flops: float = 0.0  # of the matrix products
    single: bool = False  # whether those run in full float32 precision, that is, not on the tensor cores
    exps: float = 0.0  # exponentials and the like
    l2_bytes: float = 0.0  # loads of all programs, which reuse nothing of each other
    dram_bytes: float = 0.0  # inputs and outputs once


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched. ``pointers`` maps argument names to element types, "_" is the default."""

    kernel: str  # its name in configs
    label: str  # the variant: size, dtype, flags
    function: Any  # triton.JITFunction
    pointers: dict[str, str]
    constants: dict[str, Any]
    config: LaunchConfig
    unit_strides: tuple[str, ...] = ()  # arguments that are 1 for dense tensors, which the launcher bakes in
    matrix: bool = False  # whether it must use the tensor cores
    extended: bool = False  # a variation of another case, left out of the short list
    work: Work | None = None


@dataclass(frozen=True)
class Resources:
    """A compiled case. Counts are of instructions in the binary, per thread where that makes a difference."""

    kernel: str
    label: str
    architecture: str
    config: LaunchConfig
    registers: int = 0
    stack_bytes: int = 0
    spills: int = 0  # loads and stores of local memory: STL and LDL
    shared_bytes: int = 0
    tensor_memory: int = 0  # columns, sm_100
    matrix_instructions: int = 0
    seconds: float = 0.0
    error: str = ""  # why it does not compile; everything else is then meaningless
    matrix: bool = False
    work: Work | None = None


def all_cases(select: Select, *, extended: bool = False, only: str = "") -> list[Case]:
    """Every case of every op whose kernel and label contain ``only``, in a fixed order."""
    cases: list[Case] = []
    for op in OPS_WITH_KERNELS:
        module = importlib.import_module(f"toprl_kernels.{op}.cases")
        cases += [
            case
            for case in module.cases(select)
            if only in f"{case.kernel} {case.label}" and (extended or not case.extended)
        ]
    return cases


def compile_cases(
    cases: Sequence[Case], architecture: str, *, jobs: int = 1, progress: Callable[[Resources], None] | None = None
) -> list[Resources]:
    """Compile all cases, in at most ``jobs`` processes; a case that does not compile carries its ``error``.

    Raises:
        RuntimeError: triton is missing or runs its interpreter in this process.
    """
    require_compiler()
    results = []
    for result in _compiled(cases, architecture, jobs):
        if progress is not None:
            progress(result)
        results.append(result)
    return results


def require_compiler() -> None:
    """Raise RuntimeError where kernels cannot be compiled."""
    if not triton_installed():
        raise RuntimeError("compiling the kernels needs triton (pip install triton, Linux only)")
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it and start again")
    if not (_tools() / "cuobjdump").exists():
        version = configs.triton_version()
        raise RuntimeError(f"triton {version} ships no cuobjdump to read the binaries with; install a wheel")


def _compiled(cases: Sequence[Case], architecture: str, jobs: int) -> Iterator[Resources]:
    if jobs <= 1:
        yield from (compile_case(case, architecture) for case in cases)
        return
    # Kernels cannot be pickled; a forked child inherits them. Nothing here starts threads or CUDA before the fork.
    _inherited[:] = cases
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_compile_inherited, range(len(cases)), [architecture] * len(cases))


_inherited: list[Case] = []


def _compile_inherited(index: int, architecture: str) -> Resources:
    return compile_case(_inherited[index], architecture)


def compile_case(case: Case, architecture: str) -> Resources:
    """Compile one case and read its binary."""
    import triton

    known: dict[str, Any] = dict(
        kernel=case.kernel, label=case.label, architecture=architecture, config=case.config,
        matrix=case.matrix, work=case.work,
    )  # fmt: skip
    start = time.perf_counter()
    source, options = specialize(case)
    try:
        compiled = triton.compile(source, target=_target(architecture), options=options)
    except Exception as error:  # the compiler raises many types; the report must go on and show which case failed
        return Resources(**known, error=f"{type(error).__name__}: {str(error).strip()}"[-2000:])
    if architecture.startswith("gfx"):
        counts: dict[str, Any] = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        counts = _read_cubin(compiled.asm["cubin"], MATRIX_INSTRUCTIONS[architecture] if case.matrix else None)
    return Resources(
        **known,
        **counts,
        shared_bytes=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        seconds=time.perf_counter() - start,
    )


def specialize(case: Case) -> tuple[Any, dict[str, Any]]:
    """The compiler's input: what the launcher finds out about ordinary tensors and bakes in.

    Arguments are found by name, so that a kernel may move or gain some. Raises ValueError for a constant of the
    kernel that the case does not give.
    """
    from triton.compiler import ASTSource

    constants, signature, aligned = {}, {}, {}
    for position, parameter in enumerate(case.function.params):
        name = parameter.name
        if name in case.constants or name in case.unit_strides:
            constants[name] = case.constants.get(name, 1)
            signature[name] = "constexpr"
            continue
        if parameter.is_constexpr:
            raise ValueError(f"{case.kernel} {case.label}: the case gives no value for the kernel's constant {name}")
        if name.endswith("_ptr"):
            signature[name] = "*" + case.pointers.get(name, case.pointers["_"])
        else:
            signature[name] = "fp32" if name in FLOAT_SCALARS else "i32"
        if name.endswith("_ptr") or name.startswith("stride_") or name in DIVISIBLE_SCALARS:
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.function, signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=case.config.num_warps, num_stages=case.config.num_stages, enable_fp_fusion=True)
    return source, options


def _target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@functools.cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _read_cubin(cubin: bytes, matrix_instruction: str | None) -> dict[str, Any]:
    """Registers, stack and instruction counts.

    Disassembling takes half a second: it is done where the answer is not known without it (no stack means no spills),
    and triton's cache keeps the result.
    """
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(cubin + repr(matrix_instruction).encode()).hexdigest())
    stored = cache.get_file("resources.json")
    if stored is not None:
        counts: dict[str, Any] = json.loads(Path(stored).read_text())
        return counts
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", file.name))
        if usage is None:
            raise RuntimeError("cannot read the output of cuobjdump -res-usage")
        counts = {"registers": int(usage[1]), "stack_bytes": int(usage[2])}
        if counts["stack_bytes"] or matrix_instruction is not None:
            code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", _cuobjdump("-sass", file.name), flags=re.MULTILINE)
            if not code:
                raise RuntimeError("cannot read the output of cuobjdump -sass")
            counts["spills"] = sum(re.search(r"\b(STL|LDL)\b", line) is not None for line in code)
            if matrix_instruction is not None:
                pattern = re.compile(matrix_instruction)
                counts["matrix_instructions"] = sum(pattern.search(line) is not None for line in code)
    cache.put(json.dumps(counts), "resources.json", binary=False)
    return counts


def _cuobjdump(option: str, path: str) -> str:
    command = [str(_tools() / "cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_amdgcn(text: str) -> dict[str, Any]:
    """The same from AMD's assembly, whose metadata has the counts."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"),
        "stack_bytes": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTIONS["gfx942"], text)),
    }
