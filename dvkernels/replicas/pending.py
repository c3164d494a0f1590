"""Pending calls of a step: asynchronous collectives that are issued, awaited, or under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dvkernels.errors import ContextError
from dvkernels.profiler.collective_hooks import CollectiveEvent
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.progress_thread import ProgressThread
from dvkernels.threads.claim import Claim
from dvkernels.threads.thread import Latch

__all__: list[str] = []

_CHECK_SECONDS = 1.0  # how often a waiting thread checks that the progress thread still runs


class PendingCall:
    """Asynchronous collective, performed once all replicas have issued it."""

    __slots__ = ("call_sites", "claim", "done", "events", "is_over", "requests", "results")

    def __init__(self, num_replicas: int) -> None:
        self.requests: list[CollectiveCall | None] = [None] * num_replicas
        self.call_sites = [""] * num_replicas
        self.events: list[CollectiveEvent | None] = [None] * num_replicas  # for hooks
        self.results: Sequence[Any] = ()
        self.done = Latch()  # opens when there are results, or the step has failed
        self.is_over = Latch()  # opens when the thread that performs it has finished
        self.claim = Claim()  # to perform the call, or to cancel it

    @property
    def is_complete(self) -> bool:
        """Whether all replicas have issued the call."""
        return None not in self.requests


class PendingCalls:
    """Pending calls of one step: the k-th call of a replica matches the k-th of each other."""

    __slots__ = ("_issued", "awaited", "calls", "has_awaited", "progress_thread")

    def __init__(self, num_replicas: int, progress_thread: ProgressThread) -> None:
        self.progress_thread = progress_thread
        self.calls: dict[int, PendingCall] = {}  # by number
        # The call that each replica waits, or last waited, for; whether any has waited for one.
        self.awaited: list[PendingCall | None] = [None] * num_replicas
        self.has_awaited = False
        self._issued = [0] * num_replicas

    def issue(self, replica: int, request: CollectiveCall, call_site: str) -> PendingCall:
        """Record a call of a replica; return the pending call that it is part of."""
        number = self._issued[replica]
        pending = self.calls.get(number) or self.calls.setdefault(
            number, PendingCall(len(self._issued))
        )
        pending.call_sites[replica] = call_site
        pending.requests[replica] = request
        self._issued[replica] = number + 1
        return pending

    def is_deserted(self, replica: int, has_left: Sequence[bool]) -> bool:
        """Return whether a replica that has left can never issue the latest call of ``replica``."""
        number = self._issued[replica]
        return any(
            left and issued < number for left, issued in zip(has_left, self._issued, strict=True)
        )

    def is_behind(self, replica: int) -> bool:
        """Return whether other replicas have issued calls that this one has not."""
        return self._issued[replica] < len(self.calls)

    def is_stuck(self, requests: Sequence[CollectiveCall | None]) -> bool:
        """Return whether all replicas wait, some of them for calls that none can issue now.

        ``requests`` are those of the replicas that wait at the rendezvous.
        """
        # Read first: a replica that waits at the rendezvous has issued its earlier calls.
        arrived = tuple(requests)
        incomplete = 0
        for request, pending in zip(arrived, self.awaited, strict=True):
            if request is None and pending is not None and not pending.done.is_open:
                incomplete += not pending.is_complete
        return 0 < incomplete == arrived.count(None)

    def will_be_performed(self, pending: PendingCall) -> bool:
        """Return whether all replicas have issued the call, and a thread serves the queue."""
        return pending.is_complete and self.progress_thread.is_served

    def issued_by(self, replica: int) -> PendingCall | None:
        """Return the first call that a replica has issued and others have not."""
        for pending in tuple(self.calls.values()):
            if pending.requests[replica] and not pending.is_complete:
                return pending
        return None

    def wake(self) -> None:
        """Wake the replicas that wait for a call, because the step has failed."""
        for pending in tuple(self.calls.values()):
            pending.done.open()

    def drain(self, has_failed: Callable[[], bool], fail: Callable[[BaseException], None]) -> None:
        """Wait for the progress thread: it reads arrays that belong to the caller afterwards.

        If the step has failed, cancel the calls that it has not begun.
        """
        for pending in tuple(self.calls.values()):
            while pending.is_complete and not pending.is_over.is_open:
                if has_failed() and pending.claim.take():
                    break
                if not pending.is_over.wait(_CHECK_SECONDS) and not self.progress_thread.is_served:
                    if has_failed():
                        break
                    fail(ContextError("the thread that carries out collectives has ended"))

    def clear(self) -> None:
        """Drop all calls."""
        self.calls = {}
        self.awaited = [None] * len(self.awaited)
