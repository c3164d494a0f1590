"""Element types and operations of the kernels: one definition of their arithmetic, for all twins.

A vector is an object whose operators emit code: for the CPU, LLVM's; for a GPU, PTX. The operations
are the same, and so are the bits. Half types are widened to float32, combined there, and rounded
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dvkernels.reduce_op import ReduceOp

__all__ = [
    "ADD",
    "DIV",
    "MAX",
    "MIN",
    "MUL",
    "SUB",
    "ElementType",
    "VectorOperators",
    "combine",
    "dtype_of",
    "element_type",
    "factor",
    "has_type",
    "join_bfloat16",
    "number_nbytes",
    "operation_code",
    "round_to_bfloat16",
    "split_bfloat16",
    "type_code",
]

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


class ElementType(NamedTuple):
    """Type of an element, which is a number, or two where it is complex."""

    kind: str
    itemsize: int
    unit: int  # numbers per element
    bits: int  # of a number, as it is stored

    @property
    def is_float(self) -> bool:
        """Whether the numbers are floating-point numbers."""
        return self.kind in "bfc"

    @property
    def is_half(self) -> bool:
        """Whether the numbers are computed in float32 and stored in 16 bits."""
        return self.bits == 16 and self.is_float


def element_type(code: int) -> ElementType:
    """Return the element type of a code."""
    kind, itemsize = _TYPES[code]
    unit = 2 if kind == "c" else 1
    return ElementType(kind, itemsize, unit, 8 * itemsize // unit)


def _operator(name: str) -> Callable[[Any, Any], Any]:
    """Return the method of an operator, which emits the operation of this name."""

    def operate(self: Any, other: Any) -> Any:
        return self.emit(name, other)

    return operate


class VectorOperators:
    """Vector in registers. Its classes add ``emit``, and the methods that :func:`combine` calls."""

    __add__, __sub__, __mul__ = _operator("add"), _operator("sub"), _operator("mul")
    __truediv__, __lt__, __gt__ = _operator("div"), _operator("lt"), _operator("gt")
    __and__, __or__, __xor__ = _operator("and"), _operator("or"), _operator("xor")
    __lshift__, __rshift__ = _operator("shl"), _operator("shr")

    def emit(self, name: str, other: Any) -> Any:
        """Emit an operation with another vector, or with an integer in every lane."""
        raise NotImplementedError

    def is_nan(self) -> Any:
        """Emit which numbers are not a number."""
        return self.emit("nan", self)


def combine(operation: int, element: ElementType, left: Any, right: Any) -> Any:
    """Return ``left operation right`` of two vectors."""
    if operation == ADD:
        return left + right
    if operation == MUL:
        return _complex_product(left, right) if element.kind == "c" else left * right
    if operation == SUB:
        return left - right
    if operation == DIV:  # of real floats only
        return left / right
    stays = left < right if operation == MIN else left > right
    # A NaN on the left is kept; a NaN on the right makes the comparison false, and is chosen.
    return left.choose(stays | left.is_nan() if element.is_float else stays, right)


def _complex_product(left: Any, right: Any) -> Any:
    """Return (a + bi)(c + di) = (ac - bd) + (ad + bc)i over pairs of lanes, with NumPy's bits."""
    lanes = range(left.count)
    real = left.take([lane & ~1 for lane in lanes])
    imaginary = left.take([lane | 1 for lane in lanes])
    swapped = right.take([lane ^ 1 for lane in lanes])
    cross = (imaginary * swapped).negate_even()
    return real * right + cross


def split_bfloat16(words: Any) -> Any:
    """Return the float32 of packed bfloat16: all lower halves of the words, then all upper ones.

    :func:`join_bfloat16` inverts this order of lanes, so nothing needs to be shuffled.
    """
    return (words << 16).join(words & 0xFFFF0000).bits("f32")


def join_bfloat16(bits: Any) -> Any:
    """Return words with the upper halves of the first, and of the second half of the lanes."""
    lower, upper = bits.take(range(bits.count // 2)), bits.take(range(bits.count // 2, bits.count))
    return (lower >> 16) | (upper & 0xFFFF0000)


def round_to_bfloat16(value: Any) -> Any:
    """Return the bits whose upper halves are the nearest bfloat16, ties to even, of float32."""
    bits = value.bits("u32")
    odd = (bits >> 16) & 1
    half_up = bits + 0x7FFF + odd
    # The carry would turn some NaNs into infinities: keep their upper bits, and set quiet.
    return (bits | 0x400000).choose(value.is_nan(), half_up)


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
    if kind == "V" and dtype.name == "bfloat16":  # NumPy makes the name anew each time
        return "b", 2
    if kind == "b":
        return "u", 1
    if kind == "u" and _OPERATIONS[op] in (ADD, MUL):
        return "i", itemsize
    if kind == "c" and op is not ReduceOp.PROD:
        return "f", itemsize // 2
    return kind, itemsize
