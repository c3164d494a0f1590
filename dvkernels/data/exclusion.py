"""Mutual exclusion of the threads that use one iterator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from threading import get_ident
from typing import TypeVar

from dvkernels import deadlines
from dvkernels.errors import DatasetError

__all__: list[str] = []

T = TypeVar("T")

_CLOSE_SECONDS = 5.0  # how long closing waits for the thread inside
_FIRST_SLEEP_SECONDS = 1e-4
_LAST_SLEEP_SECONDS = 0.05


class MutualExclusion:
    """Mutex that is released again whenever an interrupt (Ctrl-C) strikes.

    A ``threading.Lock`` may stay locked: an interrupt may strike between ``acquire`` and ``try``,
    or between the end of the work and ``release``. Here one call, ``dict.setdefault``, acquires
    and names the owner, and the release makes no call. Waiting threads poll; waiting is rare.
    """

    __slots__ = ("_owner", "_pid")

    def __init__(self) -> None:
        self._owner: dict[str, tuple[int]] = {}  # Used once: a release replaces it.
        self._pid = os.getpid()

    def run(self, work: Callable[[], T]) -> T:
        """Call ``work`` once no other thread is inside, and return its result."""
        me = (get_ident(),)
        try:
            if self._owner.setdefault("now", me) is not me:
                self._wait(me)
            return work()
        finally:
            if "now" in self._owner and self._owner["now"] is me:
                self._owner = {}

    def close(self, work: Callable[[], None], stop: Callable[[], None]) -> None:
        """Call ``work`` once no other thread is inside, or not at all after a few seconds.

        While another thread is inside, ``stop`` is called repeatedly to make it leave.
        """
        me = (get_ident(),)
        try:
            if self._acquire(me, _CLOSE_SECONDS, stop):
                work()
        finally:
            if "now" in self._owner and self._owner["now"] is me:
                self._owner = {}

    def _wait(self, me: tuple[int]) -> None:
        timeout = deadlines.timeout_seconds()
        if self._acquire(me, timeout, _do_nothing):
            return
        if self._owner.get("now", me)[0] == me[0]:
            raise DatasetError(
                "expected an iterator that is not in use; got one whose next element is just being "
                "made: a function or a source of its dataset uses it; make another iterator there"
            )
        raise DatasetError(
            f"expected the iterator to be free within {timeout:g} s; another thread still uses "
            "it; give each thread an iterator of its own, or set DVKERNELS_TIMEOUT_SECONDS if an "
            "element takes that long"
        )

    def _acquire(self, me: tuple[int], timeout: float, stop: Callable[[], None]) -> bool:
        """Acquire; False after the timeout, or if this very thread is inside."""
        if self._pid != os.getpid():  # The thread inside stayed in the parent of this fork.
            self._owner, self._pid = {}, os.getpid()
        sleep_seconds, deadline = _FIRST_SLEEP_SECONDS, time.monotonic() + timeout
        while (owner := self._owner.setdefault("now", me)) is not me:
            if owner[0] == me[0] or time.monotonic() > deadline:
                return False
            stop()
            time.sleep(sleep_seconds)
            sleep_seconds = min(2 * sleep_seconds, _LAST_SLEEP_SECONDS)
        return True


def _do_nothing() -> None:
    """Let the thread inside continue."""
