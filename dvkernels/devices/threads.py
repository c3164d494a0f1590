"""How threads are started and waited for, so that an interrupt at any moment leaves them whole."""

from __future__ import annotations

import _thread
import collections
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

__all__: list[str] = []

_T = TypeVar("_T")
_BEGIN_SECONDS = 1.0  # after which a thread may have died for want of memory before its first line
_NAP_SECONDS = 0.1  # what a sleeper loses at most whose wake-up an interrupt has swallowed


def start(threads: Sequence[threading.Thread]) -> None:
    """Start threads from one that no interrupt reaches, and wait for that.

    Ctrl-C inside ``Thread.start`` can leave a lock taken that the new thread then waits for
    without end. Only the main thread is interrupted, so another one calls it.
    """
    errors: list[BaseException] = []
    done = _thread.allocate_lock()
    done.acquire()

    def start_each() -> None:
        try:
            for thread in threads:
                thread.start()
        except BaseException as error:  # no memory for a thread, the interpreter shuts down
            errors.append(error)
        finally:
            done.release()

    _thread.start_new_thread(start_each, ())
    done.acquire()
    if errors:
        raise errors[0]


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


def beyond_interrupts(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function where no interrupt reaches it, and return what it returns.

    Ctrl-C in the midst of an import leaves a package half imported, and in the midst of a
    compilation a lock taken. It reaches the main thread only: so another thread calls the function
    there. An interrupt ends the wait for it, and the function goes on to its end.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return function(*arguments)
    calls: collections.deque[Callable[[], _T]] = collections.deque(
        [functools.partial(function, *arguments)]
    )
    outcome: list[tuple[Any, BaseException | None]] = []
    ended = Latch()

    def call() -> None:
        try:
            outcome.append((calls.popleft()(), None))
        except BaseException as error:
            outcome.append((None, error))
        finally:
            ended.open()

    try:
        # Not a daemon: the end of the interpreter waits for what may be inside foreign code.
        start([threading.Thread(target=call, name="dvkernels-undisturbed", daemon=False)])
        patience = _BEGIN_SECONDS
    except (RuntimeError, MemoryError):  # no thread to be had
        patience = 0.0
    while not ended.wait(patience):
        if calls:  # it has not begun, and need not: whoever takes the call makes it
            with contextlib.suppress(IndexError):
                return calls.popleft()()
        patience = _BEGIN_SECONDS
    value, error = outcome[0]
    if error is not None:
        raise error
    return cast("_T", value)
