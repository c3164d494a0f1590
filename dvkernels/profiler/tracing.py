"""Tracing: a timeline of what each replica does, in the Trace Event Format of Perfetto and Chrome.

It is off by default, and then costs one read of ``active`` per call. A recorded event is a tuple in
a ring in memory; what it says is put into words when the file is written (``trace_format.py``).
"""

from __future__ import annotations

import atexit
import collections
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter_ns
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from dvkernels import user_errors
from dvkernels.errors import ContextError
from dvkernels.profiler import collective_hooks, process_identity, trace_format
from dvkernels.profiler.atomic_file import AtomicFile
from dvkernels.profiler.collective_hooks import CollectiveEvent
from dvkernels.profiler.core_usage import CoreUsage, ThreadUsage
from dvkernels.profiler.debugging import LOGGER
from dvkernels.profiler.nvtx_ranges import NvtxRanges
from dvkernels.profiler.trace_format import Lane, TraceContent, TraceEvent

__all__ = ["trace"]

_MOST_EVENTS = 1_000_000  # some 300 MB in memory
_NS_BETWEEN_SAMPLES = 50_000_000  # of memory and processor time

Counter = tuple[str, dict[str, float]]  # its values by series

_here = threading.local()  # .lane: of the thread, in the latest trace


class DeviceClock(Protocol):
    """Clock of a GPU, which adds the spans of its streams to a trace."""

    def finish(self) -> None:
        """Add all spans that have not been added: the trace ends."""


class _OwnLane(NamedTuple):
    trace: trace
    number: int


