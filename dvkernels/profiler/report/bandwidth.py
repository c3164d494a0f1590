"""Bandwidth that collectives attained, by call and size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dvkernels.profiler.report.arrivals import ordinals
from dvkernels.profiler.report.trace_table import TraceTable

__all__ = ["Bandwidth", "bandwidths"]

_SHORTEST = 1e-10  # seconds: the clock has nanoseconds


class Bandwidth(NamedTuple):
    """Bandwidth of the calls of one verb on arrays of one size.

    ``algbw`` is the bytes of one replica over the median time.
    """

    verb: str
    nbytes: int  # of one replica
    dtype: str
    num_replicas: int
    num_calls: int
    median_seconds: float
    best_seconds: float
    attained: float | None  # median part of the speed that the cost model allows; None: not known

    @property
    def algbw(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.median_seconds


def bandwidths(table: TraceTable) -> list[Bandwidth]:
    """Return the bandwidth by verb, bytes, dtype and replicas, in this order.

    Of a collective between workers the shortest time of a worker counts: the others, which came
    earlier, waited as well.
    """
    is_reduce = table.is_a("category", "collective") & table.is_a("name", "reduce")
    rows = np.flatnonzero(is_reduce & (table.nbytes > 0) & (table.duration > _SHORTEST))
    if not len(rows):
        return []
    keys = table.strategy[rows], table.step[rows], table.call[rows], table.worker[rows]
    order, number = ordinals(keys, table.begin[rows])
    rows = rows[order]
    meeting = np.stack([table.strategy[rows], table.step[rows], table.call[rows], number])
    _, first, of_row = np.unique(meeting, axis=1, return_index=True, return_inverse=True)
    seconds = np.full(len(first), np.inf)
    np.minimum.at(seconds, of_row.ravel(), table.duration[rows])
    rows = rows[first]
    verbs, verb = np.unique(table.verbs()[rows], return_inverse=True)
    kind = np.stack([verb, table.nbytes[rows], table.dtype[rows], table.replicas[rows]])
    kinds, of_kind = np.unique(kind, axis=1, return_inverse=True)
    result = []
    for number, (verb, nbytes, dtype, replicas) in enumerate(kinds.T):
        of = of_kind.ravel() == number
        attained = table.attained[rows][of]
        known = attained[np.isfinite(attained)]
        found = Bandwidth(
            str(verbs[verb]), int(nbytes), table.texts[dtype], int(replicas), int(of.sum()),
            float(np.median(seconds[of])), float(seconds[of].min()),
            float(np.median(known)) if len(known) else None,
        )  # fmt: skip
        result.append(found)
    return result
