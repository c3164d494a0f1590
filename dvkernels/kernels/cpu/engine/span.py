"""Emission of the innermost loop: combine elements of all sources, divide, store to all targets.

Sums are kept in registers. Half types are widened to float32, combined there, and rounded once.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cpu.engine import intrinsics, vectors
from dvkernels.kernels.cpu.engine.intrinsics import cgutils, literal_intrinsic

__all__: list[str] = []

# Distance of the prefetches. Two replicas of 64 MiB took 4.45 ms without prefetching and 3.95 ms
# with it (medians of 120, 2 cores of an AMD EPYC, November 2026; 1 to 16 KiB ahead made no
# difference); of 4 MiB, in cache, 0.11 and 0.16 ms: so only jobs on data in memory prefetch.
_PREFETCH_NBYTES = 4096
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
# Numbers of replicas in place whose addresses are kept in registers: in L1 and L2 their loads in
# each iteration cost time (two replicas of 64 KiB took 3.5 us with them, and take 2.8 without).
_COUNTS_IN_PLACE = (3, 4, 8)
_LINE = 64  # a cache line: one zmm register, or two ymm, or four of NEON
_SHORT = _LINE // 4  # the shortest vector
_I64 = ir.IntType(64)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


class _SpanEmitter:
    """Emitter of a span's loop bodies: some vectors of every source, combined and stored."""

    def __init__(self, builder: Any, operation: int, code: int, args: list[Any]) -> None:
        self.builder, self.operation = builder, operation
        self.numbers = vectors.VectorArithmetic(builder, code)
        table, sources, self.num_sources, targets, self.num_targets, divisor = args
        self.first_source, self.first_target = sources, targets
        word = _I64.as_pointer()
        self.sources = builder.gep(builder.inttoptr(table, word), [sources])
        self.targets = builder.gep(builder.inttoptr(table, word), [targets])
        self.divides = self.numbers.is_float and operation == arithmetic.ADD
        if self.divides:
            one = ir.Constant(self.numbers.number, 1.0)
            self.divisor = builder.sitofp(divisor, self.numbers.number)
            self.reciprocal = builder.fdiv(one, self.divisor)
            less = builder.sub(divisor, _int(1))
            self.is_mean = builder.icmp_signed("!=", divisor, _int(1))
            self.is_exact = builder.icmp_signed("==", builder.and_(divisor, less), _int(0))

    def base(self, table: Any, index: Any) -> Any:
        """Emit the load of the address ``table[index]`` of an array."""
        return self.builder.load(self.builder.gep(table, [index]))

    def _pointers(self, base: Any, offset: Any, shifts: list[int]) -> list[Any]:
        """Emit pointers to the byte ``offset + shift`` of an array, for each shift."""
        builder = self.builder
        start = builder.inttoptr(builder.add(base, offset), ir.IntType(8).as_pointer())
        return [builder.gep(start, [_int(shift)]) for shift in shifts]

    def body(
        self,
        offset: Any,
        lanes: int,
        count: int,
        prefetches: bool = False,
        streams: bool = False,
    ) -> None:
        """Emit the combination of ``count`` vectors of ``lanes`` numbers at byte ``offset``."""
        builder, numbers = self.builder, self.numbers
        shifts = self._shifts(lanes, count)
        accumulators = [cgutils.alloca_once(builder, numbers.vector(lanes)) for _ in shifts]

        def read(index: Any) -> list[Any]:
            pointers = self._pointers(self.base(self.sources, index), offset, shifts)
            if prefetches:
                for pointer in pointers:
                    ahead = builder.gep(pointer, [_int(_PREFETCH_NBYTES)])
                    intrinsics.emit_prefetch(builder, ahead, not streams)
            return [numbers.load(pointer, lanes) for pointer in pointers]

        for accumulator, value in zip(accumulators, read(_int(0)), strict=True):
            builder.store(value, accumulator)
        with cgutils.for_range(builder, self.num_sources, start=_int(1), intp=_I64) as loop:
            for accumulator, value in zip(accumulators, read(loop.index), strict=True):
                builder.store(
                    numbers.combine(self.operation, builder.load(accumulator), value), accumulator
                )
        totals = self._divided([builder.load(accumulator) for accumulator in accumulators])
        with cgutils.for_range(builder, self.num_targets, intp=_I64) as loop:
            pointers = self._pointers(self.base(self.targets, loop.index), offset, shifts)
            for total, pointer in zip(totals, pointers, strict=True):
                numbers.store(total, pointer, lanes, streams)

    def body_of(self, offset: Any, lanes: int, sources: list[Any], targets: list[Any]) -> None:
        """Emit the same, of two vectors, for arrays whose addresses are in registers."""
        numbers, shifts = self.numbers, self._shifts(lanes, 2)

        def read(base: Any) -> list[Any]:
            return [numbers.load(each, lanes) for each in self._pointers(base, offset, shifts)]

        totals = read(sources[0])
        for base in sources[1:]:
            totals = [
                numbers.combine(self.operation, total, value)
                for total, value in zip(totals, read(base), strict=True)
            ]
        totals = self._divided(totals)
        for base in targets:
            for total, pointer in zip(totals, self._pointers(base, offset, shifts), strict=True):
                numbers.store(total, pointer, lanes)

    def can_stream(self, offset: Any) -> Any:
        """Emit whether a cache line begins at byte ``offset`` of every target."""
        builder = self.builder
        skew = cgutils.alloca_once_value(builder, _int(0))
        with cgutils.for_range(builder, self.num_targets, intp=_I64) as loop:
            start = builder.add(self.base(self.targets, loop.index), offset)
            builder.store(builder.or_(builder.load(skew), start), skew)
        low = builder.and_(builder.load(skew), _int(_LINE - 1))
        return builder.icmp_signed("==", low, _int(0))

    def fence(self) -> None:
        """Emit a fence that orders streaming stores before all later stores."""
        if _IS_X86:
            intrinsics.emit_call(self.builder, "llvm.x86.sse.sfence")
        else:
            self.builder.fence("seq_cst")

    def is_of_two(self) -> Any:
        """Emit whether there are two sources and two targets."""
        builder = self.builder
        counts = (self.num_sources, self.num_targets)
        return builder.and_(*(builder.icmp_signed("==", count, _int(2)) for count in counts))

    def num_in_place(self) -> Any:
        """Emit the number of sources if they are the targets as well, else 0."""
        builder = self.builder
        is_same = builder.and_(
            builder.icmp_signed("==", self.num_sources, self.num_targets),
            builder.icmp_signed("==", self.first_source, self.first_target),
        )
        return builder.select(is_same, self.num_sources, _int(0))

    def _shifts(self, lanes: int, count: int) -> list[int]:
        nbytes = lanes * self.numbers.itemsize // self.numbers.unit
        return [k * nbytes for k in range(count)]

    def _divided(self, totals: list[Any]) -> list[Any]:
        """Emit the division of the totals where the operation is a mean; return the results."""
        if not self.divides:
            return totals
        builder = self.builder
        before = builder.block
        with builder.if_then(self.is_mean):
            quotients = [
                self.numbers.divide(total, self.divisor, self.reciprocal, self.is_exact)
                for total in totals
            ]
            within = builder.block
        merged = []
        for total, quotient in zip(totals, quotients, strict=True):
            phi = builder.phi(total.type)
            phi.add_incoming(total, before)
            phi.add_incoming(quotient, within)
            merged.append(phi)
        return merged


