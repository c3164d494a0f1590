"""What a team asks of its devices, answered with memory of the host and the simulator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from numba import cuda


class Simulated:
    """Stands in for the devices, with memory of the host; those in ``absent`` never launch."""

    def __init__(self, threads=2, absent=()):
        self._threads, self._absent = threads, absent
        self._kernels, self._kept = {}, []
        self.loaded, self.launched, self.records = [], [], 0

    def empty(self, device, nbytes):
        room = np.full(nbytes + 256, 0xAA, np.uint8)
        address = room.ctypes.data
        return SimpleNamespace(address=address + -address % 256, room=room)

    def words(self, device, words):
        held = np.array(words, np.int64)
        return SimpleNamespace(address=held.ctypes.data, held=held)

    def pinned(self, num_words):
        return np.zeros(num_words, np.int64)

    def load(self, device, kernel):
        self.loaded.append((device, kernel))
        self._kernels.setdefault(kernel, cuda.jit(kernel))

    def launch(self, device, kernel, num_blocks, stream, words):
        assert (device, kernel) in self.loaded
        self.launched.append(device)
        if device in self._absent:
            return
        held = np.array(words, np.int64)
        self._kept.append(held)
        self._kernels[kernel][num_blocks, self._threads, stream]((held.ctypes.data,))

    def record(self, device, stream):
        self.records += 1
        event = cuda.event()
        event.record(stream)
        return event

    def wait(self, device, stream, event):
        event.wait(stream)

    def synchronize(self, device):
        pass
