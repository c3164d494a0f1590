"""Gates between replica threads: binary events with one waiter, which spins first, then sleeps.

Waking a sleeping thread costs tens of microseconds, and the scheduler tends to wake it on the core
of the waking thread, where the two replicas then alternate for milliseconds. So a waiting thread
spins for a while in compiled code without the GIL, and only then sleeps.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from dvkernels.devices import cpu
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import backends

__all__: list[str] = []

# A pause is 20 to 45 ns: spin for about 1.5 ms, to bridge a caller's work between two steps. Two
# replicas of 1.3 ms of work each, 0.5 ms apart (2 cores of an AMD EPYC, November 2026): a step
# took 4.2 ms with 2 000 pauses, 2.8 ms with unlimited ones. The limit is for idle strategies.
_PAUSES = 60_000
# About 20 us: the Python of a step with an optimizer takes longer than 10 us. With half of this its
# replicas slept for the GIL (75 to 99 us a step became 63).
_PAUSES_TO_HAND_OVER = 800


class _GateFunctions(NamedTuple):
    """Compiled functions of gates, behind their dispatchers: a call takes 0.2 us less."""

    open_gate: Callable[[HostArray, int], int]
    close_gate: Callable[[HostArray, int], None]
    await_gate: Callable[[HostArray, int, int, int, int], int]
    open_and_await: Callable[[HostArray, int, int, int], int]


@functools.cache
def _ready() -> _GateFunctions:
    """Return the compiled functions, compiled before any replica thread could compile them.

    A process forked while another thread compiles finds the compiler's lock held forever.
    """
    gate = backends.gate()
    state = gate.new_state(2)
    gate.open_gate(state, 0)
    gate.await_gate(state, -1, 0, 1, 0)
    gate.close_gate(state, 0)
    gate.open_and_await(state, 0, 1, 1)
    dispatchers = (getattr(gate, name) for name in _GateFunctions._fields)
    return _GateFunctions(*(each.get_overload(each.signatures[0]) for each in dispatchers))


class Gates:
    """Numbered gates between the threads of one step, initially closed.

    Spinning pays only while every thread has a core of its own. With more threads than cores, a
    spinning thread keeps the awaited one from running, so it sleeps at once.
    """

    __slots__ = (
        "_compiled",
        "_locks",
        "_open",
        "_pauses",
        "_pauses_to_hand_over",
        "_pool",
        "_sleeping",
        "_slots",
        "_state",
        "spins",
    )

    def __init__(self, count: int, num_threads: int) -> None:
        self._compiled = _ready()
        module: Any = backends.gate()
        self._open, self._sleeping = module.OPEN, module.SLEEPING
        self._pool: Any = backends.thread_pool().of_process()  # whose jobs a waiting thread joins
        self._state: HostArray = module.new_state(count)
        self._slots = len(self._state) // count  # words of a gate
        self._locks = [threading.Lock() for _ in range(count)]
        for lock in self._locks:
            lock.acquire()
        self.spins = num_threads <= cpu.usable_cores()
        self._pauses = _PAUSES if self.spins else 0
        self._pauses_to_hand_over = _PAUSES_TO_HAND_OVER if self.spins else 0

    def open(self, gate: int) -> None:
        """Open a gate and wake its sleeping thread. Opening an open gate does nothing."""
        if self._compiled.open_gate(self._state, gate) == self._sleeping:
            self._wake(gate)

    def open_and_let_run(self, gate: int, awaited: int) -> None:
        """Open a gate, and spin without the GIL until the gate ``awaited`` opens, for about 20 us.

        The woken thread needs the GIL. If the opener kept it, the woken thread would sleep for it.
        """
        found = self._compiled.open_and_await(self._state, gate, awaited, self._pauses_to_hand_over)
        if found & 3 == self._sleeping:
            self._wake(gate)

    def close(self, gate: int) -> None:
        """Close a gate. Only its one waiter may do this, before it waits."""
        self._compiled.close_gate(self._state, gate)

    def close_first(self, count: int) -> None:
        """Close the gates 0 to ``count`` - 1, where no thread may be waiting."""
        self._state[: count * self._slots] = 0

    def wait(self, gate: int, timeout_seconds: float = -1, *, opening: int = -1) -> bool:
        """Wait until a gate is open, and return whether it is; -1 means no timeout.

        First open the gate ``opening``, once this thread has released the GIL: its waiter needs it,
        and would sleep for it otherwise (a step of 4 KiB: 50 us became 40).
        """
        await_gate, pool = self._compiled.await_gate, self._pool.address
        is_open = await_gate(self._state, opening, gate, self._pauses, pool)
        if is_open < 0:
            self._wake(opening)
            is_open = await_gate(self._state, -1, gate, self._pauses, pool)
        return is_open > 0 or self.sleep(gate, timeout_seconds)

    def sleep(self, gate: int, timeout_seconds: float) -> bool:
        """Sleep until a gate is open, after :meth:`wait` has returned False.

        The state of the gate decides, the lock only wakes. An interrupt may strike the opener
        between the two, so a sleeping thread polls the state, at first after 20 ms.
        """
        state, slot, lock = self._state, gate * self._slots, self._locks[gate]
        end = math.inf if timeout_seconds < 0 else time.monotonic() + timeout_seconds
        nap = 0.02
        while state[slot] != self._open:
            left = end - time.monotonic()
            if left <= 0:
                return False
            lock.acquire(True, min(nap, left))
            nap = min(2 * nap, 1.0)
        return True

    def _wake(self, gate: int) -> None:
        try:  # noqa: SIM105 - a context manager takes a microsecond more
            self._locks[gate].release()
        except RuntimeError:  # released already: the sleeping thread polled the state meanwhile
            pass
