"""Kernel of an optimizer's step: reduces gradients and updates all copies, in one pass over memory.

The update rules are in optimizer_rules.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import (
    elements,
    intrinsics,
    launch_table,
    loops,
    optimizer_rules,
    reducers,
)
from dvkernels.kernels.cuda.engine.cuda_target import cuda

__all__ = ["build"]


@functools.cache
def build(rule: int, code: int) -> Callable[..., None]:
    """Return the kernel of an update rule (update_rules) and an element type, not compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize
    num_slots = (0, 1, 1, 2)[rule]

    @intrinsics.inlined
    def element_address(place, k):  # type: ignore[no-untyped-def]
        record, width, number = place
        offset = launch_table.byte_offset(record, width, k, number, itemsize)
        return launch_table.entry(launch_table.addresses(record), k) + offset

    step_vector = _stepper(rule, code, num_slots, True, loops.dense_address)
    step_element = _stepper(rule, code, num_slots, False, element_address)

    @intrinsics.inlined
    def vectors(table, header, addresses, before, begin, end):  # type: ignore[no-untyped-def]
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        for vector in range(begin + thread, end, threads):
            step_vector(table, header, (addresses, before * itemsize + 16 * vector))

    @intrinsics.inlined
    def element(table, header, record, item, number):  # type: ignore[no-untyped-def]
        step_element(table, header, (record, header.width, number))

    return loops.over_pieces(code, vectors, element)


def _stepper(rule: int, code: int, num_slots: int, is_whole: bool, address: Any) -> Any:
    """Return the device function that updates a vector, or an element, of all copies.

    ``g`` is the gradient, ``p`` the parameter, ``s`` and ``t`` are the slots.
    """
    load_gradient = reducers.loader(arithmetic.ADD, code, is_whole, address)

    @intrinsics.inlined
    def step(table, header, place):  # type: ignore[no-untyped-def]
        num_copies, parameter = header.num_targets, header.num_sources
        slot = parameter + num_copies * (1 if num_slots > 0 else 0)
        second_slot = parameter + num_copies * num_slots
        g = load_gradient(address(place, 0), place, header.num_sources, header.divisor)
        p = elements.load(address(place, parameter), code, is_whole)
        s = elements.load(address(place, slot), code, is_whole)
        t = elements.load(address(place, second_slot), code, is_whole)
        p, s, t = optimizer_rules.apply(rule, g, p, s, t, table + 8 * header.numbers)
        for k in range(num_copies):
            elements.store(address(place, parameter + k), p, code, is_whole)
            if num_slots > 0:
                elements.store(address(place, slot + k), s, code, is_whole)
            if num_slots > 1:
                elements.store(address(place, second_slot + k), t, code, is_whole)

    return step
