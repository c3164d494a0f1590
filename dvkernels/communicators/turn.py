"""Whose turn it is: the steps of one strategy follow each other, and so does what reads between."""

from __future__ import annotations

import os
import threading
from typing import final

__all__: list[str] = []


@final
class Turn:
    """A lock that steps take, and deep copies of variables; another one in each forked process."""

    __slots__ = ("_locks",)

    def __init__(self) -> None:
        self._locks: dict[int, threading.RLock] = {}

    def lock(self) -> threading.RLock:
        """Return the lock of this process: nobody here has what another process had taken."""
        pid = os.getpid()
        return self._locks.get(pid) or self._locks.setdefault(pid, threading.RLock())
