"""Operations on vectors in registers (16 bytes, or one element): load, combine, divide, store.

Kernels do not look into a vector. On a device it is a tuple of numbers in the type that they are
computed in (a vector of float16 is eight float32); in the simulator, a NumPy array. ``code`` and
``operation`` are those of kernels/arithmetic.py, which emits the same arithmetic for the CPU: so
both give the same bits.
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


def _view_at(address: int, code: int, is_whole: bool) -> Any:
    """Return a view of the vector, or of the element, at a host address.

    Raise ``ValueError`` for a misaligned address, which a device cannot access.
    """
    dtype = arithmetic.dtype_of(code)
    nbytes = intrinsics.VECTOR_NBYTES if is_whole else dtype.itemsize
    if address % (nbytes if is_whole else arithmetic.number_nbytes(code)):
        raise ValueError(f"an access of {nbytes} bytes at {address:#x}, not a multiple of its size")
    raw: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(raw, dtype)


def _simulated_load(address: int, code: int, is_whole: bool) -> Any:
    view = _view_at(address, code, is_whole)
    return view.astype(working_dtype(view.dtype))


def _simulated_store(address: int, value: Any, code: int, is_whole: bool) -> None:
    with np.errstate(all="ignore"):
        view = _view_at(address, code, is_whole)
        view[:] = value.astype(view.dtype)


def _simulated_divide(value: Any, divisor: int, code: int) -> Any:
    with np.errstate(all="ignore"):
        return value if divisor == 1 else value / value.dtype.type(divisor)


# ------------------------------------------------------------------ on a device


class _GpuNumbers(arithmetic.VectorArithmetic):
    """Emitter of LLVM arithmetic on vectors, or on single elements, for a GPU."""

    def __init__(self, builder: Any, code: int, is_whole: bool) -> None:
        super().__init__(builder, code)
        self.is_whole = is_whole
        self.count = (
            self.unit * intrinsics.VECTOR_NBYTES // self.itemsize if is_whole else self.unit
        )
        # 8 and 16-bit integers stay packed, four or two per register.
        self.is_packed = is_whole and self.itemsize < 4 and not self.is_half

    def numba_type(self) -> Any:
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
        vector = intrinsics.pack(builder, numbers)
        return builder.bitcast(vector, self.vector(self.count)) if self.is_packed else vector

    def to_tuple(self, context: Any, vector: Any) -> Any:
        """Emit the tuple of a vector."""
        builder = self.builder
        if self.is_packed:
            vector = builder.bitcast(vector, intrinsics.VECTOR)
        return context.make_tuple(builder, self.numba_type(), intrinsics.unpack(builder, vector))

    def read(self, address: Any, lanes: int, align: int) -> Any:
        """Emit the load of numbers in their stored type."""
        intrinsics.keep_rolled(self.builder)
        if not self.is_whole:
            return super().read(self._pointer(address), lanes, self.itemsize // self.unit)
        vector = intrinsics.emit_vector_load(self.builder, address)
        return self.builder.bitcast(vector, ir.VectorType(self.stored, lanes))

    def write(self, value: Any, address: Any, lanes: int, align: int) -> Any:
        """Emit the store of numbers in their stored type, and return the instruction."""
        intrinsics.keep_rolled(self.builder)
        if not self.is_whole:
            return super().write(value, self._pointer(address), lanes, self.itemsize // self.unit)
        return intrinsics.emit_vector_store(self.builder, address, value)

    def _pointer(self, address: Any) -> Any:
        return intrinsics.pointer(self.builder, address, self.stored)

    def combine(self, operation: int, left: Any, right: Any) -> Any:
        """Emit ``left operation right``."""
        if operation == arithmetic.ADD and self.is_packed:
            return self._packed_sum(left, right)
        return super().combine(operation, left, right)

    def _packed_sum(self, left: Any, right: Any) -> Any:
        """Emit the sums of packed 8 or 16-bit integers; carries do not cross their top bits.

        Five instructions per register, where unpacking takes twenty.
        """
        builder = self.builder
        top = {1: 0x80808080, 2: 0x80008000}[self.itemsize]
        tops, rest = (
            ir.Constant(intrinsics.VECTOR, [bits] * 4) for bits in (top, top ^ 0xFFFFFFFF)
        )
        left_words, right_words = (
            builder.bitcast(side, intrinsics.VECTOR) for side in (left, right)
        )
        lower = builder.add(builder.and_(left_words, rest), builder.and_(right_words, rest))
        upper = builder.and_(builder.xor(left_words, right_words), tops)
        return builder.bitcast(builder.xor(lower, upper), left.type)

    def product(self, left: Any, right: Any) -> Any:
        """Emit a product with explicit rounding: NVVM would fuse a plain one with additions."""
        builder, number = self.builder, self.number
        name = f"llvm.nvvm.mul.rn.{'d' if number == ir.DoubleType() else 'f'}"
        pairs = zip(*(intrinsics.unpack(builder, side) for side in (left, right)), strict=True)
        products = [intrinsics.call(builder, name, number, pair) for pair in pairs]
        return intrinsics.pack(builder, products)


def _arithmetic_of(builder: Any, code: int, value: Any) -> _GpuNumbers:
    """Return the emitter for values of Numba's type ``value``: vectors or elements."""
    for is_whole in (True, False):
        numbers = _GpuNumbers(builder, code, is_whole)
        if numbers.numba_type() == value:
            break
    return numbers


