"""GPU times in traces: when kernels and copies ran on their streams, by CUDA events around them.

The host does not wait for an event until the trace ends. A time of a stream becomes one of the
host's clock by an event whose time on that clock is known to lie within a few microseconds. The
simulator does its work at once, on the host's clock.
"""

from __future__ import annotations

import collections
from time import perf_counter_ns
from typing import Any, NamedTuple

from dvkernels.devices import driver
from dvkernels.devices.driver import Driver
from dvkernels.errors import DeviceError
from dvkernels.profiler import tracing
from dvkernels.profiler.debugging import LOGGER

__all__: list[str] = []

# Spans whose events the driver holds; of more the oldest is read. It is over: the driver lets the
# host be about 1000 launches ahead of a stream.
_MOST_OPEN = 4096
_NS_BETWEEN_ANCHORS = 1_000_000_000  # a difference of two events is a float32, in milliseconds


class _Anchor(NamedTuple):
    """Event that has happened at a known time of the host's clock."""

    event: int
    moment: int


class _OpenSpan(NamedTuple):
    """Span of a stream whose times have not been read."""

    name: str
    category: str
    lane: int
    about: Any
    anchor: _Anchor
    events: tuple[int, int]


class GpuSpan:
    """Span of a stream of a GPU, from its construction to :meth:`end`, for the active trace."""

    __slots__ = ("_clock", "_event", "_stream")

    def __init__(self, recording: tracing.trace, device: int, stream: int) -> None:
        self._clock = _clock_of(recording, device)
        self._stream = stream
        self._event = self._clock.now(stream)

    def end(self, name: str, category: str, about: Any = None) -> None:
        """End the span after the present work of the stream, and add it to the trace."""
        self._clock.add(name, category, self._stream, self._event, about)


def _clock_of(recording: tracing.trace, device: int) -> SimulatedClock:
    found: Any = recording.clocks.get(device)
    if found is None:
        cuda_driver = driver.find()
        made = (
            SimulatedClock(recording, device)
            if cuda_driver is None
            else StreamClock(recording, device, cuda_driver)
        )
        found = recording.clocks.setdefault(device, made)
    clock: SimulatedClock = found
    return clock


class SimulatedClock:
    """Clock of the simulator's streams: that of the host."""

    def __init__(self, recording: tracing.trace, device: int) -> None:
        self._recording, self._device = recording, device
        self._lanes: dict[int, int] = {}

    def now(self, stream: int) -> int:
        """Return a moment of the stream."""
        return perf_counter_ns()

    def add(self, name: str, category: str, stream: int, began: int, about: Any) -> None:
        """Record a span that ends now."""
        times = began, perf_counter_ns()
        self._recording.add_at(name, category, times, self.lane(stream), about)

    def lane(self, stream: int) -> int:
        """Return the lane of a stream."""
        lane = self._lanes.get(stream)
        if lane is None:
            label = f"cuda:{self._device} stream {stream:#x}"
            number = 1_000_000_000 + 1000 * self._device + len(self._lanes)  # no thread has it
            lane = self._lanes[stream] = self._recording.new_lane(label, number)
        return lane

    def finish(self) -> None:
        """Do nothing: all spans have been recorded."""


class StreamClock(SimulatedClock):
    """Clock of the streams of a GPU, read through events of the driver."""

    def __init__(self, recording: tracing.trace, device: int, cuda_driver: Driver) -> None:
        super().__init__(recording, device)
        self._driver = cuda_driver
        self._open: collections.deque[_OpenSpan] = collections.deque()
        self._anchors: list[_Anchor] = []

    def now(self, stream: int) -> int:
        """Record an event behind the present work of the stream; 0 while a graph is captured."""
        if self._driver.is_capturing(self._device, stream):
            return 0
        return self._event_on(stream)

    def add(self, name: str, category: str, stream: int, began: int, about: Any) -> None:
        """Record a span between two events, whose times are read later."""
        ended = self.now(stream) if began else 0
        if not ended:
            return
        anchors = self._anchors
        if not anchors or perf_counter_ns() - anchors[-1].moment > _NS_BETWEEN_ANCHORS:
            anchors.append(self._new_anchor(stream))
        span = _OpenSpan(name, category, self.lane(stream), about, anchors[-1], (began, ended))
        self._open.append(span)
        if len(self._open) > _MOST_OPEN:
            self._read_oldest()

    def finish(self) -> None:
        """Wait for the device, and record all spans; without those of a device that has failed."""
        try:
            while self._open:
                self._read_oldest()
            for anchor in self._anchors:
                self._driver.destroy(self._device, anchor.event)
        except DeviceError as error:
            LOGGER.warning("the trace has no times of cuda:%d: %s", self._device, error)

    def _new_anchor(self, stream: int) -> _Anchor:
        """Record an event and wait for it, three times: the shortest wait is the most exact."""
        waits: list[tuple[int, _Anchor]] = []
        for _ in range(3):
            before = perf_counter_ns()
            event = self._event_on(stream)
            self._driver.await_on_host(event)
            after = perf_counter_ns()
            waits.append((after - before, _Anchor(event, (before + after) // 2)))
        (_, best), *others = sorted(waits)
        for _, other in others:
            self._driver.destroy(self._device, other.event)
        return best

    def _event_on(self, stream: int) -> int:
        """Return a new event behind the present work of a stream."""
        event = self._driver.event(self._device, timed=True)
        self._driver.record([(self._device, stream, event)])
        return event

    def _read_oldest(self) -> None:
        """Wait for the end of the oldest span, and record it."""
        try:
            span = self._open.popleft()
        except IndexError:  # another thread has it
            return
        began, ended = span.events
        self._driver.await_on_host(ended)
        shift = self._driver.milliseconds_between(span.anchor.event, began)
        duration = self._driver.milliseconds_between(began, ended)
        start = span.anchor.moment + round(shift * 1e6)
        times = start, start + round(duration * 1e6)
        self._recording.add_at(span.name, span.category, times, span.lane, span.about)
        self._driver.destroy(self._device, began)
        self._driver.destroy(self._device, ended)
