"""Run compiled kernels without a GPU: the PTX that triton makes of a launch, executed on CPU tensors by numpy.

:func:`simulated` makes ``kernel[grid](...)`` compile for a GPU that is not there and execute the result. Each basic
block becomes a Python function over the 32 lanes of a warp; its lines bear the numbers of the PTX's lines, so that an
error names the instruction. Diverging lanes run in reverse postorder of their blocks and meet again there. Warps run
one after the other from barrier to barrier, in random order, and so do the programs of a grid.

What a GPU may do and the interpreter cannot show is an error (:class:`RaceError`), whatever the order: a byte that two
warps access without a barrier between, one of them writing; a byte of an asynchronous copy that is touched before its
group was waited for; a byte written by one program of a launch and read by another. Registers and shared memory start
as NaN. An access outside of the argument tensors is an :class:`AddressError`.

Fused multiply-adds and matrix products are computed in float64 and rounded once. Subnormal numbers are not flushed.
Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pkgutil
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

import toprl_kernels

LANES = np.arange(32)
CELLS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # one access of so many bytes
REGION_BITS = 40  # of an address: a tensor each
ATOMIC, PENDING, SEVERAL = 253, 254, 255  # marks of bytes beside the warps' 1..32

Array = np.ndarray[Any, Any]
Mask = Array | None  # None: all lanes


class RaceError(AssertionError):
    """Two warps, copies or programs touch the same byte in no fixed order."""


class AddressError(AssertionError):
    """An access outside of the arguments, or a misaligned one."""


class Memory:
    """Bytes with, for each, who wrote and who read it since the last barrier."""

    def __init__(self, data: Array, name: str) -> None:
        self.data, self.name = data, name
        self.writer, self.reader, self.program = (np.zeros(len(data), np.uint8) for _ in range(3))
        self.written = False
        self.first, self.end = len(data), 0  # the bytes accessed since the last barrier
        self._views: dict[tuple[str, int], Array] = {}

    def view(self, field: str, size: int) -> Array:
        key = (field, size)
        if key not in self._views:
            array = getattr(self, field)
            self._views[key] = array[: len(array) // size * size].view(CELLS[size])
        return self._views[key]

    def cells(self, offsets: Array, size: int) -> Array:
        """Index of each access; raises AddressError."""
        offsets = offsets.astype(np.int64)
        if offsets.min() < 0 or offsets.max() + size > len(self.data):
            where = offsets[(offsets < 0) | (offsets + size > len(self.data))]
            raise AddressError(f"{size} bytes at offset {where[0]} of {self.name}, which has {len(self.data)}")
        if (offsets % size).any():
            raise AddressError(f"{size} bytes at offset {offsets[offsets % size != 0][0]} of {self.name}: misaligned")
        return offsets // size

    def read(self, warp: Warp, cells: Array, size: int) -> Array:
        self._check("writer", warp.mark, cells, size, "reads what was written or is being copied")
        if self.written:
            self._check("program", warp.program, cells, size, "reads what another program wrote")
        readers = self.view("reader", size)
        seen = readers[cells].view(np.uint8)
        seen = np.where((seen == 0) | (seen == warp.mark), warp.mark, SEVERAL).astype(np.uint8)
        readers[cells] = seen.view(CELLS[size])
        self._accessed(cells, size)
        result: Array = self.view("data", size)[cells]
        return result

    def write(self, warp: Warp, cells: Array, size: int, values: Array | None, mark: int = 0) -> None:
        """Write ``values``, or mark the bytes as being copied to. Equal values may be written by anyone."""
        self._check("reader", warp.mark, cells, size, "overwrites what was read")
        data = self.view("data", size)
        if values is None or (data[cells].view(np.uint8) != values.view(np.uint8)).any():
            self._check("writer", warp.mark, cells, size, "overwrites what was written or is being copied")
            self._check("program", warp.program, cells, size, "overwrites what another program wrote")
        if values is not None:
            data[cells] = values
        self.view("writer", size)[cells] = np.full(size, mark or warp.mark, np.uint8).view(CELLS[size])[0]
        self.view("program", size)[cells] = np.full(size, warp.program, np.uint8).view(CELLS[size])[0]
        self.written = True
        self._accessed(cells, size)

    def add(self, warp: Warp, cells: Array, value: Any, old: Array) -> None:
        size = value.itemsize
        writers = self.view("writer", size)
        atomic = np.full(size, ATOMIC, np.uint8).view(CELLS[size])
        if (writers[cells] != atomic).any():
            self._check("writer", warp.mark, cells, size, "adds atomically to what was written")
        self._check("reader", warp.mark, cells, size, "adds atomically to what was read")
        writers[cells] = atomic
        data = self.view("data", size).view(value.dtype)
        old[:] = data[cells]
        data[cells] += value
        self._accessed(cells, size)

    def _accessed(self, cells: Array, size: int) -> None:
        self.first = min(self.first, int(cells.min()) * size)
        self.end = max(self.end, int(cells.max() + 1) * size)

    def _check(self, field: str, mine: int, cells: Array, size: int, what: str) -> None:
        marks = self.view(field, size)[cells].view(np.uint8)
        others = (marks != 0) & (marks != mine)
        if others.any():
            offset = int(np.repeat(cells, size)[others][0]) * size
            raise RaceError(f"a warp {what} since the last barrier, at offset {offset} of {self.name}")

    def barrier(self) -> None:
        if self.end:
            writer = self.writer[self.first : self.end]
            writer *= writer == PENDING
            self.reader[self.first : self.end] = 0
            self.first, self.end = len(self.data), 0


class Copy(NamedTuple):
    """One warp's asynchronous copy instruction."""

    cells: Array
    size: int
    values: Array


