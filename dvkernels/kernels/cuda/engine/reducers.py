"""Reduction of a batch of vectors, or of an element: read all sources, combine, store to targets.

These loops over sources and targets are those of all kernels. ``width`` is the number of bytes from
a vector of a batch to the next: with 16 bytes for each thread of a block, the accesses of a warp
coalesce. The loads of a batch from several sources come before the first use of any of them, so
that all are in flight together (see docs/explanation/gpu-performance.md).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from dvkernels.kernels.cuda.engine import elements, intrinsics
from dvkernels.kernels.cuda.engine.operations import Operation

__all__ = ["Access", "VectorBatch", "batch", "loader", "reducer"]


class Access(NamedTuple):
    """Device functions of a place: the arrays that are reduced there.

    Numbers are asked for where they are needed: kept, they would cost registers.
    """

    source: Any  # (place, k): address of the batch in the k-th source
    num_sources: Any  # (place)
    target: Any  # (place, k)
    num_targets: Any  # (place)
    divisor: Any  # (place)


class VectorBatch(NamedTuple):
    """Device functions on the vectors of a batch: a vector, or a pair of it and of the others."""

    load: Any  # (address, width)
    combine: Any  # (left, right)
    divide: Any  # (batch, divisor)
    store: Any  # (address, batch, width)


@functools.cache
def batch(operation: Operation, code: int, count: int) -> VectorBatch:
    """Return the device functions on ``count`` vectors; 0 stands for an element."""
    if count > 1:
        return _extended(batch(operation, code, 1), batch(operation, code, count - 1))
    is_whole = count == 1
    combine = elements.combiner(operation, code, is_whole)

    @intrinsics.inlined
    def load(address, width):  # type: ignore[no-untyped-def]
        return elements.load(address, code, is_whole)

    @intrinsics.inlined
    def divide(value, divisor):  # type: ignore[no-untyped-def]
        return elements.divide(value, divisor, code)

    @intrinsics.inlined
    def store(address, value, width):  # type: ignore[no-untyped-def]
        elements.store(address, value, code, is_whole)

    return VectorBatch(load, combine, divide, store)


def _extended(one: VectorBatch, rest: VectorBatch) -> VectorBatch:
    """Return the device functions on a vector and a batch."""
    load_one, combine_one, divide_one, store_one = one
    load_rest, combine_rest, divide_rest, store_rest = rest

    @intrinsics.inlined
    def load(address, width):  # type: ignore[no-untyped-def]
        return load_one(address, width), load_rest(address + width, width)

    @intrinsics.inlined
    def combine(left, right):  # type: ignore[no-untyped-def]
        return combine_one(left[0], right[0]), combine_rest(left[1], right[1])

    @intrinsics.inlined
    def divide(values, divisor):  # type: ignore[no-untyped-def]
        return divide_one(values[0], divisor), divide_rest(values[1], divisor)

    @intrinsics.inlined
    def store(address, values, width):  # type: ignore[no-untyped-def]
        store_one(address, values[0], width)
        store_rest(address + width, values[1], width)

    return VectorBatch(load, combine, divide, store)


def _ahead(of: VectorBatch, count: int, source: Any) -> tuple[Any, Any]:
    """Return the device functions that load from ``count`` sources, and combine them in order."""
    load_one, combine_one = of.load, of.combine

    @intrinsics.inlined
    def load_last(place, k, width):  # type: ignore[no-untyped-def]
        return load_one(source(place, k), width)

    if count == 1:
        return load_last, combine_one
    load_rest, combine_rest = _ahead(of, count - 1, source)

    @intrinsics.inlined
    def load(place, k, width):  # type: ignore[no-untyped-def]
        return load_one(source(place, k), width), load_rest(place, k + 1, width)

    @intrinsics.inlined
    def combine(values, loaded):  # type: ignore[no-untyped-def]
        return combine_rest(combine_one(values, loaded[0]), loaded[1])

    return load, combine


@functools.cache
def loader(operation: Operation, code: int, count: int, access: Access) -> Any:
    """Return the device function that combines ``count`` vectors, or an element, of all sources."""
    of, num_sources = batch(operation, code, count), access.num_sources
    # Of one vector as many as a call on few bytes has sources; of an element one: its address is
    # long to find.
    ahead = {0: 1, 1: 3}.get(count, 2)
    load_one, combine_one = _ahead(of, 1, access.source)
    load_several, combine_several = _ahead(of, ahead, access.source)

    @intrinsics.inlined
    def load(place, width):  # type: ignore[no-untyped-def]
        values = load_one(place, 0, width)
        k = 1
        if ahead > 1:
            while k + ahead <= num_sources(place):
                values = combine_several(values, load_several(place, k, width))
                k += ahead
        while k < num_sources(place):
            values = combine_one(values, load_one(place, k, width))
            k += 1
        return values

    return load


@functools.cache
def reducer(operation: Operation, code: int, count: int, access: Access) -> Any:
    """Return the device function that reduces ``count`` vectors, or an element, to all targets."""
    load = loader(operation, code, count, access)
    target, num_targets, divisor = access.target, access.num_targets, access.divisor
    _, _, divide, store = batch(operation, code, count)

    @intrinsics.inlined
    def reduce(place, width):  # type: ignore[no-untyped-def]
        values = divide(load(place, width), divisor(place))
        k = 0
        while k < num_targets(place):
            store(target(place, k), values, width)
            k += 1

    return reduce
