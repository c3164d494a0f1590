"""Requests (pending operations), and the loop that waits for one without waiting in vain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol, final

__all__ = ["AllRequests", "Finish", "Request", "finish"]

_TESTS_PER_CHECK = 100  # about 50 us of asking MPI
_BUSY_SECONDS = 2.0  # MPI moves data only while it is asked
_CHECK_SECONDS = 0.1
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 20e-6, 1e-3


class Request(Protocol):
    """Pending operation of MPI, of a GPU or of another worker; named as in mpi4py."""

    def Test(self) -> bool:
        """Return whether the operation is complete."""


Finish = Callable[[Request], None]


@final
class AllRequests:
    """Request that is complete when several requests are."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._pending = list(requests)

    def Test(self) -> bool:
        """Return whether all requests are complete."""
        self._pending = [request for request in self._pending if not request.Test()]
        return not self._pending


def finish(request: Request, check: Callable[[float], None]) -> None:
    """Wait for a request.

    Parameters
    ----------
    request : Request
    check : callable
        Called ten times a second with the seconds waited so far; raises if waiting is in vain.
    """
    began = time.monotonic()
    next_check, nap = _CHECK_SECONDS, _NAP_SECONDS
    while True:
        for _ in range(_TESTS_PER_CHECK):
            if request.Test():
                return
        waited = time.monotonic() - began
        if waited > next_check:
            check(waited)
            next_check = waited + _CHECK_SECONDS
        if waited < _BUSY_SECONDS:
            time.sleep(0)  # others may need this core
        else:
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_SECONDS)