@literal_intrinsic
def span(
    typing: Any, table: Any, sources: Any, num_sources: Any, targets: Any, num_targets: Any,
    divisor: Any, first: Any, length: Any, in_memory: Any, operation: Any, code: Any,
) -> Any:  # fmt: skip
    """Combine ``length`` elements from element ``first`` of the arrays that a table lists.

    ``sources`` and ``targets`` are the indices of their first addresses in the table.
    ``in_memory`` is 0 if the data is in a cache, 1 if it is in memory, 2 if it is in memory and no
    target is a source, so that stores may bypass the caches.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _SpanEmitter(builder, operation.literal_value, code.literal_value, list(args[:6]))
        numbers = emit.numbers
        itemsize = _int(numbers.itemsize)
        start, nbytes = builder.mul(args[6], itemsize), builder.mul(args[7], itemsize)
        stop = builder.add(start, nbytes)
        # Arrays of one allocator have one alignment within a cache line: NumPy's large ones start
        # 16 bytes into it. The elements up to the next line are done first, so that no vector
        # straddles two lines (two replicas of 4 MiB: 0.08 ms; without it 0.11 ms).
        base = builder.load(emit.targets)
        head = builder.and_(builder.neg(builder.add(base, start)), _int(_LINE - 1))
        is_whole = builder.icmp_signed("==", builder.srem(head, itemsize), _int(0))
        fits = builder.and_(is_whole, builder.icmp_signed("<", head, nbytes))
        aligned = builder.add(start, builder.select(fits, head, _int(0)))
        # Two lines at a time: two chains of additions hide each other's latency.
        step = 2 * _LINE
        middle = builder.add(aligned, builder.and_(builder.sub(stop, aligned), _int(-step)))
        lanes = _LINE // numbers.itemsize * numbers.unit

        def loop(begin: Any, end: Any, width: int, body: Any, *arguments: Any) -> None:
            with cgutils.for_range_slice(builder, begin, end, _int(width), _I64) as (offset, _):
                body(offset, *arguments)

        def parts_of_a_line(begin: Any, end: Any, widths: tuple[int, ...]) -> Any:
            """Emit the binary digits of a length, of these bytes; return its new begin."""
            for width in widths:
                digit = builder.and_(builder.sub(end, begin), _int(width))
                with builder.if_then(builder.icmp_signed("!=", digit, _int(0))):
                    emit.body(begin, width // numbers.itemsize * numbers.unit, 1)
                begin = builder.add(begin, digit)
            return begin

        # What is no whole line, at both ends, is done in a few vectors: one number after another,
        # it took 0.4 us for each piece of four arrays.
        rest = builder.add(start, builder.and_(builder.sub(aligned, start), _int(_SHORT - 1)))
        loop(start, rest, numbers.itemsize, emit.body, numbers.unit, 1)
        parts_of_a_line(rest, aligned, (_SHORT, 2 * _SHORT))
        with builder.if_else(builder.icmp_signed("!=", args[8], _int(0))) as (
            from_memory,
            from_cache,
        ):
            with from_memory:
                may_stream = builder.icmp_signed("==", args[8], _int(2))
                streams = builder.and_(may_stream, emit.can_stream(aligned))
                with builder.if_else(streams) as (past_caches, through_caches):
                    with past_caches:
                        loop(aligned, middle, step, emit.body, lanes, 2, True, True)
                        emit.fence()
                    with through_caches:
                        loop(aligned, middle, step, emit.body, lanes, 2, True)
            with from_cache, builder.if_else(emit.is_of_two()) as (two_by_two, others):
                with two_by_two:
                    bases = [
                        [emit.base(each, _int(k)) for k in (0, 1)]
                        for each in (emit.sources, emit.targets)
                    ]
                    loop(aligned, middle, step, emit.body_of, lanes, *bases)
                with others:
                    done, any_number = (
                        builder.append_basic_block(name) for name in ("done", "any")
                    )
                    switch = builder.switch(emit.num_in_place(), any_number)
                    for count in _COUNTS_IN_PLACE:
                        block = builder.append_basic_block(f"in_place_{count}")
                        switch.add_case(_int(count), block)
                        builder.position_at_end(block)
                        bases = [emit.base(emit.sources, _int(k)) for k in range(count)]
                        loop(aligned, middle, step, emit.body_of, lanes, bases, bases)
                        builder.branch(done)
                    builder.position_at_end(any_number)
                    loop(aligned, middle, step, emit.body, lanes, 2)
                    builder.branch(done)
                    builder.position_at_end(done)
        rest = parts_of_a_line(middle, stop, (_LINE, _LINE // 2, _SHORT))
        loop(rest, stop, numbers.itemsize, emit.body, numbers.unit, 1)
        return context.get_dummy_value()

    integers = [types.int64] * 9
    return types.void(*integers, operation, code), generate
