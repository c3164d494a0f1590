"""Kernels over launch tables: the loop over the pieces of a table, and that of the collectives.

There is one kernel per pair of operation and element type, for any number of replicas, any shapes
and strides. R replicas of S bytes reduced in place move 2 R S bytes: each thread keeps the sums of
four vectors of 16 bytes in registers, so a warp has 2 KiB of loads per source in flight, from two
sources at a time, and no element is read twice. A copy is a sum of one source.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, reducers
from dvkernels.kernels.cuda.engine.cuda_target import cuda
from dvkernels.kernels.cuda.engine.operations import Operation
from dvkernels.kernels.cuda.engine.table_layout import VECTOR_NBYTES

__all__ = ["build", "dense_address", "over_pieces"]


def over_pieces(code: int, threads: int, vectors: Any, element: Any) -> Callable[..., None]:
    """Return the kernel over all pieces of a launch table, not compiled, for blocks of ``threads``.

    ``vectors(table, record, begin, end)`` is the device function of these whole vectors of an item,
    and ``element(table, record, number)`` that of one element.
    """
    per_vector = VECTOR_NBYTES // arithmetic.dtype_of(code).itemsize

    def run(words):  # type: ignore[no-untyped-def]
        table = launch_table.stage(words)
        piece = cuda.blockIdx.x  # range() with a step would call a division routine
        # Words are read again where they are used: kept, they would cost registers in ``vectors``.
        while piece < launch_table.header(table).num_pieces:
            head = launch_table.locate(table, piece)
            piece_of_item = piece - head.first_piece
            record = table + 8 * head.record
            num_units = launch_table.header(table).per_thread * threads
            begin = piece_of_item * num_units
            end = min(begin + num_units, launch_table.item(record).units)
            if launch_table.item(record).num_axes == 0:
                vectors(table, record, begin, end)
                # The first piece also takes the elements before and after the whole vectors.
                item = launch_table.item(record)
                begin, end = 0, item.before + item.after if piece_of_item == 0 else 0
            unit = begin + cuda.threadIdx.x
            while unit < end:
                item = launch_table.item(record)
                is_behind = item.num_axes == 0 and unit >= item.before
                element(table, record, unit + (item.units * per_vector if is_behind else 0))
                unit += threads
            piece += cuda.gridDim.x

    return run


@intrinsics.inlined
def dense_address(place, k):  # type: ignore[no-untyped-def]
    """Return the address of a vector in array k of a contiguous item."""
    addresses, offset = place
    return launch_table.entry(addresses, k) + offset


@functools.cache
def build(operation: Operation, code: int, threads: int) -> Callable[..., None]:
    """Return the kernel of an operation (operations.py) and an element type, not compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize

    @intrinsics.inlined
    def element_address(place, k):  # type: ignore[no-untyped-def]
        addresses, record, width, position, number, common_offset, is_alike = place
        offset = common_offset
        if not is_alike:
            offset = launch_table.byte_offset(record, width, position + k, number, itemsize)
        return launch_table.entry(addresses, k) + offset

    width = VECTOR_NBYTES * threads
    reduce_four = reducers.reducer(operation, code, 4, dense_address)
    reduce_vector = reducers.reducer(operation, code, 1, dense_address)
    reduce_element = reducers.reducer(operation, code, 0, element_address)

    @intrinsics.inlined
    def vectors(table, record, begin, end):  # type: ignore[no-untyped-def]
        header = launch_table.header(table)
        num_sources, num_targets, divisor = header.num_sources, header.num_targets, header.divisor
        sources = launch_table.addresses(record)
        targets = sources + 8 * header.first_target
        vector = begin + cuda.threadIdx.x
        offset = launch_table.item(record).before * itemsize + VECTOR_NBYTES * vector
        if end - begin == 4 * threads:
            from_, to = (sources, offset), (targets, offset)
            reduce_four(from_, num_sources, to, num_targets, divisor, width)
            return
        while vector < end:
            from_, to = (sources, offset), (targets, offset)
            reduce_vector(from_, num_sources, to, num_targets, divisor, width)
            vector += threads
            offset += width

    @intrinsics.inlined
    def element(table, record, number):  # type: ignore[no-untyped-def]
        header, sources = launch_table.header(table), launch_table.addresses(record)
        first_target, width = header.first_target, header.width
        offset = launch_table.byte_offset(record, width, 0, number, itemsize)
        is_alike = launch_table.item(record).is_alike != 0
        from_ = (sources, record, width, 0, number, offset, is_alike)
        to = (sources + 8 * first_target, record, width, first_target, number, offset, is_alike)
        reduce_element(from_, header.num_sources, to, header.num_targets, header.divisor, 0)

    return over_pieces(code, threads, vectors, element)
