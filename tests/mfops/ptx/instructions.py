"""What each instruction does to the registers and memory of all threads that execute it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .memory import BLOCK_BIT, SHARED, Array, Global, Shared
from .program import Instruction, Program, elements

PARAMETER = 1 << 40  # where the kernel's parameters begin
LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4 * 2  # of a lane's share of an 8 x 8 matrix

COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
BITWISE: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
}
INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda x, y, z: x * y + z,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": lambda x, y: _quotient(x, y),
    "rem": lambda x, y: (x - _quotient(x, y) * y).astype(x.dtype),
}
# Of float64: a result is then rounded once, fma's too.
FLOAT: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "fma": lambda x, y, z: x * y + z,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x,
    "ex2": np.exp2,
}
PACKED = {"bf16": lambda x: bf16(x), "f16": lambda x: x.astype(np.float16).view(np.uint16)}


def bf16(x: Array) -> Array:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_f16(bits: Array) -> Array:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _quotient(x: Array, y: Array) -> Array:
    wide = np.int64 if x.dtype.kind == "i" else np.uint64
    x_, y_ = x.astype(wide), np.where(y == 0, 1, y).astype(wide)
    return (np.abs(x_) // np.abs(y_) * np.sign(x_) * np.sign(y_)).astype(x.dtype)


def dtype_of(type_: str) -> np.dtype:
    if type_ == "pred":
        return np.dtype(np.bool_)
    kind = {"s": "i", "f": "f"}.get(type_[0], "u")
    return np.dtype(f"{kind}{int(type_[1:]) // 8}")


def unsigned(size: int) -> np.dtype:
    return np.dtype(f"u{size}")


class Instructions:
    def __init__(
        self,
        program: Program,
        parameters: bytes,
        memory: Global,
        shared: Shared,
        block: Array,
        first: int,
    ) -> None:
        self.program, self.memory, self.shared = program, memory, shared
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.block, self.count = block, len(block)
        threads = np.arange(self.count) % (self.count // (block[-1] + 1))
        self.registers: dict[str, Array] = {
            "%tid.x": threads.astype(np.uint32),
            "%ctaid.x": (block + first).astype(np.uint32),
            "%cluster_ctarank": block.astype(np.uint32),
        }
        self.groups = np.zeros(self.count, np.int64)
        self.copies: list[tuple[Array, Array, Array, Array, Array]] = []

    # Operands.

    def register(self, name: str) -> Array:
        if name not in self.registers:
            prefix = name.rstrip("0123456789") if name not in self.program.register_types else name
            dtype = dtype_of(self.program.register_types[prefix])
            unset = 0 if dtype == np.bool_ else 0xDEADBEEFDEADBEEF
            whole = np.full(self.count, unset, np.uint64)
            self.registers[name] = whole.astype(
                dtype if dtype == np.bool_ else unsigned(dtype.itemsize)
            )
        return self.registers[name]

    def value(self, operand: str, type_: str) -> Array:
        dtype = dtype_of(type_)
        if operand[0] == "%":
            bits = self.register(operand)
        elif re.fullmatch(r"0[fd][0-9A-F]+", operand):
            bits = np.full(
                self.count, int(operand[2:], 16), unsigned(4 if operand[1] == "f" else 8)
            )
        elif re.fullmatch(r"-?\d+", operand):
            bits = np.full(self.count, int(operand), np.int64)
        elif operand == self.program.parameter:
            bits = np.full(self.count, PARAMETER, np.uint64)
        else:  # the block's shared memory
            bits = (self.block << BLOCK_BIT) + SHARED
        if dtype == np.bool_:
            return bits.astype(np.bool_)
        if bits.dtype.itemsize != dtype.itemsize:
            bits = bits.astype(unsigned(dtype.itemsize))
        return bits.view(dtype)

    def put(self, name: str, value: Array, active: Array) -> None:
        register = self.register(name)
        if value.dtype.itemsize != register.dtype.itemsize:
            value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64)
            value = value.astype(register.dtype)
        np.copyto(register, value.view(register.dtype), where=active)

    def address(self, operand: str) -> Array:
        match = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", operand)
        assert match is not None, operand
        return self.value(match[1], "u64").astype(np.int64) + int(match[2] or 0)

    # Instructions.

    def do(self, instruction: Instruction, active: Array) -> None:
        parts = instruction.parts
        name = parts[0] if parts[0] != "ld" or parts[1] != "param" else "ld_param"
        with np.errstate(all="ignore"):
            own = getattr(self, f"_{name}", None)
            if own is not None:
                own(parts, instruction.operands, active)
            else:
                self._compute(parts, instruction.operands, active)

    def _compute(self, parts: list[str], operands: list[str], active: Array) -> None:
        name, type_, result = parts[0], parts[-1], operands[0]
        table = {"b": BITWISE, "p": BITWISE, "f": FLOAT}.get(type_[0], INTEGER)
        if name not in table or ("hi" in parts and name != "mul"):
            raise NotImplementedError("an instruction that is not known here")
        types = [type_] * 3
        if "wide" in parts or "hi" in parts:  # products, and what is added to them
            wide = f"{type_[0]}{2 * int(type_[1:])}"
            types[2] = wide
        values = [self.value(op, own) for op, own in zip(operands[1:], types, strict=False)]
        if name == "div" and table is INTEGER and (values[1][active] == 0).any():
            raise ZeroDivisionError("a division by zero")
        if table is FLOAT:
            exact = table[name](*(value.astype(np.float64) for value in values))
            self.put(result, self._rounded(exact, dtype_of(type_), parts), active)
        elif "wide" in parts or "hi" in parts:
            whole = table[name](*(v.astype(dtype_of(wide)) for v in values))
            half = whole.dtype.type(8 * dtype_of(type_).itemsize)
            self.put(result, whole >> half if "hi" in parts else whole, active)
        else:
            self.put(result, table[name](*values), active)

    @staticmethod
    def _rounded(exact: Array, dtype: np.dtype, parts: list[str]) -> Array:
        result = exact.astype(dtype)
        if "rm" in parts:  # down
            result = np.where(result > exact, np.nextafter(result, dtype.type(-np.inf)), result)
        if "sat" in parts:
            result = np.clip(np.nan_to_num(result, nan=0), 0, 1)
        return result.astype(dtype)

    def _mov(self, parts: list[str], operands: list[str], active: Array) -> None:
        to, source = operands
        if parts[-1] == "pred" or "{" not in to + source:
            return self.put(to, self.value(source, parts[-1]), active)
        size = int(parts[-1][1:])
        if to[0] == "{":
            whole, names = self.value(source, parts[-1]), elements(to)
            for i, name in enumerate(names):
                part = whole >> whole.dtype.type(size // len(names) * i)
                self.put(name, part.astype(unsigned(size // len(names) // 8)), active)
            return None
        names = elements(source)
        bits = size // len(names)
        values = [self.value(name, f"b{bits}").astype(np.uint64) for name in names]
        whole = sum((v << np.uint64(bits * i) for i, v in enumerate(values)), np.uint64(0))
        return self.put(to, np.asarray(whole).astype(unsigned(size // 8)), active)

    def _cvta(self, parts: list[str], operands: list[str], active: Array) -> None:
        self.put(operands[0], self.value(operands[1], "u64"), active)

    def _mapa(self, parts: list[str], operands: list[str], active: Array) -> None:
        place = self.value(operands[1], "u32") & np.uint32((1 << BLOCK_BIT) - 1)
        self.put(
            operands[0], place | self.value(operands[2], "u32") << np.uint32(BLOCK_BIT), active
        )

    def _setp(self, parts: list[str], operands: list[str], active: Array) -> None:
        compare, type_ = parts[1], parts[-1]
        x, y = (self.value(op, type_) for op in operands[1:])
        unordered = type_[0] == "f" and compare[-1] == "u"
        result = COMPARISONS[compare[:2]](x, y)
        if unordered:
            result |= np.isnan(x) | np.isnan(y)
        self.put(operands[0], result, active)

    def _selp(self, parts: list[str], operands: list[str], active: Array) -> None:
        x, y = (self.value(op, parts[-1]) for op in operands[1:3])
        self.put(operands[0], np.where(self.register(operands[3]), x, y), active)

    def _shl(self, parts: list[str], operands: list[str], active: Array) -> None:
        x, by = self.value(operands[1], parts[-1]), self.value(operands[2], "u32")
        bits = 8 * x.dtype.itemsize
        shifted = x << np.minimum(by, bits - 1).astype(x.dtype)
        self.put(operands[0], np.where(by < bits, shifted, 0).astype(x.dtype), active)

    def _shr(self, parts: list[str], operands: list[str], active: Array) -> None:
        x, by = self.value(operands[1], parts[-1]), self.value(operands[2], "u32")
        bits = 8 * x.dtype.itemsize
        shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
        keep = (by < bits) | (x.dtype.kind == "i")
        self.put(operands[0], np.where(keep, shifted, 0).astype(x.dtype), active)

    def _bfi(self, parts: list[str], operands: list[str], active: Array) -> None:
        types = [parts[-1]] * 2 + ["u32"] * 2
        field, into, first, count = (
            self.value(op, own).astype(np.uint64)
            for op, own in zip(operands[1:], types, strict=True)
        )
        mask = ((np.uint64(1) << count) - np.uint64(1)) << first
        result = (into & ~mask) | (field << first & mask)
        self.put(operands[0], result.astype(dtype_of(parts[-1])), active)

    def _cvt(self, parts: list[str], operands: list[str], active: Array) -> None:
        to, of = parts[-2:]
        if to in ("bf16x2", "f16x2"):
            high, low = (PACKED[to[:-2]](self.value(op, "f32")) for op in operands[1:])
            result = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
        elif to in PACKED:
            result = PACKED[to](self.value(operands[1], of))
        elif of == "f16":
            result = from_f16(self.value(operands[1], "u16"))
        elif to[0] == "f":
            result = self._rounded(
                self.value(operands[1], of).astype(np.float64), dtype_of(to), parts
            )
        else:
            assert of[0] != "f", "not known here"
            result = self.value(operands[1], of).astype(dtype_of(to))
        self.put(operands[0], result, active)

    def _shfl(self, parts: list[str], operands: list[str], active: Array) -> None:
        lanes = self.value(operands[1], "b32").reshape(-1, 32)
        by = self.value(operands[2], "u32").reshape(-1, 32).astype(np.int64)
        source = LANE + by if "down" in parts else LANE ^ by
        source = np.where(source < 32, source, LANE)
        result = np.take_along_axis(lanes, source, 1).reshape(-1)
        self.put(elements(operands[0])[0].split("|")[0], result, active)

    # Memory.

    def _ld_param(self, parts: list[str], operands: list[str], active: Array) -> None:
        places = self.address(operands[1])[active] - PARAMETER
        assert (places == places[0]).all(), "parameters at several addresses"
        place, dtype = int(places[0]), dtype_of(parts[-1])
        for name in elements(operands[0]):
            own = self.parameters[place : place + dtype.itemsize].tobytes()
            self.put(name, np.full(self.count, np.frombuffer(own, dtype)[0]), active)
            place += dtype.itemsize

    def _touch(self, parts: list[str], address: Array, size: int, active: Array) -> tuple:
        """The memory's bytes, and the places in it."""
        space = parts[1].split("::")[0]
        if space == "shared":
            places = self.shared.places(
                address[active], size, active, parts[0] == "st", "cluster" in parts[1]
            )
            return self.shared.bytes, places
        assert space == "global", "generic addresses are not known here"
        return self.memory.bytes, self.memory.places(address[active], size)

    def _ld(self, parts: list[str], operands: list[str], active: Array) -> None:
        names, dtype = elements(operands[0]), dtype_of(parts[-1])
        address = self.address(operands[1])
        memory, places = self._touch(parts, address, dtype.itemsize * len(names), active)
        values = np.ascontiguousarray(memory[places]).view(unsigned(dtype.itemsize))
        for i, name in enumerate(names):
            whole = np.zeros(self.count, values.dtype)
            whole[active] = values[:, i]
            self.put(name, whole, active)

    def _st(self, parts: list[str], operands: list[str], active: Array) -> None:
        names, type_ = elements(operands[1]), parts[-1]
        values = np.stack([self.value(name, type_)[active] for name in names], axis=1)
        size = values.dtype.itemsize * len(names)
        memory, places = self._touch(parts, self.address(operands[0]), size, active)
        memory[places] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)

    def _cp(self, parts: list[str], operands: list[str], active: Array) -> None:
        if "commit_group" in parts:
            self.groups[active] += 1
        elif "wait_group" in parts:
            due = [self._arrive(copy, int(operands[0]), active) for copy in self.copies]
            self.copies = [copy for copy in due if copy[0].any()]
        else:
            to, source = self.address(operands[0]), self.address(operands[1])
            count = self.value(operands[3], "u32") if operands[3:] else np.full(self.count, 16)
            assert not (source[active] % 16).any(), "the source is not on 16 bytes"
            self._write_copy(to, np.full((self.count, 16), 0xFF, np.uint8), active)
            self.copies.append((active.copy(), to, source, count.copy(), self.groups.copy()))

    def _arrive(self, copy: tuple, pending: int, active: Array) -> tuple:
        """What is left of a copy that these threads wait for, all but the last `pending` groups."""
        issued, to, source, count, group = copy
        due = issued & active & (group < self.groups - pending)
        if due.any():
            data = np.zeros((self.count, 16), np.uint8)
            for size in set(count[due]) - {0}:
                own = due & (count == size)
                begin = self.memory.places(source[own], 1)
                places = begin + np.arange(size)
                assert self.memory.valid[places].all(), "from outside of what was allocated"
                data[own, :size] = self.memory.bytes[places]
            self._write_copy(to, data, due)
        return issued & ~due, to, source, count, group

    def _write_copy(self, to: Array, data: Array, active: Array) -> None:
        places = self.shared.places(to[active], 16, active, True, False)
        self.shared.bytes[places] = data[active]

    # Matrices.

    def _ldmatrix(self, parts: list[str], operands: list[str], active: Array) -> None:
        places = self.shared.places(self.address(operands[1])[active], 16, active, False, False)
        lines = np.zeros((self.count, 16), np.uint8)
        lines[active] = self.shared.bytes[places]
        matrices = lines.view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, line, element
        if "trans" in parts:
            matrices = matrices.swapaxes(2, 3)
        for i, name in enumerate(elements(operands[0])):
            low, high = (matrices[:, i, ROW, PAIR + j].astype(np.uint32) for j in (0, 1))
            self.put(name, (low | high << np.uint32(16)).reshape(-1), active)

    def _mma(self, parts: list[str], operands: list[str], active: Array) -> None:
        assert "m16n8k16" in parts, "not known here"
        d, a, b, c = map(elements, operands)
        from_bits = from_bf16 if "bf16" in parts else from_f16
        left = np.zeros((self.count // 32, 16, 16), np.float64)
        right = np.zeros((self.count // 32, 16, 8), np.float64)
        for half in (0, 1):
            for i, name in enumerate(a):
                bits = self.value(name, "b32").reshape(-1, 32) >> np.uint32(16 * half) & 0xFFFF
                left[:, ROW + 8 * (i % 2), PAIR + half + 8 * (i // 2)] = from_bits(bits)
            for i, name in enumerate(b):
                bits = self.value(name, "b32").reshape(-1, 32) >> np.uint32(16 * half) & 0xFFFF
                right[:, PAIR + half + 8 * i, ROW] = from_bits(bits)
        product = left @ right
        for i, (to, before) in enumerate(zip(d, c, strict=True)):
            value = self.value(before, "f32").reshape(-1, 32).astype(np.float64)
            value += product[:, ROW + 8 * (i // 2), PAIR + i % 2]
            self.put(to, value.astype(np.float32).reshape(-1), active)
