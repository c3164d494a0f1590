"""Trace format: the file of a trace, in the Trace Event Format of Perfetto and Chrome."""

from __future__ import annotations

import json
import os
import platform
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from dvkernels._version import __version__
from dvkernels.profiler import memory_report
from dvkernels.profiler.collective_hooks import CollectiveEvent
from dvkernels.profiler.process_identity import ProcessIdentity
from dvkernels.schedules import cost_model

__all__: list[str] = []

REDUCE = "reduce"  # name of the part of a collective that one thread carries out for all
_REDUCED = {"all_reduce", "all_reduce_async"}
COUNTER = "counter"  # category of events that are samples of counters
LIMIT = (
    "attained: the time of the cost model of dvkernels.schedules.cost_model.CPU (2 cores of an AMD "
    "EPYC, November 2026, data in caches), divided by the time measured"
)

# name, category, begin and end (perf_counter_ns), index of the lane, and what the span is about:
# a dict or a CollectiveEvent
TraceEvent: TypeAlias = tuple[str, str, int, int, int, Any]
Record: TypeAlias = dict[str, Any]


class Lane:
    """Lane of a trace: a thread, or a stream of a GPU."""

    __slots__ = ("name", "number")

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name


class TraceContent(NamedTuple):
    """Content of a trace that has ended."""

    process: ProcessIdentity
    events: Sequence[TraceEvent]
    lanes: Sequence[Lane]
    num_dropped: int
    others: float | None  # share of the cores' time that other programs took
    threads: Record  # processor time of the threads: ``core_usage.ThreadUsage``


def path_of(path: str | os.PathLike[str], process: ProcessIdentity) -> Path:
    """Return the path of this worker's file: in a job of several, with its number in the name.

    Pipes and devices stay as they are.
    """
    given = Path(os.fsdecode(path))
    if process.num_workers == 1:
        return given
    try:
        if not stat.S_ISREG(os.stat(given).st_mode):
            return given
    except (OSError, ValueError):  # there is none; opening it says what is wrong with it
        pass
    return given.with_name(f"{given.stem}.worker-{process.worker}{given.suffix}")


