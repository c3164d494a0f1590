"""Point-to-point messages between workers: the protocol that the collectives need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

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


def all_complete(requests: Iterable[Request]) -> Callable[[], bool]:
    """Return a function that tests requests, and returns whether all are complete."""
    pending = list(requests)

    def test() -> bool:
        pending[:] = [request for request in pending if not request.Test()]
        return not pending

    return test
