"""Start of threads, and a latch to wait for them, both safe from interrupts at any moment."""

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

_POLL_SECONDS = 0.1  # the most that a waiter loses if an interrupt swallows its wake-up
_BEGIN_SECONDS = 30.0  # a thread that has not run its first line by then never will
_DEAD_SECONDS = 0.5  # a thread seen dead for so long has died before it could begin


class Thread(threading.Thread):
    """A thread whose death before its first line is detected by :func:`start`.

    Where memory is used up the new thread may have none for its first line. Then it ends, and
    ``threading.Thread.start`` waits forever for it to begin.
    """

    _beginning: weakref.ref[Any] | None = None

    @property
    def _bootstrap(self) -> Any:
        """Function of the new thread, which has the only reference: it dies with the thread."""
        begin = functools.partial(super()._bootstrap)  # type: ignore[misc]
        self._beginning = weakref.ref(begin)
        return begin

    def is_gone(self) -> bool:
        """Return whether it was started and has ended, perhaps without having begun."""
        return self._beginning is not None and self._beginning() is None


def start(threads: Sequence[threading.Thread]) -> None:
    """Start threads, and wait until all of them run; an interrupt leaves no lock taken.

    Ctrl-C inside ``Thread.start`` can leave a lock taken for which the new thread then waits
    forever. Only the main thread is interrupted, so another one calls ``Thread.start``.

    Parameters
    ----------
    threads : sequence of threading.Thread
        Preferably of :class:`Thread`: the death of others before they begin is detected only
        after 30 s.

    Raises
    ------
    RuntimeError
        Not all of them run: no memory or no thread is left, or the interpreter ends. Those that
        did start go on. It is raised within the deadline of all waits in any case.

    Notes
    -----
    An interrupt ends the wait; the threads start all the same.
    """
    if sys.is_finalizing():  # a new thread would be frozen before its first line
        raise RuntimeError("can't start new thread: the interpreter is shutting down")
    failures: list[BaseException] = []
    finished = _thread.allocate_lock()
    finished.acquire()

    def start_each() -> None:
        try:
            for thread in threads:
                thread.start()
        except BaseException as error:  # no memory for a thread, or the interpreter shuts down
            failures.append(error)
        finally:
            finished.release()

    begin = functools.partial(start_each)  # CPython leaks a function whose thread cannot begin
    starter = weakref.ref(begin)
    try:
        _thread.start_new_thread(begin, ())
    except MemoryError as error:
        raise RuntimeError("can't start new thread: no memory is left") from error
    del begin  # now only the new thread refers to it
    end = time.monotonic() + min(_BEGIN_SECONDS, deadlines.timeout_seconds())
    polls_dead = 0  # polls since a thread was first seen dead
    while not finished.acquire(timeout=_POLL_SECONDS):
        is_dead = starter() is None or any(isinstance(t, Thread) and t.is_gone() for t in threads)
        polls_dead = polls_dead + 1 if is_dead else 0
        if polls_dead * _POLL_SECONDS >= _DEAD_SECONDS or time.monotonic() > end:
            raise RuntimeError("can't start new thread: it ended before its first line")
    if failures:
        raise RuntimeError(str(failures[0]) or "can't start new thread") from failures[0]


class Latch:
    """A one-time event that an interrupt can neither break nor keep taken.

    ``threading.Event`` holds a Python lock while it is set or waited for: Ctrl-C between two of its
    operations leaves that lock taken, and all other threads wait forever. Here the state is one
    attribute, and the lock only wakes waiters: an interrupt costs them at most one poll interval.
    """

    __slots__ = ("_wake_lock", "is_open")

    def __init__(self) -> None:
        self.is_open = False
        self._wake_lock = _thread.allocate_lock()
        self._wake_lock.acquire()

    def open(self) -> None:
        """Open the latch for all waiters, now and later. Safe to call twice, from any thread."""
        self.is_open = True
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            self._wake_lock.release()
        except RuntimeError:  # opened before
            pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the latch is open; return whether it is, at the latest after ``timeout`` s."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_open:
            remaining = _POLL_SECONDS if end is None else min(end - time.monotonic(), _POLL_SECONDS)
            if remaining <= 0:
                return False
            if self._wake_lock.acquire(timeout=remaining):
                self.open()  # wakes the next waiter
        return True