def sampled() -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the counters of this process, and their values by series, at present."""
    report = memory_report.memory()
    owners: dict[str, float] = dict.fromkeys(memory_report.OWNERS, 0)
    for by_owner in report.by_device.values():
        for owner, nbytes in by_owner.items():
            owners[owner] += nbytes
    yield "memory", owners
    if report.process_nbytes is not None:
        yield "resident memory", {"bytes": report.process_nbytes}
    yield "processor time", {"seconds": time.process_time()}


def write(file: BinaryIO, content: TraceContent) -> None:
    """Write the file of a trace, one event a line."""
    process = content.process
    about = {
        **process._asdict(),
        "clock_base_ns": process.began,
        "dropped_events": content.num_dropped,
        "share_of_other_programs": content.others,
        **content.threads,
        "limit": LIMIT,
        "dvkernels": __version__,
        "python": platform.python_version(),
    }
    write_records(file, _records(content), about)


def write_records(file: BinaryIO, records: Iterable[Record], about: Record) -> None:
    """Write a file of records, in the Trace Event Format, and of other data."""
    file.write(b'{"displayTimeUnit": "ns",\n"otherData": ')
    file.write(json.dumps(about).encode())
    file.write(b',\n"traceEvents": [')
    separator = "\n"
    for record in records:
        file.write(f"{separator}{json.dumps(record)}".encode())
        separator = ",\n"
    file.write(b"\n]}\n")


def _records(content: TraceContent) -> Iterator[Record]:
    process, lanes = content.process, content.lanes
    worker = process.worker
    yield _name("process_name", worker, 0, f"worker {worker} on {process.host}")
    for each in lanes:
        yield _name("thread_name", worker, each.number, each.name)
    for name, category, began, ended, lane, about in _with_parts(content.events):
        record = {
            "ph": "X",
            "name": name,
            "cat": category,
            "ts": (began - process.began) / 1e3,
            "dur": (ended - began) / 1e3,
            "pid": worker,
            "tid": lanes[lane].number if lanes else 0,
            "args": about or {},
        }
        if category == COUNTER:
            del record["dur"], record["cat"]
            record |= {"ph": "C", "tid": 0}
        elif isinstance(about, CollectiveEvent):
            is_part = name == REDUCE
            record["args"] = _about_collective(about, (ended - began) / 1e9, is_part)
        yield record
    yield from _arrows(content)


def _with_parts(events: Sequence[TraceEvent]) -> Iterator[TraceEvent]:
    """Yield the events; the part of a collective that one replica carried out gets its call.

    The call ends next on the same lane.
    """
    parts: dict[int, list[TraceEvent]] = {}
    for traced in events:
        if traced[0] == REDUCE and traced[-1] is None:
            parts.setdefault(traced[4], []).append(traced)
            continue
        if isinstance(traced[-1], CollectiveEvent):
            for part in parts.pop(traced[4], ()):
                yield (*part[:-1], traced[-1])
        yield traced
    for left in parts.values():
        yield from left


def _name(kind: str, worker: int, lane: int, name: str) -> Record:
    return {"ph": "M", "name": kind, "pid": worker, "tid": lane, "args": {"name": name}}


def _about_collective(event: CollectiveEvent, seconds: float, is_part: bool) -> Record:
    place = event.place
    about: Record = {"call": str(event), "strategy": place.strategy, "step": place.step}
    if not is_part:
        about["replica"] = event.replica
    if event.nbytes:
        about |= {"bytes": event.nbytes, "dtype": str(event.dtype)}
    if event.verb in _REDUCED and event.nbytes and place.algorithm_of is not None:
        about["algorithm"] = place.algorithm_of(event.num_replicas, event.nbytes)
    if is_part:
        about["replicas"] = event.num_replicas
        if event.verb in _REDUCED and event.nbytes:
            moved = 2 * event.num_replicas * event.nbytes  # read once, written once
            least = cost_model.CPU.seconds_to_move(moved)
            about |= {"moved_bytes": moved, "attained": min(1.0, least / max(seconds, 1e-9))}
    return about


def _arrows(content: TraceContent) -> Iterator[Record]:
    """Yield the arrows from the last replica to arrive at a collective to those that waited.

    The k-th collective of a replica in a step is the k-th of each other one. A step whose replicas
    have different numbers of them, since it failed or is not whole in the ring, has no arrows, nor
    has one that began before the trace.
    """
    steps: dict[int, dict[int, list[TraceEvent]]] = {}
    for traced in content.events:
        about = traced[-1]
        is_call = isinstance(about, CollectiveEvent) and traced[0] != REDUCE
        if is_call and about.num_replicas > 1 and about.place.step and not about.is_async:
            replicas = steps.setdefault(id(about.place), {})
            replicas.setdefault(about.replica, []).append(traced)
    worker, base, number = content.process.worker, content.process.began, 0
    for replicas in steps.values():
        num_replicas = next(iter(replicas.values()))[0][-1].num_replicas
        counts = {len(events) for events in replicas.values()}
        if len(counts) > 1 or len(replicas) < num_replicas:
            continue
        for meeting in zip(*replicas.values(), strict=True):
            last = max(meeting, key=lambda traced: traced[2])
            for other in meeting:
                if other is last:
                    continue
                number += 1
                start = _lane_of(content, last), (last[2] - base) / 1e3
                finish = _lane_of(content, other), (other[3] - base) / 1e3
                yield from arrow(f"{worker}.{number}", "last to arrive", start, finish)


def _lane_of(content: TraceContent, traced: TraceEvent) -> Record:
    return {"pid": content.process.worker, "tid": content.lanes[traced[4]].number}


def arrow(number: str, name: str, *ends: tuple[Record, float]) -> Iterator[Record]:
    """Yield the start and the finish of an arrow: each a moment on the lane of a record."""
    for phase, (lane, moment) in zip("sf", ends, strict=True):
        yield {
            "ph": phase, "bp": "e", "cat": "collective", "name": name, "id": number,
            "pid": lane["pid"], "tid": lane["tid"], "ts": moment,
        }  # fmt: skip
