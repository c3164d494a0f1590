"""Operations on vectors in registers (16 bytes, or one element): load, combine, divide, store.

Kernels do not look into a vector. On a device it is a tuple of numbers in the type that they are
computed in (a vector of float16 is eight float32), and 8 and 16-bit integers are 32-bit ones: those
of whole vectors stay packed, four or two per register. In the simulator it is a NumPy array.
``code`` and ``operation`` are those of kernels/arithmetic.py, which defines the arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import types

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import inline_ptx, intrinsics, simulator
from dvkernels.kernels.cuda.engine.operations import Custom, Operation
from dvkernels.kernels.cuda.engine.registers import Registers, Text, generate
from dvkernels.kernels.cuda.engine.table_layout import VECTOR_NBYTES
from dvkernels.reduce_op import working_dtype

__all__ = ["combiner", "divide", "load", "store"]

_untyped: Any = types  # its classes carry no types
_PACKED = _untyped.UniTuple(types.uint32, 4)

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
    nbytes = VECTOR_NBYTES if is_whole else dtype.itemsize
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


def _simulated_combine(operation: Operation, left: Any, right: Any) -> Any:
    with np.errstate(all="ignore"):
        if not isinstance(operation, Custom):
            return _UFUNCS[operation](left, right)
        pairs = zip(left, right, strict=True)
        return np.array([operation.function(*pair) for pair in pairs], left.dtype)


def _simulated_quotient(value: Any, divisor: int) -> Any:
    return value / value.dtype.type(divisor)


# ------------------------------------------------------------------ loads and stores


def vector_type(code: int, is_whole: bool) -> Any:
    """Return Numba's type of a vector, or of an element."""
    element = arithmetic.element_type(code)
    if is_whole and element.bits < 32 and not element.is_float:
        return _PACKED
    bits = max(element.bits, 32)
    number = f"float{bits}" if element.is_float else f"{'u' * (element.kind == 'u')}int{bits}"
    count = element.unit * (VECTOR_NBYTES // element.itemsize if is_whole else 1)
    return _untyped.UniTuple(getattr(types, number), count)


def emit_load(text: Text, address: Registers, code: int, is_whole: bool) -> Registers:
    """Emit a load that widens. Vectors are loaded as words: LLVM would split eight float16."""
    element, start = arithmetic.element_type(code), address.names[0]
    if is_whole:
        words = text.new("u32", 4)
        text.line("ld.global.v4.b32", _braced(words.names), f"[{start}]")
        if element.is_half:
            split = _split_float16 if element.kind == "f" else arithmetic.split_bfloat16
            return split(words)
        return words if element.bits < 64 else _regrouped(words, text.new("s64", 2))
    if element.is_half and element.kind == "f":
        half = text.new("b16", 1)
        text.line("ld.global.b16", half.names[0], f"[{start}]")
        return half.each("cvt.f32.f16", kind="f32")
    sign = "s" if element.kind == "i" else "u"
    numbers = text.new(f"{sign}{max(element.bits, 32)}", element.unit)
    for k, name in enumerate(numbers.names):
        text.line(f"ld.global.{sign}{element.bits}", name, f"[{start}+{k * element.bits // 8}]")
    return (numbers << 16).bits("f32") if element.is_half else numbers


def emit_store(text: Text, address: Registers, value: Registers, code: int, is_whole: bool) -> None:
    """Emit a store that rounds."""
    element, start = arithmetic.element_type(code), address.names[0]
    if element.is_half and element.kind == "f":
        value = value.each("cvt.rn.f16.f32", kind="b16")
    elif element.is_half:
        value = arithmetic.round_to_bfloat16(value)
    if is_whole:
        if element.is_half and element.kind == "b":
            value = arithmetic.join_bfloat16(value)
        elif value.count != 4:
            value = _regrouped(value, text.new("u32", 4))
        text.line("st.global.v4.b32", f"[{start}]", _braced(value.names))
        return
    if element.is_half and element.kind == "b":
        value = value >> 16
    for k, name in enumerate(value.names):
        text.line(f"st.global.b{element.bits}", f"[{start}+{k * element.bits // 8}]", name)


def _braced(names: Sequence[str]) -> str:
    return f"{{{', '.join(names)}}}"


def _regrouped(parts: Registers, result: Registers) -> Registers:
    """Emit the same bytes in fewer, larger registers, or in more, smaller ones."""
    few, many = sorted([parts, result], key=lambda one: one.count)
    per_register = many.count // few.count
    for k, name in enumerate(few.names):
        braced = _braced(many.names[k * per_register : (k + 1) * per_register])
        operands = (name, braced) if few is result else (braced, name)
        parts.text.line(f"mov.b{few.kind[1:]}", *operands)
    return result


def _split_float16(words: Registers) -> Registers:
    """Emit the float32 of packed float16."""
    halves = _regrouped(words, words.text.new("b16", 2 * words.count))
    return halves.each("cvt.f32.f16", kind="f32")


def _declare_load(address: Any, code: int, is_whole: bool) -> inline_ptx.Code:
    def emit(text: Text, where: Registers) -> list[Registers]:
        return [emit_load(text, where, code, is_whole)]

    return generate(vector_type(code, is_whole), [types.int64], emit)


def _declare_store(address: Any, value: Any, code: int, is_whole: bool) -> inline_ptx.Code:
    def emit(text: Text, where: Registers, numbers: Registers) -> None:
        emit_store(text, where, numbers, code, is_whole)

    return generate(types.void, [types.int64, value], emit)


# Read a vector at a multiple of 16 bytes, or an element at a multiple of its number's size.
load = inline_ptx.device_function(_declare_load, _simulated_load)
# Round a vector, or one element, to the stored type and write it.
store = inline_ptx.device_function(_declare_store, _simulated_store)

# ------------------------------------------------------------------ arithmetic


@functools.cache
def combiner(operation: Operation, code: int, is_whole: bool = True) -> Any:
    """Return the function that combines two vectors, or two elements, lane by lane."""
    if isinstance(operation, Custom) and not simulator.IS_ON:
        return _custom_combiner(operation, code, is_whole)

    def emit(text: Text, *sides: Registers) -> list[Registers]:
        return [emit_combine(operation, code, *sides)]

    vector = vector_type(code, is_whole)
    simulated = functools.partial(_simulated_combine, operation)
    declared = generate(vector, [vector, vector], emit)
    return inline_ptx.device_function(declared, simulated, inline_ptx.NOTHING)


def emit_combine(operation: Any, code: int, left: Registers, right: Registers) -> Any:
    """Emit ``left operation right``."""
    element = arithmetic.element_type(code)
    if element.bits >= 32 or element.is_float or left.count == 1:
        return arithmetic.combine(operation, element, left, right)
    if operation == arithmetic.ADD:
        return _packed_sum(element.bits, left, right)
    sides = (_unpack(element, side) for side in (left, right))
    return _pack(element.bits, arithmetic.combine(operation, element, *sides))


def _packed_sum(bits: int, left: Registers, right: Registers) -> Any:
    """Emit the sums of packed 8 or 16-bit integers; carries do not cross their top bits.

    Five instructions per register, where unpacking takes twenty.
    """
    top = {8: 0x80808080, 16: 0x80008000}[bits]
    rest = top ^ 0xFFFFFFFF
    return ((left & rest) + (right & rest)) ^ ((left ^ right) & top)


def _unpack(element: arithmetic.ElementType, words: Registers) -> Registers:
    """Emit the 32-bit integers of packed ones, the first of all words first."""
    sign, bits = "s" if element.kind == "i" else "u", element.bits
    lanes = [words.each(f"bfe.{sign}32", k, bits, kind=f"{sign}32") for k in range(0, 32, bits)]
    return functools.reduce(Registers.join, lanes)


def _pack(bits: int, numbers: Registers) -> Registers:
    """Emit the packed lower bits of 32-bit integers; the inverse of ``_unpack``."""
    parts = [numbers.take(range(k, k + 4)) for k in range(0, numbers.count, 4)]
    if bits == 8:
        parts = [
            low.each("prmt.b32", high, "0x0040")
            for low, high in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0].each("prmt.b32", parts[1], "0x5410")


@intrinsics.inlined
def divide(value, divisor, code):  # type: ignore[no-untyped-def]
    """Return ``value / divisor``, rounded as NumPy does; integers have no mean: ``value``.

    The product with the reciprocal of a power of two is exact, and faster.
    """
    if divisor != 1:
        if divisor & (divisor - 1) == 0:
            value = exact_quotient(value, divisor)
        else:
            value = quotient(value, divisor)
    return value


def _divider(emit_quotient: Callable[[Registers, Registers], Registers]) -> Any:
    """Return a device function that divides floating-point numbers, and returns integers."""

    def declare(value: Any, divisor: Any) -> inline_ptx.Code:
        def emit(text: Text, numbers: Registers, count: Registers) -> list[Registers]:
            real = count.each(f"cvt.rn.{numbers.kind}.s64", kind=numbers.kind)
            return [emit_quotient(numbers, real)]

        if not str(value.dtype).startswith("float"):
            return inline_ptx.Code("", value, [value, types.int64])
        return generate(value, [value, types.int64], emit)

    return inline_ptx.device_function(declare, _simulated_quotient, inline_ptx.NOTHING)


quotient = _divider(Registers.__truediv__)
exact_quotient = _divider(lambda value, real: value * real.each(f"rcp.rn.{real.kind}"))

# ------------------------------------------------------------------ functions of the user's


def _custom_combiner(custom: Custom, code: int, is_whole: bool) -> Any:
    """Return the device function that calls a user's function of two elements, lane by lane."""
    element, number = arithmetic.element_type(code), vector_type(code, False).dtype
    vector = vector_type(code, is_whole)
    if vector != _PACKED:
        return inline_ptx.calls(custom.function.py_func, custom.signature, vector)
    lanes = _untyped.UniTuple(number, VECTOR_NBYTES // element.itemsize)
    unpacked = generate(lanes, [_PACKED], lambda _, words: [_unpack(element, words)])
    packed = generate(_PACKED, [lanes], lambda _, numbers: [_pack(element.bits, numbers)])
    unpack, pack = (
        inline_ptx.device_function(code, None, inline_ptx.NOTHING) for code in (unpacked, packed)
    )
    call = inline_ptx.calls(custom.function.py_func, custom.signature, lanes)

    @intrinsics.inlined
    def combine(left, right):  # type: ignore[no-untyped-def]
        return pack(call(unpack(left), unpack(right)))

    return combine
