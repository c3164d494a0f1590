"""How threads are started and waited for, so that an interrupt at any moment leaves them whole."""

from __future__ import annotations

import _thread
import functools
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from dvkernels import deadlines

__all__: list[str] = []

_NAP_SECONDS = 0.1  # what a sleeper loses at most whose wake-up an interrupt has swallowed
_BEGIN_SECONDS = 30.0  # a thread that has not run its first line by then never will
_DEAD_SECONDS = 0.5  # how long a thread may be gone before whoever waits for it must be told


class Thread(threading.Thread):
    """A thread of which :func:`start` notices at once that it died before it could begin.

    Where memory is used up the new thread may have none for its first line. Then it ends, and
    ``threading.Thread.start`` waits for its word without end.
    """

    _beginning: weakref.ref[Any] | None = None

    @property
    def _bootstrap(self) -> Any:
        """What the new thread runs. It alone holds this, so this goes when the thread ends."""
        begin = functools.partial(super()._bootstrap)  # type: ignore[misc]
        self._beginning = weakref.ref(begin)
        return begin

    def is_gone(self) -> bool:
        """Return whether it was started and has ended, perhaps without having begun."""
        return self._beginning is not None and self._beginning() is None


def start(threads: Sequence[threading.Thread]) -> None:
    """Start threads from one that no interrupt reaches, and wait until all of them run.

    Ctrl-C inside ``Thread.start`` can leave a lock taken that the new thread then waits for
    without end. Only the main thread is interrupted, so another one calls it.

    Parameters
    ----------
    threads : sequence of threading.Thread
        Best of :class:`Thread`: others that die before they begin are noticed after 30 s.

    Raises
    ------
    RuntimeError
        Not all of them run: no memory or no thread is left, or the interpreter ends. Those that
        did start go on. It is raised within the deadline of all waits, whatever happens.

    Notes
    -----
    An interrupt ends the wait; the threads start all the same.
    """
    if sys.is_finalizing():  # it would be frozen before its first line
        raise RuntimeError("can't start new thread: the interpreter is shutting down")
    failures: list[BaseException] = []
    over = _thread.allocate_lock()
    over.acquire()

    def start_each() -> None:
        try:
            for thread in threads:
                thread.start()
        except BaseException as error:  # no memory for a thread, the interpreter shuts down
            failures.append(error)
        finally:
            over.release()

    begin = functools.partial(start_each)  # of a function that cannot begin CPython leaks one
    starter = weakref.ref(begin)
    try:
        _thread.start_new_thread(begin, ())
    except MemoryError as error:
        raise RuntimeError("can't start new thread: no memory is left") from error
    del begin  # held by the new thread alone
    end = time.monotonic() + min(_BEGIN_SECONDS, deadlines.timeout_seconds())
    doubts = 0  # naps since one of them was seen dead
    while not over.acquire(timeout=_NAP_SECONDS):
        is_dead = starter() is None or any(isinstance(t, Thread) and t.is_gone() for t in threads)
        doubts = doubts + 1 if is_dead else 0
        if doubts * _NAP_SECONDS >= _DEAD_SECONDS or time.monotonic() > end:
            raise RuntimeError("can't start new thread: it ended before its first line")
    if failures:
        raise RuntimeError(str(failures[0]) or "can't start new thread") from failures[0]


class Latch:
    """A one-time event that an interrupt can neither break nor keep taken.

    ``threading.Event`` holds a Python lock while it is set or waited for: Ctrl-C between two of its
    operations leaves that lock taken, and everybody else waits without end. Here the truth is one
    attribute, and the lock below it only wakes sleepers: what an interrupt leaves of it costs the
    others one nap.
    """

    __slots__ = ("_bell", "is_open")

    def __init__(self) -> None:
        self.is_open = False
        self._bell = _thread.allocate_lock()
        self._bell.acquire()

    def open(self) -> None:
        """Let everybody pass, now and later. Safe to call twice, from any thread."""
        self.is_open = True
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            self._bell.release()
        except RuntimeError:  # opened before
            pass

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether it is open, at the latest after ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_open:
            left = _NAP_SECONDS if end is None else min(end - time.monotonic(), _NAP_SECONDS)
            if left <= 0:
                return False
            if self._bell.acquire(timeout=left):
                self.open()  # wakes the next sleeper
        return True
