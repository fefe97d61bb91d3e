"""A kernel's PTX as Python: each basic block becomes a function over the 32 lanes of a warp.

See ptx_simulator.py. An instruction that is not known raises NotImplementedError, which names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.kernels.ptx_machine import CELLS, LANES, Array, Mask, Warp, numpy_kind


def left_operand(registers: Sequence[Array]) -> Array:
    """A [16, 16] of a warp, in the layout of mma.m16n8k16 (PTX manual)."""
    halves = np.stack(registers).view(np.uint16).reshape(2, 2, 8, 4, 2)  # k / 8, row / 8, row % 8, k % 8 / 2, k % 2
    return halves.transpose(1, 2, 0, 3, 4).reshape(16, 16)


def right_operand(registers: Sequence[Array]) -> Array:
    """B [16, 8], transposed."""
    halves = np.stack(registers).view(np.uint16).reshape(2, 8, 4, 2)  # k / 8, column, k % 8 / 2, k % 2
    return halves.transpose(1, 0, 2, 3).reshape(8, 16)


def multiply(left: Array, right: Array, registers: Sequence[Array], widen: Callable[..., Array]) -> list[Array]:
    """left [16, 16] @ right [n, 16]^T + the accumulators [16, n]; rounded once."""
    # column / 8, row / 8, column % 2, row % 8, column % 8 / 2
    acc = np.stack(registers).view(np.float32).reshape(-1, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(16, -1)
    left, right = (widen(np.ascontiguousarray(x)).astype(np.float64) for x in (left, right))
    total = (left @ right.T + acc).astype(np.float32).reshape(2, 8, -1, 4, 2).transpose(2, 0, 4, 1, 3)
    return list(total.reshape(-1, 32).view(np.uint32))


def multiply_tiles(
    warp: Warp, a: Any, b: Array, slots: list[int], keep: Array, widen: Callable[..., Array], transposed: list[bool]
) -> None:
    """wgmma: 16 of the 64 rows of a group of four warps. ``a``: registers, or a descriptor as ``b``."""
    left = left_operand(a) if isinstance(a, list) else warp.load_tile(a, (warp.mark - 1) % 4 * 16, 16, transposed[0])
    right = warp.load_tile(b, 0, 2 * len(slots), transposed[-1])
    pending = [results for _, results in reversed(warp.products)]
    before = [next((results[slot] for results in pending if slot in results), warp.registers[slot]) for slot in slots]
    sums = multiply(left, right, [np.where(keep, value, np.uint32(0)) for value in before], widen)
    warp.products[-1][1].update(zip(slots, sums, strict=True))
    for slot in slots:
        warp.registers[slot] = np.full(32, 0xFFFFFFFF, np.uint32)


def shuffle(mode: str, value: Array, by: Array) -> Array:
    """shfl.sync over the whole warp: the value of another lane, or a lane's own where there is no other."""
    by = by.astype(int)
    source = {"up": np.where(by > LANES, LANES, LANES - by), "bfly": LANES ^ by, "idx": by & 31}[mode]
    return value[source]


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
    """prmt: each byte of the result is one of the eight of b:a."""
    source = np.stack([a, b], 1).view(np.uint8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 7
    return np.take_along_axis(source, nibbles.astype(int), 1).view(np.uint32)[:, 0]


# operation -> numpy expression; the types of operands and result are the instruction's last part
UNSIGNED = {  # that mean the same for signed operands
    "add": "{0}+{1}", "sub": "{0}-{1}", "mul.lo": "{0}*{1}", "mad.lo": "{0}*{1}+{2}", "and": "{0}&{1}",
    "or": "{0}|{1}", "xor": "{0}^{1}", "not": "~{0}", "mov": "{0}", "shl": "{0}<<{1}",
    "prmt": "permute({0},{1},{2})",
}  # fmt: skip
INTEGER = {
    "shr": "{0}>>{1}", "min": "minimum({0},{1})", "max": "maximum({0},{1})", "neg": "-{0}",
    "min.relu": "maximum(minimum({0},{1}),0)", "max.relu": "maximum(maximum({0},{1}),0)",
    "div": "divide({0},{1})", "rem": "{0}-divide({0},{1})*{1}",
    "popc": "np.unpackbits({0}.view(u1).reshape(32,-1),axis=1).sum(1).astype(u4)",
}  # fmt: skip
FLOAT = {
    "add": "{0}+{1}", "sub": "{0}-{1}", "mul": "{0}*{1}", "fma": "({0}.astype(f8)*{1}+{2})", "neg": "-{0}",
    "abs": "abs({0})", "div": "{0}/{1}", "sqrt": "np.sqrt({0})", "ex2": "np.exp2({0})", "mov": "{0}",
    "min": "np.fmin({0},{1})", "max": "np.fmax({0},{1})", "min.NaN": "minimum({0},{1})",
}  # fmt: skip
COMPARE = {
    "eq": "{0}=={1}", "ne": "{0}!={1}", "lt": "{0}<{1}", "le": "{0}<={1}", "gt": "{0}>{1}", "ge": "{0}>={1}",
    # true for NaN, too; numpy's != is
    "neu": "{0}!={1}", "ltu": "~({0}>={1})", "leu": "~({0}>{1})", "nan": "isnan({0})|isnan({1})",
}  # fmt: skip
WIDEN = {"bf16": "from_bfloat16", "f16": "from_float16"}
NARROW = {"bf16": "to_bfloat16({})", "f16": "{}.astype(np.float16).view(u2)"}
NAMESPACE: dict[str, Any] = {
    "divide": divide, "permute": permute, "shuffle": shuffle, "multiply": multiply, "multiply_tiles": multiply_tiles,
    "left_operand": left_operand, "right_operand": right_operand, "to_bfloat16": to_bfloat16,
    "from_bfloat16": from_bfloat16, "from_float16": from_float16, "np": np, "bool_": np.bool_, "abs": np.abs,
    "where": np.where, "minimum": np.minimum, "maximum": np.maximum, "isnan": np.isnan, "full": np.full,
    **{f"{kind}{size}": np.dtype(f"{kind}{size}").type for kind in "iu" for size in (1, 2, 4, 8)},
    "f2": np.float16, "f4": np.float32, "f8": np.float64,
}  # fmt: skip


class Block(NamedTuple):
    """A basic block, cut at barriers.

    ``run(warp, registers, mask)`` returns, of a branch, the lanes that go to ``target`` rather than to ``next``.
    """

    run: Callable[[Warp, list[Array], Mask], Array | None]
    lines: list[int]
    kind: str  # "next", "branch" or "barrier"
    target: int
    next: int  # of a branch


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
        self.ran: set[int] = set()  # blocks

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
                if line.parts[0] in ("bra", "ret") or line.parts[:2] == ["bar", "sync"]:
                    pieces.append([])
        end = len(pieces)
        ends = []
        for index, lines in enumerate(pieces):
            last = lines[-1] if lines else Line(0, "", ["none"], [])
            kind, target = "barrier" if last.parts[:2] == ["bar", "sync"] else "next", index + 1
            if last.parts[0] in ("bra", "ret"):
                kind = "branch" if last.guard else "next"
                target = labels[last.operands[0]] if last.parts[0] == "bra" else end
            ends.append((kind, target, index + 1))
        # reverse postorder; the successor that comes later in the text is visited first: a loop before what follows
        done, seen, stack = [end], {end}, [(0, False)]
        while stack:
            block, is_left = stack.pop()
            if is_left:
                done.append(block)
            elif block not in seen:
                seen.add(block)
                kind, target, following = ends[block]
                successors = {following, target} if kind == "branch" else {target}
                stack += [(block, True), *((successor, False) for successor in sorted(successors))]
        ordered = done[::-1]
        place = {block: number for number, block in enumerate(ordered)}
        blocks = []
        for index in ordered[:-1]:
            kind, target, following = ends[index]
            numbers = [line.number for line in pieces[index]]
            blocks.append(Block(self._function(pieces[index]), numbers, kind, place[target], place.get(following, -1)))
        return blocks

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
        if "." in token:  # %tid.x
            return f"warp.special[{token!r}].astype({kind})"
        if token.startswith("%"):
            slot = self._slot(token)
            held = np.dtype(self.registers[slot])
            text = f"R[{slot}]"
            if held.itemsize != dtype.itemsize:
                text += f".astype(u{dtype.itemsize})"
            return text if dtype.kind in "ub" else f"{text}.view({kind})"
        bits = 0 if token == "global_smem" else int(token[2:], 16) if token[:2] == "0f" else int(token.rstrip("U"), 0)
        bits = bool(bits) if kind == "bool_" else bits & (1 << 8 * dtype.itemsize) - 1
        name = f"c_{bits:x}_{kind}"
        self.namespace[name] = np.full(32, bits, CELLS[dtype.itemsize]).view(dtype)
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
        parts = [part.strip() for part in token.strip("[] ").split("+")]
        return "+".join(self._value(part, kind) for part in parts if part != "0")

    # --- instructions ---

    def _statement(self, line: Line) -> str:
        """Python for one instruction."""
        guard = line.guard and self._value(line.guard.lstrip("!"), "bool_")
        guard = "~" + guard if line.guard.startswith("!") else guard
        if line.parts[0] in ("bra", "ret"):
            return f"return {guard}" if guard else "pass"
        return f"g={guard}; g=g if m is None else g&m; {self._body(line, 'g')}" if guard else self._body(line, "m")

    def _body(self, line: Line, guard: str) -> str:
        parts, operands = line.parts, line.operands
        base, last = parts[0], parts[-1]
        if base in ("bar", "fence"):
            if parts[1] == "sync" and operands != ["0"]:
                raise ValueError("only barrier 0 of all warps")
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
            a, b, c = (self._list(operand) for operand in operands[1:])
            call = f"L=multiply(left_operand({a}),right_operand({b}),{c},{WIDEN[parts[-2]]})"
            return self._together(guard, call, operands[0].strip("{} ").split(","))
        if base == "wgmma":
            return self._tiles(parts, operands, guard)
        if base == "stmatrix":
            arguments = f"{self._address(operands[0], 'u4')},{self._list(operands[1])},{'trans' in parts}"
            return f"warp.together({guard}); warp.store_matrices({arguments})"
        if base == "shfl":
            if operands[3] != {"up": "0"}.get(parts[2], "31"):
                raise ValueError("a part of the warp")
            value, by = (self._value(operand, "u4") for operand in operands[1:3])
            return self._together(guard, f"L=[shuffle({parts[2]!r},{value},{by})]", operands[:1])
        if base == "redux":
            function = {"add": "sum", "min": "min", "max": "max"}[parts[2]]
            value = self._value(operands[1], numpy_kind(last))
            return self._together(guard, f"L=[full(32,np.{function}({value}),i4).view(u4)]", operands[:1])
        if base == "vote":
            bits = f"np.packbits({self._value(operands[1], 'bool_')},bitorder='little').view(u4)[0]"
            return self._together(guard, f"L=[full(32,{bits},u4)]", operands[:1])
        if base == "atom":
            if parts[1:] != ["shared", "add", "u32"]:
                raise ValueError("atom")
            arguments = f"{self._address(operands[1], 'u4')},{self._value(operands[2], 'u4')},{guard}"
            return f"L=warp.add_atomically({arguments}); {self._assign(operands[0], 'L', 'u4', guard)}"
        return self._arithmetic(parts, operands, guard)

    def _list(self, operand: str) -> str:
        return "[" + ",".join(self._value(token, "u4") for token in operand.strip("{} ").split(",")) + "]"

    def _tiles(self, parts: list[str], operands: list[str], guard: str) -> str:
        """wgmma. Shared memory is read, and results are NaN, until the group is waited for."""
        if parts[1] != "mma_async":
            wait = f"warp.wait_products({''.join(operands)})"
            return {"fence": "pass", "commit_group": "warp.products.append(([],{}))", "wait_group": wait}[parts[1]]
        d, a, b, accumulate, *scales = operands
        if scales[:2] != ["1", "1"] or parts[-3] != "f32" or not parts[4].endswith("k16"):
            raise ValueError("wgmma")
        left = self._list(a) if "{" in a else self._value(a, "u8")
        slots = [self._slot(register.strip()) for register in d.strip("{} ").split(",")]
        rest = f"{slots},{self._value(accumulate, 'bool_')},{WIDEN[parts[-1]]},{[x != '0' for x in scales[2:]]}"
        return f"warp.together({guard}); multiply_tiles(warp,{left},{self._value(b, 'u8')},{rest})"

    def _together(self, guard: str, call: str, results: list[str]) -> str:
        """An instruction of the whole warp."""
        stores = "; ".join(f"R[{self._slot(result.strip())}]=L[{i}]" for i, result in enumerate(results))
        return f"warp.together({guard}); {call}; {stores}"

    def _access(self, parts: list[str], operands: list[str], guard: str) -> str:
        kind = numpy_kind(parts[-1])
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
            return "warp.copies.append([])"
        if parts[2] == "wait_group":
            return f"warp.wait({operands[0]})"
        target, source = self._address(operands[0], "u4"), self._address(operands[1], "u8")
        return f"warp.copy({target},{source},{int(operands[2], 0)},{self._value(operands[3], 'u4')},{guard})"

    def _arithmetic(self, parts: list[str], operands: list[str], guard: str) -> str:
        base, last = parts[0], parts[-1]
        target, *sources = operands
        if base == "cvt":
            return self._convert(parts, target, sources, guard)
        if base == "mov" and "{" in target + sources[0]:
            return self._pack(target, sources[0], guard)
        kind = "f2" if last == "bf16" else numpy_kind(last)
        size, letter = (0, "b") if last == "pred" else (int(kind[1:]), kind[0])
        if base == "setp":  # a second condition is no key of COMPARE
            a, b = (self._value(source, "u2" if last == "bf16" else kind) for source in sources)
            if last == "bf16":
                a, b = f"from_bfloat16({a})", f"from_bfloat16({b})"
            return self._assign(target, COMPARE[".".join(parts[1:-1])].format(a, b), "bool_", guard)
        if base == "selp":
            a, b = (self._value(source, f"u{size}") for source in sources[:2])
            return self._assign(target, f"where({self._value(sources[2], 'bool_')},{a},{b})", f"u{size}", guard)
        if len(parts) > 2 and parts[1] == "wide":
            wide = f"{letter}{2 * size}"
            a, b = (f"{self._value(source, kind)}.astype({wide})" for source in sources[:2])
            text = f"{a}*{b}" + (f"+{self._value(sources[2], wide)}" if base == "mad" else "")
            return self._assign(target, text, wide, guard)
        if parts[:2] == ["mul", "hi"]:
            a, b = (f"{self._value(source, kind)}.astype({letter}8)" for source in sources)
            return self._assign(target, f"({a}*{b}>>{letter}8({8 * size})).astype({kind})", kind, guard)
        if base == "bfe":
            a, (position, length) = self._value(sources[0], kind), (int(source) for source in sources[1:])
            text = f"({a}<<{kind}({8 * size - position - length}))>>{kind}({8 * size - length})"
            return self._assign(target, text, kind, guard)
        name = ".".join(part for part in parts[:-1] if part not in ("rn", "ftz", "approx", "full"))
        if letter == "f":
            text = FLOAT[name].format(*(self._value(source, kind) for source in sources))
            return self._assign(target, f"({text}).astype({kind})" if name == "fma" else text, kind, guard)
        if name in UNSIGNED:
            kind = "bool_" if last == "pred" else f"u{size}"
        table = UNSIGNED if name in UNSIGNED else INTEGER
        return self._assign(target, table[name].format(*(self._value(source, kind) for source in sources)), kind, guard)

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
        result, source = parts[-2:]
        if result in ("bf16x2", "f16x2"):  # the first operand goes to the upper half
            upper, lower = (NARROW[result[:-2]].format(self._value(token, "f4")) for token in sources)
            return self._assign(target, f"{lower}.astype(u4)|{upper}.astype(u4)<<u4(16)", "u4", guard)
        if result in NARROW:
            return self._assign(target, NARROW[result].format(self._value(sources[0], "f4")), "u2", guard)
        if source in WIDEN:
            return self._assign(target, f"{WIDEN[source]}({self._value(sources[0], 'u2')})", "f4", guard)
        if source[0] == "f":
            raise ValueError("cvt")
        kind = numpy_kind(result)
        return self._assign(target, f"{self._value(sources[0], numpy_kind(source))}.astype({kind})", kind, guard)
