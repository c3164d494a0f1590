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
def num_sources(place):  # type: ignore[no-untyped-def]
    """Return the number of sources of a launch; its table is the first of a place."""
    return launch_table.header(place[0]).num_sources


@intrinsics.inlined
def _num_targets(place):  # type: ignore[no-untyped-def]
    return launch_table.header(place[0]).num_targets


@intrinsics.inlined
def _divisor(place):  # type: ignore[no-untyped-def]
    return launch_table.header(place[0]).divisor


@intrinsics.inlined
def dense_address(place, k):  # type: ignore[no-untyped-def]
    """Return the address in array k of a contiguous item, of which a place is an offset."""
    _, record, offset = place
    return launch_table.entry(launch_table.addresses(record), k) + offset


@intrinsics.inlined
def _dense_target(place, k):  # type: ignore[no-untyped-def]
    return dense_address(place, launch_table.header(place[0]).first_target + k)


@functools.cache
def build(operation: Operation, code: int, threads: int) -> Callable[..., None]:
    """Return the kernel of an operation (operations.py) and an element type, not compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize

    @intrinsics.inlined
    def element_address(place, k):  # type: ignore[no-untyped-def]
        table, record, number, offset, is_alike = place
        if not is_alike:
            width = launch_table.header(table).width
            offset = launch_table.byte_offset(record, width, k, number, itemsize)
        return launch_table.entry(launch_table.addresses(record), k) + offset

    @intrinsics.inlined
    def element_target(place, k):  # type: ignore[no-untyped-def]
        return element_address(place, launch_table.header(place[0]).first_target + k)

    dense = reducers.Access(dense_address, num_sources, _dense_target, _num_targets, _divisor)
    strided = dense._replace(source=element_address, target=element_target)
    reduce_four = reducers.reducer(operation, code, 4, dense)
    reduce_vector = reducers.reducer(operation, code, 1, dense)
    reduce_element = reducers.reducer(operation, code, 0, strided)
    width = VECTOR_NBYTES * threads

    @intrinsics.inlined
    def vectors(table, record, begin, end):  # type: ignore[no-untyped-def]
        vector = begin + cuda.threadIdx.x
        offset = launch_table.item(record).before * itemsize + VECTOR_NBYTES * vector
        if end - begin == 4 * threads:
            reduce_four((table, record, offset), width)
            return
        while vector < end:
            reduce_vector((table, record, offset), width)
            vector += threads
            offset += width

    @intrinsics.inlined
    def element(table, record, number):  # type: ignore[no-untyped-def]
        width = launch_table.header(table).width
        offset = launch_table.byte_offset(record, width, 0, number, itemsize)
        is_alike = launch_table.item(record).is_alike != 0
        reduce_element((table, record, number, offset, is_alike), 0)

    return over_pieces(code, threads, vectors, element)
