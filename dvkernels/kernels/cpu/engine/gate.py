"""Spin-then-park gates between two threads: compiled spinning first, then a lock in Python.

A gate is one slot of an int64 array that is CLOSED, OPEN or SLEEPING. The owner of the slot
awaits it, one other thread opens it. Each slot has a cache line of its own, so that opening a gate
does not invalidate the line on which another thread spins.

    state = new_state(2)
    waiter                                      opener
    if not await_gate(state, 0, 2000):          if open_gate(state, 0) == SLEEPING:
        lock.acquire()       # blocks               lock.release()
    close_gate(state, 0)     # ready again

A waiter that stops spinning marks the gate SLEEPING by compare-and-swap, and the opener sees by
its exchange that a wake-up is due: exactly one of the two sees the other, so no wake-up is lost.
A gate holds one opening: its owner must close it before another thread opens it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types

from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics

__all__ = [
    "CLOSED",
    "OPEN",
    "SLEEPING",
    "await_gate",
    "close_gate",
    "new_state",
    "open_and_await",
    "open_gate",
]

CLOSED, OPEN, SLEEPING = 0, 1, 2

_STRIDE = 8  # int64 words per gate: a cache line of 64 bytes
_I64 = ir.IntType(64)
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_intrinsic: _Decorator = extending.intrinsic


def new_state(num_gates: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the state of ``num_gates`` closed gates, each on a cache line of its own."""
    memory = np.zeros((num_gates + 1) * _STRIDE, np.int64)
    skipped = -memory.ctypes.data % 64 // 8
    return memory[skipped : skipped + num_gates * _STRIDE]


def _slot(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Emit the pointer to the slot of gate ``args[1]`` in the array ``args[0]``."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [builder.mul(args[1], ir.Constant(_I64, _STRIDE))])


@_intrinsic
def _exchange(typing: Any, state: Any, gate: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw(
            "xchg", _slot(context, builder, signature, args), args[2], "seq_cst"
        )

    return types.int64(state, types.int64, types.int64), generate


@_intrinsic
def _load(typing: Any, state: Any, gate: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_slot(context, builder, signature, args), "acquire", 8)

    return types.int64(state, types.int64), generate


@_intrinsic
def _fall_asleep(typing: Any, state: Any, gate: Any) -> Any:
    """Change the slot from CLOSED to SLEEPING, and return its previous value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        slot = _slot(context, builder, signature, args)
        closed, sleeping = ir.Constant(_I64, CLOSED), ir.Constant(_I64, SLEEPING)
        pair = builder.cmpxchg(slot, closed, sleeping, "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(state, types.int64), generate


@jit.njit(called_with="(int64[::1], int64)", nogil=True)
def open_gate(state, k):  # type: ignore[no-untyped-def]
    """Open gate ``k`` and return its previous value: a SLEEPING owner must be woken."""
    return _exchange(state, np.int64(k), np.int64(1))


@jit.njit(called_with="(int64[::1], int64)", nogil=True)
def close_gate(state, k):  # type: ignore[no-untyped-def]
    """Close gate ``k``: it can be awaited again."""
    _exchange(state, np.int64(k), np.int64(0))


@jit.njit(called_with="(int64[::1], int64, int64)", nogil=True)
def await_gate(state, k, num_pauses):  # type: ignore[no-untyped-def]
    """Spin at most ``num_pauses`` times for gate ``k``; False: it is SLEEPING, the caller parks."""
    for spin in range(num_pauses):
        if _load(state, np.int64(k)) == 1:
            return True
        intrinsics.relax(spin)
    return _fall_asleep(state, np.int64(k)) == 1


@jit.njit(called_with="(int64[::1], int64, int64, int64)", nogil=True)
def open_and_await(state, opened, awaited, num_pauses):  # type: ignore[no-untyped-def]
    """Open one gate and spin for another, in one call.

    Return ``old + 4 * is_open``: the previous value of the opened gate, and whether the awaited
    one is open. The caller must wake a sleeper before it spins, so this returns at once for one.
    """
    old = _exchange(state, np.int64(opened), np.int64(1))
    if old == 2:
        num_pauses = 0
    for spin in range(num_pauses):
        if _load(state, np.int64(awaited)) == 1:
            return old + 4
        intrinsics.relax(spin)
    return old + 4 * np.int64(_load(state, np.int64(awaited)) == 1)
