"""Doors that one thread waits at and another opens: spin first, sleep after.

Waking a sleeping thread costs tens of microseconds, and the scheduler tends to wake it on the core
of the thread that woke it, where the two replicas then take turns for milliseconds. So a waiter
spins for a while in compiled code that holds no lock of the interpreter, and only then sleeps.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from typing import Any

from dvkernels.devices import cpu
from dvkernels.kernels import backends

__all__: list[str] = []

# A pause is 20 to 45 ns: about 1.5 ms, to bridge what a caller does between two steps. Two
# replicas of 1.3 ms of work each, 0.5 ms apart (2 cores of an AMD EPYC, November 2026): a step
# took 4.2 ms with 2 000 pauses, 2.8 ms without end. An idle strategy stops spinning after that.
_PAUSES = 60_000
_PAUSES_TO_HAND_OVER = 400  # about 10 us


@functools.cache
def _ready() -> Any:
    """Return the compiled functions, compiled before any thread could be at it.

    A process forked while another thread compiles finds the compiler's lock taken for ever.
    """
    gate = backends.gate()
    state = gate.new_state(2)
    gate.open_gate(state, 0)
    gate.await_gate(state, 0, 1)
    gate.close_gate(state, 0)
    gate.open_and_await(state, 0, 1, 1)
    return gate


class Gates:
    """Numbered gates between the threads of one step; closed at first.

    Spinning pays only while every thread has a core of its own; with more threads than cores
    a waiter would keep the one it waits for from running, so it sleeps at once.
    """

    __slots__ = ("_compiled", "_locks", "_pauses", "_pauses_to_hand_over", "_state", "spins")

    def __init__(self, count: int, num_threads: int) -> None:
        self._compiled: Any = _ready()
        self._state = self._compiled.new_state(count)
        self._locks = [threading.Lock() for _ in range(count)]
        for lock in self._locks:
            lock.acquire()
        self.spins = num_threads <= cpu.usable_cores()
        self._pauses = _PAUSES if self.spins else 0
        self._pauses_to_hand_over = _PAUSES_TO_HAND_OVER if self.spins else 0

    def open(self, gate: int) -> None:
        """Open a gate and wake who sleeps at it. Opening an open gate does nothing."""
        if self._compiled.open_gate(self._state, gate) == self._compiled.SLEEPING:
            self._wake(gate)

    def open_and_let_run(self, gate: int, awaited: int) -> None:
        """Open a gate, and let the thread behind it run until ``awaited`` opens, or a moment.

        The woken thread needs the interpreter's lock. If the opener kept it, the other would have
        to sleep for it; so the opener spins without it, at most a few microseconds.
        """
        found = self._compiled.open_and_await(self._state, gate, awaited, self._pauses_to_hand_over)
        if found & 3 == self._compiled.SLEEPING:
            self._wake(gate)

    def close(self, gate: int) -> None:
        """Close a gate. Only its one waiter may do this, before it asks to be woken."""
        self._compiled.close_gate(self._state, gate)

    def close_first(self, count: int) -> None:
        """Close the gates 0 to ``count`` - 1. Nobody may be waiting there."""
        self._state[: count * (len(self._state) // len(self._locks))] = 0

    def wait(self, gate: int, timeout_seconds: float = -1) -> bool:
        """Wait until a gate is open, at most that long; -1 means without end."""
        if self._compiled.await_gate(self._state, gate, self._pauses):
            return True
        return self.sleep(gate, timeout_seconds)

    def sleep(self, gate: int, timeout_seconds: float) -> bool:
        """Go on waiting at a gate where :meth:`wait` has returned False.

        The state of the gate decides, the lock only wakes: an interrupt may strike the opener
        between the two, so a sleeper looks up now and then, at first after 20 ms.
        """
        end = math.inf if timeout_seconds < 0 else time.monotonic() + timeout_seconds
        nap = 0.02
        while not self._is_open(gate):
            left = end - time.monotonic()
            if left <= 0:
                return False
            self._locks[gate].acquire(timeout=min(nap, left))
            nap = min(2 * nap, 1.0)
        return True

    def _is_open(self, gate: int) -> bool:
        slots = len(self._state) // len(self._locks)
        return bool(self._state[gate * slots] == self._compiled.OPEN)

    def _wake(self, gate: int) -> None:
        # Already released where a sleeper looked up by itself before it was woken.
        with contextlib.suppress(RuntimeError):
            self._locks[gate].release()
