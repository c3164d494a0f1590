"""Lets one thread at a time use an iterator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from threading import get_ident
from typing import TypeVar

from dvkernels import deadlines
from dvkernels.errors import DatasetError

__all__ = ["MutualExclusion"]

T = TypeVar("T")

_CLOSE_SECONDS = 5.0  # that closing waits for another thread which is at it
_FIRST_NAP_SECONDS = 1e-4
_LAST_NAP_SECONDS = 0.05


class MutualExclusion:
    """Has one thread at a time at something; the others wait for their turn.

    An interrupt at any moment leaves it free, and none can strike between the end of the work and
    the return: it is taken by one call, which says whose it is, and given up without any. That is
    why it is no lock. Those that wait look now and then; that is rare.
    """

    __slots__ = ("_owner", "_pid")

    def __init__(self) -> None:
        self._owner: dict[str, tuple[int]] = {}  # used once: who is done leaves a new one
        self._pid = os.getpid()

    def take(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, when nobody else is at it."""
        me = (get_ident(),)
        try:
            if self._owner.setdefault("now", me) is not me:
                self._wait(me)
            return work()
        finally:
            if "now" in self._owner and self._owner["now"] is me:
                self._owner = {}

    def end(self, work: Callable[[], None], stop: Callable[[], None]) -> None:
        """Do ``work`` when nobody else is at it; who is, is told to ``stop``, for a few seconds."""
        me = (get_ident(),)
        try:
            if self._come(me, _CLOSE_SECONDS, stop):
                work()
        finally:
            if "now" in self._owner and self._owner["now"] is me:
                self._owner = {}

    def _wait(self, me: tuple[int]) -> None:
        patience = deadlines.timeout_seconds()
        if self._come(me, patience, _do_nothing):
            return
        if self._owner.get("now", me)[0] == me[0]:
            raise DatasetError(
                "expected an iterator that is not in use; got one whose next element is just being "
                "made: a function or a source of its dataset uses it; make another iterator there"
            )
        raise DatasetError(
            f"expected the iterator to be free within {patience:g} s; another thread is still at "
            "it; give each thread an iterator of its own, or set DVKERNELS_TIMEOUT_SECONDS if an "
            "element takes that long"
        )

    def _come(self, me: tuple[int], patience: float, stop: Callable[[], None]) -> bool:
        """Wait for the turn; False if it does not come, or this very thread is at it."""
        if self._pid != os.getpid():  # whoever is at it stayed in the parent of this fork
            self._owner, self._pid = {}, os.getpid()
        nap, late = _FIRST_NAP_SECONDS, time.monotonic() + patience
        while (owner := self._owner.setdefault("now", me)) is not me:
            if owner[0] == me[0] or time.monotonic() > late:
                return False
            stop()
            time.sleep(nap)
            nap = min(2 * nap, _LAST_NAP_SECONDS)
        return True


def _do_nothing() -> None:
    """Let whoever is at it go on."""
