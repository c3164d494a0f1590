"""Whose turn it is: the steps of one strategy follow each other, and so does what reads between."""

from __future__ import annotations

import os
import threading
from typing import final

__all__: list[str] = []


@final
class StepLock:
    """A lock that steps take, and deep copies of variables; another one in each forked process."""

    __slots__ = ("_locks", "is_stepping")

    def __init__(self) -> None:
        self.is_stepping = False  # who has it may run a step; an interrupt may leave that behind
        self._locks: dict[int, threading.RLock] = {}

    def lock(self) -> threading.RLock:
        """Return the lock of this process: nobody here has what another process had taken."""
        pid = os.getpid()
        return self._locks.get(pid) or self._locks.setdefault(pid, threading.RLock())

    def is_elsewhere(self) -> bool:
        """Return whether another thread of this process runs a step."""
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
