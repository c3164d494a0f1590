"""Kernel of the collectives within a GPU: read all sources, combine left to right, store.

There is one kernel per pair of operation and element type, for any number of replicas, any shapes
and strides. R replicas of S bytes reduced in place move 2 R S bytes: each thread keeps the sums of
four vectors of 16 bytes in registers, so a warp has 2 KiB of loads per source in flight, and no
element is read twice. A copy is a sum of one source.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import cuda as numba_cuda

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import elements, intrinsics, launch_table
from dvkernels.kernels.cuda.engine.operations import Operation

__all__ = ["kernel"]

cuda: Any = numba_cuda  # its functions carry no types


@functools.cache
def kernel(operation: Operation, code: int) -> Callable[..., None]:
    """Return the kernel of an operation (operations.py) and an element type, not yet compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize
    per_vector = intrinsics.VECTOR_NBYTES // itemsize
    header, record_size = launch_table.HEADER, launch_table.RECORD
    combine_lanes = elements.combiner(operation, code)

    def run(words):  # type: ignore[no-untyped-def]
        table = launch_table.stage(words)
        num_sources, num_targets = launch_table.entry(table, 2), launch_table.entry(table, 3)
        first_target, divisor = launch_table.entry(table, 4), launch_table.entry(table, 5)
        per_thread, width = launch_table.entry(table, 6), launch_table.entry(table, 7)
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        for piece in range(cuda.blockIdx.x, launch_table.entry(table, 0), cuda.gridDim.x):
            item = launch_table.locate(table, piece)
            piece_of_item = piece - launch_table.entry(table, header + 2 * item)
            record = table + 8 * launch_table.entry(table, header + 2 * item + 1)
            num_axes, before = launch_table.entry(record, 0), launch_table.entry(record, 1)
            count, after = launch_table.entry(record, 2), launch_table.entry(record, 3)
            is_alike = launch_table.entry(record, 4) != 0
            sources = record + 8 * record_size
            targets = sources + 8 * first_target
            begin = piece_of_item * per_thread * threads
            end = min(begin + per_thread * threads, count)
            if num_axes == 0:
                first = before * itemsize + 16 * (begin + thread)
                if per_thread == 4 and end - begin == 4 * threads:
                    # Four vectors per thread, a block's width apart: accesses of a warp coalesce.
                    second = first + 16 * threads
                    third, fourth = second + 16 * threads, second + 32 * threads
                    source = launch_table.entry(sources, 0)
                    a = elements.load(source + first, code, True)
                    b = elements.load(source + second, code, True)
                    c = elements.load(source + third, code, True)
                    d = elements.load(source + fourth, code, True)
                    for k in range(1, num_sources):
                        source = launch_table.entry(sources, k)
                        e = elements.load(source + first, code, True)
                        f = elements.load(source + second, code, True)
                        g = elements.load(source + third, code, True)
                        h = elements.load(source + fourth, code, True)
                        a = combine_lanes(a, e)
                        b = combine_lanes(b, f)
                        c = combine_lanes(c, g)
                        d = combine_lanes(d, h)
                    a = elements.divide(a, divisor, code)
                    b = elements.divide(b, divisor, code)
                    c = elements.divide(c, divisor, code)
                    d = elements.divide(d, divisor, code)
                    for k in range(num_targets):
                        target = launch_table.entry(targets, k)
                        elements.store(target + first, a, code, True)
                        elements.store(target + second, b, code, True)
                        elements.store(target + third, c, code, True)
                        elements.store(target + fourth, d, code, True)
                else:
                    for vector in range(begin + thread, end, threads):
                        offset = before * itemsize + 16 * vector
                        a = elements.load(launch_table.entry(sources, 0) + offset, code, True)
                        for k in range(1, num_sources):
                            e = elements.load(launch_table.entry(sources, k) + offset, code, True)
                            a = combine_lanes(a, e)
                        a = elements.divide(a, divisor, code)
                        for k in range(num_targets):
                            elements.store(launch_table.entry(targets, k) + offset, a, code, True)
            if num_axes == 0:  # the first piece also takes the elements around the whole vectors
                begin, end = 0, before + after if piece_of_item == 0 else 0
            for unit in range(begin + thread, end, threads):
                skipped = count * per_vector if num_axes == 0 and unit >= before else 0
                element = unit + skipped
                common_offset = launch_table.byte_offset(record, width, 0, element, itemsize)
                value = elements.load(launch_table.entry(sources, 0) + common_offset, code, False)
                for k in range(1, num_sources):
                    own_offset = (
                        common_offset
                        if is_alike
                        else launch_table.byte_offset(record, width, k, element, itemsize)
                    )
                    other = elements.load(launch_table.entry(sources, k) + own_offset, code, False)
                    value = combine_lanes(value, other)
                value = elements.divide(value, divisor, code)
                for k in range(num_targets):
                    own_offset = common_offset
                    if not is_alike:
                        own_offset = launch_table.byte_offset(
                            record, width, first_target + k, element, itemsize
                        )
                    elements.store(launch_table.entry(targets, k) + own_offset, value, code, False)

    return run
