"""Copies to a GPU are complete for any timing of its streams: on a double."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.data.distributed.to_device import DeviceCopier


class Stream:
    """A stream: work that runs in order, possibly late; a wait for an event is work too."""

    def __init__(self):
        self.queue = []

    def step(self):
        """Run the next piece of work; return whether there was one that need not wait."""
        if not self.queue or not self.queue[0][0]():
            return False
        self.queue.pop(0)[1]()
        return True

    def wait_event(self, event):
        assert event.gpu.here == 0, "a default stream is that of the current device"
        count = event.recorded
        self.queue.append((lambda: event.happened >= count, lambda: None))


class Event:
    def __init__(self, gpu):
        self.gpu, self.recorded, self.happened = gpu, 0, 0

    def record(self, stream):
        assert self.gpu.here == 0, "a default stream is that of the current device"
        self.recorded += 1

        def happen(count=self.recorded):
            self.happened = count

        stream.queue.append((lambda: True, happen))

    def synchronize(self):
        self.gpu.run(lambda: self.happened >= self.recorded)


class Gpu:
    """Array library whose copies run as late as possible, or at random times before."""

    def __init__(self, seed=None):
        self.random = None if seed is None else random.Random(seed)
        self.default = Stream()
        self.streams = [self.default]
        self.num_pinned, self.here = 0, None

    def run(self, is_done):
        while not is_done():
            assert any([stream.step() for stream in self.streams]), "nothing can go on"

    def tick(self):
        for _ in range(0 if self.random is None else self.random.randrange(4)):
            self.random.choice(self.streams).step()

    def finish(self):
        self.run(lambda: not any(stream.queue for stream in self.streams))

    # the interface of cuda.ArrayLibrary

    def empty(self, device, shape, dtype, stream=None):
        return np.full(shape, 0xEE, dtype)

    def copy(self, target, source, stream=None):
        (stream or self.default).queue.append((lambda: True, lambda: np.copyto(target, source)))
        self.tick()

    def stream(self, device):
        self.streams.append(Stream())
        return self.streams[-1]

    def event(self, device):
        return Event(self)

    @contextlib.contextmanager
    def at(self, device):
        self.here = device
        yield
        self.here = None

    def current(self, device):
        return self.default

    def pinned(self, nbytes):
        self.num_pinned += 1
        return np.empty(nbytes, np.uint8)


def batch(number, rows):
    rng = np.random.default_rng(number)
    images = [rng.integers(0, 255, (length, 3), np.uint8) for length in rows]
    labels = [rng.standard_normal(length) for length in rows]
    return [images, labels, ["a", "b"], [np.float32(number), np.float16(number)]]


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_no_buffer_is_overwritten_before_it_was_read(seed):
    gpu = Gpu(seed)
    copier = DeviceCopier([dv.Device("cuda", 0)] * 2, gpu)
    sent = [batch(k, rows) for k, rows in enumerate([(4, 3), (4, 4), (0, 2), (9, 9), (1, 0)] * 4)]
    got = []
    for columns in sent:
        got.append(copier.copy([[np.copy(one) for one in column] for column in columns[:2]]
                                  + columns[2:]))  # fmt: skip
        gpu.tick()
    gpu.finish()
    for there, here in zip(got, sent, strict=True):
        for found, right in zip(there, here, strict=True):
            for one, other in zip(found, right, strict=True):
                np.testing.assert_array_equal(one, other)
                assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
                assert np.shape(one) == np.shape(other)
    assert gpu.num_pinned <= 4  # two slots, each of which grew once


def test_a_batch_is_transferred_while_the_step_before_it_computes():
    gpu = Gpu()
    copier = DeviceCopier([dv.Device("cuda", 0)], gpu)
    for _ in range(2):  # from the third batch on, buffers are reused
        copier.copy([[np.zeros(8)]])
    computed = []
    gpu.default.queue.append((lambda: bool(computed), lambda: None))  # a step that takes long
    copier.copy([[np.ones(8)]])
    side = gpu.streams[1]
    while gpu.default.step() or side.step():
        pass
    assert not side.queue, "the batch waits for the step before it"
    assert gpu.default.queue
    computed.append(True)
    gpu.finish()


def test_arrays_that_are_not_numeric_stay_on_the_host():
    text = np.array(["a", "b"])
    (found,) = DeviceCopier([dv.Device("cuda", 0)], Gpu()).copy([[text]])
    assert found[0] is text


def test_staging_buffers_are_in_the_memory_report():
    gpu = Gpu(None)
    copier = DeviceCopier([dv.Device("cuda", 77)], gpu)
    copier.copy([[np.zeros(1000)]])
    assert dv.profiler.memory().by_device["cuda:77"]["staging"] == 8000
    del copier
    report = dv.profiler.memory()
    assert "cuda:77" not in report.by_device
    assert report.peak_by_device["cuda:77"]["staging"] == 8000
