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

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, reducers
from dvkernels.kernels.cuda.engine.cuda_target import cuda
from dvkernels.kernels.cuda.engine.operations import Operation

__all__ = ["build", "dense_address", "over_pieces"]


def over_pieces(code: int, vectors: Any, element: Any) -> Callable[..., None]:
    """Return the kernel over all pieces of a launch table, not compiled.

    ``vectors(table, header, addresses, before, begin, end)`` is the device function of the whole
    vectors of a piece, and ``element(table, header, record, item, number)`` that of one element.
    """
    itemsize = arithmetic.dtype_of(code).itemsize
    per_vector = intrinsics.VECTOR_NBYTES // itemsize

    def run(words):  # type: ignore[no-untyped-def]
        table = launch_table.stage(words)
        header = launch_table.header(table)
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        for piece in range(cuda.blockIdx.x, header.num_pieces, cuda.gridDim.x):
            head = launch_table.locate(table, piece)
            piece_of_item = piece - head.first_piece
            record = table + 8 * head.record
            item = launch_table.item(record)
            begin = piece_of_item * header.per_thread * threads
            end = min(begin + header.per_thread * threads, item.units)
            if item.num_axes == 0:
                vectors(table, header, launch_table.addresses(record), item.before, begin, end)
                # The first piece also takes the elements before and after the whole vectors.
                begin, end = 0, item.before + item.after if piece_of_item == 0 else 0
            for unit in range(begin + thread, end, threads):
                is_behind = item.num_axes == 0 and unit >= item.before
                element(
                    table,
                    header,
                    record,
                    item,
                    unit + (item.units * per_vector if is_behind else 0),
                )

    return run


@intrinsics.inlined
def dense_address(place, k):  # type: ignore[no-untyped-def]
    """Return the address of a vector in array k of a contiguous item."""
    addresses, offset = place
    return launch_table.entry(addresses, k) + offset


@functools.cache
def build(operation: Operation, code: int) -> Callable[..., None]:
    """Return the kernel of an operation (operations.py) and an element type, not compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize

    @intrinsics.inlined
    def element_address(place, k):  # type: ignore[no-untyped-def]
        addresses, record, width, position, number, common_offset, is_alike = place
        offset = common_offset
        if not is_alike:
            offset = launch_table.byte_offset(record, width, position + k, number, itemsize)
        return launch_table.entry(addresses, k) + offset

    reduce_four = reducers.four_vectors(operation, code, dense_address)
    reduce_vector = reducers.one(operation, code, True, dense_address)
    reduce_element = reducers.one(operation, code, False, element_address)

    @intrinsics.inlined
    def vectors(table, header, addresses, before, begin, end):  # type: ignore[no-untyped-def]
        num_sources, num_targets, divisor = header.num_sources, header.num_targets, header.divisor
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        targets = addresses + 8 * header.first_target
        if header.per_thread == 4 and end - begin == 4 * threads:
            offset = before * itemsize + 16 * (begin + thread)
            from_, to = (addresses, offset), (targets, offset)
            reduce_four(from_, num_sources, to, num_targets, divisor, 16 * threads)
        else:
            for vector in range(begin + thread, end, threads):
                offset = before * itemsize + 16 * vector
                from_, to = (addresses, offset), (targets, offset)
                first = dense_address(from_, 0)
                reduce_vector(first, from_, num_sources, to, num_targets, divisor)

    @intrinsics.inlined
    def element(table, header, record, item, number):  # type: ignore[no-untyped-def]
        num_sources, num_targets, divisor = header.num_sources, header.num_targets, header.divisor
        addresses, first_target = launch_table.addresses(record), header.first_target
        targets, width = addresses + 8 * first_target, header.width
        offset = launch_table.byte_offset(record, width, 0, number, itemsize)
        is_alike = item.is_alike != 0
        from_ = (addresses, record, width, 0, number, offset, is_alike)
        to = (targets, record, width, first_target, number, offset, is_alike)
        first = launch_table.entry(addresses, 0) + offset
        reduce_element(first, from_, num_sources, to, num_targets, divisor)

    return over_pieces(code, vectors, element)
