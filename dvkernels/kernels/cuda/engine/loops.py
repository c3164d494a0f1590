"""Kernels over launch tables: the loop over the pieces of a table, and that of the collectives.

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
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, reducers
from dvkernels.kernels.cuda.engine.operations import Operation

__all__ = ["dense_address", "kernel", "over_pieces"]

cuda: Any = numba_cuda  # its functions carry no types


def over_pieces(code: int, vectors: Any, element: Any) -> Callable[..., None]:
    """Return the kernel over all pieces of a launch table, not compiled.

    ``vectors(table, header, addresses, before, begin, end)`` is the device function of the whole
    vectors of a piece, and ``element(table, header, record, item, number)`` that of one element.
    """
    itemsize = arithmetic.dtype_of(code).itemsize
    per_vector = intrinsics.VECTOR_NBYTES // itemsize

    def run(words):  # type: ignore[no-untyped-def]
        table = launch_table.stage(words)
        piece = cuda.blockIdx.x  # range() with a step would call a division routine
        while piece < launch_table.header(table).num_pieces:
            per_thread = launch_table.header(table).per_thread
            head = launch_table.locate(table, piece)
            piece_of_item = piece - head.first_piece
            record = table + 8 * head.record
            item = launch_table.item(record)
            begin = piece_of_item * per_thread * THREADS
            end = min(begin + per_thread * THREADS, item.units)
            if item.num_axes == 0:
                vectors(table, record, begin, end)
                # The first piece also takes the elements before and after the whole vectors.
                item = launch_table.item(record)
                begin, end = 0, item.before + item.after if piece_of_item == 0 else 0
            unit = begin + cuda.threadIdx.x
            while unit < end:
                item = launch_table.item(record)
                is_behind = item.num_axes == 0 and unit >= item.before
                element(table, record, unit + (item.units * per_vector if is_behind else 0))
                unit += THREADS
            piece += cuda.gridDim.x

    return run


THREADS = 256

@intrinsics.inlined
def dense_address(place, k):  # type: ignore[no-untyped-def]
    """Return the address of a vector in array k of a contiguous item."""
    addresses, offset = place
    return launch_table.entry(addresses, k) + offset


@functools.cache
def kernel(operation: Operation, code: int) -> Callable[..., None]:
    """Return the kernel of an operation (operations.py) and an element type, not compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize

    @intrinsics.inlined
    def element_address(place, k):  # type: ignore[no-untyped-def]
        addresses, record, width, position, number, common_offset, is_alike = place
        offset = common_offset
        if not is_alike:
            offset = launch_table.byte_offset(record, width, position + k, number, itemsize)
        return launch_table.entry(addresses, k) + offset

    reduce_four = reducers.reducer(operation, code, 4, dense_address)
    reduce_vector = reducers.reducer(operation, code, 1, dense_address)
    reduce_element = reducers.reducer(operation, code, 0, element_address)

    @intrinsics.inlined
    def vectors(table, record, begin, end):  # type: ignore[no-untyped-def]
        offset = launch_table.item(record).before * itemsize + 16 * (begin + cuda.threadIdx.x)
        header = launch_table.header(table)
        num_sources, num_targets, divisor = header.num_sources, header.num_targets, header.divisor
        addresses = launch_table.addresses(record)
        targets = addresses + 8 * header.first_target
        width = 16 * THREADS
        if end - begin == 4 * THREADS:
            from_, to = (addresses, offset), (targets, offset)
            reduce_four(from_, num_sources, to, num_targets, divisor, width)
        else:
            vector = begin + cuda.threadIdx.x
            while vector < end:
                from_, to = (addresses, offset), (targets, offset)
                reduce_vector(from_, num_sources, to, num_targets, divisor, width)
                vector += THREADS
                offset += width

    @intrinsics.inlined
    def element(table, record, number):  # type: ignore[no-untyped-def]
        header = launch_table.header(table)
        num_sources, num_targets, divisor = header.num_sources, header.num_targets, header.divisor
        addresses, first_target, width = launch_table.addresses(record), header.first_target, header.width
        targets = addresses + 8 * first_target
        offset = launch_table.byte_offset(record, width, 0, number, itemsize)
        is_alike = launch_table.item(record).is_alike != 0
        from_ = (addresses, record, width, 0, number, offset, is_alike)
        to = (targets, record, width, first_target, number, offset, is_alike)
        reduce_element(from_, num_sources, to, num_targets, divisor, 0)

    return over_pieces(code, vectors, element)
