"""Point-to-point messages between workers: the protocol that the collectives need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias, final

from dvkernels.devices.array_spec import HostArray

__all__: list[str] = []

# Waits until a function returns True, or raises.
Finish: TypeAlias = Callable[[Callable[[], bool]], None]


class Request(Protocol):
    """Pending operation of MPI or of another worker; named as in mpi4py."""

    def Test(self) -> bool:
        """Return whether the operation is complete."""


class PersistentRequest(Request, Protocol):
    """Request that can be started again and again, as in mpi4py."""

    def Start(self) -> None:
        """Start the operation."""

    def Free(self) -> None:
        """Free the request."""


@final
class AllRequests:
    """Request that is complete when several requests are."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._pending = list(requests)

    def Test(self) -> bool:
        """Return whether all requests are complete."""
        self._pending = [request for request in self._pending if not request.Test()]
        return not self._pending


class PointToPoint(Protocol):
    """Non-blocking messages of flat arrays between workers.

    The caller leaves an array alone until its request is complete. Messages of one tag between two
    workers are received in the order in which they were sent.
    """

    rank: int
    size: int

    def send(self, array: HostArray, to: int, tag: int) -> Request:
        """Send an array to a worker."""

    def receive(self, array: HostArray, source: int, tag: int) -> Request:
        """Receive an array of the same length from a worker."""

    def all_gather(self, own: HostArray, gathered: HostArray) -> PersistentRequest:
        """Return a repeatable all-gather of ``own`` bytes to the rows of ``gathered``."""

    def progress(self) -> None:
        """Progress all messages: another worker may wait for this one's."""
