"""The median time of a call, for the ``track_*`` benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def median_seconds(
    call: Callable[[], object], *, min_calls: int = 7, budget_seconds: float = 0.5
) -> float:
    """Return the median time of ``call``, over at least ``min_calls`` and about the budget."""
    durations_ns = []
    end = time.perf_counter() + budget_seconds
    while len(durations_ns) < min_calls or time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        durations_ns.append(time.perf_counter_ns() - start)
    return statistics.median(durations_ns) / 1e9
