"""Vectors of elements in registers: loaded, combined, divided, stored; 16 bytes, or one element.

What a vector is stays closed: on a device a tuple of numbers, as wide as they are computed in (a
vector of float16 is eight float32); in the simulator a NumPy array. ``code`` and ``operation`` are
those of kernels/arithmetic.py, which emits the same code for the CPU: hence the same bits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import intrinsics
from dvkernels.kernels.cuda.engine.operations import Custom, Operation
from dvkernels.reduce_op import working_dtype

__all__ = ["combiner", "divide", "load", "store"]

_untyped: Any = types  # its classes carry no types
_I32, _I64 = ir.IntType(32), ir.IntType(64)

# ------------------------------------------------------------------ in the simulator

_UFUNCS = {
    arithmetic.ADD: np.add,
    arithmetic.MIN: np.minimum,
    arithmetic.MAX: np.maximum,
    arithmetic.MUL: np.multiply,
}


def _at(address: int, code: int, is_whole: bool) -> Any:
    """Return a view of the vector, or the element, at an address of the host.

    Raise where a device would: it reads so many bytes at their multiples only.
    """
    dtype = arithmetic.dtype_of(code)
    nbytes = intrinsics.VECTOR_NBYTES if is_whole else dtype.itemsize
    if address % (nbytes if is_whole else arithmetic.number_nbytes(code)):
        raise ValueError(f"an access of {nbytes} bytes at {address:#x}, which is no multiple of it")
    raw: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(raw, dtype)


def _plain_load(address: int, code: int, is_whole: bool) -> Any:
    found = _at(address, code, is_whole)
    return found.astype(working_dtype(found.dtype))


def _plain_store(address: int, value: Any, code: int, is_whole: bool) -> None:
    with np.errstate(all="ignore"):
        place = _at(address, code, is_whole)
        place[:] = value.astype(place.dtype)


def _plain_divide(value: Any, divisor: int, code: int) -> Any:
    with np.errstate(all="ignore"):
        return value if divisor == 1 else value / value.dtype.type(divisor)


# ------------------------------------------------------------------ on a device


class _GpuNumbers(arithmetic.VectorArithmetic):
    """Emits arithmetic of vectors, or of single elements, for a GPU."""

    def __init__(self, builder: Any, code: int, is_whole: bool) -> None:
        super().__init__(builder, code)
        self.is_whole = is_whole
        self.count = (
            self.unit * intrinsics.VECTOR_NBYTES // self.itemsize if is_whole else self.unit
        )
        # Bytes and shorts stay four or two to a register: unpacked, they would take one each.
        self.is_packed = is_whole and self.itemsize < 4 and not self.is_half

    def described(self) -> Any:
        """Return Numba's type of a vector."""
        if self.is_packed:
            return _untyped.UniTuple(types.uint32, 4)
        sign = "u" if self.kind == "u" else ""
        name = "float" if self.is_float else f"{sign}int"
        bits = 32 if self.is_half else 8 * self.itemsize // self.unit
        return _untyped.UniTuple(getattr(types, f"{name}{bits}"), self.count)

    def from_tuple(self, value: Any) -> Any:
        """Emit the vector of a tuple."""
        builder = self.builder
        numbers = [builder.extract_value(value, k) for k in range(value.type.count)]
        vector = intrinsics.gather(builder, numbers)
        return builder.bitcast(vector, self.vector(self.count)) if self.is_packed else vector

    def to_tuple(self, context: Any, vector: Any) -> Any:
        """Emit the tuple of a vector."""
        builder = self.builder
        if self.is_packed:
            vector = builder.bitcast(vector, intrinsics.VECTOR)
        return context.make_tuple(builder, self.described(), intrinsics.spread(builder, vector))

    def read(self, address: Any, lanes: int, align: int) -> Any:
        """Emit the load of what is stored."""
        intrinsics.keep_rolled(self.builder)
        if not self.is_whole:
            return super().read(self._place(address), lanes, self.itemsize // self.unit)
        vector = intrinsics.load_whole(self.builder, address)
        return self.builder.bitcast(vector, ir.VectorType(self.stored, lanes))

    def write(self, value: Any, address: Any, lanes: int, align: int) -> Any:
        """Emit the store of what is stored, and return it."""
        intrinsics.keep_rolled(self.builder)
        if not self.is_whole:
            return super().write(value, self._place(address), lanes, self.itemsize // self.unit)
        return intrinsics.store_whole(self.builder, address, value)

    def _place(self, address: Any) -> Any:
        return intrinsics.pointer(self.builder, address, self.stored)

    def combine(self, operation: int, left: Any, right: Any) -> Any:
        """Emit ``left operation right``."""
        if operation == arithmetic.ADD and self.is_packed:
            return self._packed_sum(left, right)
        return super().combine(operation, left, right)

    def _packed_sum(self, left: Any, right: Any) -> Any:
        """Emit the sums of bytes or shorts, four or two at once: no carry crosses their top bits.

        Five instructions a register, where unpacking takes twenty.
        """
        builder = self.builder
        top = {1: 0x80808080, 2: 0x80008000}[self.itemsize]
        tops, rest = (
            ir.Constant(intrinsics.VECTOR, [bits] * 4) for bits in (top, top ^ 0xFFFFFFFF)
        )
        one, other = (builder.bitcast(side, intrinsics.VECTOR) for side in (left, right))
        lower = builder.add(builder.and_(one, rest), builder.and_(other, rest))
        upper = builder.and_(builder.xor(one, other), tops)
        return builder.bitcast(builder.xor(lower, upper), left.type)

    def product(self, left: Any, right: Any) -> Any:
        """Emit a product whose rounding is spelled out: NVVM would fuse others with additions."""
        builder, number = self.builder, self.number
        name = f"llvm.nvvm.mul.rn.{'d' if number == ir.DoubleType() else 'f'}"
        pairs = zip(*(intrinsics.spread(builder, side) for side in (left, right)), strict=True)
        products = [intrinsics.call(builder, name, number, pair) for pair in pairs]
        return intrinsics.gather(builder, products)


def _numbers(builder: Any, code: int, value: Any) -> _GpuNumbers:
    """Return the arithmetic of a vector of this type."""
    for is_whole in (True, False):
        numbers = _GpuNumbers(builder, code, is_whole)
        if numbers.described() == value:
            break
    return numbers


@intrinsics.twin(_plain_load, prefer_literal=True)
def load(typing: Any, address: Any, code: Any, is_whole: Any) -> Any:
    """Read a vector at a multiple of 16 bytes, or one element at a multiple of its numbers'."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = _GpuNumbers(builder, code.literal_value, is_whole.literal_value)
        return numbers.to_tuple(context, numbers.load(args[0], numbers.count))

    result = _GpuNumbers(None, code.literal_value, is_whole.literal_value).described()
    return result(types.int64, code, is_whole), generate


@intrinsics.twin(_plain_store, prefer_literal=True)
def store(typing: Any, address: Any, value: Any, code: Any, is_whole: Any) -> Any:
    """Round and write a vector, or one element."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = _GpuNumbers(builder, code.literal_value, is_whole.literal_value)
        numbers.store(numbers.from_tuple(args[1]), args[0], numbers.count)
        return context.get_dummy_value()

    return types.void(types.int64, value, code, is_whole), generate


@functools.cache
def combiner(operation: Operation, code: int) -> Any:
    """Return the function that combines two vectors, or two elements, lane by lane."""

    def plain(left: Any, right: Any) -> Any:
        with np.errstate(all="ignore"):
            if not isinstance(operation, Custom):
                return _UFUNCS[operation](left, right)
            pairs = zip(left, right, strict=True)
            return np.array([operation.function(*pair) for pair in pairs], left.dtype)

    @intrinsics.twin(plain)
    def combine(typing: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            numbers = _numbers(builder, code, left)
            one, other = (numbers.from_tuple(arg) for arg in args)
            if isinstance(operation, Custom):
                result = _called(context, builder, operation, numbers, one, other)
            else:
                result = numbers.combine(operation, one, other)
            return numbers.to_tuple(context, result)

        return left(left, right), generate

    return combine


def _called(
    context: Any, builder: Any, custom: Custom, numbers: _GpuNumbers, one: Any, other: Any
) -> Any:
    """Emit calls of a function of the user's, element by element; they are inlined."""
    # Not kept by Numba: it would take functions of equal code, and other globals, for the same.
    compiled = context.compile_subroutine(
        builder, custom.function.py_func, custom.signature, caching=False
    )
    kind, unit = custom.signature.return_type, numbers.unit
    sides = [intrinsics.spread(builder, side) for side in (one, other)]
    found: list[Any] = []
    for k in range(0, one.type.count, unit):
        pair = [_as_element(context, builder, kind, side[k : k + unit]) for side in sides]
        result = context.call_internal(builder, compiled.fndesc, custom.signature, pair)
        if unit == 2:
            found += (builder.extract_value(result, part) for part in range(2))
        else:
            is_bool = kind == types.boolean
            found.append(builder.zext(result, numbers.number) if is_bool else result)
    return intrinsics.gather(builder, found)


def _as_element(context: Any, builder: Any, kind: Any, numbers: Sequence[Any]) -> Any:
    """Emit the value, as Numba's functions take it, of the numbers of an element."""
    if len(numbers) == 2:
        value = context.make_complex(builder, kind)
        value.real, value.imag = numbers
        return value._getvalue()
    if kind == types.boolean:
        return builder.icmp_unsigned("!=", numbers[0], numbers[0].type(0))
    return numbers[0]


@intrinsics.twin(_plain_divide, prefer_literal=True)
def divide(typing: Any, value: Any, divisor: Any, code: Any) -> Any:
    """Return ``value / divisor`` as NumPy rounds it; of integers, which have no mean, ``value``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = _numbers(builder, code.literal_value, value)
        if not numbers.is_float:
            return args[0]
        one, whole = ir.Constant(_I64, 1), numbers.from_tuple(args[0])
        real = builder.sitofp(args[1], numbers.number)
        reciprocal = builder.fdiv(ir.Constant(numbers.number, 1.0), real)
        rest = builder.and_(args[1], builder.sub(args[1], one))
        is_exact = builder.icmp_signed("==", rest, ir.Constant(_I64, 0))
        before = builder.block
        with builder.if_then(builder.icmp_signed("!=", args[1], one)):
            quotient = numbers.divide(whole, real, reciprocal, is_exact)
            within = builder.block
        result = builder.phi(whole.type)
        result.add_incoming(whole, before)
        result.add_incoming(quotient, within)
        return numbers.to_tuple(context, result)

    return value(value, types.int64, code), generate
