"""Spans of GPU streams in traces, on a double of the driver."""

from __future__ import annotations

import itertools
import json
import time

import pytest

import dvkernels as dv
from dvkernels.devices import driver, gpu_times
from dvkernels.devices.gpu_times import GpuSpan
from dvkernels.errors import DeviceError
from dvkernels.profiler import tracing

AHEAD = 1_000_000  # ns of the device's work that the host has not awaited


class TimedDriver:
    """Driver whose events happen ``AHEAD`` after they are recorded, once they are awaited."""

    def __init__(self):
        self.numbers = itertools.count(1)
        self.recorded, self.destroyed = {}, []
        self.capturing, self.has_failed = set(), False

    def is_capturing(self, device, stream):
        return stream in self.capturing

    def event(self, device, *, timed):
        assert timed
        return next(self.numbers)

    def record(self, lanes):
        ((device, stream, event),) = lanes
        ahead = 0 if stream == 7 else AHEAD
        self.recorded[event] = time.perf_counter_ns() + ahead

    def await_on_host(self, event):
        if self.has_failed:
            raise DeviceError("the device has failed")
        while time.perf_counter_ns() < self.recorded[event]:
            pass

    def milliseconds_between(self, first, last):
        return (self.recorded[last] - self.recorded[first]) / 1e6

    def destroy(self, device, event):
        self.destroyed.append(event)


@pytest.fixture
def double(monkeypatch):
    made = TimedDriver()
    monkeypatch.setattr(driver, "find", lambda: made)
    return made


def traced_on(path):
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    return [(lanes[event["tid"]], event) for event in events if event["ph"] == "X"]


def test_spans_have_the_times_of_their_streams_on_the_clock_of_the_host(double, tmp_path):
    with dv.profiler.trace(tmp_path / "t") as recording:
        base = recording._process.began
        times = []
        for stream in (7, 8):
            span = GpuSpan(recording, 2, stream)
            span.end("kernel", "kernel", {"blocks": 3})
            times.append(sorted(double.recorded)[-1])
    found = traced_on(tmp_path / "t")
    assert [lane for lane, _ in found] == ["cuda:2 stream 0x7", "cuda:2 stream 0x8"]
    began = [double.recorded[1], double.recorded[6]]  # 2 ended the first, 3 to 5 are anchors
    for (_, event), moment in zip(found, began, strict=True):
        assert event["args"] == {"blocks": 3}
        assert abs(event["ts"] * 1e3 - (moment - base)) < AHEAD  # the anchor was on stream 7
    assert sorted(double.destroyed) == sorted(double.recorded)


def test_more_spans_than_the_driver_should_hold_are_read_meanwhile(double, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_times, "_MOST_OPEN", 3)
    with dv.profiler.trace(tmp_path / "t"):
        for _ in range(10):
            GpuSpan(tracing.active, 0, 7).end("kernel", "kernel")
        assert len(double.destroyed) == 2 + 2 * 7  # two of the anchors; the ring holds seven spans
    assert len(traced_on(tmp_path / "t")) == 10


def test_captured_work_and_failed_devices_leave_no_times(double, tmp_path, caplog):
    double.capturing.add(9)
    with dv.profiler.trace(tmp_path / "t"):
        GpuSpan(tracing.active, 0, 9).end("captured", "kernel")
        GpuSpan(tracing.active, 0, 7).end("kernel", "kernel")
        double.has_failed = True
    assert traced_on(tmp_path / "t") == []
    assert "no times of cuda:0: the device has failed" in caplog.text
