"""Lock of a strategy's replicas: one step at a time, no map and no deep copy during one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, final

from dvkernels import deadlines
from dvkernels.errors import CollectiveTimeoutError

__all__: list[str] = []

T = TypeVar("T")


@final
class StepLock:
    """Reentrant lock held by a step or a deep copy of a variable; a new one after a fork."""

    __slots__ = ("_locks", "farms", "is_stepping")

    def __init__(self) -> None:
        # Set by the holder of the lock; stale after an interrupt, so check the lock too.
        self.is_stepping = False
        # The task farm that occupies the replicas, if any. A dict, since it changes atomically.
        self.farms: dict[Any, None] = {}
        self._locks: dict[int, threading.RLock] = {}

    def lock(self) -> threading.RLock:
        """Return the lock of this process: the parent may have held its own during the fork."""
        pid = os.getpid()
        return self._locks.get(pid) or self._locks.setdefault(pid, threading.RLock())

    def is_elsewhere(self) -> bool:
        """Return whether another thread of this process is running a step."""
        if not self.is_stepping:
            return False
        lock = self.lock()
        try:
            return not lock.acquire(blocking=False)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                lock.release()
            except RuntimeError:  # not ours
                pass

    def check_free(self, verb: str) -> None:
        """Raise ``ContextError`` if a map is open; wait for the calls of one that has ended."""
        for farm in list(self.farms):
            farm.vacate(verb)

    def between_steps(self, work: Callable[[], T], what: str) -> T:
        """Call ``work`` while no other thread runs a step, which is awaited, and no map is open."""
        self.check_free(what)  # before the lock, for which functions of the map may wait
        lock, seconds = self.lock(), deadlines.timeout_seconds()
        try:
            if not lock.acquire(timeout=seconds):
                raise CollectiveTimeoutError(
                    f"{what}: another thread has been running a step of this strategy for "
                    f"{seconds:g} s; a thread that this step waits for must not do this "
                    f"(DVKERNELS_TIMEOUT_SECONDS changes the timeout)"
                )
            self.check_free(what)  # of a map opened meanwhile
            return work()
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                lock.release()
            except RuntimeError:  # not acquired: the wait timed out or was interrupted
                pass
