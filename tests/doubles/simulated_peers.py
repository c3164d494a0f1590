"""Driver double of a device group: host memory, and kernels in the simulator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from numba import cuda


class SimulatedDriver:
    """GroupDriver on host memory; launches on the devices in ``absent`` are dropped."""

    def __init__(self, absent=(), num_resident=32):
        self._absent, self._num_resident = absent, num_resident
        self._kernels, self._kept = {}, []
        self.loaded, self.launched, self.num_blocks, self.events = [], [], set(), 0

    def empty(self, device, nbytes):
        buffer = np.full(nbytes + 256, 0xAA, np.uint8)
        address = buffer.ctypes.data
        return SimpleNamespace(address=address + -address % 256, buffer=buffer)

    def words(self, device, words):
        array = np.array(words, np.int64)
        return SimpleNamespace(address=array.ctypes.data, array=array)

    def pinned(self, device, num_words):
        return np.zeros(num_words, np.int64)

    def load(self, device, kernel):
        self.loaded.append((device, kernel))
        self._kernels.setdefault(kernel, cuda.jit(kernel.build()))
        return self._num_resident

    def launch(self, device, kernel, num_blocks, stream, words):
        assert (device, kernel) in self.loaded
        self.launched.append(device)
        self.num_blocks.add(num_blocks)
        if device in self._absent:
            return
        array = np.array(words, np.int64)
        self._kept.append(array)
        self._kernels[kernel][num_blocks, kernel.launch_bounds[0], stream]((array.ctypes.data,))

    def event(self, device):
        self.events += 1
        return cuda.event()

    def record(self, lanes):
        for _, stream, event in lanes:
            event.record(stream)

    def wait(self, lanes):
        for _, stream, event in lanes:
            event.wait(stream)

    def synchronize(self, device):
        pass
