"""Lock of a strategy's steps: one step at a time, and no deep copy of a variable during one."""

from __future__ import annotations

import os
import threading
from typing import final

__all__: list[str] = []


@final
class StepLock:
    """Reentrant lock held by a step or a deep copy of a variable; a new one after a fork."""

    __slots__ = ("_locks", "is_stepping")

    def __init__(self) -> None:
        # Set by the holder of the lock; stale after an interrupt, so check the lock too.
        self.is_stepping = False
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
