"""Workers that are threads of one process: the laws and failures without MPI."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dvkernels.communicators.room import Room
from dvkernels.communicators.shared_memory import SharedMemory
from dvkernels.communicators.workers import WorkerGroup


def transports(size, timeout_seconds=20.0):
    """Return a transport for each worker, over memory of this process."""
    nbytes = Room.nbytes_for(size)
    memory = np.zeros(nbytes + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][:nbytes]
    rooms = [Room(memory, rank, size) for rank in range(size)]
    return [SharedMemory(room, timeout_seconds, is_roomy=False) for room in rooms]


def at_once(*calls):
    """Return the outcome of each call, all at the same time: its result or its exception."""

    def outcome(call):
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [*pool.map(outcome, calls)]


class Together:
    """The communicator whose ranks are workers, each on a thread."""

    def __init__(self, size):
        self.size = size
        self.workers = [WorkerGroup(transport) for transport in transports(size)]

    def _each(self, verb, values, *args, outs=None):
        calls = []
        for rank, worker in enumerate(self.workers):
            extra = args if outs is None else (*args, [outs[rank]])
            calls.append(lambda w=worker, r=rank, a=extra: getattr(w, verb)([values[r]], *a))
        found = at_once(*calls)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found

    def all_reduce(self, values, op, out=None):
        return [one for (one,) in self._each("all_reduce", values, op, outs=out)]

    def reduce(self, values, op):
        return self._each("reduce", values, op)[0]

    def reduce_scatter(self, values, op):
        return [one for (one,) in self._each("reduce_scatter", values, op)]

    def all_gather(self, values, axis):
        return [one for (one,) in self._each("all_gather", values, axis)]

    def broadcast(self, values, root):
        return [one for (one,) in self._each("broadcast", values, root)]
