"""Emission of the loop over updates of rows: combine a row with its update, store to all copies."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cpu.engine import intrinsics, vectors
from dvkernels.kernels.cpu.engine.intrinsics import cgutils, literal_intrinsic

__all__: list[str] = []

REPLACE = -1  # beside the operations of arithmetic.py
# How many updates ahead a row is fetched. 13 312 rows of 64 bytes out of a million took 0.35 ms
# without and take 0.23 ms (one core of an AMD EPYC, 2026-11).
_AHEAD = 12
_LINE = 64
_I64 = ir.IntType(64)
_ONE = _I64(1)


class _RowEmitter:
    """Emitter of the updates of rows by one operation on one type of elements."""

    def __init__(self, builder: Any, operation: int, code: int, args: list[Any]) -> None:
        self.builder, self.operation = builder, operation
        self.numbers = vectors.VectorArithmetic(builder, code)
        table, self.num_copies, self.indices, self.updates, self.stride = args[:5]
        self.listed, self.count, self.nbytes, self.divisor = args[5:]
        self.bases = builder.inttoptr(table, _I64.as_pointer())
        self.base = builder.load(self.bases)
        # The updates of a row of halves, which the list has together, are combined before it is
        # rounded; these operations round nothing.
        exact = (REPLACE, arithmetic.MIN, arithmetic.MAX)
        self.merges = self.numbers.is_half and operation not in exact

    def _word(self, address: Any, index: Any) -> Any:
        builder = self.builder
        return builder.load(builder.gep(builder.inttoptr(address, _I64.as_pointer()), [index]))

    def _byte(self, *terms: Any) -> Any:
        address = functools.reduce(self.builder.add, terms)
        return self.builder.inttoptr(address, ir.IntType(8).as_pointer())

    def _row_of(self, update: Any) -> Any:
        return self._word(self.indices, update)

    def loop(self, is_plain: bool, is_listed: bool = True) -> None:
        """Emit the loop over the updates: plain ones are of one copy and not divided."""
        builder, first, last = self.builder, _I64(0), self.builder.sub(self.count, _ONE)

        def update_at(place: Any) -> Any:
            return self._word(self.listed, place) if is_listed else place

        with cgutils.for_range(builder, self.count, intp=_I64) as loop:
            place, later = loop.index, builder.add(loop.index, _I64(_AHEAD))
            later = builder.select(builder.icmp_signed("<", later, last), later, last)
            later = builder.mul(self._row_of(update_at(later)), self.nbytes)
            for end in (first, builder.sub(self.nbytes, _ONE)):
                intrinsics.emit_prefetch(builder, self._byte(self.base, later, end), True)
            update = update_at(place)
            row = self._row_of(update)
            if not self.merges:
                self._change(place, update, row, is_plain)
                return
            is_first = builder.icmp_signed("==", place, first)
            before = update_at(builder.select(is_first, first, builder.sub(place, _ONE)))
            is_new = builder.icmp_signed("!=", self._row_of(before), row)
            with builder.if_then(builder.or_(is_first, is_new)):
                self._change(place, update, row, is_plain)

    def _change(self, place: Any, update: Any, row: Any, is_plain: bool) -> None:
        """Emit the change of a row: its cache lines, then the binary digits of the rest."""
        builder, nbytes = self.builder, self.nbytes
        whole, rest = (builder.and_(nbytes, _I64(part)) for part in (-_LINE, _LINE - 1))
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(_LINE), _I64) as (start, _):
            self._vector(place, update, row, start, _LINE, is_plain)
        with builder.if_then(builder.icmp_signed("!=", rest, _I64(0))):
            width = _LINE // 2
            while width >= self.numbers.itemsize:
                digit = builder.and_(rest, _I64(width))
                with builder.if_then(builder.icmp_signed("!=", digit, _I64(0))):
                    start = builder.and_(nbytes, _I64(-2 * width))
                    self._vector(place, update, row, start, width, is_plain)
                width //= 2

    def _vector(
        self, place: Any, update: Any, row: Any, offset: Any, width: int, is_plain: bool
    ) -> None:
        """Emit the change of ``width`` bytes of a row from byte ``offset`` on."""
        builder, numbers = self.builder, self.numbers
        lanes = width // numbers.itemsize * numbers.unit
        shift = builder.add(builder.mul(row, self.nbytes), offset)
        target = self._byte(self.base, shift)
        if self.merges:
            value = self._merged(numbers.load(target, lanes), place, row, offset, is_plain)
        else:
            value = self._update(update, offset, lanes, is_plain)
            if self.operation != REPLACE:
                value = numbers.combine(self.operation, numbers.load(target, lanes), value)
        numbers.store(value, target, lanes)
        if not is_plain:
            with cgutils.for_range(builder, self.num_copies, start=_ONE, intp=_I64) as loop:
                other = builder.load(builder.gep(self.bases, [loop.index]))
                numbers.store(value, self._byte(other, shift), lanes)

    def _update(self, update: Any, offset: Any, lanes: int, is_plain: bool) -> Any:
        """Emit the load of a vector of an update, and its division."""
        builder, numbers = self.builder, self.numbers
        start = builder.mul(update, self.stride)
        value = numbers.load(self._byte(self.updates, start, offset), lanes)
        if is_plain or not numbers.is_float:
            return value
        divisor = builder.sitofp(self.divisor, numbers.number)
        return builder.fdiv(value, numbers.spread(divisor, lanes))

    def _merged(self, value: Any, place: Any, row: Any, offset: Any, is_plain: bool) -> Any:
        """Emit the combination with the update at a place and those that follow for the row."""
        builder, before = self.builder, self.builder.block
        body, after = (builder.append_basic_block() for _ in range(2))
        builder.branch(body)
        builder.position_at_end(body)
        total, at = builder.phi(value.type), builder.phi(_I64)
        update = self._update(self._word(self.listed, at), offset, value.type.count, is_plain)
        new, following = self.numbers.combine(self.operation, total, update), builder.add(at, _ONE)
        is_inside = builder.icmp_signed("<", following, self.count)
        next_one = self._word(self.listed, builder.select(is_inside, following, at))
        is_same = builder.icmp_signed("==", self._row_of(next_one), row)
        for phi, start, end in ((total, value, new), (at, place, following)):
            phi.add_incoming(start, before)
            phi.add_incoming(end, builder.block)
        builder.cbranch(builder.and_(is_inside, is_same), body, after)
        builder.position_at_end(after)
        return new


@literal_intrinsic
def apply_updates(
    typing: Any, copies: Any, num_copies: Any, indices: Any, updates: Any, stride: Any, listed: Any,
    count: Any, nbytes: Any, divisor: Any, is_all: Any, operation: Any, code: Any,
) -> Any:  # fmt: skip
    """Apply updates to rows of ``nbytes``, one after another, in the order of a list.

    ``copies`` is the address of the addresses of the arrays. Update i is for row ``indices[i]``,
    ``i * stride`` bytes after ``updates``, and is divided by ``divisor`` first. The list has
    ``count`` numbers of updates; those of one row of halves are together. ``is_all`` says that it
    is 0, 1, 2 and so on.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code_of_type = code.literal_value
        emit = _RowEmitter(builder, operation.literal_value, code_of_type, list(args[:9]))
        is_alone, is_undivided = (builder.icmp_signed("==", args[k], _ONE) for k in (1, 8))
        with builder.if_else(builder.and_(is_alone, is_undivided)) as (plain, general):
            with plain, builder.if_else(builder.trunc(args[9], ir.IntType(1))) as (every, some):
                with every:
                    emit.loop(is_plain=True, is_listed=emit.merges)
                with some:
                    emit.loop(is_plain=True)
            with general:
                emit.loop(is_plain=False)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10, operation, code), generate
