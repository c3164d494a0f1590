"""LLVM code of vector arithmetic on every element type, for both twins.

The CPU keeps a vector in one register, a GPU in several: the emitted operations are the same, and
so are the bits. Half types are widened to float32, combined there, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir

from dvkernels.reduce_op import ReduceOp

__all__ = [
    "ADD",
    "DIV",
    "MAX",
    "MIN",
    "MUL",
    "SUB",
    "VectorArithmetic",
    "dtype_of",
    "factor",
    "has_type",
    "number_nbytes",
    "operation_code",
    "type_code",
]

_LINE = 64  # bytes of a cache line, the unit of a streaming store
_I64 = ir.IntType(64)
_I32 = ir.IntType(32)

ADD, MIN, MAX, MUL, SUB, DIV = range(6)
# A mean is a sum that is divided once, at the end.
_OPERATIONS = {
    ReduceOp.SUM: ADD,
    ReduceOp.MEAN: ADD,
    ReduceOp.MIN: MIN,
    ReduceOp.MAX: MAX,
    ReduceOp.PROD: MUL,
}
# Element types of the loops: the letter of numpy.dtype.kind (b for bfloat16), bytes of an element.
_TYPES = (
    ("i", 1), ("i", 2), ("i", 4), ("i", 8), ("u", 1), ("u", 2), ("u", 4), ("u", 8),
    ("b", 2), ("f", 2), ("f", 4), ("f", 8), ("c", 8), ("c", 16),
)  # fmt: skip


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


class VectorArithmetic:
    """Emitter of loads, stores and arithmetic on vectors of one element type.

    A vector holds numbers: a complex element is two of them.
    """

    def __init__(self, builder: Any, code: int) -> None:
        self.builder = builder
        self.kind, self.itemsize = _TYPES[code]
        self.unit = 2 if self.kind == "c" else 1  # numbers per element
        bits = 8 * self.itemsize // self.unit
        self.is_half = bits == 16 and self.kind in "bf"
        self.is_float = self.kind in "bfc"
        floats = {16: ir.FloatType(), 32: ir.FloatType(), 64: ir.DoubleType()}
        self.number: Any = floats[bits] if self.is_float else ir.IntType(bits)
        self.stored: Any = ir.IntType(16) if self.is_half else self.number

    def vector(self, lanes: int) -> Any:
        """Return the vector type of ``lanes`` numbers in which arithmetic is done."""
        return ir.VectorType(self.number, lanes)

    def load(self, pointer: Any, lanes: int, align: int = 1) -> Any:
        """Emit a load that widens; on a CPU, unaligned loads cost nothing on aligned data."""
        builder = self.builder
        raw = self.read(pointer, lanes, align)
        if not self.is_half:
            return raw
        if self.kind == "f":
            halves = builder.bitcast(raw, ir.VectorType(ir.HalfType(), lanes))
            return builder.fpext(halves, self.vector(lanes))
        if lanes % 2 == 0:
            # Each 32-bit word holds two halves: all lower ones come first, then all upper ones.
            # The store inverts this order of lanes, so nothing needs to be shuffled.
            words = builder.bitcast(raw, ir.VectorType(_I32, lanes // 2))
            lower = builder.shl(words, self._all(_I32, lanes // 2, 16))
            upper = builder.and_(words, self._all(_I32, lanes // 2, 0xFFFF0000))
            wide = builder.shuffle_vector(lower, upper, self._lanes(range(lanes)))
        else:
            wide = builder.zext(raw, ir.VectorType(_I32, lanes))
            wide = builder.shl(wide, self._all(_I32, lanes, 16))
        return builder.bitcast(wide, self.vector(lanes))

    def store(
        self, value: Any, pointer: Any, lanes: int, streams: bool = False, align: int = 1
    ) -> None:
        """Emit a store that rounds half types; a streaming store needs a cache line's start."""
        builder = self.builder
        if self.is_half:
            value = self._to_half(value, lanes)
        stored = self.write(value, pointer, lanes, _LINE if streams else align)
        if streams:
            one = ir.Constant(_I32, 1)
            stored.set_metadata("nontemporal", builder.module.add_metadata([one]))

    def read(self, pointer: Any, lanes: int, align: int) -> Any:
        """Emit a load of the stored type."""
        kind = ir.VectorType(self.stored, lanes)
        typed = self.builder.bitcast(pointer, kind.as_pointer(pointer.type.addrspace))
        return self.builder.load(typed, align=align)

    def write(self, value: Any, pointer: Any, lanes: int, align: int) -> Any:
        """Emit a store of the stored type, and return the instruction."""
        kind = ir.VectorType(self.stored, lanes)
        typed = self.builder.bitcast(pointer, kind.as_pointer(pointer.type.addrspace))
        return self.builder.store(value, typed, align=align)

    def _to_half(self, value: Any, lanes: int) -> Any:
        """Emit the rounding to the nearest half, ties to even."""
        builder = self.builder
        shorts = ir.VectorType(ir.IntType(16), lanes)
        if self.kind == "f":
            halves = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
            return builder.bitcast(halves, shorts)
        wide = ir.VectorType(_I32, lanes)
        bits = builder.bitcast(value, wide)
        sixteen = self._all(_I32, lanes, 16)
        upper = builder.lshr(bits, sixteen)
        odd = builder.and_(upper, self._all(_I32, lanes, 1))
        half_up = builder.add(builder.add(bits, self._all(_I32, lanes, 0x7FFF)), odd)
        # The carry would turn some NaNs into infinities: keep their upper bits, and set quiet.
        quiet = builder.or_(bits, self._all(_I32, lanes, 0x400000))
        is_nan = builder.fcmp_unordered("uno", value, value)
        rounded = builder.select(is_nan, quiet, half_up)
        if lanes % 2:
            return builder.trunc(builder.lshr(rounded, sixteen), shorts)
        half = lanes // 2
        lower = builder.shuffle_vector(rounded, rounded, self._lanes(range(half)))
        upper = builder.shuffle_vector(rounded, rounded, self._lanes(range(half, lanes)))
        lower = builder.lshr(lower, self._all(_I32, half, 16))
        upper = builder.and_(upper, self._all(_I32, half, 0xFFFF0000))
        return builder.bitcast(builder.or_(lower, upper), shorts)

    def combine(self, operation: int, left: Any, right: Any) -> Any:
        """Emit ``left operation right``."""
        builder = self.builder
        if operation == ADD:
            return (builder.fadd if self.is_float else builder.add)(left, right)
        if operation == MUL:
            if self.kind == "c":
                return self._complex_product(left, right)
            return (builder.fmul if self.is_float else builder.mul)(left, right)
        if operation == SUB:
            return (builder.fsub if self.is_float else builder.sub)(left, right)
        if operation == DIV:  # of real floats only
            return builder.fdiv(left, right)
        sign = "<" if operation == MIN else ">"
        if not self.is_float:
            compare = builder.icmp_signed if self.kind == "i" else builder.icmp_unsigned
            return builder.select(compare(sign, left, right), left, right)
        # A NaN on the left is kept; a NaN on the right makes the comparison false, and is chosen.
        stays = builder.or_(
            builder.fcmp_ordered(sign, left, right), builder.fcmp_unordered("uno", left, left)
        )
        return builder.select(stays, left, right)

    def _complex_product(self, left: Any, right: Any) -> Any:
        """Emit (a + bi)(c + di) = (ac - bd) + (ad + bc)i over pairs of lanes, with NumPy's bits."""
        builder = self.builder
        lanes = left.type.count
        real = self._shuffle(left, [lane & ~1 for lane in range(lanes)])
        imaginary = self._shuffle(left, [lane | 1 for lane in range(lanes)])
        swapped = self._shuffle(right, [lane ^ 1 for lane in range(lanes)])
        signs = ir.Constant(left.type, [(-1.0, 1.0)[lane & 1] for lane in range(lanes)])
        cross = builder.fmul(self.product(imaginary, swapped), signs)
        return builder.fadd(self.product(real, right), cross)

    def product(self, left: Any, right: Any) -> Any:
        """Emit a product that is rounded before a sum: never a fused multiply-add."""
        return self.builder.fmul(left, right)

    def divide(self, value: Any, divisor: Any, reciprocal: Any, is_exact: Any) -> Any:
        """Emit a division with NumPy's bits.

        Where ``is_exact``, the divisor is a power of two, and the product with the reciprocal is
        exact and faster.
        """
        builder = self.builder
        lanes = value.type.count
        with builder.if_else(is_exact) as (exact, rounded):
            with exact:
                product = builder.fmul(value, self.spread(reciprocal, lanes))
                from_exact = builder.block
            with rounded:
                quotient = builder.fdiv(value, self.spread(divisor, lanes))
                from_rounded = builder.block
        merged = builder.phi(value.type)
        merged.add_incoming(product, from_exact)
        merged.add_incoming(quotient, from_rounded)
        return merged

    def spread(self, scalar: Any, lanes: int) -> Any:
        """Emit a vector with the scalar in every lane."""
        undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        single = self.builder.insert_element(undefined, scalar, _int(0))
        return self._shuffle(single, [0] * lanes)

    def _shuffle(self, vector: Any, lanes: list[int]) -> Any:
        nothing = ir.Constant(vector.type, ir.Undefined)
        return self.builder.shuffle_vector(vector, nothing, self._lanes(lanes))

    @staticmethod
    def _lanes(lanes: Sequence[int]) -> Any:
        return ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))

    @staticmethod
    def _all(number: Any, lanes: int, value: int) -> Any:
        return ir.Constant(ir.VectorType(number, lanes), [value] * lanes)


