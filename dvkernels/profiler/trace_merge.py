"""Merge of the traces of several workers into one, on one clock.

Processes of one host read one clock. Between hosts the offset of two clocks follows from what the
traces hold: no worker ends a collective before every other has begun it, since each waits for the
control messages of all (``communicators/workers/consistency.py``). With the offset d of a worker's
clock against the first worker's, each collective that both took part in says

    begin - end_of_first  <=  d  <=  end - begin_of_first

as a message there and one back would. The middle of what all of them leave is the estimate, and
half its width the uncertainty.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dvkernels.errors import TraceError
from dvkernels.profiler import trace_format
from dvkernels.profiler.atomic_file import AtomicFile
from dvkernels.profiler.trace_format import Record

__all__ = ["ClockOffset", "merge"]

# Collectives in which each worker waits for all others; they are carried out in the spans "reduce".
_MEETINGS = {
    "all_gather", "all_reduce", "all_reduce_async", "apply_gradients", "barrier", "broadcast",
    "reduce_scatter",
}  # fmt: skip
_BETWEEN_WORKERS = " on worker "  # in the names of strategies of several workers


class ClockOffset(NamedTuple):
    """Offset of a worker's clock against that of the first worker, and how it was found."""

    worker: int
    offset_ns: int
    uncertainty_ns: int | None  # None: unknown
    method: str  # "same clock", "collectives", or "system time"


class _WorkerTrace(NamedTuple):
    about: Mapping[str, Any]
    events: list[Record]

    @property
    def worker(self) -> int:
        return int(self.about["worker"])

    @property
    def base(self) -> int:
        return int(self.about["clock_base_ns"])


class _Meeting(NamedTuple):
    """A worker's part of a collective, by its own clock [ns]."""

    began: int
    ended: int
    event: Record


def merge(
    paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> list[ClockOffset]:
    """Merge the traces of the workers of one job into one file; return the offsets of their clocks.

    Raises
    ------
    TraceError
        A file is not a trace of this package, or two are of the same worker.
    OSError
        A file cannot be read, or the output not be written; an old output stays as it is.
    """
    traces = sorted((_read(Path(path)) for path in paths), key=lambda found: found.worker)
    workers = [found.worker for found in traces]
    if len({*workers}) < len(workers) or not workers:
        raise TraceError(
            f"expected one trace of each worker of a job; got those of the workers {workers}"
        )
    meetings = [_meetings(found) for found in traces]
    offsets = [
        _offset(traces[0], found, meetings[0], own)
        for found, own in zip(traces, meetings, strict=True)
    ]
    start = min(found.base - each.offset_ns for found, each in zip(traces, offsets, strict=True))
    shifts = [
        (found.base - each.offset_ns - start) / 1e3
        for found, each in zip(traces, offsets, strict=True)
    ]
    about = {
        "workers": [
            {**found.about, **each._asdict()} for found, each in zip(traces, offsets, strict=True)
        ],
        "limit": traces[0].about.get("limit"),
    }
    AtomicFile(output).fill(
        lambda file: trace_format.write_records(
            file, _merged_events(traces, shifts, meetings), about
        )
    )
    return offsets


def _read(path: Path) -> _WorkerTrace:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = _WorkerTrace(content["otherData"], content["traceEvents"])
        _ = found.worker, found.base, found.about["clock"], found.about["unix_ns"] + 0
        for event in found.events:
            if event["ph"] == "X":
                _ = event["ts"] + event["dur"] + 0, event["pid"], event["tid"], {**event["args"]}
            elif "ts" in event:
                _ = event["ts"] + 0
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(
            f"{path} is not a trace of one worker, written by dv.profiler.trace ({error!r})"
        ) from None
    return found


def _meetings(trace: _WorkerTrace) -> dict[tuple[Any, ...], _Meeting]:
    """Return this worker's parts of the collectives between workers; equal keys are one meeting."""
    found: dict[tuple[Any, ...], _Meeting] = {}
    counts: dict[tuple[Any, ...], int] = {}
    for event in trace.events:
        about = event.get("args", {})
        strategy, between, _ = about.get("strategy", "").partition(_BETWEEN_WORKERS)
        verb = about.get("call", "").partition("(")[0]
        if event.get("name") != trace_format.REDUCE or not between or verb not in _MEETINGS:
            continue
        key = strategy.partition("(")[0], about["step"], verb
        counts[key] = counts.get(key, 0) + 1
        began = trace.base + round(event["ts"] * 1e3)
        ended = began + round(event["dur"] * 1e3)
        found[*key, counts[key], about["call"]] = _Meeting(began, ended, event)
    return found


def _offset(
    first: _WorkerTrace,
    other: _WorkerTrace,
    of_first: Mapping[tuple[Any, ...], _Meeting],
    of_other: Mapping[tuple[Any, ...], _Meeting],
) -> ClockOffset:
    worker = other.worker
    if first.about["clock"] == other.about["clock"]:
        return ClockOffset(worker, 0, 0, "same clock")
    both = of_first.keys() & of_other.keys()
    if not both:
        system = (other.base - other.about["unix_ns"]) - (first.base - first.about["unix_ns"])
        return ClockOffset(worker, system, None, "system time")
    lower, upper = -math.inf, math.inf
    for key in both:
        lower = max(lower, of_other[key].began - of_first[key].ended)
        upper = min(upper, of_other[key].ended - of_first[key].began)
    # They have crossed where the clocks drifted apart by more than a collective takes.
    return ClockOffset(
        worker, round((lower + upper) / 2), math.ceil(abs(upper - lower) / 2), "collectives"
    )


def _merged_events(
    traces: Sequence[_WorkerTrace],
    shifts: Sequence[float],
    meetings: Sequence[Mapping[tuple[Any, ...], _Meeting]],
) -> Iterator[Record]:
    for trace, shift in zip(traces, shifts, strict=True):
        for event in trace.events:
            yield event | {"ts": event["ts"] + shift} if "ts" in event else event
    yield from _arrows(shifts, meetings)


def _arrows(
    shifts: Sequence[float], meetings: Sequence[Mapping[tuple[Any, ...], _Meeting]]
) -> Iterator[Record]:
    """Yield the arrows from the last worker to begin a collective to the others."""
    number = 0
    for key in meetings[0]:
        parts = [own.get(key) for own in meetings]
        present = [
            (part.event, part.event["ts"] + shift)
            for part, shift in zip(parts, shifts, strict=True)
            if part is not None
        ]
        if len(present) < len(parts) or len(parts) == 1:
            continue
        last, began = max(present, key=lambda found: found[1])
        for event, start in present:
            if event is not last:
                number += 1
                finish = event, start + event["dur"]
                yield from trace_format.arrow(
                    f"workers.{number}", "last worker to arrive", (last, began), finish
                )
