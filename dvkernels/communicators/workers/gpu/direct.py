"""Values that go from the GPU of one worker straight to that of another, where all of them can."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import numpy as np

from dvkernels.communicators.workers.gpu.collectives import GpuCollectives
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.communicators.workers.wait import Finish
from dvkernels.devices import cuda
from dvkernels.devices.buffers import Spec, spec
from dvkernels.kernels import backends
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.schedules import partition

__all__ = ["GpuDirect"]


@final
class GpuDirect:
    """The verbs between workers whose MPI takes memory of GPUs, each for one value.

    Parameters
    ----------
    workers : WorkerGroup
        With a communicator of MPI that takes memory of GPUs.
    arrays : ArrayLibrary, optional
        What makes arrays on GPUs; that of this process if not given.
    reduce : callable, optional
        The kernel of that name, for these arrays; that of GPUs if not given.

    Notes
    -----
    In the round in which the workers agree on a call each says whether its value lies on a GPU. If
    one does not, every verb returns None on all of them, and nothing has happened. So it is with
    reductions of the user's own: they may compile for the GPU of one worker, and not for another's.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        arrays: cuda.ArrayLibrary | None = None,
        reduce: Callable[..., Any] | None = None,
    ) -> None:
        self._workers = workers
        self._arrays = cuda.arrays() if arrays is None else arrays
        self._reduce = backends.cuda().reduce if reduce is None else reduce
        self._exchanges: dict[int, GpuCollectives] = {}

    def beside(self) -> GpuDirect:
        """Return the same for another thread, with memory of its own."""
        return GpuDirect(self._workers.beside(), self._arrays, self._reduce)

    def all_reduce(self, value: Any, op: Reduction, out: Any = None) -> Any:
        """Return the reduction in a new array, or in ``out``; None: not all values can go so."""
        wanted = "gpu.all_reduce", op.name.lower(), spec(value)
        can = isinstance(op, ReduceOp) and _is_on_gpu(value) and (out is None or _is_on_gpu(out))
        if not can:
            return self._decline(*wanted)
        device = self._arrays.device_of(value)
        with self._arrays.at(device):
            source = self._dense(value)
            # One that overlaps the value otherwise would change it before all of it is sent.
            target = source if out is value and out is source else self._like(value)
            flat, into = source.reshape(-1), target.reshape(-1)
            exchange = self._exchange_on(device)
            exchange.prepare_all_reduce(flat)

            def move(told: list[int], finish: Finish) -> bool:
                if all(told):
                    exchange.all_reduce(into, flat, op, finish)
                return all(told)

            if not self._workers.carry(move, 1, *wanted):
                return None
            if out is None or out is target:
                return target
            self._arrays.copy(out, target, self._arrays.current(device))
            return out

    def reduce_scatter(self, value: Any, op: Reduction) -> Any:
        """Return this worker's part of the reduction; None: not all values can go so."""
        total = self.all_reduce(value, op)
        if total is None:
            return None
        start, stop = partition.bounds(len(value), self._workers.size, self._workers.rank)
        return self._copied(total[start:stop])  # of its own, so that the rest is let go

    def all_gather(self, value: Any, axis: int) -> Any:
        """Return the concatenation in a new array; None: not all values can go so."""
        rest = (*value.shape[:axis], *value.shape[axis + 1 :])
        wanted = "gpu.all_gather", f"axis {axis}", Spec(("any", *rest), value.dtype)
        num_rows, can = value.shape[axis], _is_on_gpu(value)
        told = self._workers.carry(_listen, 2 * num_rows + can, *wanted)
        if not all(word & 1 for word in told):
            return None
        device, row_nbytes = self._arrays.device_of(value), math.prod(rest) * value.itemsize
        rows = partition.starts(word >> 1 for word in told)
        starts = [start * row_nbytes for start in rows]
        with self._arrays.at(device):
            result = self._arrays.empty(device, (rows[-1], *rest), value.dtype)
            own = result[rows[self._workers.rank] : rows[self._workers.rank + 1]]
            if own.size:
                self._arrays.copy(own, _axis_moved(value, axis, 0), self._arrays.current(device))
            exchange = self._exchange_on(device)
            exchange.complete()

            def move(_: list[int], finish: Finish) -> None:
                if result.size:
                    exchange.all_gather(_as_bytes(result), starts, finish)

            self._workers.carry(move, 0, "gpu.all_gather has room")
            return result if axis == 0 else self._dense(_axis_moved(result, 0, axis))

    def broadcast(self, value: Any, root: int) -> Any:
        """Return the root's value in a new array; None: not all values can go so."""
        wanted = "gpu.broadcast", f"from worker {root}", spec(value)
        if not _is_on_gpu(value):
            return self._decline(*wanted)
        device = self._arrays.device_of(value)
        with self._arrays.at(device):
            result = self._copied(value) if self._workers.rank == root else self._like(value)
            exchange = self._exchange_on(device)
            exchange.complete()

            def move(told: list[int], finish: Finish) -> bool:
                if all(told) and result.size:
                    exchange.broadcast(_as_bytes(result), root, finish)
                return all(told)

            return result if self._workers.carry(move, 1, *wanted) else None

    def _decline(self, verb: str, *terms: Any) -> None:
        """Tell the others that this worker's value cannot go so."""
        self._workers.carry(_listen, 0, verb, *terms)

    def _exchange_on(self, device: int) -> GpuCollectives:
        found = self._exchanges.get(device)
        if found is None:
            comm, seconds = self._workers.gpu_comms[0], self._workers.timeout_seconds
            found = GpuCollectives(comm, self._arrays, self._reduce, device, seconds)
            self._exchanges[device] = found
        return found

    def _like(self, value: Any) -> Any:
        return self._arrays.empty(self._arrays.device_of(value), value.shape, value.dtype)

    def _dense(self, value: Any) -> Any:
        """Return a dense array of the same content: the same one if it is."""
        return value if value.flags.c_contiguous else self._copied(value)

    def _copied(self, value: Any) -> Any:
        made = self._like(value)
        if value.size:
            device = self._arrays.device_of(value)
            self._arrays.copy(made, value, self._arrays.current(device))
        return made


def _is_on_gpu(value: Any) -> bool:
    return not isinstance(value, (np.ndarray, np.generic))


def _listen(told: list[int], _: Finish) -> list[int]:
    """Move nothing."""
    return told


def _axis_moved(array: Any, source: int, target: int) -> Any:
    axes = [axis for axis in range(array.ndim) if axis != source]
    return array.transpose([*axes[:target], source, *axes[target:]])


def _as_bytes(array: Any) -> Any:
    """Return a dense array as flat bytes on its GPU, not copied."""
    return array.reshape(-1).view(np.uint8)
