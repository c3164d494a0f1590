"""LLVM code of vectors in the CPU's registers: loads, stores, arithmetic on every element type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir

from dvkernels.kernels import arithmetic

__all__: list[str] = []

_LINE = 64  # bytes of a cache line, the unit of a streaming store
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_COMPARISONS = {"lt": "<", "gt": ">", "nan": "uno"}
_NAMES = {"and": "and_", "or": "or_", "shl": "shl", "shr": "lshr"}
_KINDS = {"f32": ir.FloatType(), "u32": _I32}


class Vector(arithmetic.VectorOperators):
    """Emitted LLVM vector."""

    def __init__(self, builder: Any, value: Any, is_signed: bool = False) -> None:
        self.builder, self.value, self.is_signed = builder, value, is_signed
        self.count = value.type.count
        self.is_float = not isinstance(value.type.element, ir.IntType)

    def _of(self, value: Any) -> Vector:
        return Vector(self.builder, value, self.is_signed)

    def emit(self, name: str, other: Any) -> Vector:
        """Emit an operation with another vector, or with an integer in every lane."""
        builder = self.builder
        if isinstance(other, Vector):
            operand = other.value
        else:
            operand = ir.Constant(self.value.type, [other] * self.count)
        if name in _COMPARISONS:
            compare = builder.icmp_signed if self.is_signed else builder.icmp_unsigned
            if self.is_float:
                compare = builder.fcmp_unordered if name == "nan" else builder.fcmp_ordered
            return self._of(compare(_COMPARISONS[name], self.value, operand))
        instruction = _NAMES.get(name, f"f{name}" if self.is_float else name)
        return self._of(getattr(builder, instruction)(self.value, operand))

    def choose(self, where: Vector, other: Vector) -> Vector:
        """Emit these numbers where the condition holds, else those of ``other``."""
        return self._of(self.builder.select(where.value, self.value, other.value))

    def negate_even(self) -> Vector:
        """Emit the numbers, those of even lanes with the other sign."""
        signs = [(-1.0, 1.0)[lane & 1] for lane in range(self.count)]
        return self.emit("mul", self._of(ir.Constant(self.value.type, signs)))

    def bits(self, kind: str) -> Vector:
        """Emit the same bits as numbers of another type of 32 bits."""
        wanted = ir.VectorType(_KINDS[kind], self.count)
        return self._of(self.builder.bitcast(self.value, wanted))

    def take(self, lanes: Iterable[int]) -> Vector:
        """Emit the vector of these lanes."""
        return self.join(self._of(ir.Constant(self.value.type, ir.Undefined)), lanes)

    def join(self, other: Vector, lanes: Iterable[int] | None = None) -> Vector:
        """Emit the vector of these lanes, by default all, of this one and ``other``."""
        numbers = [*(range(2 * self.count) if lanes is None else lanes)]
        mask = ir.Constant(ir.VectorType(_I32, len(numbers)), numbers)
        return self._of(self.builder.shuffle_vector(self.value, other.value, mask))


class VectorArithmetic:
    """Emitter of loads, stores and arithmetic on vectors of one element type.

    A vector holds numbers: a complex element is two of them.
    """

    def __init__(self, builder: Any, code: int) -> None:
        self.builder = builder
        self.element = element = arithmetic.element_type(code)
        self.itemsize, self.unit = element.itemsize, element.unit
        self.is_float, self.is_half = element.is_float, element.is_half
        floats = {16: ir.FloatType(), 32: ir.FloatType(), 64: ir.DoubleType()}
        self.number: Any = floats[element.bits] if self.is_float else ir.IntType(element.bits)
        self._stored: Any = _I16 if self.is_half else self.number

    def vector(self, lanes: int) -> Any:
        """Return the vector type of ``lanes`` numbers in which arithmetic is done."""
        return ir.VectorType(self.number, lanes)

    def load(self, pointer: Any, lanes: int) -> Any:
        """Emit a load that widens; unaligned loads cost nothing on aligned data."""
        builder = self.builder
        kind = ir.VectorType(self._stored, lanes)
        raw = builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)
        if not self.is_half:
            return raw
        if self.element.kind == "f":
            halves = builder.bitcast(raw, ir.VectorType(ir.HalfType(), lanes))
            return builder.fpext(halves, self.vector(lanes))
        if lanes % 2 == 0:
            words = builder.bitcast(raw, ir.VectorType(_I32, lanes // 2))
            return arithmetic.split_bfloat16(Vector(builder, words)).value
        wide = Vector(builder, builder.zext(raw, ir.VectorType(_I32, lanes)))
        return (wide << 16).bits("f32").value

    def store(self, value: Any, pointer: Any, lanes: int, streams: bool = False) -> None:
        """Emit a store that rounds half types; a streaming store needs a cache line's start."""
        builder = self.builder
        if self.is_half:
            value = self._to_half(value, lanes)
        kind = ir.VectorType(self._stored, lanes)
        typed = builder.bitcast(pointer, kind.as_pointer())
        stored = builder.store(value, typed, align=_LINE if streams else 1)
        if streams:
            one = ir.Constant(_I32, 1)
            stored.set_metadata("nontemporal", builder.module.add_metadata([one]))

    def _to_half(self, value: Any, lanes: int) -> Any:
        """Emit the rounding to the nearest half, ties to even."""
        builder = self.builder
        shorts = ir.VectorType(_I16, lanes)
        if self.element.kind == "f":
            halves = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
            return builder.bitcast(halves, shorts)
        rounded = arithmetic.round_to_bfloat16(Vector(builder, value))
        if lanes % 2:
            return builder.trunc((rounded >> 16).value, shorts)
        return builder.bitcast(arithmetic.join_bfloat16(rounded).value, shorts)

    def combine(self, operation: int, left: Any, right: Any) -> Any:
        """Emit ``left operation right``."""
        is_signed = self.element.kind == "i"
        sides = (Vector(self.builder, side, is_signed) for side in (left, right))
        return arithmetic.combine(operation, self.element, *sides).value

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
        single = self.builder.insert_element(undefined, scalar, _I64(0))
        return Vector(self.builder, single).take([0] * lanes).value
