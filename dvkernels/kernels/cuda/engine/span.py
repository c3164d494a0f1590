"""Reduction of a span, the contiguous elements that one block combines from all sources."""

from __future__ import annotations

import functools
from typing import Any

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, reducers
from dvkernels.kernels.cuda.engine.cuda_target import cuda
from dvkernels.kernels.cuda.engine.operations import Operation
from dvkernels.kernels.cuda.engine.table_layout import VECTOR_NBYTES
from dvkernels.schedules import partition

__all__ = ["reducer", "start"]


start = intrinsics.inlined(partition.start)


@intrinsics.inlined
def _source(place, k):  # type: ignore[no-untyped-def]
    addresses, positions, _, offset = place
    return launch_table.entry(addresses, launch_table.entry(positions, k)) + offset


@intrinsics.inlined
def _target(place, k):  # type: ignore[no-untyped-def]
    return _source(place, place[2][0] + k)


@intrinsics.inlined
def _num_sources(place):  # type: ignore[no-untyped-def]
    return place[2][0]


@intrinsics.inlined
def _num_targets(place):  # type: ignore[no-untyped-def]
    return place[2][1]


@intrinsics.inlined
def _divisor(place):  # type: ignore[no-untyped-def]
    return place[2][2]


_ACCESS = reducers.Access(_source, _num_sources, _target, _num_targets, _divisor)


@functools.cache
def reducer(operation: Operation, code: int, threads: int) -> Any:
    """Return the device function by which the threads of a block reduce a span.

    ``addresses`` is a table of addresses; ``positions`` is a table of positions in it, first those
    of the sources, then those of the targets; ``counts`` are the numbers of sources and of targets,
    and the divisor.
    """
    itemsize = arithmetic.dtype_of(code).itemsize
    reduce_four = reducers.reducer(operation, code, 4, _ACCESS)
    reduce_vector = reducers.reducer(operation, code, 1, _ACCESS)
    reduce_element = reducers.reducer(operation, code, 0, _ACCESS)
    width = VECTOR_NBYTES * threads

    @intrinsics.inlined
    def reduce(addresses, positions, counts, begin, end):  # type: ignore[no-untyped-def]
        thread = cuda.threadIdx.x
        # Vectors where all addresses are equal modulo 16; else, and around the vectors, elements.
        place = (addresses, positions, counts, begin * itemsize)
        misalignment = _source(place, 0) & 15
        is_alike = misalignment % itemsize == 0
        for k in range(1, counts[0] + counts[1]):
            is_alike = is_alike and _source(place, k) & 15 == misalignment
        vectors_begin, vectors_end = end, end
        if is_alike:
            per_vector = VECTOR_NBYTES // itemsize
            vectors_begin = min(begin + ((16 - misalignment) & 15) // itemsize, end)
            vectors_end = vectors_begin + (end - vectors_begin) // per_vector * per_vector
        offset = vectors_begin * itemsize + VECTOR_NBYTES * thread
        stop = vectors_end * itemsize
        while offset + 3 * width < stop:
            reduce_four((addresses, positions, counts, offset), width)
            offset += 4 * width
        while offset < stop:
            reduce_vector((addresses, positions, counts, offset), width)
            offset += width
        # The elements before and after the whole vectors.
        num_before = vectors_begin - begin
        index = thread  # range() with a step would call a division routine
        while index < num_before + end - vectors_end:
            element = begin + index if index < num_before else vectors_end + index - num_before
            reduce_element((addresses, positions, counts, element * itemsize), width)
            index += threads

    return reduce
