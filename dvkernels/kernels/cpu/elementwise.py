"""The compiled loops: a program of spans, run piece by piece by whichever threads are free.

A job is one int64 array, so that every kernel has one signature per dtype:

    [0] next piece   [8] pieces done             each on a cache line that only counters touch
    [16] number of pieces  [17] elements a piece  [18] elements  [19] chunks  [20] rows
    [21] whether to prefetch from memory
    [24:] rows of six: chunk, sources, number of sources, targets, number of targets, divisor
    then the address tables to which `sources` and `targets` point (indices into the job)

A thread claims a piece and runs every row over it: "combine the sources, left to right, and store
to every target", over one chunk of the piece, or all of it where chunk is -1. Pieces share no
element, so no thread waits for another, and the bits depend on the program alone.

Intrinsics and their callers share this file: Numba's cache notices no edit of a callee elsewhere.
One top-level runner for each op: a runner made by a closure would never be found in the cache.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils as numba_cgutils

from dvkernels.reduce_op import ReduceOp

__all__ = ["DONE", "HEADER", "NUM_PIECES", "PREFETCHES", "ROW", "Runner", "kernel"]

DONE, NUM_PIECES, PREFETCHES, HEADER, ROW = 8, 16, 21, 24, 6

_SUM, _MEAN, _MIN, _MAX, _PROD = 0, 1, 2, 3, 4
_HAS_PAUSE = platform.machine() in ("x86_64", "AMD64")
# Two replicas of 64 MiB took 4.45 ms without prefetching and 3.95 ms with it (medians of 120, 2
# cores of an AMD EPYC, November 2026; 1 to 16 KiB ahead alike); of 4 MiB, in cache, 0.11 and
# 0.16 ms: hence only where the job says that the data lies in memory.
_PREFETCH_NBYTES = 4096
_VECTOR_BYTES = 64  # a cache line: one zmm register, or two ymm, or four of NEON
_I64 = ir.IntType(64)
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_intrinsic: _Decorator = extending.intrinsic
_literal_intrinsic: _Decorator = extending.intrinsic(prefer_literal=True)
cgutils: Any = numba_cgutils  # its functions carry no types

Runner = Callable[[Any, Any, int], bool]


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


def _combine(builder: Any, op: int, dtype: Any, left: Any, right: Any) -> Any:
    """Emit ``left op right`` for scalars or vectors of ``dtype``."""
    is_float = isinstance(dtype, types.Float)
    if op in (_SUM, _MEAN):
        return builder.fadd(left, right) if is_float else builder.add(left, right)
    if op == _PROD:
        return builder.fmul(left, right) if is_float else builder.mul(left, right)
    sign = "<" if op == _MIN else ">"
    if not is_float:
        compare = builder.icmp_signed if dtype.signed else builder.icmp_unsigned
        return builder.select(compare(sign, left, right), left, right)
    # A NaN on the left stays; one on the right makes the comparison false, so it is chosen.
    stays = builder.or_(
        builder.fcmp_ordered(sign, left, right), builder.fcmp_unordered("uno", left, left)
    )
    return builder.select(stays, left, right)


class _Emitter:
    """Emits the body of a span: one block of vectors, or one element, of every source."""

    def __init__(self, context: Any, builder: Any, op: int, dtype: Any, job: Any, row: Any) -> None:
        self.builder, self.op, self.dtype, self.job = builder, op, dtype, job
        self.element = context.get_data_type(dtype)
        self.itemsize = dtype.bitwidth // 8
        fields = [builder.load(builder.gep(job, [builder.add(row, _int(k))])) for k in range(1, 6)]
        self.sources, self.num_sources, self.targets, self.num_targets, self.divisor = fields

    def _pointer(self, table: Any, index: Any, offset: Any, kind: Any, position: int) -> Any:
        builder = self.builder
        address = builder.load(builder.gep(self.job, [builder.add(table, index)]))
        address = builder.add(address, builder.add(offset, _int(position * _VECTOR_BYTES)))
        return builder.inttoptr(address, kind.as_pointer())

    def _prefetch(self, pointer: Any) -> None:
        """Ask for the line that a later block will read, and write where it stands."""
        builder, byte, int32 = self.builder, ir.IntType(8).as_pointer(), ir.IntType(32)
        ahead = builder.gep(builder.bitcast(pointer, byte), [_int(_PREFETCH_NBYTES)])
        function_type = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
        prefetch = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        to_write, keep, data = (ir.Constant(int32, number) for number in (1, 3, 1))
        builder.call(prefetch, [ahead, to_write, keep, data])

    def block(self, offset: Any, num_vectors: int, prefetches: bool = False) -> None:
        """Combine and store at byte ``offset``: 2 vectors, or one element where 0 are asked for."""
        builder = self.builder
        lanes = _VECTOR_BYTES // self.itemsize
        kind = ir.VectorType(self.element, lanes) if num_vectors else self.element
        places = range(max(num_vectors, 1))
        sums = [cgutils.alloca_once(builder, kind) for _ in places]
        # align=1: arrays may start anywhere, and unaligned loads cost nothing on aligned data.
        for k in places:
            pointer = self._pointer(self.sources, _int(0), offset, kind, k)
            if prefetches:
                self._prefetch(pointer)
            builder.store(builder.load(pointer, align=1), sums[k])
        with cgutils.for_range(builder, self.num_sources, start=_int(1), intp=_I64) as loop:
            for k in places:
                pointer = self._pointer(self.sources, loop.index, offset, kind, k)
                if prefetches:
                    self._prefetch(pointer)
                value = builder.load(pointer, align=1)
                total = builder.load(sums[k])
                builder.store(_combine(builder, self.op, self.dtype, total, value), sums[k])
        if self.op == _MEAN:
            self._divide(sums, lanes if num_vectors else 0)
        with cgutils.for_range(builder, self.num_targets, intp=_I64) as loop:
            for k in places:
                pointer = self._pointer(self.targets, loop.index, offset, kind, k)
                builder.store(builder.load(sums[k]), pointer, align=1)

    def _divide(self, sums: list[Any], lanes: int) -> None:
        """Divide, with NumPy's bits.

        The product with a rounded reciprocal would be other bits; that of 1, 2, 4, ... is exact,
        and multiplying is several times as fast.
        """
        builder = self.builder
        divisor = builder.sitofp(self.divisor, self.element)
        reciprocal = builder.fdiv(ir.Constant(self.element, 1.0), divisor)
        if lanes:
            divisor, reciprocal = self._spread(divisor, lanes), self._spread(reciprocal, lanes)
        rest = builder.and_(self.divisor, builder.sub(self.divisor, _int(1)))
        with builder.if_else(builder.icmp_signed("==", rest, _int(0))) as (is_exact, is_rounded):
            with is_exact:
                for place in sums:
                    builder.store(builder.fmul(builder.load(place), reciprocal), place)
            with is_rounded:
                for place in sums:
                    builder.store(builder.fdiv(builder.load(place), divisor), place)

    def _spread(self, scalar: Any, lanes: int) -> Any:
        """Return a vector with the scalar in every lane."""
        undefined = ir.Constant(ir.VectorType(self.element, lanes), ir.Undefined)
        single = self.builder.insert_element(undefined, scalar, _int(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
        return self.builder.shuffle_vector(single, undefined, zeros)


@_literal_intrinsic
def _span(typing: Any, job: Any, row: Any, first: Any, length: Any, witness: Any, op: Any) -> Any:
    """Run row ``row`` over ``length`` elements from ``first``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(job)(context, builder, args[0]).data
        emit = _Emitter(context, builder, op.literal_value, witness.dtype, data, args[1])
        start = builder.mul(args[2], _int(emit.itemsize))
        nbytes = builder.mul(args[3], _int(emit.itemsize))
        stop = builder.add(start, nbytes)
        # Arrays of one allocator lie alike in their cache lines, NumPy's large ones 16 bytes past
        # the start: elements up to the next line go first, so that no vector straddles two lines
        # (two replicas of 4 MiB: 0.11 ms before, 0.08 ms since).
        base = builder.load(builder.gep(data, [emit.sources]))
        head = builder.and_(builder.neg(builder.add(base, start)), _int(_VECTOR_BYTES - 1))
        is_whole = builder.icmp_signed("==", builder.srem(head, _int(emit.itemsize)), _int(0))
        fits = builder.and_(is_whole, builder.icmp_signed("<", head, nbytes))
        aligned = builder.add(start, builder.select(fits, head, _int(0)))
        # Two vectors at a time: two chains of additions hide each other's latency.
        step = 2 * _VECTOR_BYTES
        middle = builder.add(aligned, builder.and_(builder.sub(stop, aligned), _int(-step)))
        far = builder.load(builder.gep(data, [_int(PREFETCHES)]))

        def loop(first: Any, last: Any, width: int, num_vectors: int, prefetches: bool) -> None:
            with cgutils.for_range_slice(builder, first, last, _int(width), _I64) as (offset, _):
                emit.block(offset, num_vectors, prefetches)

        loop(start, aligned, emit.itemsize, 0, False)
        with builder.if_else(builder.icmp_signed("!=", far, _int(0))) as (from_memory, in_cache):
            with from_memory:
                loop(aligned, middle, step, 2, True)
            with in_cache:
                loop(aligned, middle, step, 2, False)
        loop(middle, stop, emit.itemsize, 0, False)
        return context.get_dummy_value()

    return types.void(job, row, first, length, witness, op), generate