class trace:
    """Record a trace until the end of a ``with`` block, or ``close``, and write it to a file.

    Parameters
    ----------
    path : path-like
        The file, such as ``run.json``. An existing file is replaced at the end of the trace. In a
        job of several workers each writes a file of its own, such as ``run.worker-1.json``;
        ``python -m dvkernels trace run.worker-*.json -o run.json`` merges them.
    nvtx : bool, optional
        Whether steps, collectives and ranges are also NVTX ranges, for NVIDIA's tools; needs the
        package ``nvtx``.
    max_events : int, optional
        The size of the ring of events: of more than these the latest are kept.

    Raises
    ------
    ContextError
        A trace is being recorded already; a process records one at a time.
    ImportError
        ``nvtx`` was asked for and the package is missing.
    OSError
        The file cannot be created; raised before anything is recorded.
    ClusterError
        The environment variables that give this worker's number are malformed.
    ValueError, TypeError
        ``max_events`` is not a positive integer.

    Notes
    -----
    A process of the trace is a worker. It has a lane for each thread, named after the replica that
    runs on it, with these spans: ``run`` (a replica's function); each collective from its call to
    its result, with its bytes, dtype and algorithm, and inside it ``reduce`` where this thread
    carried it out for all replicas (the rest of the collective is waiting); ``write`` of variables;
    ``next`` of distributed iterators; ``copy`` between host and GPUs; kernels on GPUs, on lanes of
    their streams; ranges of :func:`range`; and the phases of checkpoints. Arrows lead from the
    replica that arrived last at a collective to those that waited for it. Counters show memory by
    owner and the processor time of the process. Open the file at ui.perfetto.dev.

    ``attained`` of a ``reduce`` is the part of the speed that the cost model of this package
    allows: docs/reference/profiler.md says where its numbers come from.

    An interrupt may come before the first line of a ``__exit__``: then the recording goes on, as
    with any context manager of Python, until ``close`` or the end of the program. The file is
    written at once, at the end: a program that is killed leaves none, and an old one untouched.

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

    _path: Any

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        nvtx: bool = False,
        max_events: int = _MOST_EVENTS,
    ) -> None:
        global active
        if active is not None:
            raise ContextError(
                f"a trace is being recorded already, to {active._path}; end it first"
            )
        if isinstance(max_events, bool) or not isinstance(max_events, int):
            raise TypeError(f"trace: max_events is a positive integer, got {max_events!r}")
        if max_events < 1:
            raise ValueError(f"trace: max_events is a positive integer, got {max_events}")
        self._nvtx = NvtxRanges() if nvtx else None
        self.before = self._push if nvtx else None
        self._process = process_identity.describe()
        self._usage, self._threads = CoreUsage(), ThreadUsage()
        self._ring: collections.deque[TraceEvent] = collections.deque(maxlen=max_events)
        self._append = self._ring.append
        self._count = itertools.count().__next__
        self._lanes: list[Lane] = []
        self._next_sample = 0
        self.clocks: dict[int, DeviceClock] = {}  # by the index of the GPU
        self._output = AtomicFile(trace_format.path_of(path, self._process))
        self._path = self._output.path
        try:
            atexit.register(self.close)
            collective_hooks.add_observer(self)
            active = self
        except BaseException:
            collective_hooks.remove_observer(self)
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
        if os.getpid() != self._process.pid:
            return  # a forked child: the file belongs to the parent
        if active is self:
            active = None
        collective_hooks.remove_observer(self)
        if self._output.is_open:
            for clock in list(self.clocks.values()):
                clock.finish()
            content = self._content()
            if content.num_dropped:
                LOGGER.warning(
                    "the trace %s holds the last %d events; %d earlier ones were left out",
                    self._path, len(content.events), content.num_dropped,
                )  # fmt: skip
            self._output.fill(lambda file: trace_format.write(file, content))
            self._ring.clear()  # threads remember their lanes, and the trace, until the next one
        self._output.discard()  # what an interrupted call left; nothing after a whole one
        atexit.unregister(self.close)

    def _content(self) -> TraceContent:
        events = [*self._ring]
        share = self._usage.share_of_others()
        return TraceContent(
            self._process, events, [*self._lanes], self._count() - len(events), share,
            self._threads.report(),
        )  # fmt: skip

    # -- lanes ------------------------------------------------------------------------------------

    def lane(self) -> int:
        """Return the number of this thread's lane."""
        own: _OwnLane | None = getattr(_here, "lane", None)
        if own is not None and own.trace is self:
            return own.number
        thread = threading.current_thread()
        _here.lane = own = _OwnLane(self, self.new_lane(thread.name, threading.get_native_id()))
        return own.number

    def new_lane(self, name: str, number: int) -> int:
        """Add a lane, which the file shows under this number; return its index."""
        lane = Lane(number, name)
        self._lanes.append(lane)
        return self._lanes.index(lane)  # by identity; several threads may append at once

    def name_lane(self, name: str) -> None:
        """Name the lane of this thread."""
        self._lanes[self.lane()].name = name

    # -- events -----------------------------------------------------------------------------------

    def begin(self, name: str) -> int:
        """Begin a span of this thread; return the present time (``perf_counter_ns``)."""
        if self._nvtx is not None:
            self._nvtx.push(name)
        return perf_counter_ns()

    def end(self, name: str, category: str, began: int, about: Any) -> None:
        """End and record the span that this thread has begun last."""
        if self._nvtx is not None:
            self._nvtx.pop()
        self.add(name, category, began, about)

    def add(self, name: str, category: str, began: int, about: Any) -> None:
        """Record a span of this thread, from ``began`` (``perf_counter_ns``) to now.

        ``about`` is a dict that JSON can represent, a ``CollectiveEvent``, or None.
        """
        ended = perf_counter_ns()
        own = getattr(_here, "lane", None)
        lane = own.number if own is not None and own.trace is self else self.lane()
        self._append((name, category, began, ended, lane, about))
        self._count()

    def add_at(
        self, name: str, category: str, times: tuple[int, int], lane: int, about: Any
    ) -> None:
        """Record a span of another lane, from its begin to its end."""
        self._append((name, category, *times, lane, about))
        self._count()

    def sample(self, more: Callable[[], Iterable[Counter]] | None = None) -> None:
        """Record memory, processor time and more counters, if the last sample is old enough."""
        now = perf_counter_ns()
        if now >= self._next_sample:
            self._next_sample = now + _NS_BETWEEN_SAMPLES
            for name, values in (*trace_format.sampled(), *(more() if more is not None else ())):
                self.add_at(name, trace_format.COUNTER, (now, now), 0, values)

    # -- the collectives: an observer of collective_hooks -----------------------------------------

    def _push(self, event: CollectiveEvent) -> None:
        """Begin the NVTX range of a collective."""
        if self._nvtx is not None and not event.is_async:
            self._nvtx.push(event.verb)

    def after(self, event: CollectiveEvent) -> None:
        """Record the span of a collective; of an asynchronous one ``wait`` has been recorded."""
        if event.verb == "all_reduce_async":  # in place: a property would cost a frame
            return
        if self._nvtx is not None:
            self._nvtx.pop()
        own = getattr(_here, "lane", None)
        lane = own.number if own is not None and own.trace is self else self.lane()
        self._append((event.verb, "collective", event.began, event.ended, lane, event))
        self._count()

    abort = after


# The trace that is being recorded; None: none is.
active: trace | None = None


@user_errors.context_manager
def span(name: str, category: str, *, lane: str = "", **about: Any) -> Iterator[None]:
    """Record a block as a span, if a trace is active at its start; ``lane`` names the thread."""
    recording = active
    if recording is None:
        yield
        return
    if lane:
        recording.name_lane(lane)
    began = recording.begin(name)
    try:
        yield
    finally:
        recording.end(name, category, began, about)


def _forget() -> None:
    """End the recording in a forked child: the file belongs to the parent."""
    global active
    if active is not None:
        collective_hooks.remove_observer(active)
    active = None


os.register_at_fork(after_in_child=_forget)
