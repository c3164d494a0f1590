"""Point-to-point messages between workers: the protocol that the collectives need."""

from __future__ import annotations

from typing import Any, Protocol

from dvkernels.communicators.workers.mpi.request import Request

__all__: list[str] = []


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

    def send(self, array: Any, to: int, tag: int) -> Request:
        """Send an array to a worker."""

    def receive(self, array: Any, source: int, tag: int) -> Request:
        """Receive an array of the same length from a worker."""

    def all_gather(self, own: Any, gathered: Any) -> PersistentRequest:
        """Return a repeatable all-gather of ``own`` bytes to the rows of ``gathered``."""

    def progress(self) -> None:
        """Progress all messages: another worker may wait for this one's."""
