"""Interpreter of the inline PTX of kernels, over many threads at once, on the host's memory.

Each register holds the bits of all threads. The semantics are those of NVIDIA's PTX ISA 8: results
round to nearest, subnormal numbers are kept, float32 and float16 results that are no numbers are
the canonical NaN. An instruction, a size or a space that is not listed here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ADDRESS = re.compile(r"\[([$%\w]+?)(?:\+(\d+))?\]")
_COMPARISONS = {
    "lt": np.less, "gt": np.greater, "eq": np.equal, "ne": np.not_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_CONVERSIONS = {"f32.f16", "rn.f16.f32", "rn.f32.f64", "rn.f32.s64", "rn.f64.s64"}


class Value(NamedTuple):
    """Number or tuple of a kernel: Numba's type, and the bits of each number in every thread."""

    type: Any
    registers: list[np.ndarray]


def dtype_of(kind: str) -> np.dtype:
    """Return the dtype of a PTX type, of bits as of unsigned integers."""
    return np.dtype({"s": "i", "u": "u", "b": "u", "f": "f"}[kind[0]] + str(int(kind[1:]) // 8))


def bits_of(array: np.ndarray) -> np.ndarray:
    """Return the bits of numbers; of results that are no numbers, those of the canonical NaN."""
    if array.dtype.char in "ef":
        canonical = np.array({"e": 0x7FFF, "f": 0x7FFFFFFF}[array.dtype.char])
        found = np.ascontiguousarray(array).view(f"u{array.itemsize}")
        return np.where(np.isnan(array), canonical.astype(found.dtype), found)
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


class Machine:
    """Threads that execute inline PTX.

    ``memory`` is all that they may access, besides shared memory; ``thread`` is the number of each.
    """

    def __init__(self, memory: Sequence[np.ndarray] = (), thread: Sequence[int] = (0,)) -> None:
        self.memory = [array.reshape(-1).view(np.uint8) for array in memory]
        self.thread = np.asarray(thread, "u4")
        self.shared: dict[str, np.ndarray] = {}
        self.barriers = 0

    def call(self, function: Any, *args: Any) -> Value | None:
        """Execute a device function on values and constants."""
        code = function.declare(*(arg.type if isinstance(arg, Value) else arg for arg in args))
        operands = [bits for arg in args if isinstance(arg, Value) for bits in arg.registers]
        if not code.text:
            return args[0]
        results = [dtype_of(kind) for kind in kinds(code.result)]
        found = self.execute(code.text, results, operands)
        return Value(code.result, found) if results else None

    def execute(self, text: str, results: Sequence[Any], operands: Sequence[np.ndarray]) -> Any:
        """Execute PTX whose first registers are results; return those."""
        self._registers = {f"${k}": np.zeros(0, dtype) for k, dtype in enumerate(results)}
        self._sizes = {f"${k}": dtype.itemsize for k, dtype in enumerate(results)}
        for k, bits in enumerate(operands, len(results)):
            self._registers[f"${k}"], self._sizes[f"${k}"] = bits, bits.itemsize
        self._labels: set[str] = set()
        skips_to = ""
        with np.errstate(all="ignore"):
            for statement in _statements(text):
                if statement.endswith(":"):
                    skips_to = "" if skips_to == statement[:-1] else skips_to
                elif not skips_to:
                    skips_to = self._step(statement)
        assert not skips_to, f"no label {skips_to}"
        return [bits_of(self._registers[f"${k}"]) for k in range(len(results))]

    def _step(self, statement: str) -> str:
        """Execute a statement; return the label to go to, if any."""
        if statement.startswith("."):
            self._declare(statement)
            return ""
        negates, predicate, opcode, rest = _STATEMENT.fullmatch(statement).groups()
        operands = _OPERAND.findall(rest)
        if opcode == "bra":
            taken = self._registers[predicate] if predicate else np.True_
            assert taken.all() or not taken.any(), "threads that branch apart run one by one"
            return operands[0] if taken.all() != bool(negates) else ""
        assert not predicate, f"only branches are predicated: {statement}"
        name, _, kind = opcode.partition(".")
        run: Callable[..., Any] | None = getattr(self, f"_{name}", None)
        if run is None:
            raise NotImplementedError(
                f"no PTX instruction that this interpreter knows: {statement}"
            )
        run(kind, *[operand.strip() for operand in operands])
        return ""

    def _declare(self, statement: str) -> None:
        register = re.fullmatch(r"\.reg \.(pred|b\d+) (.*)", statement)
        if register is not None:
            size = 0 if register[1] == "pred" else int(register[1][1:]) // 8
            for name in register[2].split(", "):
                stem, _, count = name.rstrip(">").partition("<")
                names = [f"{stem}{k}" for k in range(int(count))] if count else [stem]
                self._sizes.update(dict.fromkeys(names, size))
            return
        shared = re.fullmatch(r"\.shared \.align \d+ \.b64 (\w+)\[(\d+)\]", statement)
        if shared is None:
            raise NotImplementedError(f"no declaration that this interpreter knows: {statement}")
        self.shared.setdefault(shared[1], np.zeros(int(shared[2]), np.uint64))

    # ------------------------------------------------------------------ registers

    def _read(self, operand: str, kind: str) -> np.ndarray:
        """Return a register, or a constant, as numbers of a PTX type."""
        if kind == "pred":
            return self._registers[operand]
        if operand == "%tid.x":
            return self.thread
        dtype = dtype_of(kind)
        if operand[0] not in "$%":
            return np.array([int(operand, 0)], np.int64).astype(f"u{dtype.itemsize}").view(dtype)
        assert self._sizes[operand] == dtype.itemsize, f"{operand} is no {kind}"
        return bits_of(self._registers[operand]).view(dtype)

    def _write(self, name: str, numbers: np.ndarray, kind: str) -> None:
        """Write a register of a type's size."""
        if kind == "pred":
            assert self._sizes[name] == 0, name
            self._registers[name] = numbers
            return
        dtype = dtype_of(kind)
        assert self._sizes[name] == dtype.itemsize, f"{name} is no {kind}"
        self._registers[name] = bits_of(numbers.astype(dtype, copy=False))

    def _each(self, operation: Callable[..., Any], kind: str, to: str, *operands: str) -> None:
        self._write(to, operation(*(self._read(one, kind) for one in operands)), kind)

    def _rounded(self, operation: Callable[..., Any], kind: str, *operands: str) -> None:
        """Execute an instruction that names its rounding where the numbers are no integers."""
        *rounding, number = kind.split(".")
        expected = {"f": ["rn"]}.get(number[0], [])
        assert rounding == expected, f"expected the rounding {expected}: {kind}"
        self._each(operation, number, *operands)

    # ------------------------------------------------------------------ instructions

    def _add(self, kind: str, *operands: str) -> None:
        self._rounded(np.add, kind, *operands)

    def _sub(self, kind: str, *operands: str) -> None:
        self._rounded(np.subtract, kind, *operands)

    def _mul(self, kind: str, *operands: str) -> None:
        self._rounded(np.multiply, kind.removeprefix("lo."), *operands)

    def _div(self, kind: str, *operands: str) -> None:
        is_float = "f" in kind
        self._rounded(np.true_divide if is_float else np.floor_divide, kind, *operands)

    def _rcp(self, kind: str, *operands: str) -> None:
        self._rounded(np.reciprocal, kind, *operands)

    def _sqrt(self, kind: str, *operands: str) -> None:
        self._rounded(np.sqrt, kind, *operands)

    def _neg(self, kind: str, *operands: str) -> None:
        self._each(np.negative, kind, *operands)

    def _and(self, kind: str, *operands: str) -> None:
        self._each(np.bitwise_and, kind, *operands)

    def _or(self, kind: str, *operands: str) -> None:
        self._each(np.bitwise_or, kind, *operands)

    def _xor(self, kind: str, *operands: str) -> None:
        self._each(np.bitwise_xor, kind, *operands)

    def _shl(self, kind: str, to: str, value: str, count: str) -> None:
        assert int(count) < 8 * dtype_of(kind).itemsize
        self._write(to, self._read(value, kind) << dtype_of(kind).type(count), kind)

    def _shr(self, kind: str, to: str, value: str, count: str) -> None:
        assert int(count) < 8 * dtype_of(kind).itemsize
        self._write(to, self._read(value, kind) >> dtype_of(kind).type(count), kind)

    def _bfe(self, kind: str, to: str, value: str, start: str, length: str) -> None:
        """Extract a field of bits; the highest one of a signed field fills the others."""
        dtype = dtype_of(kind)
        above = 32 - int(start) - int(length)
        assert dtype.itemsize == 4
        assert above >= 0
        field = self._read(value, kind) << dtype.type(above)
        self._write(to, field >> dtype.type(32 - int(length)), kind)

    def _prmt(self, kind: str, to: str, low: str, high: str, selector: str) -> None:
        """Choose four of the eight bytes of two words."""
        assert kind == "b32"
        pair = self._read(low, "b32").astype("u8") | self._read(high, "b32").astype(
            "u8"
        ) << np.uint64(32)
        result = np.zeros_like(pair)
        for k in range(4):
            chosen = int(selector, 0) >> 4 * k & 15
            assert chosen < 8, "copies of sign bits"
            byte = pair >> np.uint64(8 * chosen) & np.uint64(255)
            result |= byte << np.uint64(8 * k)
        self._write(to, result.astype("u4"), kind)

    def _setp(self, kind: str, to: str, left: str, right: str) -> None:
        """Compare; but for ``ne``, no comparison holds of what is no number."""
        comparison, number = kind.split(".")
        result = _COMPARISONS[comparison](self._read(left, number), self._read(right, number))
        self._write(to, result, "pred")

    def _selp(self, kind: str, to: str, left: str, right: str, where: str) -> None:
        bits = f"b{kind[1:]}"
        chosen = np.where(
            self._read(where, "pred"), self._read(left, bits), self._read(right, bits)
        )
        self._write(to, chosen, bits)

    def _cvt(self, kind: str, to: str, value: str) -> None:
        assert kind in _CONVERSIONS, kind
        *_, result, source = kind.split(".")
        self._write(to, self._read(value, source).astype(dtype_of(result)), result)

    def _cvta(self, kind: str, to: str, value: str) -> None:
        assert kind == "shared.u64", kind
        self._registers[to] = self._registers[value]

    def _mov(self, kind: str, to: str, value: str) -> None:
        """Copy bits, take them apart, or put them together."""
        if value in self.shared:
            self._write(to, np.array([self.shared[value].ctypes.data], np.uint64), kind)
        elif to[0] == "{":
            names = to[1:-1].split(", ")
            part = f"b{int(kind[1:]) // len(names)}"
            whole, size = self._read(value, kind), dtype_of(part).itemsize
            parts = whole.reshape(-1, 1).view(f"u{size}")
            for k, name in enumerate(names):
                self._write(name, parts[:, k], part)
        elif value[0] == "{":
            names = value[1:-1].split(", ")
            part = f"b{int(kind[1:]) // len(names)}"
            parts = np.stack([self._read(name, part) for name in names], axis=1)
            self._write(to, parts.view(dtype_of(kind)).reshape(-1), kind)
        else:
            self._write(to, self._read(value, kind), kind)

    def _bar(self, kind: str, number: str) -> None:
        assert (kind, number) == ("sync", "0")
        self.barriers += 1

    # ------------------------------------------------------------------ memory

    def _ld(self, kind: str, to: str, address: str) -> None:
        """Load numbers; a small one is extended, with its sign or zeros, to its register."""
        kind = (
            kind.removeprefix("acquire.sys.").removeprefix("relaxed.sys.").removeprefix("global.")
        )
        names, number = _vector(kind, to)
        for k, name in enumerate(names):
            dtype = dtype_of(number)
            loaded = self._at(address, k * dtype.itemsize, len(names) * dtype.itemsize, dtype)()
            wide = f"{number[0]}{8 * self._sizes[name]}"
            assert self._sizes[name] >= dtype.itemsize, name
            self._write(name, loaded.astype(dtype_of(wide)), wide)

    def _st(self, kind: str, address: str, value: str) -> None:
        """Store numbers, of a wide register the lower bits."""
        if kind.startswith("shared."):
            name, offset = re.fullmatch(r"\[(\w+)\+(\d+)\]", address).groups()
            self.shared[name][int(offset) // 8] = self._read(value, kind.removeprefix("shared."))[0]
            return
        kind = kind.removeprefix("release.sys.").removeprefix("relaxed.sys.")
        assert kind.startswith("global."), kind
        names, number = _vector(kind.removeprefix("global."), value)
        for k, name in enumerate(names):
            dtype = dtype_of(number)
            bits = self._read(name, f"b{8 * self._sizes[name]}").astype(dtype)
            self._at(address, k * dtype.itemsize, len(names) * dtype.itemsize, dtype)(bits)

    def _at(self, address: str, shift: int, alignment: int, dtype: np.dtype) -> Callable[..., Any]:
        """Return the function that loads from the addresses of all threads, or stores there."""
        name, offset = _ADDRESS.fullmatch(address).groups()
        start = self._read(name, "s64") + int(offset or 0)
        assert not (start % alignment).any(), "a misaligned access"
        for array in self.memory:
            places = start + shift - array.ctypes.data
            if (places >= 0).all() and (places + dtype.itemsize <= array.size).all():
                break
        else:
            raise AssertionError(f"an access outside of the memory: {address}")
        bytes_of_each = places[:, None] + np.arange(dtype.itemsize)

        def access(stored: np.ndarray | None = None) -> np.ndarray | None:
            if stored is None:
                return array[bytes_of_each].view(dtype).reshape(-1)
            array[bytes_of_each] = stored.reshape(-1, 1).view(np.uint8)
            return None

        return access


def kinds(numba_type: Any) -> list[str]:
    """Return the PTX type of each number of one of Numba's types."""
    if hasattr(numba_type, "dtype"):
        return kinds(numba_type.dtype) * numba_type.count
    found = re.fullmatch(r"(u?int|float)(\d+)", str(numba_type))
    return [{"int": "s", "uint": "u", "float": "f"}[found[1]] + found[2]] if found else []


def _vector(kind: str, operand: str) -> tuple[list[str], str]:
    """Return the registers of a load or a store, and the type of each."""
    count, _, number = kind.rpartition(".")
    names = operand.strip("{}").split(", ")
    assert count in ("", "v4"), kind
    assert len(names) == (4 if count else 1), operand
    return names, number


def _statements(text: str) -> list[str]:
    """Return declarations, instructions and labels, with ``name:`` for a label."""
    body = text.strip()
    if body.startswith("{"):
        assert body.endswith("}")
        body = body[1:-1]
    found = []
    for statement in body.split(";"):
        *labels, last = re.split(r"(?<=\w:)\s", statement.strip())
        found += [*labels, last] if last else labels
    return [" ".join(one.split()) for one in found if one]
