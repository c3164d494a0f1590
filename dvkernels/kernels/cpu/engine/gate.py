"""Spin-then-park gates between two threads: compiled spinning first, then a lock in Python.

A gate is one slot of an int64 array that is CLOSED, OPEN or SLEEPING. The owner of the slot
awaits it, one other thread opens it. Each slot has a cache line of its own, so that opening a gate
does not invalidate the line on which another thread spins.

    state = new_state(2)
    waiter                                      opener
    if not await_gate(state, -1, 0, 2000, 0):   if open_gate(state, 0) == SLEEPING:
        lock.acquire()       # blocks               lock.release()
    close_gate(state, 0)     # ready again

A waiter that stops spinning marks the gate SLEEPING by compare-and-swap, and the opener sees by
its exchange that a wake-up is due: exactly one of the two sees the other, so no wake-up is lost.
A gate holds one opening: its owner must close it before another thread opens it again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics, records, thread_pool

__all__: list[str] = []

CLOSED, OPEN, SLEEPING = 0, 1, 2
NOT_AWAITED = -1


class _Gate(NamedTuple):
    state: int


_GATE = records.layout(_Gate, nbytes=records.LINE_NBYTES)
_gate_at = records.nth(_GATE)


def new_state(num_gates: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the state of ``num_gates`` closed gates, each on a cache line of its own."""
    return intrinsics.words(num_gates * _GATE.itemsize // 8)


# The first two keep the GIL: a thread that gave it up for nanoseconds might sleep to get it back.


@jit.njit(called_with="(int64[::1], int64)")
def open_gate(state, k):  # type: ignore[no-untyped-def]
    """Open gate ``k`` and return its previous value: a SLEEPING owner must be woken."""
    return intrinsics.exchange(_gate_at(intrinsics.address_of(state), k), "state", OPEN)


@jit.njit(called_with="(int64[::1], int64)")
def close_gate(state, k):  # type: ignore[no-untyped-def]
    """Close gate ``k``: it can be awaited again."""
    intrinsics.exchange(_gate_at(intrinsics.address_of(state), k), "state", CLOSED)


@jit.njit(nogil=True)
def _spin(gate, num_pauses, pool):  # type: ignore[no-untyped-def]
    """Return whether a gate opens within ``num_pauses``.

    Meanwhile join the jobs of the pool at an address, unless it is 0.
    """
    is_open = False
    if pool != 0:
        thread_pool.count_guests(pool, 1)
    for turn in range(num_pauses):
        is_open = intrinsics.load_shared(gate, "state") == OPEN
        if is_open:
            break
        if pool != 0 and thread_pool.has_jobs(pool):
            thread_pool.help_out(pool)
        intrinsics.relax(turn)
    if pool != 0:
        thread_pool.count_guests(pool, -1)
    return is_open


@jit.njit(called_with="(int64[::1], int64, int64, int64, int64)", nogil=True)
def await_gate(state, opened, k, num_pauses, pool):  # type: ignore[no-untyped-def]
    """Open a gate, unless it is negative, and spin at most ``num_pauses`` times for gate ``k``.

    Return whether it is OPEN; else it is SLEEPING, and the caller parks. So it does at once if the
    opened gate was SLEEPING: NOT_AWAITED, the caller wakes its owner first. Meanwhile join the jobs
    of the pool at an address, unless it is 0.
    """
    if opened >= 0:
        first = _gate_at(intrinsics.address_of(state), opened)
        if intrinsics.exchange(first, "state", OPEN) == SLEEPING:
            return NOT_AWAITED
    gate = _gate_at(intrinsics.address_of(state), k)
    is_open = (
        _spin(gate, num_pauses, pool)
        or intrinsics.compare_exchange(gate, "state", CLOSED, SLEEPING) == OPEN
    )
    return np.int64(is_open)


@jit.njit(called_with="(int64[::1], int64, int64, int64)", nogil=True)
def open_and_await(state, opened, awaited, num_pauses):  # type: ignore[no-untyped-def]
    """Open one gate and spin for another, in one call.

    Return ``old + 4 * is_open``: the previous value of the opened gate, and whether the awaited
    one is open. The caller must wake a sleeper before it spins, so this returns at once for one.
    """
    gates = intrinsics.address_of(state)
    old = intrinsics.exchange(_gate_at(gates, opened), "state", OPEN)
    gate = _gate_at(gates, awaited)
    is_open = _spin(gate, 0 if old == SLEEPING else num_pauses, 0)
    is_open = is_open or intrinsics.load_shared(gate, "state") == OPEN
    return old + 4 * np.int64(is_open)
