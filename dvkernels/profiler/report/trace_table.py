"""Trace table: the spans and samples of a trace file in columns.

The file is read line by line, one event each, as ``trace_format.py`` writes it: a trace of a
million spans takes some hundred megabytes of memory. Nothing in a file is trusted.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from dvkernels.errors import TraceError

__all__ = ["Sample", "TraceTable", "WorkerFacts", "printable", "read"]

_HEAD = b'{"displayTimeUnit": "ns",'
_ABOUT = b'"otherData": '
_EVENTS = b'"traceEvents": ['
_END = b"]}"
_LONGEST_LINE = 1 << 24
_LARGEST = 1e18  # of a number: 30,000 years, an exbibyte
MOST_SPANS = 20_000_000  # some 2 GB in columns
_TEXTS = ("name", "category", "strategy", "call", "dtype")
_NUMBERS = ("worker", "lane", "replica", "step", "nbytes", "replicas")
_FLOATS = ("begin", "duration", "attained")
_BETWEEN_WORKERS = " on worker "  # in the names of strategies of several workers


class Sample(NamedTuple):
    """Sample of a counter, such as memory by owner."""

    worker: int
    seconds: float
    counter: str
    values: dict[str, float]


class WorkerFacts(NamedTuple):
    """Facts about a worker; None where the trace does not know."""

    worker: int
    num_workers: int  # of the job; the trace may hold fewer
    host: str
    cores: int | None
    share_of_other_programs: float | None  # of the cores' time
    dropped_events: int
    thread_seconds: list[float]  # processor time of each of Python's threads
    library_thread_seconds: list[float]  # and of those of BLAS, OpenMP and Numba

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Self:
        """Take the facts out of what a file says about a worker."""
        numbers = [
            None if about.get(name) is None else _finite(about[name])
            for name in ("cores", "share_of_other_programs")
        ]
        seconds = [
            [_finite(number) for number in about.get(name, [])]
            for name in ("thread_seconds", "library_thread_seconds")
        ]
        return cls(
            int(_finite(about["worker"])), int(_finite(about["num_workers"])),
            printable(about["host"]), None if numbers[0] is None else int(numbers[0]), numbers[1],
            int(_finite(about.get("dropped_events", 0))), *seconds,
        )  # fmt: skip


class TraceTable:
    """Spans of a trace, in columns of equal length, and what else its file says.

    Attributes
    ----------
    workers : list of WorkerFacts
        What the file says about each worker, at least one.
    texts : list of str
        The texts of the columns ``name``, ``category``, ``strategy``, ``call`` and ``dtype``, which
        hold indices of this list; 0 is "". Strategies have no worker in their names.
    begin, end : array of float
        In seconds, on the clock of the trace.
    worker, lane, replica, step, nbytes, replicas : array of int
        -1 where the file says nothing; ``lane`` is an index of ``lanes``.
    attained : array of float
        NaN where the file says nothing.
    lanes : list of (int, int)
        Worker and thread of each lane.
    lane_names : dict
        By lane.
    samples : list of Sample
        In the order of the file.
    variables : dict of list
        By the row of a write or a read: the names of the variables.
    """

    begin: Any
    end: Any
    duration: Any
    attained: Any
    name: Any
    category: Any
    strategy: Any
    call: Any
    dtype: Any
    worker: Any
    lane: Any
    replica: Any
    step: Any
    nbytes: Any
    replicas: Any

    def __init__(self, about: Mapping[str, Any], records: Iterator[Mapping[str, Any]]) -> None:
        self.workers = [WorkerFacts.of(each) for each in about.get("workers", [about])]
        if not self.workers:
            raise TraceError("the list of workers is empty")
        self.texts: list[str] = [""]
        self.lanes: list[tuple[int, int]] = []
        self.lane_names: dict[tuple[int, int], str] = {}
        self.samples: list[Sample] = []
        self.variables: dict[int, list[str]] = {}
        self._codes = {"": 0}
        self._lane_codes: dict[tuple[int, int], int] = {}
        self._columns: dict[str, array[Any]] = {name: array("i") for name in _TEXTS}
        self._columns |= {name: array("q") for name in _NUMBERS}
        self._columns |= {name: array("d") for name in _FLOATS}
        for record in records:
            self._add(record)
        for name, column in self._columns.items():
            setattr(self, name, np.array(column))
        self.end = self.begin + self.duration

    def __len__(self) -> int:
        return len(self.begin)

    def code(self, text: str) -> int:
        """Return the index of a text; -1 if no column has it."""
        return self._codes.get(text, -1)

    def is_a(self, column: str, text: str) -> Any:
        """Return which rows have this text in a column."""
        return getattr(self, column) == self.code(text)

    def verbs(self) -> Any:
        """Return for each row the verb of its call, such as ``"all_reduce"``, or ""."""
        return np.array([text.partition("(")[0] for text in self.texts])[self.call]

    def _add(self, record: Mapping[str, Any]) -> None:
        phase = record["ph"]
        if phase == "X":
            self._add_span(record)
        elif phase == "C":
            values = {printable(key): _finite(value) for key, value in record["args"].items()}
            worker, at = int(_finite(record["pid"])), _finite(record["ts"]) / 1e6
            self.samples.append(Sample(worker, at, str(record["name"]), values))
        elif phase == "M" and record["name"] == "thread_name":
            where = int(record["pid"]), int(record["tid"])
            self.lane_names[where] = printable(record["args"]["name"])

    def _add_span(self, record: Mapping[str, Any]) -> None:
        columns, about = self._columns, record["args"]
        row = len(columns["begin"])
        if row == MOST_SPANS:
            raise TraceError(f"it has more than {MOST_SPANS} spans; record fewer (max_events)")
        begin, duration = _finite(record["ts"]) / 1e6, _finite(record["dur"]) / 1e6
        if duration < 0:
            raise ValueError(f"a span lasts {record['dur']} us")
        where = int(record["pid"]), int(record["tid"])
        lane = self._lane_codes.setdefault(where, len(self.lanes))
        if lane == len(self.lanes):
            self.lanes.append(where)
        columns["begin"].append(begin)
        columns["duration"].append(duration)
        columns["attained"].append(_finite(about["attained"]) if "attained" in about else math.nan)
        columns["worker"].append(where[0])
        columns["lane"].append(lane)
        columns["nbytes"].append(int(_finite(about.get("bytes", -1))))
        for name in ("replica", "step", "replicas"):
            columns[name].append(int(about.get(name, -1)))
        texts = {
            "name": record["name"],
            "category": record["cat"],
            "strategy": about.get("strategy", "").partition(_BETWEEN_WORKERS)[0],
            "call": about.get("call", ""),
            "dtype": about.get("dtype", ""),
        }
        for name, text in texts.items():
            columns[name].append(self._code_of(text))
        if "variables" in about:
            self.variables[row] = [printable(name) for name in about["variables"]]

    def _code_of(self, text: Any) -> int:
        code = self._codes.get(text)
        if code is None:
            code = self._codes[text] = len(self.texts)
            self.texts.append(printable(text))
        return code


def printable(text: Any) -> str:
    """Return a text without control sequences and lone surrogates: names are not trusted."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def _finite(number: Any) -> float:
    if type(number) not in (int, float) or not abs(number) < _LARGEST:
        raise ValueError(f"{number!r:.40} is no number that a trace has")
    return float(number)


