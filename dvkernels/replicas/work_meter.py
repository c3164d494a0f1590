"""Work meter: the seconds that each replica has worked in its steps, without its waits for others.

The time of a replica in a collective, the reduction included, is no work of its own: it is that of
the slowest replica.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.pending import PendingCall
from dvkernels.replicas.rendezvous import Rendezvous

__all__: list[str] = []

# The host waits for the streams in one step of so many, a prime: programs of two or more kinds of
# steps have each kind measured in turn.
_PERIOD_ON_STREAMS = 7


class WorkReading(NamedTuple):
    """Reading of a meter: the steps so far, and the seconds of work of each replica in them."""

    num_steps: int
    seconds: tuple[float, ...]


class WorkMeter:
    """Meter of the work of the replicas of one strategy, in the steps that ended well."""

    __slots__ = ("_steps", "finish", "reading", "shares")

    def __init__(self, num_replicas: int) -> None:
        self._steps = itertools.count()
        # Waits for the work that a replica has put on its stream; None: there are no streams.
        self.finish: Callable[[int], None] | None = None
        # The latest shares of the work that suited the speeds; empty: none are known.
        self.shares: tuple[float, ...] = ()
        self.reading = WorkReading(0, (0.0,) * num_replicas)

    def rendezvous(self, *args: Any) -> Rendezvous:
        """Return the rendezvous of a step, to be measured; of some steps where there are streams.

        The parameters are those of :class:`Rendezvous`.
        """
        if self.finish is not None and next(self._steps) % _PERIOD_ON_STREAMS:
            return Rendezvous(*args)
        return MeteredRendezvous(self, *args)

    def add(self, seconds: Sequence[float]) -> None:
        """Count a step in which the replicas worked for so many seconds."""
        num_steps, before = self.reading
        total = tuple(map(float.__add__, before, seconds))
        self.reading = WorkReading(num_steps + 1, total)  # at once, for readers in other threads


class MeteredRendezvous(Rendezvous):
    """Rendezvous that measures the time of each replica outside of collectives."""

    __slots__ = ("_began", "_meter", "_worked")

    def __init__(self, meter: WorkMeter, num_replicas: int, *args: Any) -> None:
        super().__init__(num_replicas, *args)
        self._meter = meter
        self._began = [0.0] * num_replicas  # when the replica last began to work
        self._worked = [0.0] * num_replicas

    def resume(self, replica: int) -> None:
        """Start the clock of a replica, once its stream is empty."""
        if self._meter.finish is not None:
            self._meter.finish(replica)
        self._began[replica] = perf_counter()

    def pause(self, replica: int) -> None:
        """Stop the clock of a replica, once its stream is empty."""
        if self._meter.finish is not None:
            self._meter.finish(replica)
        self._count(replica)

    def _count(self, replica: int) -> None:
        now = perf_counter()
        self._worked[replica] += now - self._began[replica]
        self._began[replica] = now

    def meet(self, replica: int, request: CollectiveCall, is_observed: bool = False) -> Any:
        """Perform a collective with the other replicas, which is not counted as work."""
        self.pause(replica)
        result = super().meet(replica, request, is_observed)
        self.resume(replica)
        return result

    def await_pending(self, replica: int, pending: PendingCall, is_observed: bool = False) -> Any:
        """Wait for an asynchronous collective, which is not counted as work."""
        self.pause(replica)
        result = super().await_pending(replica, pending, is_observed)
        self.resume(replica)
        return result

    # A replica enters and leaves whatever happens, so nothing is waited for there.

    def enter(self, replica: int) -> bool:
        """Register this thread as a replica's, and start its clock."""
        self._began[replica] = perf_counter()
        return super().enter(replica)

    def leave(self, replica: int) -> int:
        """Stop the clock, and record that this replica's function has ended."""
        self._count(replica)
        return super().leave(replica)

    def end(self) -> None:
        """Close the step, and report its work unless it has failed."""
        has_failed = self.failure is not None or False in self._has_left
        super().end()
        if not has_failed:
            self._meter.add(self._worked)
