"""Waiting for other processes and for devices: one loop, and the table of all spins and naps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["until"]


class Spins(NamedTuple):
    """Numbers of pauses that compiled code spins before it gives up; a pause is 20 to 45 ns."""

    own_core: int  # where each worker has a core of its own
    shared_core: int  # where a spinning worker may keep the awaited one from running

    def of(self, may_spin: bool) -> int:
        """Return the number of pauses; ``may_spin``: each worker has a core of its own."""
        return self.own_core if may_spin else self.shared_core


class Pace(NamedTuple):
    """Pace of a wait: it polls without naps, then between naps, each twice as long as the last."""

    busy_seconds: float  # how long to poll without naps
    nap_seconds: float  # the first nap
    longest_nap_seconds: float
    check_seconds: float  # how often to check, between naps, that waiting is not in vain


# For a round over shared memory: about 1.5 ms, like replicas of one process.
ROUND_SPINS = Spins(60_000, 100)
# For the workers of a host in the middle of a collective between hosts; between two spins the
# messages progress.
HOST_SPINS = Spins(2000, 50)
SPINS_BETWEEN_NAPS = 100

# For a round over shared memory, after its spin. A check asks the system for processes.
ROUND = Pace(0.0, 50e-6, 1e-3, 0.1)
# For a round over MPI: workers may be late.
MPI_ROUND = Pace(1e-3, 20e-6, 1e-3, 0.0)
# For data that all workers have agreed to exchange, so that only a lost or stopped worker can delay
# them. MPI moves data only inside of its calls: 64 MiB took 1.3 s with naps of a millisecond.
MPI_DATA = Pace(2.0, 20e-6, 1e-3, 0.0)
# For all workers to begin or to exit, which takes as long as their programs.
PROGRAMS = Pace(0.0, 1e-3, 1e-3, math.inf)
# For the processes of a host group to come; a check asks the system for processes.
ROLL_CALL = Pace(0.0, 0.2e-3, 5e-3, 0.1)
# For a message, and of a server for requests: an answer takes 20 to 200 us, and a process that is
# idle leaves its core to others. A check asks the system for processes.
MESSAGE = Pace(0.2e-3, 20e-6, 1e-3, 0.1)
SHARED_CORE_MESSAGE = Pace(0.0, 20e-6, 1e-3, 0.1)
# For programs of JAX over several processes; a check asks the coordination service.
JAX_PROGRAM = Pace(0.0, 50e-6, 1e-3, 0.25)
# For GPUs, whose calls a thread watches in the background.
GPU_CALL = Pace(0.0, 0.05, 0.05, 0.0)

_POLLS_PER_LOOK = 100  # at the clock: about 50 us of MPI tests


def until(
    is_done: Callable[[], bool],
    pace: Pace,
    seconds: float = math.inf,
    check: Callable[..., object] | None = None,
    *about: Any,
) -> bool:
    """Wait until ``is_done()``; return whether it was within so many seconds.

    ``check(waited_seconds, *about)`` is called now and then, and before the deadline is given up;
    it raises if waiting is in vain.
    """
    began = now = time.monotonic()
    busy_until = began + min(pace.busy_seconds, seconds)
    while now < busy_until:
        for _ in range(_POLLS_PER_LOOK):
            if is_done():
                return True
        time.sleep(0)  # others may need this core
        now = time.monotonic()
    nap, next_check = pace.nap_seconds, began + pace.check_seconds
    while not is_done():
        now = time.monotonic()
        is_late = now - began > seconds
        if check is not None and (is_late or now >= next_check):
            check(now - began, *about)
            next_check = now + pace.check_seconds
        if is_late:
            return is_done()
        time.sleep(nap)
        nap = min(2 * nap, pace.longest_nap_seconds)
    return True
