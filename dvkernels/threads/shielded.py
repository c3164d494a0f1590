"""Work that Ctrl-C cannot leave half done: another thread does it, and the caller waits.

CPython raises ``KeyboardInterrupt`` in the main thread, at the entry of any function and after any
call. What has begun there may end anywhere, its ``except`` and ``finally`` clauses included. So
whatever must be whole or undone is sent on an errand, and the main thread has nothing to clean up.
"""

from __future__ import annotations

import _thread
import contextvars
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from dvkernels.threads.thread import Latch

__all__: list[str] = []

_T = TypeVar("_T")

# After so long a thread that was started is taken for one that never ran, for want of memory.
_SECONDS_TO_BEGIN = 0.5


class Cancelled(BaseException):
    """The caller was interrupted, and wants no more of what it sent for."""


class ShieldedCall:
    """A call that is made once, by whichever thread comes first.

    Parameters
    ----------
    act : callable
    is_whole : bool
        Once begun it is not to be cancelled.
    """

    def __init__(self, act: Callable[[], Any], *, is_whole: bool = False) -> None:
        self._act = act
        self._is_whole = is_whole
        self._context = contextvars.copy_context()
        self._pid = os.getpid()
        self._doers: dict[None, int] = {}  # one at most: the thread that said so first
        self.done = Latch()
        self.result: Any = None
        self.error: BaseException | None = None
        self._is_cancelled = False

    def start(self, prepare: Callable[[], object] = object) -> None:
        """Let a thread do it that the end of the program waits for; where there is none, do it.

        The thread calls ``prepare`` first.
        """

        def work() -> None:
            prepare()
            self.do()

        def start() -> None:
            try:
                threading.Thread(target=work, name="dvkernels-errand").start()
            except (RuntimeError, MemoryError):
                work()

        try:
            _thread.start_new_thread(start, ())
        except (RuntimeError, MemoryError):
            self.do()

    def do(self) -> None:
        """Do it, unless another thread does or has."""
        own = threading.get_ident()
        if self.done.is_open or self._doers.setdefault(None, own) != own:  # atomic
            return
        try:
            if self._is_cancelled:
                raise Cancelled
            self.result = self._context.run(self._call)
        except BaseException as error:
            self.error = error
        finally:
            self.done.open()

    def wait(self) -> None:
        """Return when it is done. If nobody has begun, or can, the caller does it."""
        while not self.done.wait(_SECONDS_TO_BEGIN):
            doer = self._doers.get(None)
            if doer is None or doer == threading.get_ident():
                self.do()
            elif self._pid != os.getpid() or doer not in sys._current_frames():
                self.error = RuntimeError("the thread that was at work on it is gone")
                self.done.open()

    def cancel(self) -> None:
        """Let it end as soon as may be; what nobody has begun is not done at all."""
        self._is_cancelled = True
        self.do()

    def check(self) -> None:
        """Raise :class:`Cancelled` if it is to end."""
        if self._is_cancelled and not self._is_whole:
            raise Cancelled

    def outcome(self) -> Any:
        """Return the result, or raise the error."""
        error, self.error = self.error, None
        if error is None:
            return self.result
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def _call(self) -> Any:
        _current.set(self)
        return self._act()


_current: contextvars.ContextVar[ShieldedCall | None] = contextvars.ContextVar(
    "errand", default=None
)


def current() -> ShieldedCall | None:
    """Return the errand that this thread is on."""
    return _current.get()


def beyond_interrupts(function: Callable[..., _T], *arguments: Any) -> _T:
    """Return what a function returns, called where no interrupt reaches it.

    Ctrl-C in the midst of an import leaves a package half imported, and in the midst of a
    compilation a lock taken. An interrupt ends the wait, and the function goes on to its end.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return function(*arguments)
    errand = ShieldedCall(functools.partial(function, *arguments))
    errand.start()
    errand.wait()
    return cast("_T", errand.outcome())


def uninterrupted(act: Callable[[], Any], *, is_whole: bool = False) -> Any:
    """Return ``act()``, called where no interrupt reaches it.

    An interrupt cancels it, and is raised when it has ended. If it ``is_whole``, an interrupt lets
    it come to its own end, or not begin.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return act()
    errand = ShieldedCall(act, is_whole=is_whole)
    interrupt: BaseException | None = None
    is_sent = False
    while True:
        try:
            if errand.done.is_open:
                break
            if not is_sent:
                is_sent = True
                try:
                    _thread.start_new_thread(errand.do, ())
                except (RuntimeError, MemoryError):  # no thread is to be had
                    errand.do()
            errand.wait()
        except BaseException as error:
            interrupt = error
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                errand.cancel()
            except BaseException:
                pass  # it is raised already
    if interrupt is not None:
        raise interrupt from errand.error
    return errand.outcome()
