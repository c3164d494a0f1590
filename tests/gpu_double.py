"""Test double of a GPU that executes asynchronously, and of an MPI between workers.

GPU memory is host memory, as a CUDA-aware MPI would take it, but arrays on it cannot be read: work
of a stream is complete once an event says so, and may or may not have happened before. The MPI
reads a send buffer at once or much later, and may write a receive buffer from the start.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import defaultdict

import numpy as np

from dvkernels.kernels import cpu


class OnDevice:
    """Array that the host cannot read."""

    def __init__(self, hidden, device=0):
        self.hidden, self.device = hidden, device
        self.shape, self.dtype, self.nbytes = hidden.shape, hidden.dtype, hidden.nbytes
        self.size, self.ndim, self.itemsize = hidden.size, hidden.ndim, hidden.itemsize
        self.flags = hidden.flags

    def __len__(self):
        return len(self.hidden)

    def __getitem__(self, key):
        return OnDevice(self.hidden[key], self.device)

    def reshape(self, *shape):
        assert self.flags.c_contiguous, "CuPy would copy"
        return OnDevice(self.hidden.reshape(*shape), self.device)

    def view(self, dtype):
        return OnDevice(self.hidden.view(dtype), self.device)

    def transpose(self, axes):
        return OnDevice(self.hidden.transpose(axes), self.device)


class Stream:
    def __init__(self, seed):
        self.queue, self._random, self.is_stuck = [], random.Random(seed), False

    def give(self, work):
        self.queue.append(work)
        self.go_on()

    def go_on(self):
        for _ in range(self._random.randrange(3)):
            self.step()

    def step(self):
        if self.queue and not self.is_stuck:
            self.queue.pop(0)()

    def drain(self):
        while self.queue:
            self.step()


class Event:
    def record(self, stream):
        self._stream, self._has_happened = stream, False
        stream.give(lambda: setattr(self, "_has_happened", True))

    @property
    def done(self):
        self._stream.go_on()
        return self._has_happened

    def synchronize(self):
        while not self._has_happened:
            self._stream.step()


class Arrays:
    """Double of the array module of one worker's GPUs."""

    def __init__(self, seed):
        self.streams = [Stream(seed), Stream(seed + 1)]
        self.stream, self.num_pinned, self.num_made = self.streams[0], 0, 0
        self.here = threading.local()

    def drain(self):
        for stream in self.streams:
            stream.drain()

    def empty(self, device, shape, dtype, stream=None):
        self.num_made += 1
        made = np.empty(shape, dtype)
        made.reshape(-1).view(np.uint8)[:] = 0xEE
        return OnDevice(made, device)

    def copy(self, target, source, stream=None):
        assert isinstance(target, OnDevice) or isinstance(source, OnDevice)
        into, taken = (getattr(array, "hidden", array) for array in (target, source))
        (stream or self.stream).give(lambda: np.copyto(into, taken))

    def event(self, device):
        return Event()

    def current(self, device):
        return self.stream

    def device_of(self, array):
        return array.device

    def pinned(self, nbytes):
        self.num_pinned += 1
        return np.empty(nbytes, np.uint8)

    @contextlib.contextmanager
    def at(self, device, stream=None):
        self.here.device = device
        yield
        self.here.device = None

    def bytes_of(self, array):
        assert array.flags.c_contiguous
        assert self.here.device == array.device, "MPI is called where the memory's GPU is current"
        return array.hidden.reshape(-1).view(np.uint8)

    def reduce(self, sources, op, *, out):
        """Enqueue a reduction on the current stream."""
        taken = [source.hidden for source in sources]
        assert all(source.dtype == out.dtype and source.shape == out.shape for source in sources)
        self.stream.give(lambda: cpu.reduce(taken, op, out=out.hidden))


class Mpi:
    """Message transport between ``size`` workers that are threads of one process."""

    def __init__(self, size, seed=0):
        self.random, self.mutex = random.Random(seed), threading.Lock()
        self.sends, self.receives = defaultdict(list), defaultdict(list)
        self.comms = [Comm(self, rank, size) for rank in range(size)]

    def move(self, key):
        """Deliver one message for which both a send and a receive are posted."""
        if self.sends[key] and self.receives[key]:
            send, receive = self.sends[key].pop(0), self.receives[key].pop(0)
            assert len(send.held) == len(receive.held), "all workers cut the array alike"
            receive.held[:] = send.held
            send.is_done = receive.is_done = True


class Comm:
    def __init__(self, mpi, rank, size):
        self._mpi, self.rank, self.size = mpi, rank, size

    def Isend(self, held, to, tag):
        assert len(held), "nothing is not sent"
        with self._mpi.mutex:
            is_eager = self._mpi.random.random() < 0.5
            key = self.rank, to, tag
            made = Sending(self._mpi, key, held.copy() if is_eager else held)
            self._mpi.sends[key].append(made)
            return made

    def Irecv(self, held, source, tag):
        with self._mpi.mutex:
            held[:] = 0xDD
            key = source, self.rank, tag
            made = Sending(self._mpi, key, held)
            self._mpi.receives[key].append(made)
            return made


class Sending:
    def __init__(self, mpi, key, held):
        self._mpi, self._key, self.held, self.is_done = mpi, key, held, False

    def Test(self):
        with self._mpi.mutex:
            if self._mpi.random.random() < 0.5:
                self._mpi.move(self._key)
            return self.is_done


class OfHost:
    """Communicator of GPU arrays that takes and returns host arrays."""

    def __init__(self, communicator, arrays):
        self._communicator, self._arrays = communicator, arrays
        self.size = communicator.size

    def __getattr__(self, verb):
        def call(values, *args):
            known = {}
            on_device = [self._moved(arg, known) for arg in (values, *args)]
            found = getattr(self._communicator, verb)(*on_device)
            self._arrays.drain()
            return [one.hidden for one in found] if isinstance(found, list) else found.hidden

        return call

    def _moved(self, arg, known):
        if not isinstance(arg, list):
            return arg
        return [known.setdefault(id(array), OnDevice(array)) for array in arg]
