"""Kernel of an optimizer's step: reduces gradients and updates all copies, in one pass over memory.

The update rules are in optimizer_rules.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dvkernels.kernels import arithmetic, update_rules
from dvkernels.kernels.cuda.engine import (
    intrinsics,
    launch_table,
    loops,
    optimizer_rules,
    reducers,
)
from dvkernels.kernels.cuda.engine.cuda_target import cuda
from dvkernels.kernels.cuda.engine.table_layout import VECTOR_NBYTES

__all__ = ["build"]


@functools.cache
def build(rule: int, code: int, threads: int) -> Callable[..., None]:
    """Return the kernel of an update rule (update_rules) and an element type, not compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize

    @intrinsics.inlined
    def element_address(place, k):  # type: ignore[no-untyped-def]
        table, record, number = place
        width = launch_table.header(table).width
        offset = launch_table.byte_offset(record, width, k, number, itemsize)
        return launch_table.entry(launch_table.addresses(record), k) + offset

    step_two = _stepper(rule, code, 2, loops.dense_address)
    step_vector = _stepper(rule, code, 1, loops.dense_address)
    step_element = _stepper(rule, code, 0, element_address)
    width = VECTOR_NBYTES * threads

    @intrinsics.inlined
    def vectors(table, record, begin, end):  # type: ignore[no-untyped-def]
        vector = begin + cuda.threadIdx.x
        offset = launch_table.item(record).before * itemsize + VECTOR_NBYTES * vector
        while vector + threads < end:
            step_two((table, record, offset), width)
            vector += 2 * threads
            offset += 2 * width
        if vector < end:
            step_vector((table, record, offset), width)

    @intrinsics.inlined
    def element(table, record, number):  # type: ignore[no-untyped-def]
        step_element((table, record, number), 0)

    return loops.over_pieces(code, threads, vectors, element)


@intrinsics.inlined
def _position(place, state):  # type: ignore[no-untyped-def]
    """Return the position of the first copy of a state: the parameters, or a slot."""
    header = launch_table.header(place[0])
    return header.num_sources + header.num_targets * state


def _stepper(rule: int, code: int, count: int, address: Any) -> Any:
    """Return the device function that updates ``count`` vectors, or an element, of all copies.

    ``g`` is the gradient, ``p`` the parameter, ``s`` and ``t`` are the slots.
    """
    num_slots = update_rules.NUM_SLOTS[rule]
    access = reducers.Access(address, loops.num_sources, None, None, None)
    load_gradient = reducers.loader(arithmetic.ADD, code, count, access)
    load, _, divide, store = reducers.batch(arithmetic.ADD, code, count)
    update = _updater(rule, count)

    @intrinsics.inlined
    def step(place, width):  # type: ignore[no-untyped-def]
        # The states are loaded first: they are in flight together with the first gradients.
        p = load(address(place, _position(place, 0)), width)
        s = load(address(place, _position(place, 1)), width) if num_slots > 0 else p
        t = load(address(place, _position(place, 2)), width) if num_slots > 1 else p
        g = load_gradient(place, width)
        header = launch_table.header(place[0])
        g = divide(g, header.divisor)
        p, s, t = update(g, p, s, t, place[0] + 8 * header.numbers)
        k = 0
        while k < launch_table.header(place[0]).num_targets:
            store(address(place, _position(place, 0) + k), p, width)
            if num_slots > 0:
                store(address(place, _position(place, 1) + k), s, width)
            if num_slots > 1:
                store(address(place, _position(place, 2) + k), t, width)
            k += 1

    return step


def _updater(rule: int, count: int) -> Any:
    """Return the device function that applies a rule to ``count`` vectors, or to an element."""

    @intrinsics.inlined
    def update(g, p, s, t, numbers):  # type: ignore[no-untyped-def]
        return optimizer_rules.apply(numbers, g, p, s, t, rule)

    if count < 2:
        return update
    update_rest = _updater(rule, count - 1)

    @intrinsics.inlined
    def update_all(g, p, s, t, numbers):  # type: ignore[no-untyped-def]
        first = update(g[0], p[0], s[0], t[0], numbers)
        rest = update_rest(g[1], p[1], s[1], t[1], numbers)
        return (first[0], rest[0]), (first[1], rest[1]), (first[2], rest[2])

    return update_all
