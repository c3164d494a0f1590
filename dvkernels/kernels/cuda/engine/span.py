"""Reduction of a span, the contiguous elements that one block combines from all sources."""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda as numba_cuda

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import elements, launch_table
from dvkernels.kernels.cuda.engine.operations import Operation
from dvkernels.schedules import partition

__all__ = ["LINE_NBYTES", "combiner", "start"]

cuda: Any = numba_cuda  # its functions carry no types

# A line of the L2 cache: spans begin at multiples of it in a buffer.
LINE_NBYTES = 128

start = cuda.jit(device=True, inline="always")(partition.start)


@functools.cache
def combiner(operation: Operation, code: int) -> Any:
    """Return the device function by which the threads of a block combine a span.

    ``places`` is a table of addresses; ``sources`` and ``targets`` are tables of indices into it.
    Each thread has four vectors of every source in flight, a block's width apart.
    """
    itemsize = arithmetic.dtype_of(code).itemsize
    combine_lanes = elements.combiner(operation, code)

    @cuda.jit(device=True, inline="always")
    def combine(places, sources, num_sources, targets, num_targets, begin, end, divisor):  # type: ignore[no-untyped-def]
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        # Vectors where all addresses are equal modulo 16; else, and around the vectors, elements.
        misalignment = (
            launch_table.entry(places, launch_table.entry(sources, 0)) + begin * itemsize
        ) & 15
        is_alike = misalignment % itemsize == 0
        for k in range(1, num_sources):
            source = launch_table.entry(places, launch_table.entry(sources, k))
            is_alike = is_alike and (source + begin * itemsize) & 15 == misalignment
        for k in range(num_targets):
            target = launch_table.entry(places, launch_table.entry(targets, k))
            is_alike = is_alike and (target + begin * itemsize) & 15 == misalignment
        vectors_begin, vectors_end = end, end
        if is_alike:
            per_vector = 16 // itemsize
            vectors_begin = min(begin + ((16 - misalignment) & 15) // itemsize, end)
            vectors_end = vectors_begin + (end - vectors_begin) // per_vector * per_vector
        offset = vectors_begin * itemsize + 16 * thread
        stop = vectors_end * itemsize
        width = 16 * threads
        while offset + 3 * width < stop:
            source = launch_table.entry(places, launch_table.entry(sources, 0)) + offset
            a = elements.load(source, code, True)
            b = elements.load(source + width, code, True)
            c = elements.load(source + 2 * width, code, True)
            d = elements.load(source + 3 * width, code, True)
            for k in range(1, num_sources):
                source = launch_table.entry(places, launch_table.entry(sources, k)) + offset
                e = elements.load(source, code, True)
                f = elements.load(source + width, code, True)
                g = elements.load(source + 2 * width, code, True)
                h = elements.load(source + 3 * width, code, True)
                a = combine_lanes(a, e)
                b = combine_lanes(b, f)
                c = combine_lanes(c, g)
                d = combine_lanes(d, h)
            a = elements.divide(a, divisor, code)
            b = elements.divide(b, divisor, code)
            c = elements.divide(c, divisor, code)
            d = elements.divide(d, divisor, code)
            for k in range(num_targets):
                target = launch_table.entry(places, launch_table.entry(targets, k)) + offset
                elements.store(target, a, code, True)
                elements.store(target + width, b, code, True)
                elements.store(target + 2 * width, c, code, True)
                elements.store(target + 3 * width, d, code, True)
            offset += 4 * width
        while offset < stop:
            source = launch_table.entry(places, launch_table.entry(sources, 0)) + offset
            a = elements.load(source, code, True)
            for k in range(1, num_sources):
                source = launch_table.entry(places, launch_table.entry(sources, k)) + offset
                a = combine_lanes(a, elements.load(source, code, True))
            a = elements.divide(a, divisor, code)
            for k in range(num_targets):
                target = launch_table.entry(places, launch_table.entry(targets, k)) + offset
                elements.store(target, a, code, True)
            offset += width
        # The elements before and after the whole vectors.
        num_before = vectors_begin - begin
        index = thread  # range() with a step would call a division routine
        while index < num_before + end - vectors_end:
            element = begin + index if index < num_before else vectors_end + index - num_before
            source = launch_table.entry(places, launch_table.entry(sources, 0)) + element * itemsize
            value = elements.load(source, code, False)
            for k in range(1, num_sources):
                source = (
                    launch_table.entry(places, launch_table.entry(sources, k)) + element * itemsize
                )
                value = combine_lanes(value, elements.load(source, code, False))
            value = elements.divide(value, divisor, code)
            for k in range(num_targets):
                target = (
                    launch_table.entry(places, launch_table.entry(targets, k)) + element * itemsize
                )
                elements.store(target, value, code, False)
            index += threads

    return combine
