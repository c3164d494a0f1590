"""Workers as threads of one process, for the laws and failures without MPI."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from dvkernels.communicators.hierarchical import Hierarchical
from dvkernels.communicators.local import Local
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.communicators.workers.shm.segment import Segment
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.communicators.workers.shm.transport import SharedMemoryTransport
from dvkernels.schedules import partition


class ThreadSegmentAllocator:
    """Segment allocator of workers that are threads; all of them open a segment together."""

    def __init__(self, size, free_nbytes=1 << 40):
        self.free, self.opened = free_nbytes, []
        self._size, self._barrier = size, threading.Barrier(size, self._make, 20)

    def free_nbytes(self):
        return self.free

    def open(self, nbytes):
        self._wanted = nbytes
        self._barrier.wait()
        return self.opened[-1]

    def _make(self):
        memory = [np.full(self._wanted + 64, 0xEE, np.uint8) for _ in range(self._size)]
        self.opened.append([one[-one.ctypes.data % 64 :][: self._wanted] for one in memory])
        self.free -= self._size * self._wanted


def transports(size, timeout_seconds=20.0, may_spin=False, segments=None):
    """Return a shared-memory transport for each worker, over memory of this process."""
    segments = segments or ThreadSegmentAllocator(size)
    return [
        SharedMemoryTransport(
            segment, timeout_seconds, may_spin, SymmetricMemory(segment.rank, size, segments)
        )
        for segment in segments_of(size)
    ]


def segments_of(size, *more):
    """Return each worker's view of one segment; ``more`` are its numbers and sizes of buffers."""
    nbytes = Segment.nbytes_for(size, *more)
    memory = np.zeros(nbytes + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][:nbytes]
    return [Segment(memory, rank, size, *more) for rank in range(size)]


def at_once(*calls):
    """Call all at once, and return the outcome of each: its result or its exception."""

    def outcome(call):
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [*pool.map(outcome, calls)]


def results(*calls):
    """Call all at once, and return the results; raise the first exception."""
    found = at_once(*calls)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


class Together:
    """Communicator of all ranks of several workers, each on a thread with some of the ranks.

    Each worker has ``num_local`` ranks, or ``counts`` of them; ``over`` makes each worker's
    communicator from its group and its hierarchical communicator. ``carried`` are the workers'
    transports, by default over shared memory.
    """

    def __init__(self, size, num_local=1, counts=None, over=None, carried=None):
        self.size = size
        counts = counts or [num_local] * (size // num_local)
        self._starts = partition.starts(counts)
        workers = [WorkerGroup(transport) for transport in carried or transports(len(counts))]
        self.communicators = [
            Hierarchical(Local(count, "auto"), worker, counts)
            for count, worker in zip(counts, workers, strict=True)
        ]
        if over is not None:
            pairs = zip(workers, self.communicators, strict=True)
            self.communicators = results(*(lambda pair=pair: over(*pair) for pair in pairs))
        elif num_local == 1:
            self.communicators = workers

    def _each(self, verb, values, *args, outs=None):
        """Return the result of each worker's call, in rank order."""
        calls = []
        for k, communicator in enumerate(self.communicators):
            own = slice(*self._starts[k : k + 2])
            extra = args if outs is None else (*args, outs[own])
            call = getattr(communicator, verb)
            calls.append(lambda call=call, own=own, extra=extra: call(values[own], *extra))
        return results(*calls)

    def all_reduce(self, values, op, out=None):
        return [*chain.from_iterable(self._each("all_reduce", values, op, outs=out))]

    def reduce(self, values, op):
        return self._each("reduce", values, op)[0]

    def reduce_scatter(self, values, op):
        return [*chain.from_iterable(self._each("reduce_scatter", values, op))]

    def all_gather(self, values, axis):
        return [*chain.from_iterable(self._each("all_gather", values, axis))]

    def broadcast(self, values, root):
        return [*chain.from_iterable(self._each("broadcast", values, root))]