@_intrinsic
def _add(typing: Any, job: Any, slot: Any) -> Any:
    """Add 1 to a counter that other threads count too, and return what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(job)(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), _int(1), "acq_rel")

    return types.int64(job, types.int64), generate


@_intrinsic
def _read(typing: Any, job: Any, slot: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(job)(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)

    return types.int64(job, types.int64), generate


@_intrinsic
def _pause(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_PAUSE:
            name, function_type = "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@numba.njit(nogil=True, cache=True)
def _part(job, piece, row):  # type: ignore[no-untyped-def]
    """Return where the chunk of ``row`` lies in ``piece``: as schedules/partition.py cuts it."""
    first = piece * job[17]
    length = min(job[17], job[18] - first)
    chunk = job[row]
    if chunk < 0:
        return first, length
    small = length // job[19]
    num_larger = length - small * job[19]
    return first + chunk * small + min(chunk, num_larger), small + np.int64(chunk < num_larger)


@numba.njit(nogil=True, cache=True)
def _settle(job, num_pauses):  # type: ignore[no-untyped-def]
    """Wait, at most ``num_pauses`` pauses, for pieces that others claimed; True: all are done."""
    for _ in range(num_pauses):
        if _read(job, 8) == job[16]:
            return True
        _pause()
    return _read(job, 8) == job[16]


@numba.njit(nogil=True, cache=True)
def _run_sum(job, witness, num_pauses):  # type: ignore[no-untyped-def]
    piece = _add(job, 0)
    while piece < job[16]:
        for row in range(24, 24 + 6 * job[20], 6):
            first, length = _part(job, piece, row)
            _span(job, row, first, length, witness, 0)  # _SUM
        _add(job, 8)
        piece = _add(job, 0)
    return _settle(job, num_pauses)


@numba.njit(nogil=True, cache=True)
def _run_mean(job, witness, num_pauses):  # type: ignore[no-untyped-def]
    piece = _add(job, 0)
    while piece < job[16]:
        for row in range(24, 24 + 6 * job[20], 6):
            first, length = _part(job, piece, row)
            _span(job, row, first, length, witness, 1)  # _MEAN
        _add(job, 8)
        piece = _add(job, 0)
    return _settle(job, num_pauses)


@numba.njit(nogil=True, cache=True)
def _run_min(job, witness, num_pauses):  # type: ignore[no-untyped-def]
    piece = _add(job, 0)
    while piece < job[16]:
        for row in range(24, 24 + 6 * job[20], 6):
            first, length = _part(job, piece, row)
            _span(job, row, first, length, witness, 2)  # _MIN
        _add(job, 8)
        piece = _add(job, 0)
    return _settle(job, num_pauses)


@numba.njit(nogil=True, cache=True)
def _run_max(job, witness, num_pauses):  # type: ignore[no-untyped-def]
    piece = _add(job, 0)
    while piece < job[16]:
        for row in range(24, 24 + 6 * job[20], 6):
            first, length = _part(job, piece, row)
            _span(job, row, first, length, witness, 3)  # _MAX
        _add(job, 8)
        piece = _add(job, 0)
    return _settle(job, num_pauses)


@numba.njit(nogil=True, cache=True)
def _run_prod(job, witness, num_pauses):  # type: ignore[no-untyped-def]
    piece = _add(job, 0)
    while piece < job[16]:
        for row in range(24, 24 + 6 * job[20], 6):
            first, length = _part(job, piece, row)
            _span(job, row, first, length, witness, 4)  # _PROD
        _add(job, 8)
        piece = _add(job, 0)
    return _settle(job, num_pauses)


_RUNNERS: dict[ReduceOp, Runner] = {
    ReduceOp.SUM: _run_sum,
    ReduceOp.MEAN: _run_mean,
    ReduceOp.MIN: _run_min,
    ReduceOp.MAX: _run_max,
    ReduceOp.PROD: _run_prod,
}
_kernels: dict[tuple[ReduceOp, np.dtype[Any]], tuple[Runner, Any]] = {}


def kernel(op: ReduceOp, dtype: np.dtype[Any]) -> tuple[Runner, Any]:
    """Return the compiled runner of ``op``, and the empty array that tells it the dtype."""
    found = _kernels.get((op, dtype))
    if found is None:
        runner, witness = _RUNNERS[op], np.empty(0, _computed_as(op, dtype))
        # Compiled here and now, by a job of no pieces: an interrupt of the compiler is harmless,
        # and no helper thread ever waits for it.
        runner(np.zeros(HEADER, np.int64), witness, 0)
        found = _kernels[op, dtype] = runner, witness
    return found


def _computed_as(op: ReduceOp, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype whose kernel computes the same bits: every one less saves 0.3 s."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind == "u" and op in (ReduceOp.SUM, ReduceOp.PROD):
        return np.dtype(f"i{dtype.itemsize}")
    return dtype
