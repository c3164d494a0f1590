"""Bytes between the workers of several hosts: what can be under way."""

from __future__ import annotations

from typing import Any, Protocol

from dvkernels.communicators.workers.wait import Request

__all__: list[str] = []


class PersistentRequest(Request, Protocol):
    """Something that can be done again and again."""

    def Start(self) -> None:
        """Begin."""

    def Free(self) -> None:
        """Forget it."""


class PointToPoint(Protocol):
    """Carries flat arrays between workers; no call waits.

    An array stays as it is until its request is done. Messages of one tag between two workers are
    received in the order in which they were sent.
    """

    rank: int
    size: int

    def send(self, array: Any, to: int, tag: int) -> Request:
        """Send an array to a worker."""

    def receive(self, array: Any, source: int, tag: int) -> Request:
        """Receive what a worker sends; the array is as long as that."""

    def gather(self, own: Any, held: Any) -> PersistentRequest:
        """Return what brings the bytes of each worker to row ``rank`` of each worker's ``held``."""

    def move(self) -> None:
        """Let data move that nobody asks for here: others may wait for it."""
