"""Memory over time: the samples of a trace by worker and owner."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dvkernels.profiler.report.trace_table import TraceTable

__all__ = ["PROCESS", "MemorySeries", "memory_series"]

_MOST_POINTS = 500  # of a series, which a page can show
PROCESS = "process"  # owner of the resident memory


class MemorySeries(NamedTuple):
    """Bytes of one owner on one worker, at times in seconds; of many points the peaks."""

    worker: int
    owner: str  # as in ``dv.profiler.memory()``, or "process": its resident memory
    seconds: list[float]
    nbytes: list[int]

    @property
    def peak(self) -> int:
        """The most that any sample saw, as far as it is kept."""
        return max(self.nbytes)


def memory_series(table: TraceTable) -> list[MemorySeries]:
    """Return the series that are not zero throughout, by worker, the largest peak first."""
    found: dict[tuple[int, str], list[tuple[float, int]]] = {}
    for sample in table.samples:
        if sample.counter == "memory":
            values = sample.values
        elif sample.counter == "resident memory":
            values = {PROCESS: sample.values.get("bytes", 0)}
        else:
            continue
        for owner, nbytes in values.items():
            found.setdefault((sample.worker, owner), []).append((sample.seconds, int(nbytes)))
    series = [
        MemorySeries(worker, owner, *map(list, zip(*_thinned(points), strict=True)))
        for (worker, owner), points in found.items()
        if any(nbytes for _, nbytes in points)
    ]
    return sorted(series, key=lambda each: (each.worker, -each.peak, each.owner))


def _thinned(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return at most so many points, of each run of points the largest: peaks stay."""
    points = sorted(points)
    runs = np.array_split(np.arange(len(points)), min(len(points), _MOST_POINTS))
    return [max((points[k] for k in run), key=lambda point: point[1]) for run in runs]
