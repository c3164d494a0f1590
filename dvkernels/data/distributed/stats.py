"""How long input took, and whether it sets the pace."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from dvkernels.data.array_nest import nbytes_of
from dvkernels.data.error_policy import SkippedElements
from dvkernels.data.prefetch import Prefetcher
from dvkernels.profiler import tracing
from dvkernels.profiler.debugging import LOGGER

__all__ = ["InputStats", "StatsRecorder"]

_WARN_AFTER_BATCHES = 100
_WARN_SHARE = 0.5  # of the time between batches


@dataclass(frozen=True)
class InputStats:
    """What an iterator has fetched, and how long that took.

    Attributes
    ----------
    num_batches : int
        Delivered.
    nbytes : int
        Of their arrays.
    wait_seconds : float
        That ``next`` took.
    fetch_seconds : float
        That computing the elements took; under prefetching it overlaps with other work.
    copy_seconds : float
        That the host took to copy batches to GPUs: into page-locked memory, and to start the
        transfers, which overlap with other work. 0 where parts are views of the batch.
    elapsed_seconds : float
        From the first ``next`` to the end of the last.
    queue_depth, prefetch : int
        Batches held ready now, and at most.
    num_skipped : int
        Elements left out because they failed, under ``on_error="skip"``.
    skipped : tuple of str
        The first hundred of them: the error, and where it happened.
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


class StatsRecorder:
    """Adds up what each batch took."""

    __slots__ = ("_began", "_copied", "_ended", "_nbytes", "_num_batches", "_wait")

    def __init__(self) -> None:
        self._num_batches = self._nbytes = 0
        self._wait = self._began = self._ended = self._copied = 0.0

    def count_copy(self, seconds: float) -> None:
        """Add what a copy to devices took."""
        self._copied += seconds

    def count(self, began: float, elements: list[Any]) -> None:
        """Count a batch that was asked for at ``began``."""
        now = time.perf_counter()
        if self._num_batches == 0:
            self._began = began
        self._ended = now
        self._num_batches += 1
        self._wait += now - began
        if tracing.active is not None:
            tracing.active.add("next", "input", round(began * 1e9), {})
        for element in elements:
            self._nbytes += nbytes_of(element)
        if self._num_batches == _WARN_AFTER_BATCHES:
            self._warn()

    def _warn(self) -> None:
        elapsed = self._ended - self._began
        if self._wait < _WARN_SHARE * elapsed:
            return
        LOGGER.warning(
            "input sets the pace: %.0f %% of the time of %d batches went into waiting for them; "
            "hold some ready with prefetch, share the work with map(num_workers=...), or read "
            "larger batches",
            100 * self._wait / elapsed, self._num_batches,
        )  # fmt: skip

    def stats(
        self, ahead: Prefetcher | None, prefetch: int, skips: SkippedElements | None
    ) -> InputStats:
        """Return what has been counted."""
        return InputStats(
            num_batches=self._num_batches,
            nbytes=self._nbytes,
            wait_seconds=self._wait,
            fetch_seconds=self._wait if ahead is None else ahead.fetch_seconds,
            copy_seconds=self._copied,
            elapsed_seconds=self._ended - self._began,
            queue_depth=0 if ahead is None else ahead.num_held,
            prefetch=prefetch,
            num_skipped=0 if skips is None else skips.count,
            skipped=() if skips is None else tuple(skips.listed),
        )
