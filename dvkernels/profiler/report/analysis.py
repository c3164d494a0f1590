"""Analysis of a trace: all sections of its report, as plain data for JSON, text and the page."""

from __future__ import annotations

from typing import Any, NamedTuple

from dvkernels.profiler.report import advice as rules
from dvkernels.profiler.report import arrivals, bandwidth, memory_series, time_split, timeline
from dvkernels.profiler.report.advice import Advice
from dvkernels.profiler.report.arrivals import Lateness
from dvkernels.profiler.report.bandwidth import Bandwidth
from dvkernels.profiler.report.memory_series import MemorySeries
from dvkernels.profiler.report.time_split import ReplicaTime
from dvkernels.profiler.report.timeline import SpanTotal
from dvkernels.profiler.report.trace_table import TraceTable, WorkerFacts

__all__ = ["Analysis", "analyse"]


class Analysis(NamedTuple):
    """Sections of a report."""

    workers: list[WorkerFacts]
    num_spans: int
    seconds: float
    times: list[ReplicaTime]
    bandwidths: list[Bandwidth]
    lateness: list[Lateness]
    memory: list[MemorySeries]
    spans: list[SpanTotal]
    advice: list[Advice]

    def as_json(self) -> dict[str, Any]:
        """Return what JSON can represent; times in seconds, sizes in bytes, rates a second."""
        return {
            "trace": {
                "workers": [each._asdict() for each in self.workers],
                "spans": self.num_spans,
                "seconds": self.seconds,
            },
            "time": [each._asdict() for each in self.times],
            "bandwidth": [{**each._asdict(), "algbw": each.algbw} for each in self.bandwidths],
            "lateness": [each._asdict() for each in self.lateness],
            "memory": [{**each._asdict(), "peak": each.peak} for each in self.memory],
            "spans": [each._asdict() for each in self.spans],
            "advice": [each._asdict() for each in self.advice],
        }


def analyse(table: TraceTable) -> Analysis:
    """Analyse a trace."""
    meetings = arrivals.meetings(table)
    times = time_split.replica_times(table, meetings)
    ranking = arrivals.lateness(table, meetings)
    seconds = float(table.end.max() - table.begin.min()) if len(table) else 0.0
    return Analysis(
        table.workers,
        len(table),
        seconds,
        times,
        bandwidth.bandwidths(table),
        ranking,
        memory_series.memory_series(table),
        timeline.span_totals(table),
        rules.advice(table, times, ranking),
    )
