"""Coordinator statistics: calls that wait, run and have ended, and what the servers were asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dvkernels.errors import DvKernelsError
from dvkernels.variables.request_counts import RequestTotals
from dvkernels.variables.table_server import TableServer
from dvkernels.variables.variable import storage_of, variables_of

__all__ = ["CoordinatorStats", "ServerStats"]


@dataclass(frozen=True)
class ServerStats:
    """What one server was asked for the variables that exist.

    Attributes
    ----------
    rank : int
        The process that serves; 0 where the variables lie in the coordinator's process.
    reads, writes : int
        Requests. One that writes several variables counts for each of them.
    rows_read, rows_written : int
        Their rows; a variable of shape () has one.
    staleness : float
        The mean, over the writes of those who had read the variable before, of the number of
        writes by others in between: 0 in step.
    max_staleness : int
        The largest of these numbers.
    busy_seconds : float
        Time spent in requests [s]; 0 where the workers themselves carry them out, as threads.
    most_waiting : int
        The most processes whose requests were waiting at one time; 0 likewise.
    """

    rank: int
    reads: int
    writes: int
    rows_read: int
    rows_written: int
    staleness: float
    max_staleness: int
    busy_seconds: float
    most_waiting: int


@dataclass(frozen=True)
class CoordinatorStats:
    """Statistics of a coordinator, since it was made.

    Attributes
    ----------
    seconds : float
        How long ago that was [s].
    queued, running : int
        Calls that wait for a worker, and that workers run.
    returned, failed : int
        Calls that have ended, with a result or an error of theirs.
    repeated : int
        Runs that were lost with their workers; the calls ran again.
    servers : tuple of ServerStats
        What the servers were asked, by all processes.
    """

    seconds: float
    queued: int
    running: int
    returned: int
    failed: int
    repeated: int
    servers: tuple[ServerStats, ...]

    @property
    def rows_per_second(self) -> float:
        """Rows that all servers have read and written, by the time since the beginning."""
        rows = sum(server.rows_read + server.rows_written for server in self.servers)
        return rows / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.returned} calls returned, {self.failed} failed, {self.repeated} ran again, "
            f"{self.queued} wait, {self.running} run; {self.rows_per_second:,.0f} rows/s"
        ]
        for each in self.servers:
            lines.append(
                f"server {each.rank}: {each.reads} reads of {each.rows_read} rows, {each.writes} "
                f"writes of {each.rows_written}; staleness {each.staleness:.1f}, at most "
                f"{each.max_staleness}; busy for {each.busy_seconds:.3f} s, at most "
                f"{each.most_waiting} waiting"
            )
        return "\n".join(lines)


def servers_of(strategy: Any) -> tuple[ServerStats, ...]:
    """Return the statistics of a strategy's servers, which are asked if they are processes."""
    if strategy.processes is not None:
        return tuple(
            _server_stats(rank, *report) for rank, report in strategy.processes.reports().items()
        )
    total = RequestTotals()
    for variable in variables_of(strategy.placement):
        copies = storage_of(variable)
        if isinstance(copies.server, TableServer) and not copies.is_slot:  # which has no own one
            total = total.plus(copies.server.counts.totals)
    return (_server_stats(0, total, 0.0, 0),)


def counters(coordinator: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the counters of a trace, and their values by series, at present."""
    with contextlib.suppress(DvKernelsError):  # a lost server: its users are told
        stats = coordinator.stats()
        yield "calls", {"queued": stats.queued, "running": stats.running}
        for each in stats.servers:
            yield f"requests of server {each.rank}", {"reads": each.reads, "writes": each.writes}
            rows = {"read": each.rows_read, "written": each.rows_written}
            yield f"rows of server {each.rank}", rows
            yield f"staleness of server {each.rank}", {"mean": each.staleness}


def _server_stats(
    rank: int, totals: RequestTotals, busy_seconds: float, most_waiting: int
) -> ServerStats:
    followed = totals.writes_after_reads
    return ServerStats(
        rank,
        totals.reads,
        totals.writes,
        totals.rows_read,
        totals.rows_written,
        totals.staleness / followed if followed else 0.0,
        totals.max_staleness,
        busy_seconds,
        most_waiting,
    )
