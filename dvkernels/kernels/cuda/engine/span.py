"""One block's part of a reduction: a span of elements of every source, combined and stored."""

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

# What a cache takes at once: spans begin at such lines of a buffer.
LINE_NBYTES = 128

start = cuda.jit(device=True, inline="always")(partition.start)


@functools.cache
def combiner(operation: Operation, code: int) -> Any:
    """Return the device function that combines a span, for all threads of a block.

    ``places`` is a table of addresses; ``sources`` and ``targets`` are tables of the numbers of
    places. Each thread has four vectors of every source in flight, a block's width apart.
    """
    itemsize = arithmetic.dtype_of(code).itemsize
    combine_lanes = elements.combiner(operation, code)

    @cuda.jit(device=True, inline="always")
    def combine(places, sources, num_sources, targets, num_targets, begin, end, divisor):  # type: ignore[no-untyped-def]
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        # Whole vectors where all addresses lie alike to 16 bytes; else, and around them, elements.
        lies = (launch_table.entry(places, launch_table.entry(sources, 0)) + begin * itemsize) & 15
        alike = lies % itemsize == 0
        for k in range(1, num_sources):
            source = launch_table.entry(places, launch_table.entry(sources, k))
            alike = alike and (source + begin * itemsize) & 15 == lies
        for k in range(num_targets):
            target = launch_table.entry(places, launch_table.entry(targets, k))
            alike = alike and (target + begin * itemsize) & 15 == lies
        whole_from, whole_to = end, end
        if alike:
            per_vector = 16 // itemsize
            whole_from = min(begin + ((16 - lies) & 15) // itemsize, end)
            whole_to = whole_from + (end - whole_from) // per_vector * per_vector
        place = whole_from * itemsize + 16 * thread
        stop = whole_to * itemsize
        width = 16 * threads
        while place + 3 * width < stop:
            source = launch_table.entry(places, launch_table.entry(sources, 0)) + place
            a = elements.load(source, code, True)
            b = elements.load(source + width, code, True)
            c = elements.load(source + 2 * width, code, True)
            d = elements.load(source + 3 * width, code, True)
            for k in range(1, num_sources):
                source = launch_table.entry(places, launch_table.entry(sources, k)) + place
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
                target = launch_table.entry(places, launch_table.entry(targets, k)) + place
                elements.store(target, a, code, True)
                elements.store(target + width, b, code, True)
                elements.store(target + 2 * width, c, code, True)
                elements.store(target + 3 * width, d, code, True)
            place += 4 * width
        while place < stop:
            source = launch_table.entry(places, launch_table.entry(sources, 0)) + place
            a = elements.load(source, code, True)
            for k in range(1, num_sources):
                source = launch_table.entry(places, launch_table.entry(sources, k)) + place
                a = combine_lanes(a, elements.load(source, code, True))
            a = elements.divide(a, divisor, code)
            for k in range(num_targets):
                target = launch_table.entry(places, launch_table.entry(targets, k)) + place
                elements.store(target, a, code, True)
            place += width
        # Before the whole vectors, and after them.
        num_before = whole_from - begin
        number = thread  # a range() with a step would divide, by a call
        while number < num_before + end - whole_to:
            element = begin + number if number < num_before else whole_to + number - num_before
            source = launch_table.entry(places, launch_table.entry(sources, 0)) + element * itemsize
            one = elements.load(source, code, False)
            for k in range(1, num_sources):
                source = (
                    launch_table.entry(places, launch_table.entry(sources, k)) + element * itemsize
                )
                one = combine_lanes(one, elements.load(source, code, False))
            one = elements.divide(one, divisor, code)
            for k in range(num_targets):
                target = (
                    launch_table.entry(places, launch_table.entry(targets, k)) + element * itemsize
                )
                elements.store(target, one, code, False)
            number += threads

    return combine
