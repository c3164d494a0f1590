"""Reduction of a span, the contiguous elements that one block combines from all sources."""

from __future__ import annotations

import functools
from typing import Any

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, reducers
from dvkernels.kernels.cuda.engine.cuda_target import cuda
from dvkernels.kernels.cuda.engine.operations import Operation
from dvkernels.schedules import partition

__all__ = ["reducer", "start"]


start = intrinsics.inlined(partition.start)


@intrinsics.inlined
def _address(place, k):  # type: ignore[no-untyped-def]
    addresses, positions, offset = place
    return launch_table.entry(addresses, launch_table.entry(positions, k)) + offset


@functools.cache
def reducer(operation: Operation, code: int, threads: int) -> Any:
    """Return the device function by which the threads of a block reduce a span.

    ``addresses`` is a table of addresses; ``positions`` is a table of positions in it, first those
    of the sources, then those of the targets.
    """
    itemsize = arithmetic.dtype_of(code).itemsize
    width = 16 * threads
    reduce_four = reducers.reducer(operation, code, 4, _address)
    reduce_vector = reducers.reducer(operation, code, 1, _address)
    reduce_element = reducers.reducer(operation, code, 0, _address)

    @intrinsics.inlined
    def reduce(addresses, positions, num_sources, num_targets, begin, end, divisor):  # type: ignore[no-untyped-def]
        thread = cuda.threadIdx.x
        # Vectors where all addresses are equal modulo 16; else, and around the vectors, elements.
        place = (addresses, positions, begin * itemsize)
        misalignment = _address(place, 0) & 15
        is_alike = misalignment % itemsize == 0
        for k in range(1, num_sources):
            is_alike = is_alike and _address(place, k) & 15 == misalignment
        target_positions = positions + 8 * num_sources
        place = (addresses, target_positions, begin * itemsize)
        for k in range(num_targets):
            is_alike = is_alike and _address(place, k) & 15 == misalignment
        vectors_begin, vectors_end = end, end
        if is_alike:
            per_vector = 16 // itemsize
            vectors_begin = min(begin + ((16 - misalignment) & 15) // itemsize, end)
            vectors_end = vectors_begin + (end - vectors_begin) // per_vector * per_vector
        offset = vectors_begin * itemsize + 16 * thread
        stop = vectors_end * itemsize
        while offset + 3 * width < stop:
            sources, targets = (addresses, positions, offset), (addresses, target_positions, offset)
            reduce_four(sources, num_sources, targets, num_targets, divisor, width)
            offset += 4 * width
        while offset < stop:
            sources, targets = (addresses, positions, offset), (addresses, target_positions, offset)
            reduce_vector(sources, num_sources, targets, num_targets, divisor, width)
            offset += width
        # The elements before and after the whole vectors.
        num_before = vectors_begin - begin
        index = thread  # range() with a step would call a division routine
        while index < num_before + end - vectors_end:
            element = begin + index if index < num_before else vectors_end + index - num_before
            offset = element * itemsize
            sources, targets = (addresses, positions, offset), (addresses, target_positions, offset)
            reduce_element(sources, num_sources, targets, num_targets, divisor, width)
            index += threads

    return reduce