def read(path: str | os.PathLike[str]) -> TraceTable:
    """Read the trace of a worker, or a merged one.

    Raises
    ------
    TraceError
        The file is empty, cut off, no trace of this package, or too large; the message says where.
    OSError
        It cannot be read.
    """
    name = os.fsdecode(path)
    with open(path, "rb") as file:
        lines = _NumberedLines(file)
        try:
            return TraceTable(_about(lines), _records(lines))
        except (
            ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
        ) as error:  # fmt: skip
            what = str(error) if isinstance(error, TraceError) else f"{error!r:.200}"
            raise TraceError(
                f"{name}, line {lines.number}: {what}; expected a trace as dv.profiler.trace, or "
                f"python -m dvkernels trace, has written it"
            ) from None


class _NumberedLines:
    """Lines of a file, and the number of the one that was read last."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.number = file, 0

    def next(self) -> bytes:
        self.number += 1
        line = self._file.readline(_LONGEST_LINE)
        if len(line) == _LONGEST_LINE:
            raise TraceError(f"the line is longer than {_LONGEST_LINE} bytes")
        if not line.endswith(b"\n"):
            is_empty = self.number == 1 and not line
            raise TraceError("the file is empty" if is_empty else "the file was cut off")
        return line.rstrip(b"\r\n")


def _about(lines: _NumberedLines) -> dict[str, Any]:
    """Read the lines before the events; return what they say about the trace."""
    first = lines.next()
    if first != _HEAD:
        raise TraceError(f"the file begins with {first[:40]!r}")
    second = lines.next()
    if not second.startswith(_ABOUT):
        raise TraceError(f"the line is {second[:40]!r}")
    about: dict[str, Any] = json.loads(second.removeprefix(_ABOUT).removesuffix(b","))
    if lines.next() != _EVENTS:
        raise TraceError("the list of events is missing")
    return about


def _records(lines: _NumberedLines) -> Iterator[dict[str, Any]]:
    while (line := lines.next()) != _END:
        yield json.loads(line.removesuffix(b","))
