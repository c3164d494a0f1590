"""Request counts of a table: reads, writes, their rows, and how stale what is written is."""

from __future__ import annotations

from typing import Any, NamedTuple, final

__all__: list[str] = []

_READS = frozenset({"gather_rows", "read_value", "update"})
_NEITHER = frozenset({"deepcopy", "steps"})


class RequestTotals(NamedTuple):
    """Numbers of requests, and of their rows."""

    reads: int = 0
    writes: int = 0
    rows_read: int = 0
    rows_written: int = 0
    writes_after_reads: int = 0  # by somebody who had read the table before
    staleness: int = 0  # of these, in all
    max_staleness: int = 0

    def plus(self, other: RequestTotals) -> RequestTotals:
        """Return the totals of two tables."""
        sums = RequestTotals(*(mine + its for mine, its in zip(self, other, strict=True)))
        return sums._replace(max_staleness=max(self.max_staleness, other.max_staleness))


@final
class RequestCounts:
    """Counts of the requests for one table, which come one at a time.

    The staleness of a write is the number of writes by others since its author last read.
    """

    __slots__ = (
        "_max_staleness", "_num_after", "_reads", "_rows_read", "_rows_written", "_staleness",
        "_versions", "_writes",
    )  # fmt: skip

    def __init__(self) -> None:
        self._reads = self._writes = self._rows_read = self._rows_written = 0
        self._num_after = self._staleness = self._max_staleness = 0
        self._versions: dict[int, int] = {}  # by who reads: the writes that the read has seen

    @property
    def totals(self) -> RequestTotals:
        """All that has been counted."""
        return RequestTotals(
            self._reads, self._writes, self._rows_read, self._rows_written,
            self._num_after, self._staleness, self._max_staleness,
        )  # fmt: skip

    def note(self, who: int, what: str, copies: Any, arrays: tuple[Any, ...]) -> None:
        """Count a request of a thread, or of a process, that is about to be carried out."""
        if what in _NEITHER:
            return
        num_rows = _num_rows(what, copies, arrays)
        versions = self._versions
        if what in _READS:
            self._reads += 1
            self._rows_read += num_rows
            versions[who] = self._writes
            if what != "update":
                return
        self._writes += 1
        self._rows_written += num_rows
        seen = versions.get(who)
        if seen is not None:
            versions[who] = seen + 1  # its own write
            stale = self._writes - seen - 1
            self._num_after += 1
            self._staleness += stale
            self._max_staleness = max(self._max_staleness, stale)


def _num_rows(what: str, copies: Any, arrays: tuple[Any, ...]) -> int:
    """Return the number of rows that a request reads or writes."""
    if what == "gather_rows":
        return int(arrays[0].size)
    if what.startswith("scatter_"):
        return len(arrays[1])
    rows = getattr(arrays[0], "rows", None) if arrays else None  # of a RowGradient
    if rows is not None:
        return len(rows)
    shape = copies.arrays[0].shape
    return int(shape[0]) if shape else 1
