"""Tracing: a timeline of what each replica does, in the Trace Event Format of Perfetto and Chrome.

It is off by default, and then costs one read of ``active`` per call.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from dvkernels import user_errors
from dvkernels.errors import ContextError
from dvkernels.profiler.atomic_file import AtomicFile
from dvkernels.profiler.debugging import LOGGER

__all__ = ["trace"]

_MOST_SPANS = 1_000_000  # some 300 MB in memory


class _TraceEvent(NamedTuple):
    """Span of time of one thread; times of ``time.perf_counter_ns``."""

    name: str
    category: str
    began: int
    ended: int
    thread: int
    about: dict[str, Any]


class trace:
    """Record a trace until the end of a ``with`` block, or ``close``, and write it to a file.

    Parameters
    ----------
    path : path-like
        The file, such as ``run.json``. An existing file is replaced at the end of the trace.

    Raises
    ------
    ContextError
        A trace is being recorded already; a process records one at a time.
    OSError
        The file cannot be created; raised before anything is recorded.

    Notes
    -----
    The trace has one lane per thread, named after the replica that runs on it, with these spans:
    ``run`` (a replica's function); each collective from its call to its result, and inside it
    ``reduce`` where this thread carried it out for all replicas (the rest of the collective is
    waiting); ``next`` of distributed iterators; and the phases of checkpoints. Open the file at
    ui.perfetto.dev or chrome://tracing.

    An interrupt may come before the first line of a ``__exit__``: then the recording goes on, as
    with any context manager of Python, until ``close`` or the end of the program.

    A span costs about a microsecond. At most a million spans are kept; a warning gives the number
    of later ones. Every worker records its own trace, so each needs a path of its own.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> import dvkernels as dv
    >>> two = dv.MirroredStrategy(["cpu:0", "cpu:0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with dv.profiler.trace(f"{folder}/run.json"):
    ...         _ = two.run(lambda: dv.get_replica_context().all_reduce("sum", 1.0))
    ...     events = json.loads(pathlib.Path(folder, "run.json").read_text())["traceEvents"]
    >>> two.close()
    >>> sorted({event["name"] for event in events if event["ph"] == "X"})
    ['all_reduce', 'reduce', 'run']
    """

    _path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        global active
        if active is not None:
            raise ContextError(
                f"a trace is being recorded already, to {active._path}; end it first"
            )
        self._pid = os.getpid()
        self._began = time.perf_counter_ns()
        self._output = AtomicFile(path)
        self._path = self._output.path
        self._spans: list[_TraceEvent] = []
        self._lanes: dict[int, str] = {}
        self._num_dropped = 0
        try:
            atexit.register(self.close)
            active = self
        except BaseException:
            self._output.discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the recording and write the file. Safe to call again, also after an interrupt."""
        global active
        if os.getpid() != self._pid:
            return  # a forked child: the file belongs to the parent
        if active is self:
            active = None
        if self._output.is_open:
            if self._num_dropped:
                LOGGER.warning(
                    "the trace %s holds %d spans; %d later ones were left out",
                    self._path, len(self._spans), self._num_dropped,
                )  # fmt: skip
            self._output.fill(self._write)
        self._output.discard()  # what an interrupted call left; nothing after a whole one
        atexit.unregister(self.close)

    def _write(self, file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8")
        json.dump({"traceEvents": [*self._events()], "displayTimeUnit": "ns"}, text)
        text.flush()
        text.detach()

    def name_lane(self, name: str) -> None:
        """Name the lane of this thread."""
        self._lanes[threading.get_native_id()] = name

    def add(self, name: str, category: str, began: int, about: dict[str, Any]) -> None:
        """Record a span of this thread, from ``began`` (``perf_counter_ns``) to now."""
        if len(self._spans) >= _MOST_SPANS:
            self._num_dropped += 1
            return
        thread = threading.get_native_id()
        if thread not in self._lanes:
            self._lanes[thread] = threading.current_thread().name
        ended = time.perf_counter_ns()
        self._spans.append(_TraceEvent(name, category, began, ended, thread, about))

    def _events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of the Trace Event Format: thread names, then spans in microseconds."""
        for thread, name in self._lanes.items():
            about = {"name": name}
            yield {
                "ph": "M", "name": "thread_name", "pid": self._pid, "tid": thread, "args": about
            }  # fmt: skip
        for span in self._spans:
            yield {
                "ph": "X",
                "name": span.name,
                "cat": span.category,
                "ts": (span.began - self._began) / 1e3,
                "dur": (span.ended - span.began) / 1e3,
                "pid": self._pid,
                "tid": span.thread,
                "args": span.about,
            }


# The trace that is being recorded; None: none is.
active: trace | None = None


@user_errors.context_manager
def span(name: str, category: str, *, lane: str = "", **about: Any) -> Iterator[None]:
    """Record a block as a span, if a trace is active at its start; ``lane`` names the thread."""
    recording, began = active, time.perf_counter_ns()
    if recording is not None and lane:
        recording.name_lane(lane)
    try:
        yield
    finally:
        if recording is not None:
            recording.add(name, category, began, about)


def _forget() -> None:
    """End the recording in a forked child: the file belongs to the parent."""
    global active
    active = None


os.register_at_fork(after_in_child=_forget)
