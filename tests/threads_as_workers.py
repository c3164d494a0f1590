"""Test double of workers: threads of one process that share memory, without MPI."""

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


class Segments:
    """Shared memory of threads: all of them open a segment together."""

    def __init__(self, size, free_nbytes=1 << 40):
        self.left, self.opened = free_nbytes, []
        self._size, self._meeting = size, threading.Barrier(size, self._make, 20)

    def free_nbytes(self):
        return self.left

    def open(self, nbytes):
        self._wanted = nbytes
        self._meeting.wait()
        return self.opened[-1]

    def _make(self):
        held = [np.full(self._wanted + 64, 0xEE, np.uint8) for _ in range(self._size)]
        self.opened.append([one[-one.ctypes.data % 64 :][: self._wanted] for one in held])
        self.left -= self._size * self._wanted


def transports(size, timeout_seconds=20.0, is_roomy=False, segments=None):
    """Return a transport for each worker, over memory of this process."""
    segments = segments or Segments(size)
    return [
        SharedMemoryTransport(
            room, timeout_seconds, is_roomy, SymmetricMemory(room.rank, size, segments)
        )
        for room in rooms(size)
    ]


def rooms(size, *more):
    """Return each worker's view of shared memory, with more slots if requested."""
    nbytes = Segment.nbytes_for(size, *more)
    memory = np.zeros(nbytes + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][:nbytes]
    return [Segment(memory, rank, size, *more) for rank in range(size)]


def at_once(*calls):
    """Run the calls in parallel, and return the result or exception of each."""

    def outcome(call):
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [*pool.map(outcome, calls)]


def results(*calls):
    """Run the calls in parallel, and return their results; raise the first exception."""
    found = at_once(*calls)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


class Together:
    """Communicator whose ranks are divided among workers, one thread per worker.

    ``num_local`` each, or as many as ``counts`` says; ``over`` makes each worker's communicator
    from its group and its hierarchical communicator. ``carried`` are the workers' transports, in
    memory that they share if not given.
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
        """Return the results of all workers' calls, concatenated."""
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
