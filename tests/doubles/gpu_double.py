"""Double of an asynchronous GPU.

GPU memory is host memory, but its arrays refuse to be read. Work of a stream has been done once an
event says so, and may or may not have been done before.
"""

from __future__ import annotations

import contextlib
import random

import numpy as np


class OnDevice:
    """Array that the host cannot read."""

    def __init__(self, hidden, device=0):
        self.hidden, self.device = hidden, device
        self.shape, self.dtype, self.nbytes = hidden.shape, hidden.dtype, hidden.nbytes
        self.flags = hidden.flags


class Stream:
    def __init__(self, seed):
        self.queue, self._random = [], random.Random(seed)

    def give(self, work):
        self.queue.append(work)
        for _ in range(self._random.randrange(3)):
            self.step()

    def step(self):
        if self.queue:
            self.queue.pop(0)()

    def drain(self):
        while self.queue:
            self.step()


class Event:
    def __init__(self, arrays, device):
        self._arrays, self._device = arrays, device

    def record(self, stream):
        assert self._arrays.here == self._device, "a default stream is that of the current device"
        self._stream, self._has_happened = stream, False
        stream.give(lambda: setattr(self, "_has_happened", True))

    def synchronize(self):
        while not self._has_happened:
            self._stream.step()


class Arrays:
    """Double of the array library (``cuda.ArrayLibrary``) of one worker."""

    def __init__(self, seed):
        self.streams = [Stream(seed), Stream(seed + 1)]
        self.stream, self.num_pinned, self.here = self.streams[0], 0, None

    def drain(self):
        for stream in self.streams:
            stream.drain()

    def empty(self, device, shape, dtype, stream=None):
        made = np.empty(shape, dtype)
        made.reshape(-1).view(np.uint8)[:] = 0xEE
        return OnDevice(made, device)

    def copy(self, target, source, stream=None):
        assert isinstance(target, OnDevice) or isinstance(source, OnDevice)
        into, taken = (getattr(array, "hidden", array) for array in (target, source))
        (stream or self.stream).give(lambda: np.copyto(into, taken))

    def event(self, device):
        return Event(self, device)

    @contextlib.contextmanager
    def at(self, device, stream=None):
        before, self.here = self.here, device
        yield
        self.here = before

    def current(self, device):
        return self.stream

    def device_of(self, array):
        return array.device

    def pinned(self, nbytes):
        self.num_pinned += 1
        return np.empty(nbytes, np.uint8)
