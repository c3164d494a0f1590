"""Stoppable daemon threads, which the end of the program stops and waits for."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence

from dvkernels.threads import thread

__all__: list[str] = []

_END_SECONDS = 5.0  # the most that the end of the program waits for all of them
_GRACE_SECONDS = 1.0  # of these, before the threads are interrupted
_POLL_SECONDS = 0.1


class StoppableThread:
    """Daemon thread that is stopped, and waited for, before the interpreter ends.

    The end of the interpreter kills daemon threads wherever they are, and inside foreign C++
    (optree, a user's library) that aborts the process, whatever its exit status should be. A
    thread that is not a daemon would delay the end for as long as user code runs.

    Parameters
    ----------
    work : callable
        Called with the latch ``stop``; returns soon after it is opened.
    name : str
        Name of the thread.
    wake : callable, optional
        Ends a wait of ``work`` after ``stop`` is opened.
    """

    def __init__(
        self,
        work: Callable[[thread.Latch], None],
        name: str,
        wake: Callable[[], object] | None = None,
    ) -> None:
        self.has_ended = thread.Latch()
        self._stop = thread.Latch()
        self._work = work
        self._wake = wake
        self._pid = os.getpid()
        self._thread = thread.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; raise ``RuntimeError`` if no thread can be started.

        After an interrupt it may have started: ``work`` should check that its owner still exists.
        """
        start_all([self])

    @property
    def is_here(self) -> bool:
        """Whether this process created the thread, and is not a fork of that process."""
        return self._pid == os.getpid()

    @property
    def has_begun(self) -> bool:
        """Whether the thread was started."""
        return self._thread.ident is not None

    @property
    def is_stopping(self) -> bool:
        """Whether ``stop`` has been called."""
        return self._stop.is_open

    def stop(self) -> None:
        """Signal the thread to stop, without waiting for it."""
        self._stop.open()
        if self._wake is not None:
            self._wake()

    def wait(self, seconds: float) -> bool:
        """Wait until the thread has ended; return whether it did within so many seconds.

        ``Thread.join`` would mistake an interrupt of the wait for the end of the thread.
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
        """Raise ``SystemExit`` in the thread as soon as it runs Python code."""
        import ctypes

        ident = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))


def start_all(threads: Sequence[StoppableThread]) -> None:
    """Start threads at once; raise ``RuntimeError`` if not all of them run."""
    try:
        _running.update(threads)
        thread.start([each._thread for each in threads])
    except Exception:
        _running.difference_update(each for each in threads if not each.has_begun)
        raise


_running: set[StoppableThread] = set()
is_over = False  # whether the program is ending, and these threads with it


def _end_all() -> None:
    """Stop all running threads and wait for them; give up on those that a system call blocks."""
    global is_over
    is_over = True
    began = time.monotonic()
    own = [running for running in _running.copy() if running.is_here and running.has_begun]
    for running in own:
        running.stop()
    for running in own:
        while not running.wait(_POLL_SECONDS):
            seconds = time.monotonic() - began
            if seconds > _END_SECONDS:
                return
            if seconds > _GRACE_SECONDS:
                running._interrupt()


# At exit, daemon threads still run, and the user's threads that are not daemons have ended.
atexit.register(_end_all)