@intrinsics.twin(_simulated_load, prefer_literal=True)
def load(typing: Any, address: Any, code: Any, is_whole: Any) -> Any:
    """Read a vector at a multiple of 16 bytes, or an element at a multiple of its number's size."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = _GpuNumbers(builder, code.literal_value, is_whole.literal_value)
        return numbers.to_tuple(context, numbers.load(args[0], numbers.count))

    result = _GpuNumbers(None, code.literal_value, is_whole.literal_value).numba_type()
    return result(types.int64, code, is_whole), generate


@intrinsics.twin(_simulated_store, prefer_literal=True)
def store(typing: Any, address: Any, value: Any, code: Any, is_whole: Any) -> Any:
    """Round a vector, or one element, to the stored type and write it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = _GpuNumbers(builder, code.literal_value, is_whole.literal_value)
        numbers.store(numbers.from_tuple(args[1]), args[0], numbers.count)
        return context.get_dummy_value()

    return types.void(types.int64, value, code, is_whole), generate


@functools.cache
def combiner(operation: Operation, code: int) -> Any:
    """Return the function that combines two vectors, or two elements, lane by lane."""

    def simulated(left: Any, right: Any) -> Any:
        with np.errstate(all="ignore"):
            if not isinstance(operation, Custom):
                return _UFUNCS[operation](left, right)
            pairs = zip(left, right, strict=True)
            return np.array([operation.function(*pair) for pair in pairs], left.dtype)

    @intrinsics.twin(simulated)
    def combine(typing: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            numbers = _arithmetic_of(builder, code, left)
            left_vector, right_vector = (numbers.from_tuple(arg) for arg in args)
            if isinstance(operation, Custom):
                result = _emit_calls(
                    context, builder, operation, numbers, left_vector, right_vector
                )
            else:
                result = numbers.combine(operation, left_vector, right_vector)
            return numbers.to_tuple(context, result)

        return left(left, right), generate

    return combine


def _emit_calls(
    context: Any, builder: Any, custom: Custom, numbers: _GpuNumbers, left: Any, right: Any
) -> Any:
    """Emit calls of a user's function, element by element; they are inlined."""
    # No caching: Numba would confuse functions of equal code and different globals.
    compiled = context.compile_subroutine(
        builder, custom.function.py_func, custom.signature, caching=False
    )
    kind, unit = custom.signature.return_type, numbers.unit
    sides = [intrinsics.unpack(builder, side) for side in (left, right)]
    results: list[Any] = []
    for k in range(0, left.type.count, unit):
        pair = [_emit_element(context, builder, kind, side[k : k + unit]) for side in sides]
        result = context.call_internal(builder, compiled.fndesc, custom.signature, pair)
        if unit == 2:
            results += (builder.extract_value(result, part) for part in range(2))
        else:
            is_bool = kind == types.boolean
            results.append(builder.zext(result, numbers.number) if is_bool else result)
    return intrinsics.pack(builder, results)


def _emit_element(context: Any, builder: Any, kind: Any, numbers: Sequence[Any]) -> Any:
    """Emit the value of Numba's type ``kind`` from the numbers of an element."""
    if len(numbers) == 2:
        value = context.make_complex(builder, kind)
        value.real, value.imag = numbers
        return value._getvalue()
    if kind == types.boolean:
        return builder.icmp_unsigned("!=", numbers[0], numbers[0].type(0))
    return numbers[0]


@intrinsics.twin(_simulated_divide, prefer_literal=True)
def divide(typing: Any, value: Any, divisor: Any, code: Any) -> Any:
    """Return ``value / divisor``, rounded as NumPy does; integers have no mean: ``value``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = _arithmetic_of(builder, code.literal_value, value)
        if not numbers.is_float:
            return args[0]
        constant_one, dividend = ir.Constant(_I64, 1), numbers.from_tuple(args[0])
        real = builder.sitofp(args[1], numbers.number)
        reciprocal = builder.fdiv(ir.Constant(numbers.number, 1.0), real)
        rest = builder.and_(args[1], builder.sub(args[1], constant_one))
        is_exact = builder.icmp_signed("==", rest, ir.Constant(_I64, 0))
        before = builder.block
        with builder.if_then(builder.icmp_signed("!=", args[1], constant_one)):
            quotient = numbers.divide(dividend, real, reciprocal, is_exact)
            division = builder.block
        result = builder.phi(dividend.type)
        result.add_incoming(dividend, before)
        result.add_incoming(quotient, division)
        return numbers.to_tuple(context, result)

    return value(value, types.int64, code), generate
