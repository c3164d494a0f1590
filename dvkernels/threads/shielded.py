"""Calls shielded from Ctrl-C: another thread makes them, and the caller waits.

CPython raises ``KeyboardInterrupt`` in the main thread, at the entry of any function and after any
call: code may stop anywhere there, inside its ``except`` and ``finally`` clauses as well. So a call
that must be complete or undone is made by another thread, and the main thread has nothing to clean
up.
"""

from __future__ import annotations

import _thread
import contextvars
import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from dvkernels import thread_frames
from dvkernels.threads.thread import Latch

__all__: list[str] = []

_T = TypeVar("_T")

# A thread that has not begun after this time is assumed never to run, for lack of memory.
_BEGIN_SECONDS = 0.5


class Cancelled(BaseException):
    """Raised inside a shielded call whose caller was interrupted."""


class ShieldedCall:
    """A call that is made once, by the first thread to run it.

    Parameters
    ----------
    function : callable
        Called without arguments.
    is_atomic : bool
        Whether the call, once begun, cannot be cancelled.
    """

    def __init__(self, function: Callable[[], Any], *, is_atomic: bool = False) -> None:
        self._function = function
        self._is_atomic = is_atomic
        self._context = contextvars.copy_context()
        self._pid = os.getpid()
        self._runners: dict[None, int] = {}  # at most one: the first thread to enter itself
        self.done = Latch()
        self.result: Any = None
        self.error: BaseException | None = None
        self._is_cancelled = False

    def start(self, prepare: Callable[[], object] = object) -> None:
        """Run the call on a thread that the end of the program waits for, after ``prepare()``.

        Where no thread can be started, run it here.
        """

        def run_in_thread() -> None:
            prepare()
            self.run()

        def start() -> None:
            try:
                # Without daemon=False Python 3.11 asks who calls, and lists the caller for ever.
                threading.Thread(
                    target=run_in_thread, name="dvkernels-shielded-call", daemon=False
                ).start()
            except (RuntimeError, MemoryError):
                run_in_thread()

        try:
            _thread.start_new_thread(start, ())
        except (RuntimeError, MemoryError):
            self.run()

    def run(self) -> None:
        """Make the call, unless another thread is making it or has made it."""
        own = threading.get_ident()
        if self.done.is_open or self._runners.setdefault(None, own) != own:  # atomic
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
        """Wait until the call is done. If no thread has begun it, or can, make it here."""
        while not self.done.wait(_BEGIN_SECONDS):
            runner = self._runners.get(None)
            if runner is None or runner == threading.get_ident():
                self.run()
            elif self._pid != os.getpid() or runner not in thread_frames.current_frames():
                self.error = RuntimeError("the thread that made a shielded call is gone")
                self.done.open()

    def cancel(self) -> None:
        """Let the call end at its next ``check``; if it has not begun, it will not be made."""
        self._is_cancelled = True
        self.run()

    def check(self) -> None:
        """Raise :class:`Cancelled` if the call is cancelled and not atomic."""
        if self._is_cancelled and not self._is_atomic:
            raise Cancelled

    def outcome(self) -> Any:
        """Return the result of the call, or raise its error."""
        error, self.error = self.error, None
        if error is None:
            return self.result
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def _call(self) -> Any:
        token = _current.set(self)
        try:
            return self._function()
        finally:
            _current.reset(token)  # else the context and this call would refer to each other


_current: contextvars.ContextVar[ShieldedCall | None] = contextvars.ContextVar(
    "shielded_call", default=None
)


def current() -> ShieldedCall | None:
    """Return the shielded call that this thread is making, if any."""
    return _current.get()


def beyond_interrupts(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function on a thread that no interrupt reaches, and return its result.

    Ctrl-C during an import would leave a package half imported, and during a compilation a lock
    taken. An interrupt ends the wait of the caller; the function runs to its end.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return function(*arguments)
    call = ShieldedCall(functools.partial(function, *arguments))
    call.start()
    call.wait()
    return cast("_T", call.outcome())


def uninterrupted(function: Callable[[], Any], *, is_atomic: bool = False) -> Any:
    """Call a function on a thread that no interrupt reaches, and return its result.

    An interrupt cancels the call, and is raised when the call has ended. An atomic call is not
    cancelled once it has begun.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return function()
    call = ShieldedCall(function, is_atomic=is_atomic)
    interrupt: BaseException | None = None
    is_started = False
    while True:
        try:
            if call.done.is_open:
                break
            if not is_started:
                is_started = True
                try:
                    _thread.start_new_thread(call.run, ())
                except (RuntimeError, MemoryError):  # no thread can be started
                    call.run()
            call.wait()
        except BaseException as error:
            interrupt = error
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                call.cancel()
            except BaseException:
                pass  # the first interrupt is raised below
    if interrupt is not None:
        raise interrupt from call.error
    return call.outcome()
