"""Requests: pending operations, and the type of functions that wait for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, final

__all__ = ["AllRequests", "Finish", "Request"]


class Request(Protocol):
    """Pending operation of MPI or of another worker; named as in mpi4py."""

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
