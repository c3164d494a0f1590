"""The compiled loops: combine the elements of all sources, left to right, store to all targets.

One runner for each pair of an operation and an element type, a C function of the address of a job
(see job.py for what a job holds). A runner claims pieces of the job until none is left, so any
number of threads may call it at once; pieces share no element, so no thread waits for another,
and the bits depend on the job alone.

Sums are kept in registers. Half types are widened to float32, combined there, and rounded once.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils as numba_cgutils

from dvkernels.kernels import arithmetic, jit
from dvkernels.kernels.cpu.engine import intrinsics
from dvkernels.reduce_op import ReduceOp

__all__ = [
    "addresses_on",
    "claim",
    "locate",
    "part",
    "runner",
    "span",
]


# Two replicas of 64 MiB took 4.45 ms without prefetching and 3.95 ms with it (medians of 120, 2
# cores of an AMD EPYC, November 2026; 1 to 16 KiB ahead alike); of 4 MiB, in cache, 0.11 and
# 0.16 ms: hence only where the job says that the data lies in memory.
_PREFETCH_NBYTES = 4096
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_LINE = 64  # a cache line: one zmm register, or two ymm, or four of NEON
_I64 = ir.IntType(64)
_I32 = ir.IntType(32)
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_literal_intrinsic: _Decorator = extending.intrinsic(prefer_literal=True)
cgutils: Any = numba_cgutils  # its functions carry no types


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


class _SpanEmitter:
    """Emits the body of a span: some vectors of every source, combined and stored."""

    def __init__(self, builder: Any, operation: int, code: int, args: list[Any]) -> None:
        self.builder, self.operation = builder, operation
        self.numbers = arithmetic.Numbers(builder, code)
        table, sources, self.num_sources, targets, self.num_targets, divisor = args
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
        """Return the address of the array ``table[index]``."""
        return self.builder.load(self.builder.gep(table, [index]))

    def _pointers(self, base: Any, offset: Any, places: list[int]) -> list[Any]:
        """Return where an array has byte ``offset``, and so many bytes after it."""
        builder = self.builder
        start = builder.inttoptr(builder.add(base, offset), ir.IntType(8).as_pointer())
        return [builder.gep(start, [_int(place)]) for place in places]

    def _prefetch(self, pointer: Any, to_write: bool) -> None:
        """Ask for the line that a later turn will read, and perhaps write where it stands."""
        builder, byte = self.builder, ir.IntType(8).as_pointer()
        ahead = builder.gep(pointer, [_int(_PREFETCH_NBYTES)])
        function_type = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        purpose = [ir.Constant(_I32, number) for number in (int(to_write), 3, 1)]
        builder.call(prefetch, [ahead, *purpose])

    def turn(
        self,
        offset: Any,
        lanes: int,
        count: int,
        prefetches: bool = False,
        streams: bool = False,
    ) -> None:
        """Combine and store ``count`` vectors of ``lanes`` numbers at byte ``offset``."""
        builder, numbers = self.builder, self.numbers
        places = self._places(lanes, count)
        sums = [cgutils.alloca_once(builder, numbers.vector(lanes)) for _ in places]

        def read(index: Any) -> list[Any]:
            pointers = self._pointers(self.base(self.sources, index), offset, places)
            if prefetches:
                for pointer in pointers:
                    self._prefetch(pointer, not streams)
            return [numbers.load(pointer, lanes) for pointer in pointers]

        for place, value in zip(sums, read(_int(0)), strict=True):
            builder.store(value, place)
        with cgutils.for_range(builder, self.num_sources, start=_int(1), intp=_I64) as loop:
            for place, value in zip(sums, read(loop.index), strict=True):
                builder.store(numbers.combine(self.operation, builder.load(place), value), place)
        totals = self._divided([builder.load(place) for place in sums])
        with cgutils.for_range(builder, self.num_targets, intp=_I64) as loop:
            pointers = self._pointers(self.base(self.targets, loop.index), offset, places)
            for total, pointer in zip(totals, pointers, strict=True):
                numbers.store(total, pointer, lanes, streams)

    def turn_of_two(self, offset: Any, lanes: int, count: int, bases: list[Any]) -> None:
        """Do as ``turn`` for two sources and two targets, whose addresses are known."""
        numbers, places = self.numbers, self._places(lanes, count)
        left, right, *targets = (self._pointers(base, offset, places) for base in bases)
        totals = self._divided(
            [
                numbers.combine(self.operation, numbers.load(one, lanes), numbers.load(two, lanes))
                for one, two in zip(left, right, strict=True)
            ]
        )
        for target in targets:
            for total, pointer in zip(totals, target, strict=True):
                numbers.store(total, pointer, lanes)

    def can_stream(self, offset: Any) -> Any:
        """Emit whether every target has a line's start at byte ``offset``."""
        builder = self.builder
        skew = cgutils.alloca_once_value(builder, _int(0))
        with cgutils.for_range(builder, self.num_targets, intp=_I64) as loop:
            place = builder.add(self.base(self.targets, loop.index), offset)
            builder.store(builder.or_(builder.load(skew), place), skew)
        low = builder.and_(builder.load(skew), _int(_LINE - 1))
        return builder.icmp_signed("==", low, _int(0))

    def fence(self) -> None:
        """Order streamed stores before what follows."""
        if _IS_X86:
            function_type = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse.sfence"
            fence = cgutils.get_or_insert_function(self.builder.module, function_type, name)
            self.builder.call(fence, [])
        else:
            self.builder.fence("seq_cst")

    def is_of_two(self) -> Any:
        """Emit whether there are two sources and two targets.

        In the caches nearest to the core reading addresses for each turn shows: a call on two
        replicas of 64 KiB took 3.5 us so and takes 2.8 us with the addresses in registers.
        """
        builder = self.builder
        counts = (self.num_sources, self.num_targets)
        return builder.and_(*(builder.icmp_signed("==", count, _int(2)) for count in counts))

    def _places(self, lanes: int, count: int) -> list[int]:
        nbytes = lanes * self.numbers.itemsize // self.numbers.unit
        return [k * nbytes for k in range(count)]

    def _divided(self, totals: list[Any]) -> list[Any]:
        """Return the totals, or their quotients where the operation is a mean."""
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


