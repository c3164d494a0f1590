"""Threads that the end of the program stops and waits for."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable

from dvkernels.threads import thread as threads

__all__: list[str] = []

_END_SECONDS = 5.0  # that the end of the program waits for all of them
_GRACE_SECONDS = 1.0  # of these, until what they do is interrupted
_NAP_SECONDS = 0.1


class StoppableThread:
    """A daemon thread that is told to stop, and waited for, before the interpreter ends.

    An interpreter that ends takes its daemon threads with it wherever they are, and inside foreign
    C++ (optree, a user's library) that aborts the process, whatever its exit status was to be. A
    thread that is no daemon would hold up the end for as long as user code pleases.

    Parameters
    ----------
    work : callable
        Given the latch ``stop``; returns soon after that is open.
    name : str
        Of the thread.
    wake : callable, optional
        Ends a wait of ``work`` once ``stop`` is open.
    """

    def __init__(
        self,
        work: Callable[[threads.Latch], None],
        name: str,
        wake: Callable[[], object] | None = None,
    ) -> None:
        self.has_ended = threads.Latch()
        self._stop = threads.Latch()
        self._work = work
        self._wake = wake
        self._pid = os.getpid()
        self._thread = threads.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start; ``RuntimeError`` if there are no means for a thread.

        After an interrupt it may have started: ``work`` should look whether its owner still lives.
        """
        try:
            _running.add(self)
            threads.start([self._thread])
        except Exception:
            _running.discard(self)
            raise

    @property
    def is_here(self) -> bool:
        """Whether this process is the one that started it, and not a fork of that."""
        return self._pid == os.getpid()

    @property
    def has_begun(self) -> bool:
        """Whether there is or was such a thread."""
        return self._thread.ident is not None

    @property
    def is_stopping(self) -> bool:
        """Whether it has been told to stop."""
        return self._stop.is_open

    def stop(self) -> None:
        """Tell it to stop, and do not wait."""
        self._stop.open()
        if self._wake is not None:
            self._wake()

    def wait(self, seconds: float) -> bool:
        """Return whether it has ended, at the latest after so many seconds.

        ``Thread.join`` would take an interrupt of the wait for the end of the thread.
        """
        is_myself = self._thread.ident == threading.get_ident()
        return not self.is_here or is_myself or self.has_ended.wait(seconds)

    def _run(self) -> None:
        try:
            self._work(self._stop)
        finally:
            _running.discard(self)
            self.has_ended.open()

    def _interrupt(self) -> None:
        """Raise ``SystemExit`` in it as soon as it runs Python code."""
        import ctypes

        ident = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))


_running: set[StoppableThread] = set()
is_over = False  # whether the program is, so that a daemon thread of the user's waits in vain


def _end_all() -> None:
    """Stop all that run, and wait; leave behind what some system call holds for good."""
    global is_over
    is_over = True
    began = time.monotonic()
    ours = [thread for thread in _running.copy() if thread.is_here and thread.has_begun]
    for thread in ours:
        thread.stop()
    for thread in ours:
        while not thread.wait(_NAP_SECONDS):
            seconds = time.monotonic() - began
            if seconds > _END_SECONDS:
                return
            if seconds > _GRACE_SECONDS:
                thread._interrupt()


# Here threads still run as ever, and those of the user that are no daemons have ended.
atexit.register(_end_all)
