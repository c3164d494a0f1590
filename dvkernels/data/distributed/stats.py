"""Input statistics: time, bytes and batches of an iterator, and a warning if it is input-bound."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from dvkernels.data.array_nest import Element, nbytes_of
from dvkernels.data.cursor import Cursor
from dvkernels.data.distributed.balancer import Balancer
from dvkernels.data.error_policy import SkippedElements
from dvkernels.profiler import tracing
from dvkernels.profiler.debugging import LOGGER

__all__ = ["InputStats", "StatsRecorder"]

_WARN_AFTER_BATCHES = 100
_WARN_SHARE = 0.5  # of the time between batches


@dataclass(frozen=True)
class InputStats:
    """Input statistics of one iterator.

    Attributes
    ----------
    num_batches : int
        Batches delivered.
    nbytes : int
        Bytes of their arrays.
    wait_seconds : float
        Time spent in ``next`` [s].
    fetch_seconds : float
        Time to compute the elements [s]; with prefetching it overlaps with other work.
    copy_seconds : float
        Time of the host to copy batches to GPUs [s]: to fill page-locked memory and to start the
        transfers, which overlap with other work. 0 where parts are views of the batch.
    elapsed_seconds : float
        Time from the first ``next`` to the end of the last [s].
    queue_depth, prefetch : int
        Prefetched batches that are ready now, and the most there can be.
    num_skipped : int
        Elements that failed and were skipped, under ``on_error="skip"``.
    skipped : tuple of str
        The first hundred of them: the error, and where it happened.
    shares : tuple of float
        Under ``balance="measured"``, the share of each local replica in this worker's rows of a
        batch; else empty.
    seconds_per_element : tuple of float
        Under ``balance="measured"``, the measured time of each local replica [s], without waits in
        collectives; empty until enough steps have been measured.
    first_wait_seconds : float
        Time spent in the first ``next`` [s], which is part of ``wait_seconds``.
    """

    num_batches: int
    nbytes: int
    wait_seconds: float
    fetch_seconds: float
    copy_seconds: float
    elapsed_seconds: float
    queue_depth: int
    prefetch: int
    num_skipped: int
    skipped: tuple[str, ...]
    shares: tuple[float, ...] = ()
    seconds_per_element: tuple[float, ...] = ()
    first_wait_seconds: float = 0.0

    @property
    def headspace(self) -> float | None:
        """How many times as fast the steps would be if data cost nothing; None before two batches.

        Between the end of the first ``next`` and the end of the last, a time T passes, of which
        the later calls of ``next`` take W. Without them the same steps take T - W, so the headspace
        is T / (T - W): 1.0 where nothing is waited for, 2.0 where the input takes half of the time.
        The first ``next`` is left out, which starts threads, opens files and compiles. What the
        steps lose to threads that prefetch on the same cores is not in W, so the headspace is at
        least this. Over several workers W contains waits for the input of other workers.
        """
        lasted = self.elapsed_seconds - self.first_wait_seconds
        waited = self.wait_seconds - self.first_wait_seconds
        if self.num_batches < 2 or lasted <= 0:
            return None
        return lasted / (lasted - waited) if waited < lasted else math.inf


class StatsRecorder:
    """Recorder of the input statistics: of the times of the batches, and of skipped elements."""

    __slots__ = (
        "_began", "_copied", "_ended", "_first_wait", "_nbytes", "_num_batches", "_wait", "skips"
    )  # fmt: skip

    def __init__(self, on_error: str) -> None:
        self.skips = SkippedElements() if on_error == "skip" else None
        self._num_batches = self._nbytes = 0
        self._wait = self._began = self._ended = self._copied = self._first_wait = 0.0

    def count_copy(self, seconds: float) -> None:
        """Add the time of a copy to devices."""
        self._copied += seconds

    def count(self, began: float, elements: list[Element]) -> None:
        """Count a batch that was requested at ``began``."""
        now = time.perf_counter()
        if self._num_batches == 0:
            self._began = began
            self._first_wait = now - began
        self._ended = now
        self._num_batches += 1
        self._wait += now - began
        nbytes = 0
        for element in elements:
            nbytes += nbytes_of(element)
        self._nbytes += nbytes
        if tracing.active is not None:
            tracing.active.add("next", "input", round(began * 1e9), {"bytes": nbytes})
        if self._num_batches == _WARN_AFTER_BATCHES:
            self._warn()

    def _warn(self) -> None:
        elapsed = self._ended - self._began
        if self._wait < _WARN_SHARE * elapsed:
            return
        LOGGER.warning(
            "input sets the pace: %.0f %% of the time of %d batches went into waiting for them; "
            "keep some ready with prefetch, share the work with map(num_workers=...), or read "
            "larger batches",
            100 * self._wait / elapsed, self._num_batches,
        )  # fmt: skip

    def stats(self, cursor: Cursor, prefetch: int, balancer: Balancer | None = None) -> InputStats:
        """Return the statistics so far."""
        fetch_seconds, skips = cursor.fetch_seconds, self.skips
        return InputStats(
            num_batches=self._num_batches,
            nbytes=self._nbytes,
            wait_seconds=self._wait,
            fetch_seconds=self._wait if fetch_seconds is None else fetch_seconds,
            copy_seconds=self._copied,
            elapsed_seconds=self._ended - self._began,
            queue_depth=cursor.num_ready,
            prefetch=prefetch,
            num_skipped=0 if skips is None else skips.count,
            skipped=() if skips is None else tuple(skips.listed),
            shares=() if balancer is None else balancer.shares,
            seconds_per_element=() if balancer is None else balancer.seconds_per_element,
            first_wait_seconds=self._first_wait,
        )