@_literal_intrinsic
def span(
    typing: Any, table: Any, sources: Any, num_sources: Any, targets: Any, num_targets: Any,
    divisor: Any, first: Any, length: Any, far: Any, operation: Any, code: Any,
) -> Any:  # fmt: skip
    """Combine ``length`` elements from element ``first`` of the arrays that a table names.

    ``sources`` and ``targets`` say where their addresses begin in the table. ``far`` says where
    the data lies: 0 in a cache, 1 in memory, 2 in memory and no target is a source, so that
    stores may go past the caches.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _SpanEmitter(builder, operation.literal_value, code.literal_value, list(args[:6]))
        numbers = emit.numbers
        itemsize = _int(numbers.itemsize)
        start, nbytes = builder.mul(args[6], itemsize), builder.mul(args[7], itemsize)
        stop = builder.add(start, nbytes)
        # Arrays of one allocator lie alike in their cache lines, NumPy's large ones 16 bytes past
        # the start: elements up to the next line go first, so that no vector straddles two lines
        # (two replicas of 4 MiB: 0.11 ms before, 0.08 ms since).
        base = builder.load(emit.targets)
        head = builder.and_(builder.neg(builder.add(base, start)), _int(_LINE - 1))
        is_whole = builder.icmp_signed("==", builder.srem(head, itemsize), _int(0))
        fits = builder.and_(is_whole, builder.icmp_signed("<", head, nbytes))
        aligned = builder.add(start, builder.select(fits, head, _int(0)))
        # Two lines at a time: two chains of additions hide each other's latency.
        step = 2 * _LINE
        middle = builder.add(aligned, builder.and_(builder.sub(stop, aligned), _int(-step)))
        lanes = _LINE // numbers.itemsize * numbers.unit

        def loop(begin: Any, end: Any, width: int, turn: Any, *arguments: Any) -> None:
            with cgutils.for_range_slice(builder, begin, end, _int(width), _I64) as (offset, _):
                turn(offset, *arguments)

        loop(start, aligned, numbers.itemsize, emit.turn, numbers.unit, 1)
        with builder.if_else(builder.icmp_signed("!=", args[8], _int(0))) as (in_memory, in_cache):
            with in_memory:
                asked = builder.icmp_signed("==", args[8], _int(2))
                streams = builder.and_(asked, emit.can_stream(aligned))
                with builder.if_else(streams) as (past_caches, through_caches):
                    with past_caches:
                        loop(aligned, middle, step, emit.turn, lanes, 2, True, True)
                        emit.fence()
                    with through_caches:
                        loop(aligned, middle, step, emit.turn, lanes, 2, True)
            with in_cache, builder.if_else(emit.is_of_two()) as (of_two, of_many):
                with of_two:
                    bases = [emit.base(emit.sources, _int(k)) for k in (0, 1)]
                    bases += [emit.base(emit.targets, _int(k)) for k in (0, 1)]
                    loop(aligned, middle, step, emit.turn_of_two, lanes, 2, bases)
                with of_many:
                    loop(aligned, middle, step, emit.turn, lanes, 2)
        loop(middle, stop, numbers.itemsize, emit.turn, numbers.unit, 1)
        return context.get_dummy_value()

    integers = [types.int64] * 9
    return types.void(*integers, operation, code), generate


@jit.njit(nogil=True)
def claim(job, ordinal, turn):  # type: ignore[no-untyped-def]
    """Claim pieces for a thread; return its turn, the first, and one past the last (0: none).

    The pieces are cut into segments. A thread begins with the segment of its own number, so that
    a call on the same data finds it in the same core's cache; then it helps in the others. Two
    replicas of 1 MiB took 23 us with pieces handed out from one counter and take 11 us so, of 4 MiB
    105 and 51 (2 cores of an AMD EPYC, 1 MiB of cache each, 2026-11).
    """
    num_pieces, grain = intrinsics.load(job, 8), intrinsics.load(job, 9)
    counters, num_segments = job + 8 * intrinsics.load(job, 20), intrinsics.load(job, 21)
    while turn < num_segments:
        segment = (ordinal + turn) % num_segments
        first = num_pieces * segment // num_segments
        last = num_pieces * (segment + 1) // num_segments
        begin = first + intrinsics.fetch_add(counters, 8 * segment, grain)
        if begin < last:
            return turn, begin, min(begin + grain, last)
        turn += 1
    return turn, np.int64(0), np.int64(0)


@jit.njit(nogil=True)
def locate(job, piece):  # type: ignore[no-untyped-def]
    """Return what a piece is: its table, first element, length, first line, and one past the last.

    It belongs to the last item that begins before it.
    """
    items = job + 8 * intrinsics.load(job, 12)
    low, high = 0, intrinsics.load(job, 11)
    while high - low > 1:
        middle = (low + high) // 2
        if intrinsics.load(items, 4 * middle) <= piece:
            low = middle
        else:
            high = middle
    item, longest = items + 32 * low, intrinsics.load(job, 10)
    length, num_lines = intrinsics.load(item, 1), intrinsics.load(item, 2)
    blocks = max(1, -(-length // longest))  # of a line
    lines = max(1, longest // max(1, length))  # of a piece
    number = piece - intrinsics.load(item, 0)
    first = number % blocks * longest
    line = number // blocks * lines
    table = job + 8 * intrinsics.load(item, 3)
    return table, first, min(longest, length - first), line, min(line + lines, num_lines)


@jit.njit(nogil=True)
def addresses_on(line, table, width, scratch):  # type: ignore[no-untyped-def]
    """Write to ``scratch`` where the arrays of a table have their ``line``."""
    for k in range(width):
        shift = line * intrinsics.load(table, width + k) if line > 0 else 0
        intrinsics.store(scratch, k, intrinsics.load(table, k) + shift)


@jit.njit(nogil=True)
def part(length, num_parts, k):  # type: ignore[no-untyped-def]
    """Return where part ``k`` begins and how long it is: as schedules/partition.py cuts it."""
    small = length // num_parts
    num_larger = length - small * num_parts
    return k * small + min(k, num_larger), small + np.int64(k < num_larger)


def _make(operation: int, code: int) -> Any:
    """Return the runner; Numba's cache tells these closures apart by what they enclose."""

    @jit.cfunc(types.void(types.int64))
    def run(job):  # type: ignore[no-untyped-def]
        far, width, num_parts = (
            intrinsics.load(job, 15),
            intrinsics.load(job, 16),
            intrinsics.load(job, 17),
        )
        program, num_rows = job + 8 * intrinsics.load(job, 13), intrinsics.load(job, 14)
        ordinal = intrinsics.fetch_add(job, 0, 1)
        turn, begin, end = claim(job, ordinal, 0)
        while begin < end:
            for piece in range(begin, end):
                table, column, length, line, last_line = locate(job, piece)
                scratch = np.empty(width if last_line > 1 else 0, np.int64)
                while line < last_line:
                    addresses = table
                    if last_line > 1:
                        addresses = np.int64(scratch.ctypes.data)
                        addresses_on(line, table, width, addresses)
                    for row in range(num_rows):
                        step = program + 48 * row
                        first, count = column, length
                        chunk = intrinsics.load(step, 0)
                        if chunk >= 0:
                            start, count = part(length, num_parts, chunk)
                            first += start
                        span(
                            addresses, intrinsics.load(step, 1), intrinsics.load(step, 2),
                            intrinsics.load(step, 3), intrinsics.load(step, 4),
                            intrinsics.load(step, 5), first, count, far, operation, code,
                        )  # fmt: skip
                    line += 1
            turn, begin, end = claim(job, ordinal, turn)

    return run


_runners: dict[tuple[int, int], Any] = {}
_by_dtype: dict[tuple[ReduceOp, np.dtype[Any]], tuple[int, int]] = {}


def runner(op: ReduceOp, dtype: np.dtype[Any]) -> int:
    """Return the address of the runner of ``op`` over ``dtype``, compiled here and now.

    A job counts elements; of a complex sum it counts the floats: see :func:`arithmetic.factor`.
    """
    key = _by_dtype.get((op, dtype))
    if key is None:
        key = _by_dtype[op, dtype] = (
            arithmetic.operation_code(op),
            arithmetic.type_code(dtype, op),
        )
    found = _runners.get(key)
    if found is None:
        found = _runners[key] = _make(*key)
    address: int = found.address
    return address
