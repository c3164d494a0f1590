"""Reduction of one vector, of four, or of an element: read all sources, combine, store to targets.

These loops over sources and targets are those of all kernels. ``address(place, k)`` is a device
function: the address of these elements in the k-th source, or target. ``sources`` and ``targets``
are places.
"""

from __future__ import annotations

import functools
from typing import Any

from dvkernels.kernels.cuda.engine import elements, intrinsics
from dvkernels.kernels.cuda.engine.operations import Operation

__all__ = ["four_vectors", "loader", "one"]


@functools.cache
def loader(operation: Operation, code: int, is_whole: bool, address: Any) -> Any:
    """Return the device function that combines a vector, or element, of all sources.

    ``first`` is its address in the first source.
    """
    combine = elements.combiner(operation, code, is_whole)

    @intrinsics.inlined
    def load(first, sources, num_sources, divisor):  # type: ignore[no-untyped-def]
        value = elements.load(first, code, is_whole)
        for k in range(1, num_sources):
            other = elements.load(address(sources, k), code, is_whole)
            value = combine(value, other)
        return elements.divide(value, divisor, code)

    return load


@functools.cache
def one(operation: Operation, code: int, is_whole: bool, address: Any) -> Any:
    """Return the device function that reduces a vector, or an element, into all targets."""
    load = loader(operation, code, is_whole, address)

    @intrinsics.inlined
    def reduce(first, sources, num_sources, targets, num_targets, divisor):  # type: ignore[no-untyped-def]
        value = load(first, sources, num_sources, divisor)
        for k in range(num_targets):
            elements.store(address(targets, k), value, code, is_whole)

    return reduce


@functools.cache
def four_vectors(operation: Operation, code: int, address: Any) -> Any:
    """Return the device function that reduces four vectors, ``width`` bytes apart, at once.

    All their loads from a source are in flight together; with the width of a block, the accesses
    of a warp coalesce.
    """
    combine = elements.combiner(operation, code)

    @intrinsics.inlined
    def reduce(sources, num_sources, targets, num_targets, divisor, width):  # type: ignore[no-untyped-def]
        source = address(sources, 0)
        a = elements.load(source, code, True)
        b = elements.load(source + width, code, True)
        c = elements.load(source + 2 * width, code, True)
        d = elements.load(source + 3 * width, code, True)
        for k in range(1, num_sources):
            source = address(sources, k)
            e = elements.load(source, code, True)
            f = elements.load(source + width, code, True)
            g = elements.load(source + 2 * width, code, True)
            h = elements.load(source + 3 * width, code, True)
            a = combine(a, e)
            b = combine(b, f)
            c = combine(c, g)
            d = combine(d, h)
        a = elements.divide(a, divisor, code)
        b = elements.divide(b, divisor, code)
        c = elements.divide(c, divisor, code)
        d = elements.divide(d, divisor, code)
        for k in range(num_targets):
            target = address(targets, k)
            elements.store(target, a, code, True)
            elements.store(target + width, b, code, True)
            elements.store(target + 2 * width, c, code, True)
            elements.store(target + 3 * width, d, code, True)

    return reduce
