"""Something that is under way, and how to wait for it without waiting in vain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol, final

__all__ = ["AllRequests", "Finish", "Request", "finish"]

_TESTS_PER_LOOK = 100  # about 50 us of asking MPI
_BUSY_SECONDS = 2.0  # MPI moves data only while it is asked
_LOOK_SECONDS = 0.1
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 20e-6, 1e-3


class Request(Protocol):
    """Something that MPI, a GPU or another worker is doing."""

    def Test(self) -> bool:
        """Tell whether it is done."""


Finish = Callable[[Request], None]


@final
class AllRequests:
    """Several requests as one."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._left = list(requests)

    def Test(self) -> bool:
        """Tell whether all are done."""
        self._left = [request for request in self._left if not request.Test()]
        return not self._left


def finish(request: Request, look: Callable[[float], None]) -> None:
    """Return when a request is done.

    Parameters
    ----------
    request : Request
    look : callable
        Told ten times a second for how many seconds this has waited; raises if it is in vain.
    """
    began = time.monotonic()
    next_look, nap = _LOOK_SECONDS, _NAP_SECONDS
    while True:
        for _ in range(_TESTS_PER_LOOK):
            if request.Test():
                return
        waited = time.monotonic() - began
        if waited > next_look:
            look(waited)
            next_look = waited + _LOOK_SECONDS
        if waited < _BUSY_SECONDS:
            time.sleep(0)  # others may need this core
        else:
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_SECONDS)