def operation_code(op: ReduceOp) -> int:
    """Return the code by which kernels know an operation; a mean is a sum with a divisor."""
    return _OPERATIONS[op]


def type_code(dtype: np.dtype[Any], op: ReduceOp = ReduceOp.MAX) -> int:
    """Return the code of the element type that gives ``op`` the same bits as ``dtype``."""
    return _TYPES.index(_computed_as(op, dtype))


def has_type(dtype: np.dtype[Any]) -> bool:
    """Return whether the loops have a type for the elements of ``dtype``."""
    return dtype.isnative and _computed_as(ReduceOp.PROD, dtype) in _TYPES


def dtype_of(code: int) -> np.dtype[Any]:
    """Return the dtype of a type code."""
    kind, itemsize = _TYPES[code]
    return np.dtype(ml_dtypes.bfloat16 if kind == "b" else f"{kind}{itemsize}")


def number_nbytes(code: int) -> int:
    """Return the bytes of a number of a type: of a complex one, half of the element."""
    kind, itemsize = _TYPES[code]
    return itemsize // 2 if kind == "c" else itemsize


def factor(op: object, dtype: np.dtype[Any]) -> int:
    """Return the elements of the computed type per element of ``dtype``: 2 for complex sums."""
    return 2 if dtype.kind == "c" and op in (ReduceOp.SUM, ReduceOp.MEAN) else 1


def _computed_as(op: ReduceOp, dtype: np.dtype[Any]) -> tuple[str, int]:
    """Return the type whose runner computes the same bits; a shared runner saves 0.3 s."""
    kind, itemsize = dtype.kind, dtype.itemsize
    if dtype.name == "bfloat16":
        return "b", 2
    if kind == "b":
        return "u", 1
    if kind == "u" and _OPERATIONS[op] in (ADD, MUL):
        return "i", itemsize
    if kind == "c" and op is not ReduceOp.PROD:
        return "f", itemsize // 2
    return kind, itemsize