class Warp:
    """Registers, place in the code, and copies under way."""

    def __init__(self, kernel: Kernel, index: int, block: tuple[int, int, int], program: int, launch: Launch) -> None:
        self.registers = [np.full(32, -1, np.int8).astype(kind) for kind in kernel.registers]
        self.pc: int | Array = 0
        self.mark, self.program = index + 1, program
        self.memories, self.shared = launch.memories, launch.shared
        self.special = {"%laneid": LANES.astype(np.uint32)}
        shape = (kernel.num_warps * 32, 1, 1)
        for axis, name in enumerate("xyz"):
            thread = (index * 32 + LANES if axis == 0 else LANES * 0).astype(np.uint32)
            sizes = {"tid": thread, "ctaid": block[axis], "nctaid": launch.grid[axis], "ntid": shape[axis]}
            for prefix, value in sizes.items():
                self.special[f"%{prefix}.{name}"] = np.broadcast_to(np.uint32(value), 32)
        self.parameters = launch.parameters
        self.issued: list[Copy] = []
        self.groups: list[list[Copy]] = []

    def at(self, space: str, addresses: Array) -> Iterator[tuple[Mask, Memory, Array]]:
        """Which lanes access which memory, and at which offsets."""
        if space == "shared":
            yield None, self.shared, addresses
            return
        regions = addresses >> np.uint64(REGION_BITS)
        for region in dict.fromkeys(regions.tolist()):
            if region not in self.memories:
                raise AddressError(f"address {int(addresses[regions == region][0]):#x} is in no argument")
            base, memory = self.memories[region]
            lanes = None if (regions == region).all() else regions == region
            yield lanes, memory, (addresses if lanes is None else addresses[lanes]).astype(np.int64) - base

    def load(self, space: str, addresses: Array, size: int, count: int, mask: Mask) -> list[Array]:
        """``count`` values of ``size`` bytes per lane; lanes that are off get anything."""
        active = addresses if mask is None else addresses[mask]
        result = np.full(32, -1, np.int8).repeat(size * count).reshape(32, -1).view(np.uint8)
        if len(active):
            values = np.empty((len(active), size * count), np.uint8)
            for lanes, memory, offsets in self.at(space, active):
                part = memory.read(self, memory.cells(offsets, size * count), size * count)
                values[slice(None) if lanes is None else lanes] = part.view(np.uint8).reshape(-1, size * count)
            result[slice(None) if mask is None else mask] = values
        return list(result.view(CELLS[size]).T.copy())

    def store(self, space: str, addresses: Array, values: Sequence[Array], mask: Mask) -> None:
        bits = np.stack(values, 1)
        if mask is not None:
            addresses, bits = addresses[mask], bits[mask]
        if len(addresses):
            size = bits.itemsize * bits.shape[1]
            cells = np.ascontiguousarray(bits).view(CELLS[size])[:, 0]
            for lanes, memory, offsets in self.at(space, addresses):
                memory.write(self, memory.cells(offsets, size), size, cells if lanes is None else cells[lanes])

    def add_atomically(self, space: str, addresses: Array, value: Array, mask: Mask) -> Array:
        """The values before. Nothing else may touch the bytes before the next barrier."""
        old = value.copy()
        for lane in LANES if mask is None else LANES[mask]:
            ((_, memory, offsets),) = self.at(space, addresses[lane : lane + 1])
            cells = memory.cells(offsets, value.itemsize)
            memory.add(self, cells, value[lane], old[lane : lane + 1])
        return old

    def copy(self, target: Array, source: Array, size: int, used: Array, mask: Mask) -> None:
        """cp.async: the first ``used`` of ``size`` bytes, zeros for the rest, once the group is waited for."""
        lanes = np.ones(32, bool) if mask is None else mask
        if not lanes.any():
            return
        values = np.zeros((32, size), np.uint8)
        for count in set(used[lanes].tolist()) - {0}:
            part = lanes & (used == count)
            values[part, :count] = (
                np.stack(self.load("global", source, 1, count, part), 1)[part]
                if count not in CELLS
                else self.load("global", source, count, 1, part)[0][part].copy().view(np.uint8).reshape(-1, count)
            )
        cells = self.shared.cells(target[lanes], size)
        self.shared.write(self, cells, size, None, PENDING)
        self.issued.append(Copy(cells, size, np.ascontiguousarray(values[lanes]).view(CELLS[size])[:, 0]))

    def together(self, mask: Mask) -> None:
        """Raise unless all lanes are on."""
        if mask is not None and not mask.all():
            raise RaceError("an instruction of the whole warp that only some lanes reach")

    def commit(self) -> None:
        self.groups.append(self.issued)
        self.issued = []

    def wait(self, pending: int) -> None:
        """Finish all but the last ``pending`` groups."""
        while len(self.groups) > pending:
            for cells, size, values in self.groups.pop(0):
                self.shared.view("writer", size)[cells] = 0
                self.shared.write(self, cells, size, values)

    def load_matrices(self, addresses: Array, count: int, transposed: bool) -> list[Array]:
        """ldmatrix: 8 x 8 matrices of 16 bits, whose rows are where lanes 8 i .. 8 i + 7 say."""
        addresses = addresses[: 8 * count]
        rows = self.shared.read(self, self.shared.cells(addresses, 16), 16).view(np.uint16).reshape(count, 8, 8)
        if transposed:
            rows = rows.swapaxes(1, 2)
        return list(np.ascontiguousarray(rows).view(np.uint32).reshape(count, 32))


