"""Timeline: some steps from the middle of a trace, span by span, and the spans of all by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dvkernels.profiler.report.arrivals import Meetings
from dvkernels.profiler.report.time_split import steps_of
from dvkernels.profiler.report.trace_table import TraceTable

__all__ = ["SpanTotal", "Timeline", "span_totals", "timeline"]

_MOST_SPANS = 2000  # that a page shows fluently, also on a phone
_MOST_STEPS = 12


class SpanTotal(NamedTuple):
    """Spans of one name on all lanes."""

    name: str
    category: str
    num_spans: int
    seconds: float
    median_seconds: float
    longest_seconds: float


class Timeline(NamedTuple):
    """Spans of a few whole steps: rows of the trace table, in order of their begin."""

    strategy: str
    begin: float
    end: float
    num_steps: int  # those shown
    num_steps_in_all: int
    rows: Any
    begins: Any  # of the rows; of a collective, once all replicas are there
    names: list[str]  # of the rows; a collective that is carried out has the name of its verb


def _names(table: TraceTable, rows: Any) -> list[str]:
    verbs = table.verbs()[rows]
    return [
        f"{name} ({verb})" if name in ("reduce", "wait") and verb else name
        for name, verb in zip([table.texts[code] for code in table.name[rows]], verbs, strict=True)
    ]


def _begins(table: TraceTable, rows: Any, meetings: Meetings) -> Any:
    """Return the begins of rows; of the reduction inside a call, when its last replica arrived."""
    begins = table.begin[rows].copy()
    last_begin = dict(zip(meetings.rows.tolist(), meetings.last_begin.tolist(), strict=True))
    calls: dict[int, int] = {}  # by lane: the latest call
    for index, row in enumerate(rows.tolist()):
        lane = int(table.lane[row])
        if row in last_begin:
            calls[lane] = row
        elif table.texts[table.name[row]] == "reduce" and lane in calls:
            call = calls[lane]
            if table.end[row] <= table.end[call]:
                begins[index] = min(max(begins[index], last_begin[call]), table.end[row])
    return begins


def span_totals(table: TraceTable) -> list[SpanTotal]:
    """Return the spans by category and name, those that took the longest together first."""
    kinds, of = np.unique(
        np.stack([table.category, table.name]), axis=1, return_inverse=True
    )  # fmt: skip
    totals = []
    for number, (category, name) in enumerate(kinds.T):
        seconds = table.duration[of.ravel() == number]
        total = SpanTotal(
            table.texts[name], table.texts[category], len(seconds), float(seconds.sum()),
            float(np.median(seconds)), float(seconds.max()),
        )  # fmt: skip
        totals.append(total)
    return sorted(totals, key=lambda each: -each.seconds)


def timeline(table: TraceTable, strategy: str, meetings: Meetings) -> Timeline:
    """Return whole steps of a strategy from the middle of the trace: as many as a page can show."""
    worker = int(min(table.worker[table.is_a("strategy", strategy)], default=0))
    steps = steps_of(table, worker, table.code(strategy))
    count = len(steps.begin)
    if not count:
        begin, end = float(table.begin.min(initial=0.0)), float(table.end.max(initial=0.0))
        rows = np.argsort(table.begin, kind="stable")[:_MOST_SPANS]
        return Timeline("", begin, end, 0, 0, rows, table.begin[rows], _names(table, rows))
    for shown in range(min(count, _MOST_STEPS), 0, -1):
        first = (count - shown) // 2
        begin, end = steps.start[first], steps.end[first + shown - 1]
        rows = np.flatnonzero((table.begin < end) & (table.end > begin))
        if len(rows) <= _MOST_SPANS:
            break
    rows = rows[np.argsort(table.begin[rows], kind="stable")][:_MOST_SPANS]
    begins = _begins(table, rows, meetings)
    return Timeline(
        strategy, float(begin), float(end), shown, count, rows, begins, _names(table, rows)
    )
