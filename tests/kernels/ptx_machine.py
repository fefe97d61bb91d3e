"""What runs a kernel's PTX: memory that knows who touched it, warps, the programs of a launch.

See ptx_simulator.py. The code itself is in ptx_code.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from tests.kernels.ptx_code import Kernel

LANES = np.arange(32)
CELLS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # one access of so many bytes
REGION_BITS = 40  # of an address: a tensor each
PENDING, SEVERAL = 254, 255  # marks of bytes beside the warps' 1..32
ATOMIC = np.uint32(0xFDFDFDFD)  # the mark of four bytes that are added to

Array = np.ndarray[Any, Any]
Mask = Array | None  # None: all lanes


def numpy_kind(part: str) -> str:
    """numpy's name of a PTX type: "s32" -> "i4"."""
    if part == "pred":
        return "bool_"
    return {"s": "i", "u": "u", "b": "u", "f": "f"}[part[0]] + str(int(part[1:]) // 8)


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

    def read(self, warp: Warp, cells: Array, size: int, *, is_pending: bool = False) -> Array:
        """The bytes; ``is_pending``: an asynchronous instruction reads them until it is waited for."""
        self._check("writer", warp.mark, cells, size, "reads what was written or is being copied")
        if self.written:
            self._check("program", warp.program, cells, size, "reads what another program wrote")
        readers = self.view("reader", size)
        seen = readers[cells].view(np.uint8)
        alone = (seen == 0) | (seen == warp.mark)
        seen = np.where(is_pending | (seen == PENDING), PENDING, np.where(alone, warp.mark, SEVERAL)).astype(np.uint8)
        readers[cells] = seen.view(CELLS[size])
        self.touch(cells, size)
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
        self.touch(cells, size)

    def add(self, warp: Warp, cells: Array, values: Array) -> Array:
        """Add 32-bit numbers atomically, lane by lane; return those before."""
        self._check("reader", warp.mark, cells, 4, "adds atomically to what was read")
        writers, data = self.view("writer", 4), self.view("data", 4)
        if (writers[cells] != ATOMIC).any():
            self._check("writer", warp.mark, cells, 4, "adds atomically to what was written")
        writers[cells] = ATOMIC
        before: Array = data[cells] + np.tril(cells[:, None] == cells, -1).astype(np.uint32) @ values
        np.add.at(data, cells, values)
        self.touch(cells, 4)
        return before

    def touch(self, cells: Array, size: int) -> None:
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
            reader = self.reader[self.first : self.end]
            reader *= reader == PENDING
            self.first, self.end = len(self.data), 0


class Warp:
    """Registers, place in the code, and copies under way."""

    def __init__(self, kernel: Kernel, index: int, block: tuple[int, int, int], program: int, launch: Launch) -> None:
        self.registers = [np.full(32, -1, np.int8).astype(kind) for kind in kernel.registers]
        self.pc: int | Array = 0
        self.mark, self.program = index + 1, program
        self.memories, self.shared = launch.memories, launch.shared
        self.special = {"%tid.x": (index * 32 + LANES).astype(np.uint32)}
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = np.full(32, block[axis], np.uint32)
            self.special[f"%nctaid.{name}"] = np.full(32, launch.grid[axis], np.uint32)
        self.parameters = launch.parameters
        # asynchronous work by group, of which the last one is not committed yet
        self.copies: list[list[tuple[Array, int, Array]]] = [[]]  # cells, their size, values
        self.products: list[tuple[list[Array], dict[int, Array]]] = [([], {})]  # cells read, results by register

    def at(self, space: str, addresses: Array, mask: Mask) -> Iterator[tuple[Array, Memory, Array]]:
        """Which lanes access which memory, and at which offsets."""
        lanes = LANES if mask is None else LANES[mask]
        if space == "shared":
            if len(lanes):
                yield lanes, self.shared, addresses[lanes]
            return
        regions = addresses[lanes] >> np.uint64(REGION_BITS)
        for region in dict.fromkeys(regions.tolist()):
            part = lanes[regions == region]
            if region not in self.memories:
                raise AddressError(f"address {int(addresses[part][0]):#x} is in no argument")
            base, memory = self.memories[region]
            yield part, memory, addresses[part].astype(np.int64) - base

    def load(self, space: str, addresses: Array, size: int, count: int, mask: Mask) -> list[Array]:
        """``count`` values of ``size`` bytes per lane; lanes that are off get anything."""
        result = np.full((32, size * count), 255, np.uint8)
        for lanes, memory, offsets in self.at(space, addresses, mask):
            part = memory.read(self, memory.cells(offsets, size * count), size * count)
            result[lanes] = part.view(np.uint8).reshape(-1, size * count)
        return list(result.view(CELLS[size]).T.copy())

    def store(self, space: str, addresses: Array, values: Sequence[Array], mask: Mask) -> None:
        bits = np.stack(values, 1)
        size = bits.itemsize * bits.shape[1]
        bits = bits.view(CELLS[size])[:, 0]
        for lanes, memory, offsets in self.at(space, addresses, mask):
            memory.write(self, memory.cells(offsets, size), size, bits[lanes])

    def add_atomically(self, addresses: Array, values: Array, mask: Mask) -> Array:
        """The numbers before. Nothing else may touch the bytes before the next barrier."""
        before = values.copy()
        for lanes, memory, offsets in self.at("shared", addresses, mask):
            before[lanes] = memory.add(self, memory.cells(offsets, 4), values[lanes])
        return before

    def copy(self, target: Array, source: Array, size: int, used: Array, mask: Mask) -> None:
        """cp.async: the first ``used`` of ``size`` bytes, zeros for the rest, once the group is waited for."""
        lanes = np.ones(32, bool) if mask is None else mask
        if not lanes.any():
            return
        values = np.zeros((32, size), np.uint8)
        for count in set(used[lanes].tolist()) - {0}:
            part = lanes & (used == count)
            values[part, :count] = self.load("global", source, count, 1, part)[0][part, None].view(np.uint8)
        cells = self.shared.cells(target[lanes], size)
        self.shared.write(self, cells, size, None, PENDING)
        self.copies[-1].append((cells, size, np.ascontiguousarray(values[lanes]).view(CELLS[size])[:, 0]))

    def together(self, mask: Mask) -> None:
        """Raise unless all lanes are on."""
        if mask is not None and not mask.all():
            raise RaceError("an instruction of the whole warp that only some lanes reach")

    def wait(self, pending: int) -> None:
        """Finish all but the last ``pending`` groups of copies."""
        while len(self.copies) > pending + 1:
            for cells, size, values in self.copies.pop(0):
                self.shared.view("writer", size)[cells] = 0
                self.shared.write(self, cells, size, values)

    def wait_products(self, pending: int) -> None:
        while len(self.products) > pending + 1:
            read, results = self.products.pop(0)
            for cells in read:
                self.shared.view("reader", 2)[cells] = self.mark * 0x101  # both bytes
                self.shared.touch(cells, 2)
            for slot, value in results.items():
                if not any(slot in later for _, later in self.products):
                    self.registers[slot] = value

    def load_matrices(self, addresses: Array, count: int, transposed: bool) -> list[Array]:
        """ldmatrix: 8 x 8 matrices of 16 bits, whose rows are where lanes 8 i .. 8 i + 7 say."""
        addresses = addresses[: 8 * count]
        rows = self.shared.read(self, self.shared.cells(addresses, 16), 16).view(np.uint16).reshape(count, 8, 8)
        if transposed:
            rows = rows.swapaxes(1, 2)
        return list(np.ascontiguousarray(rows).view(np.uint32).reshape(count, 32))

    def store_matrices(self, addresses: Array, values: Sequence[Array], transposed: bool) -> None:
        """stmatrix: the inverse of ldmatrix."""
        rows = np.stack(values).view(np.uint16).reshape(len(values), 8, 8)
        if transposed:
            rows = rows.swapaxes(1, 2)
        cells = self.shared.cells(addresses[: 8 * len(values)], 16)
        self.shared.write(self, cells, 16, np.ascontiguousarray(rows).view(CELLS[16]).reshape(-1))

    def load_tile(self, descriptor: Array, first: int, rows: int, transposed: bool) -> Array:
        """wgmma's operand [rows, 16] of 16 bits in swizzled shared memory; transposed: the rows are contiguous."""
        bits = int(descriptor[0])
        start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        width = {0: 0, 1: 128, 2: 64, 3: 32}[bits >> 62]  # bytes of a row of an atom of eight rows
        if width == 0 or bits >> 49 & 7:
            raise NotImplementedError(f"matrix descriptor {bits:#x}")
        row, k = np.arange(first, first + rows)[:, None], np.arange(16)[None]
        across, along = (k, 2 * row) if transposed else (row, 2 * k)
        address = start + across // 8 * stride + across % 8 * width + along // width * leading + along % width
        address ^= (address >> 7 & width // 16 - 1) << 4
        cells = self.shared.cells(address.reshape(-1), 2)
        self.products[-1][0].append(cells)
        return self.shared.read(self, cells, 2, is_pending=True).reshape(rows, 16)


class Launch:
    """One launch: the arguments' memory and what the programs share."""

    def __init__(self, kernel: Kernel, arguments: Sequence[tuple[Any, str]], grid: tuple[int, int, int]) -> None:
        self.grid = grid
        self.memories: dict[int, tuple[int, Memory]] = {}
        self.parameters: dict[str, Array] = {}
        regions: dict[int, int] = {}  # address of a storage -> its address here
        values = [*arguments, *[(0, "i64")] * (len(kernel.parameters) - len(arguments))]  # scratch memory, not used
        for (label, kind), (value, signature) in zip(kernel.parameters, values, strict=True):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                start = storage.data_ptr()
                if start not in regions:
                    number = len(regions) + 1
                    regions[start] = (number << REGION_BITS) + start % 256
                    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                    self.memories[number] = (regions[start], Memory(data, f"{signature} argument {label}"))
                value = regions[start] + value.data_ptr() - start
            bits, size = int(np.float32(value).view(np.uint32) if kind == "f32" else value), int(kind[1:]) // 8
            self.parameters[label] = np.full(32, bits & (1 << 8 * size) - 1, CELLS[size])

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
        kernel.ran.add(place)
        try:
            taken = block.run(warp, warp.registers, mask)
        except (AssertionError, NotImplementedError, ValueError, IndexError) as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != kernel.file:
                trace = trace.tb_next
            if trace is None:
                raise
            raise type(error)(kernel.describe(trace.tb_lineno, error)) from error
        if block.kind == "barrier" and mask is not None:
            raise RaceError(f"{kernel.name}: a barrier that only some lanes of a warp reach")
        moved: Any = block.target
        if block.kind == "branch":
            assert taken is not None
            moved = np.where(taken, block.target, block.next)
            if mask is None and (moved == moved[0]).all():
                moved = int(moved[0])
        warp.pc = moved if mask is None else np.where(mask, moved, here)
        if block.kind == "barrier":
            return True