def multiply_matrices(a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], widen: Callable[..., Array]) -> Any:
    """mma.m16n8k16: registers of A [16, 16], B [16, 8] and C [16, 8] in the layout of the PTX manual."""
    halves = np.stack(a).view(np.uint16).reshape(2, 2, 8, 4, 2)  # k / 8, row / 8, row % 8, k % 8 / 2, k % 2
    left = widen(halves).astype(np.float64).transpose(1, 2, 0, 3, 4).reshape(16, 16)
    halves = np.stack(b).view(np.uint16).reshape(2, 8, 4, 2)  # k / 8, column, k % 8 / 2, k % 2
    right = widen(halves).astype(np.float64).transpose(0, 2, 3, 1).reshape(16, 8)
    acc = np.stack(c).view(np.float32).reshape(2, 2, 8, 4).transpose(0, 2, 3, 1).reshape(16, 8)  # row / 8, column % 2
    total = (left @ right + acc).astype(np.float32)
    return total.reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, 32).view(np.uint32)


def shuffle(mode: str, value: Array, by: Array, clamp: Array) -> tuple[Array, Array]:
    """shfl.sync: the value of another lane, and whether that lane is in range."""
    by, segment, limit = (by & 31).astype(int), (clamp >> 8 & 31).astype(int), (clamp & 31).astype(int)
    largest, smallest = LANES & segment | limit & ~segment, LANES & segment
    source = {"up": LANES - by, "down": LANES + by, "bfly": LANES ^ by, "idx": smallest | by & ~segment}[mode]
    inside = source >= largest if mode == "up" else source <= largest
    return value[np.where(inside, source, LANES)], inside


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def to_bfloat16(value: Array) -> Array:
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def divide(a: Array, b: Array) -> Array:
    """Integers, towards zero; -1 for a divisor of 0."""
    quotient = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where(b == 0, np.array(-1).astype(a.dtype), np.where((a < 0) != (b < 0), -quotient, quotient))


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the eight of b:a, or its sign."""
    source = np.stack([a, b], 1).view(np.uint8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    chosen = np.take_along_axis(source, (nibbles & 7).astype(int), 1)
    return np.where(nibbles & 8, np.where(chosen >> 7, 255, 0), chosen).astype(np.uint8).view(np.uint32)[:, 0]


# operation -> numpy expression; the types of operands and result are the instruction's last part
UNSIGNED = {  # that mean the same for signed operands
    "add": "{0}+{1}", "sub": "{0}-{1}", "mul.lo": "{0}*{1}", "mad.lo": "{0}*{1}+{2}", "and": "{0}&{1}",
    "or": "{0}|{1}", "xor": "{0}^{1}", "not": "~{0}", "mov": "{0}", "shl": "{0}<<{1}",
    "prmt": "permute({0},{1},{2})",
}  # fmt: skip
INTEGER = {
    "shr": "{0}>>{1}", "min": "minimum({0},{1})", "max": "maximum({0},{1})", "neg": "-{0}", "abs": "abs({0})",
    "div": "divide({0},{1})", "rem": "{0}-divide({0},{1})*{1}",
    "popc": "np.unpackbits({0}.view(u1).reshape(32,-1),axis=1).sum(1).astype(u4)",
}  # fmt: skip
FLOAT = {
    "add": "{0}+{1}", "sub": "{0}-{1}", "mul": "{0}*{1}", "fma": "({0}.astype(f8)*{1}+{2})", "neg": "-{0}",
    "abs": "abs({0})", "min": "fmin({0},{1})", "max": "fmax({0},{1})", "min.NaN": "minimum({0},{1})", "max.NaN": "maximum({0},{1})", "div": "{0}/{1}", "rcp": "1/{0}",
    "sqrt": "sqrt({0})", "rsqrt": "1/sqrt({0})", "ex2": "exp2({0})", "lg2": "log2({0})", "mov": "{0}",
    "tanh": "tanh({0})", "sin": "sin({0})", "cos": "cos({0})",
}  # fmt: skip
COMPARE = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
REDUCE = {"add": "sum", "min": "min", "max": "max", "and": "bitwise_and.reduce", "or": "bitwise_or.reduce"}
NAMESPACE: dict[str, Any] = {
    "divide": divide, "permute": permute, "shuffle": shuffle, "multiply_matrices": multiply_matrices, "to_bfloat16": to_bfloat16,
    "from_bfloat16": from_bfloat16, "from_float16": from_float16, "np": np, "bool_": np.bool_,
    **{f"{kind}{size}": np.dtype(f"{kind}{size}").type for kind in "iuf" for size in (1, 2, 4, 8) if kind + str(size) != "f1"},
    **{name: getattr(np, name) for name in "where minimum maximum abs fmin fmax sqrt exp2 log2 tanh sin cos isnan full trunc".split()},
}  # fmt: skip


class Block(NamedTuple):
    """A basic block, cut at barriers. ``run(warp, registers, mask)`` returns the lanes that take the branch."""

    run: Callable[[Warp, list[Array], Mask], Array | None]
    kind: str  # "next", "branch", "barrier" or "exit"
    target: int
    next: int


class Line(NamedTuple):
    number: int
    guard: str  # predicate register, "!" before it if negated
    parts: list[str]  # of the opcode
    operands: list[str]


INSTRUCTION = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*);$")
OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^\s,][^,]*")


class Kernel:
    """A kernel's PTX as Python functions, one per basic block, in reverse postorder."""

    def __init__(self, name: str, ptx: str, num_warps: int) -> None:
        self.name, self.num_warps, self.text = name, num_warps, ptx.splitlines()
        self.file = f"<PTX of {name}>"
        self.registers: list[type] = []  # numpy type of each
        self.slots: dict[str, int] = {}
        self.kinds = {  # "%rd" -> numpy type
            prefix: np.bool_ if kind == "pred" else CELLS[int(kind[1:]) // 8]
            for kind, prefix in re.findall(r"\.reg \.(\w+)\s+(%\w+)<", ptx)
        }
        self.parameters = [
            (label, kind) for kind, label in re.findall(r"^\s*\.param \.(\w+)[^\n]*?(\w+_param_\d+)", ptx, re.MULTILINE)
        ]
        self.namespace = dict(NAMESPACE)
        self.blocks = self._blocks()

    def _blocks(self) -> list[Block]:
        pieces: list[list[Line]] = [[]]
        labels: dict[str, int] = {}
        start = next(i for i, text in enumerate(self.text) if text.startswith("{"))
        for number, text in enumerate(self.text[start:], start + 1):
            text = text.split("//")[0].strip()
            if text == "}":
                break
            if re.fullmatch(r"\$\w+:", text):
                if pieces[-1]:
                    pieces.append([])
                labels[text[:-1]] = len(pieces) - 1
            elif match := INSTRUCTION.match(text):
                line = Line(number, match[1] or "", match[2].split("."), OPERAND.findall(match[3]))
                pieces[-1].append(line)
                if line.parts[0] in ("bra", "ret", "exit") or line.parts[:2] in (["bar", "sync"], ["barrier", "sync"]):
                    pieces.append([])
        end = len(pieces)
        ends = []
        for index, lines in enumerate(pieces):
            last = lines[-1] if lines else None
            if last is None or last.parts[0] not in ("bra", "ret", "exit", "bar", "barrier"):
                ends.append(("next", end, index + 1))
            elif last.parts[0] in ("bar", "barrier"):
                if last.parts[1] == "sync" and last.operands != ["0"]:
                    raise NotImplementedError(self.describe(last.number, "only barrier 0 of all warps"))
                ends.append(("barrier" if last.parts[1] == "sync" else "next", end, index + 1))
            else:
                target = labels[last.operands[0]] if last.parts[0] == "bra" else end
                ends.append(("branch", target, index + 1) if last.guard else ("next", end, target))
        place = self._reverse_postorder(ends, end)
        ordered = sorted(place, key=place.__getitem__)
        place[end] = len(ordered)
        return [Block(self._function(pieces[i]), ends[i][0], place[ends[i][1]], place[ends[i][2]]) for i in ordered]

    @staticmethod
    def _reverse_postorder(ends: list[tuple[str, int, int]], end: int) -> dict[int, int]:
        """Block -> place. The successor that comes later in the text is visited first: a loop before what follows."""
        done: list[int] = []
        seen = {end}
        stack = [(0, False)]
        while stack:
            block, is_left = stack.pop()
            if is_left:
                done.append(block)
            elif block not in seen:
                seen.add(block)
                kind, target, following = ends[block]
                successors = {following, target} if kind == "branch" else {following}
                stack += [(block, True), *((successor, False) for successor in sorted(successors))]
        return {block: place for place, block in enumerate(reversed(done))}

    def describe(self, number: int, error: object) -> str:
        source = next((text for text in reversed(self.text[:number]) if ".loc" in text), "")
        comment = source.partition("//")[2].strip()
        return f"{self.name}, PTX line {number} ({comment}): {self.text[number - 1].strip()}: {error}"

    def _function(self, lines: list[Line]) -> Callable[[Warp, list[Array], Mask], Array | None]:
        first = lines[0].number if lines else 2
        code = [""] * (first - 2) + ["def run(warp, R, m):"]
        for line in lines:
            code += [""] * (line.number - 1 - len(code))
            try:
                code.append(" " + self._statement(line))
            except (KeyError, ValueError) as error:
                raise NotImplementedError(self.describe(line.number, f"not simulated ({error!r})")) from None
        if not lines:
            code.append(" pass")
        exec(compile("\n".join(code), self.file, "exec"), self.namespace)
        result: Callable[[Warp, list[Array], Mask], Array | None] = self.namespace.pop("run")
        return result

    # --- operands ---

    def _slot(self, register: str) -> int:
        if register not in self.slots:
            self.slots[register] = len(self.registers)
            self.registers.append(self.kinds[re.sub(r"\d+$", "", register)])
        return self.slots[register]

    def _value(self, token: str, kind: str) -> str:
        """Expression for an operand as an array of ``kind``, such as "u4" or "bool_"."""
        token = token.strip()
        dtype: Any = np.dtype(NAMESPACE[kind])
        if token in ("%tid.x", "%tid.y", "%tid.z", "%laneid") or re.match(r"%n?(tid|ctaid)\.", token):
            return f"warp.special[{token!r}].astype({kind})"
        if token.startswith("%"):
            slot = self._slot(token)
            held = np.dtype(self.registers[slot])
            text = f"R[{slot}]"
            if held.itemsize != dtype.itemsize:
                text += f".astype(u{dtype.itemsize})"
            return text if dtype.kind in "ub" else f"{text}.view({kind})"
        if token.startswith(("0f", "0d")):
            bits = int(token[2:], 16)
        else:
            bits = 0 if token == "global_smem" else int(token.rstrip("U"), 0)
        name = f"c_{bits & (1 << 64) - 1:x}_{kind}"
        if dtype.kind == "b":
            self.namespace[name] = np.full(32, bool(bits))
        else:
            unsigned = CELLS[dtype.itemsize]
            self.namespace[name] = np.full(32, bits & (1 << 8 * dtype.itemsize) - 1, unsigned).view(dtype)
        return name

    def _assign(self, register: str, text: str, kind: str, guard: str) -> str:
        """Statement that puts an array of ``kind`` into a register, where the lanes are on."""
        if register == "_":
            return "pass"
        slot = self._slot(register)
        held, dtype = np.dtype(self.registers[slot]), np.dtype(NAMESPACE[kind])
        if held != dtype:
            if held.itemsize != dtype.itemsize:  # the sign is kept
                text = f"({text}).astype({'i' if dtype.kind == 'i' else 'u'}{held.itemsize})"
            text = f"({text}).view(u{held.itemsize})" if dtype.kind != "u" or held.itemsize != dtype.itemsize else text
        return f"R[{slot}]={text} if {guard} is None else where({guard},{text},R[{slot}])"

    def _address(self, token: str, kind: str) -> str:
        base, _, offset = token.strip("[] ").partition("+")
        if not base.strip().startswith("%"):
            return self._value(str(int(offset or 0)), kind)
        text = self._value(base.strip(), kind)
        return text if int(offset or 0) == 0 else f"{text}+{self._value(str(int(offset)), kind)}"

    # --- instructions ---

    def _statement(self, line: Line) -> str:
        """Python for one instruction."""
        if line.parts[0] == "bra":
            return "pass" if not line.guard else f"return {self._guard(line)}"
        if line.parts[0] in ("ret", "exit"):
            return "pass" if not line.guard else f"return {self._guard(line)}"
        if line.guard:
            return f"g={self._guard(line)}; g=g if m is None else g&m; {self._body(line, 'g')}"
        return self._body(line, "m")

    def _guard(self, line: Line) -> str:
        text = self._value(line.guard.lstrip("!"), "bool_")
        return f"~{text}" if line.guard.startswith("!") else text

    def _body(self, line: Line, guard: str) -> str:
        parts, operands = line.parts, line.operands
        base, last = parts[0], parts[-1]
        if base in ("bar", "barrier", "membar", "fence", "griddepcontrol"):
            return "pass"
        if base in ("ld", "st"):
            return self._access(parts, operands, guard)
        if parts[:2] == ["cp", "async"]:
            return self._copy(parts, operands, guard)
        if base == "ldmatrix":
            count = int(next(part for part in parts if re.fullmatch(r"x[124]", part))[1:])
            results = operands[0].strip("{} ").split(",")
            load = f"L=warp.load_matrices({self._address(operands[1], 'u4')},{count},{'trans' in parts})"
            return self._together(guard, load, results)
        if base == "mma":
            if parts[3] != "m16n8k16" or parts[-4] != "f32" or last != "f32" or parts[-3] != parts[-2]:
                raise ValueError("mma")
            widen = {"bf16": "from_bfloat16", "f16": "from_float16"}[parts[-2]]
            d, *inputs = ([each.strip() for each in operand.strip("{} ").split(",")] for operand in operands)
            lists = ",".join("[" + ",".join(self._value(each, "u4") for each in values) + "]" for values in inputs)
            return self._together(guard, f"L=multiply_matrices({lists},{widen})", d)
        if base == "shfl":
            value, by, clamp = (self._value(operand, "u4") for operand in operands[1:4])
            target, _, inside = operands[0].partition("|")
            text = f"L=shuffle({parts[2]!r},{value},{by},{clamp})"
            extra = f"; R[{self._slot(inside)}]=L[1]" if inside else ""
            return self._together(guard, text, [target]) + extra
        if base == "redux":
            kind = last.replace("s", "i").replace("b", "u")
            kind = kind[0] + str(int(kind[1:]) // 8)
            function = f"np.{REDUCE[parts[2]]}"
            return self._together(
                guard, f"L=[full(32,{function}({self._value(operands[1], kind)}),{kind}).view(u4)]", operands[:1]
            )
        if base == "vote" and parts[2] == "ballot":
            return self._together(
                guard,
                f"L=[full(32,np.packbits({self._value(operands[1], 'bool_')},bitorder='little').view(u4)[0],u4)]",
                operands[:1],
            )
        if base in ("atom", "red") and parts[-2] == "add":
            kind, space = self._kind(last), next(part for part in parts if part in ("global", "shared"))
            pointer = self._address(operands[-2], "u4" if space == "shared" else "u8")
            call = f"L=warp.add_atomically({space!r},{pointer},{self._value(operands[-1], kind)},{guard})"
            return call + (f"; {self._assign(operands[0], 'L', kind, guard)}" if base == "atom" else "")
        return self._arithmetic(parts, operands, guard)

    @staticmethod
    def _kind(part: str) -> str:
        """numpy's name of a PTX type: "s32" -> "i4"."""
        if part == "pred":
            return "bool_"
        letter = {"s": "i", "u": "u", "b": "u", "f": "f"}[part[0]]
        return letter + str(int(part[1:]) // 8)

    def _together(self, guard: str, call: str, results: list[str]) -> str:
        """An instruction of the whole warp."""
        stores = "; ".join(f"R[{self._slot(result.strip())}]=L[{i}]" for i, result in enumerate(results))
        return f"warp.together({guard}); {call}; {stores}"

    def _access(self, parts: list[str], operands: list[str], guard: str) -> str:
        kind = self._kind(parts[-1])
        size = int(kind[1:])
        if parts[:2] == ["ld", "param"]:
            value = f"warp.parameters[{operands[1].strip('[] ')!r}].view({kind})"
            return self._assign(operands[0], value, kind, guard)
        space = next(part for part in parts if part in ("global", "shared"))
        address = "u4" if space == "shared" else "u8"
        if parts[0] == "ld":
            results = [result.strip() for result in operands[0].strip("{} ").split(",")]
            call = f"L=warp.load({space!r},{self._address(operands[1], address)},{size},{len(results)},{guard})"
            view = "" if kind[0] == "u" else f".view({kind})"
            return "; ".join(
                [call, *(self._assign(result, f"L[{i}]{view}", kind, guard) for i, result in enumerate(results))]
            )
        values = ",".join(self._value(value, f"u{size}") for value in operands[1].strip("{} ").split(","))
        return f"warp.store({space!r},{self._address(operands[0], address)},[{values}],{guard})"

    def _copy(self, parts: list[str], operands: list[str], guard: str) -> str:
        if parts[2] == "commit_group":
            return "warp.commit()"
        if parts[2] == "wait_group":
            return f"warp.wait({operands[0]})"
        if parts[2] == "wait_all":
            return "warp.commit(); warp.wait(0)"
        size = int(operands[2], 0)
        used = self._value(operands[3] if len(operands) > 3 else str(size), "u4")
        return f"warp.copy({self._address(operands[0], 'u4')},{self._address(operands[1], 'u8')},{size},{used},{guard})"

    def _arithmetic(self, parts: list[str], operands: list[str], guard: str) -> str:
        base, last = parts[0], parts[-1]
        target, *sources = operands
        if base == "cvt":
            return self._convert(parts, target, sources, guard)
        if base == "mov" and "{" in target + sources[0]:
            return self._pack(target, sources[0], guard)
        kind = self._kind(last)
        size, letter = (0, "b") if last == "pred" else (int(kind[1:]), kind[0])
        if base == "setp":
            a, b = (self._value(source, kind) for source in sources[:2])
            return self._assign(target, self._comparison(parts, a, b, letter), "bool_", guard)
        if base == "selp":
            a, b = (self._value(source, f"u{size}") for source in sources[:2])
            return self._assign(target, f"where({self._value(sources[2], 'bool_')},{a},{b})", f"u{size}", guard)
        if len(parts) > 2 and parts[1] == "wide":
            wide = f"{letter}{2 * size}"
            a, b = (f"{self._value(source, kind)}.astype({wide})" for source in sources[:2])
            text = f"{a}*{b}" + (f"+{self._value(sources[2], wide)}" if base == "mad" else "")
            return self._assign(target, text, wide, guard)
        if parts[:2] == ["mul", "hi"]:
            wide = {2: f"{letter}4", 4: f"{letter}8"}[size]
            a, b = (f"{self._value(source, kind)}.astype({wide})" for source in sources)
            return self._assign(target, f"({a}*{b}>>{wide}({8 * size})).astype({kind})", kind, guard)
        if base == "bfe":
            a, (position, length) = self._value(sources[0], kind), (int(source) for source in sources[1:])
            text = f"({a}<<{kind}({8 * size - position - length}))>>{kind}({8 * size - length})"
            return self._assign(target, text, kind, guard)
        name = ".".join(part for part in parts[:-1] if part not in ("rn", "ftz", "approx", "full", "rz"))
        if letter == "f":
            text = FLOAT[name].format(*(self._value(source, kind) for source in sources))
            return self._assign(target, f"({text}).astype({kind})" if name == "fma" else text, kind, guard)
        if name in UNSIGNED:
            kind = "bool_" if last == "pred" else f"u{size}"
        table = UNSIGNED if name in UNSIGNED else INTEGER
        return self._assign(target, table[name].format(*(self._value(source, kind) for source in sources)), kind, guard)

    @staticmethod
    def _comparison(parts: list[str], a: str, b: str, letter: str) -> str:
        operation = parts[1]
        if parts[2:-1] not in ([], ["ftz"]):
            raise ValueError("setp with a second condition")
        if operation in ("nan", "num"):
            return f"{'' if operation == 'nan' else '~'}(isnan({a})|isnan({b}))"
        if letter == "f" and operation.endswith("u"):  # true for NaN, too
            opposite = {"equ": None, "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}[operation]
            return f"~(({a}<{b})|({a}>{b}))" if opposite is None else f"~({a}{COMPARE[opposite]}{b})"
        if operation == "ne":
            return f"({a}<{b})|({a}>{b})" if letter == "f" else f"{a}!={b}"
        return f"{a}{COMPARE[operation]}{b}"

    def _pack(self, target: str, source: str, guard: str) -> str:
        """mov between a register and several narrower ones."""
        if "{" in source:
            tokens = source.strip("{} ").split(",")
            narrow = np.dtype(self.registers[self._slot(target)]).itemsize // len(tokens)
            values = ",".join(self._value(token, f"u{narrow}") for token in tokens)
            wide = f"u{narrow * len(tokens)}"
            return self._assign(target, f"np.stack([{values}],1).view({wide})[:,0]", wide, guard)
        tokens = [token.strip() for token in target.strip("{} ").split(",")]
        wide = np.dtype(self.registers[self._slot(source)]).itemsize
        narrow = f"u{wide // len(tokens)}"
        split = f"L={self._value(source, f'u{wide}')}.view({narrow}).reshape(32,-1).T.copy()"
        return "; ".join([split, *(self._assign(token, f"L[{i}]", narrow, guard) for i, token in enumerate(tokens))])

    def _convert(self, parts: list[str], target: str, sources: list[str], guard: str) -> str:
        kinds = [part for part in parts[1:] if re.fullmatch(r"(bf16|f16)(x2)?|[fsu](8|16|32|64)", part)]
        result, source = kinds
        if result in ("bf16x2", "f16x2"):  # the first operand goes to the upper half
            upper, lower = (self._narrow(self._value(token, "f4"), result[:-2]) for token in sources)
            return self._assign(target, f"{lower}.astype(u4)|{upper}.astype(u4)<<u4(16)", "u4", guard)
        if result in ("bf16", "f16"):
            return self._assign(target, self._narrow(self._value(sources[0], self._kind(source)), result), "u2", guard)
        if source in ("bf16", "f16"):
            widen = "from_bfloat16" if source == "bf16" else "from_float16"
            return self._assign(target, f"{widen}({self._value(sources[0], 'u2')})", "f4", guard)
        kind = self._kind(result)
        value = self._value(sources[0], self._kind(source))
        if source[0] == "f" and result[0] != "f":
            value = {"rzi": "trunc({})", "rni": "np.rint({})", "rmi": "np.floor({})", "rpi": "np.ceil({})"}[
                parts[1]
            ].format(value)
        return self._assign(target, f"{value}.astype({kind})", kind, guard)

    @staticmethod
    def _narrow(value: str, kind: str) -> str:
        return f"to_bfloat16({value})" if kind == "bf16" else f"{value}.astype(np.float16).view(u2)"


class Launch:
    """One launch: the arguments' memory and what the programs share."""

    def __init__(self, kernel: Kernel, arguments: Sequence[tuple[Any, str]], grid: tuple[int, int, int]) -> None:
        self.grid = grid
        self.memories: dict[int, tuple[int, Memory]] = {}
        self.parameters: dict[str, Array] = {}
        regions: dict[int, int] = {}  # address of a storage -> its address here
        values = [*arguments, *[(0, "i64")] * (len(kernel.parameters) - len(arguments))]  # scratch memory, not used
        for (label, kind), (value, signature) in zip(kernel.parameters, values, strict=True):
            dtype = np.dtype(NAMESPACE[Kernel._kind(kind)])
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                start = storage.data_ptr()
                if start not in regions:
                    number = len(regions) + 1
                    regions[start] = (number << REGION_BITS) + start % 256
                    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                    self.memories[number] = (regions[start], Memory(data, f"{signature} argument {label}"))
                value = regions[start] + value.data_ptr() - start
            if dtype.kind != "f":  # as bits
                value, dtype = int(value) & (1 << 8 * dtype.itemsize) - 1, np.dtype(CELLS[dtype.itemsize])
            self.parameters[label] = np.full(32, value, dtype).view(CELLS[dtype.itemsize])

    def run(self, kernel: Kernel, shared_bytes: int, order: random.Random) -> None:
        blocks = [(x, y, z) for z in range(self.grid[2]) for y in range(self.grid[1]) for x in range(self.grid[0])]
        order.shuffle(blocks)
        for number, block in enumerate(blocks):
            self.shared = Memory(np.full(shared_bytes, 255, np.uint8), "shared memory")
            warps = [Warp(kernel, i, block, number % 250 + 1, self) for i in range(kernel.num_warps)]
            while True:
                order.shuffle(warps)
                states = {advance(kernel, warp) for warp in warps}
                for _, memory in self.memories.values():
                    memory.barrier()
                self.shared.barrier()
                if states == {False}:
                    break
                if len(states) > 1:
                    raise RaceError(f"{kernel.name}: some warps wait at a barrier that others never reach")


def advance(kernel: Kernel, warp: Warp) -> bool:
    """Run a warp to the next barrier (True) or to its end (False)."""
    end = len(kernel.blocks)
    while True:
        here, mask = warp.pc, None
        if not isinstance(here, int):
            place = int(here.min())
            mask = here == place
            if mask.all():
                warp.pc, mask = place, None
        else:
            place = here
        if place == end:
            return False
        block = kernel.blocks[place]
        try:
            taken = block.run(warp, warp.registers, mask)
        except (AssertionError, NotImplementedError, ValueError, IndexError) as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != kernel.file:
                trace = trace.tb_next
            if trace is None:
                raise
            raise type(error)(kernel.describe(trace.tb_lineno, error)) from error
        if block.kind == "branch":
            assert taken is not None
            if mask is None and taken.all():
                warp.pc = block.target
            elif mask is None and not taken.any():
                warp.pc = block.next
            else:
                moved = np.where(taken, block.target, block.next)
                warp.pc = moved if mask is None else np.where(mask, moved, here)
            continue
        warp.pc = block.next if mask is None else np.where(mask, block.next, here)
        if block.kind == "barrier":
            if mask is not None:
                raise RaceError(f"{kernel.name}: a barrier that only some lanes of a warp reach")
            return True


class Driver:
    """What triton asks of a GPU's driver when it compiles: the target, and some device and stream."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a key of the kernels' caches

    def get_current_stream(self, device: int) -> int:
        return 0


launched_kernels: set[str] = set()
_kernels: dict[tuple[str, int], Kernel] = {}


def parsed(name: str, ptx: str, num_warps: int) -> Kernel:
    key = (ptx, num_warps)
    if key not in _kernels:
        _kernels[key] = Kernel(name, ptx, num_warps)
    return _kernels[key]


class Launched(NamedTuple):
    """A launch as it was made, to be repeated with other code."""

    name: str
    num_warps: int
    shared_bytes: int
    arguments: list[tuple[Any, str]]
    grid: tuple[int, int, int]

    def run(self, ptx: str, seed: int) -> None:
        kernel = parsed(self.name, ptx, self.num_warps)
        with np.errstate(all="ignore"):
            Launch(kernel, self.arguments, self.grid).run(kernel, self.shared_bytes, random.Random(seed))


@contextlib.contextmanager
def simulated(capability: int = 80, *, seed: int = 0) -> Iterator[None]:
    """Run every launch of a Triton kernel on CPU tensors from its PTX.

    Args:
        capability: of the GPU to compile for; its configurations are those that ``configs.select`` gives CPU tensors.
        seed: of the order of warps and programs.

    Raises:
        NotImplementedError: an instruction that the simulator does not know; names it.
    """
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("simulated: TRITON_INTERPRET is set; kernels are compiled only in a process without it")
    for module in pkgutil.walk_packages(toprl_kernels.__path__, "toprl_kernels."):
        if module.name.endswith(".triton"):
            importlib.import_module(module.name)
    compile_launch = triton.JITFunction.run

    @functools.wraps(compile_launch)
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_launch(self, *args, grid=grid, warmup=True, **kwargs)  # binds as a launch does
        metadata = compiled.metadata
        for scratch in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, scratch, 0):
                raise NotImplementedError(f"{metadata.name}: {scratch}")
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arguments = [(values[name], kind) for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        launched_kernels.add(metadata.name)
        shape = (*grid, 1, 1)[:3]
        ptx = compiled.asm["ptx"]
        Launched(metadata.name, metadata.num_warps, metadata.shared, arguments, shape).run(ptx, seed)
        return compiled

    triton.runtime.driver.set_active(Driver(capability))
    triton.JITFunction.run = run
    # read again at each call by who decides whether kernels take CPU tensors; triton reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        triton.JITFunction.run = compile_launch
        del os.environ["TRITON_INTERPRET"]
