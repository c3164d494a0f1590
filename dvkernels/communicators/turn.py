"""Whose turn it is to run a step of a strategy: one thread's at a time."""

from __future__ import annotations

import os
import threading

__all__: list[str] = []


class Turn:
    """The lock of a strategy's steps; whoever runs one holds ``lock``.

    An RLock: releasing one that is not ours raises, so that an interrupt between any two operations
    leaves it as it should be. A forked process has it anew.
    """

    __slots__ = ("_pid", "lock")

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Forget who has it: the owner stayed in the process that this one was forked from."""
        self.lock = threading.RLock()
        self._pid = os.getpid()

    def is_elsewhere(self) -> bool:
        """Return whether another thread of this process runs a step."""
        if self._pid != os.getpid():
            return False
        try:
            return not self.lock.acquire(blocking=False)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self.lock.release()
            except RuntimeError:  # not ours
                pass
