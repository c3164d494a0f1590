"""Direct collectives between GPUs of different workers, where MPI is CUDA-aware."""

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
    """Collectives of one GPU array per worker, by CUDA-aware MPI.

    Parameters
    ----------
    workers : WorkerGroup
        With a CUDA-aware MPI communicator.
    arrays : ArrayLibrary, optional
        Allocates GPU arrays; by default the array library of this process.
    reduce : callable, optional
        The kernel ``reduce`` for these arrays; by default that of the CUDA backend.

    Notes
    -----
    In the control round of a call, each worker votes whether its value is on a GPU. If one is not,
    the method returns None on all workers, and nothing has happened. Custom reductions return None
    too: one may compile for the GPU of one worker and not for that of another.
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
        self._collectives: dict[int, GpuCollectives] = {}

    def duplicate(self) -> GpuDirect:
        """Return the same collectives for another thread, with memory of their own."""
        return GpuDirect(self._workers.duplicate(), self._arrays, self._reduce)

    def all_reduce(self, value: Any, op: Reduction, out: Any = None) -> Any:
        """Return the reduction in a new array, or in ``out``; None if a worker declines."""
        call = "gpu.all_reduce", op.name.lower(), spec(value)
        is_supported = (
            isinstance(op, ReduceOp) and _is_on_gpu(value) and (out is None or _is_on_gpu(out))
        )
        if not is_supported:
            return self._decline(*call)
        device = self._arrays.device_of(value)
        with self._arrays.at(device):
            source = self._contiguous(value)
            # An ``out`` that overlaps the value otherwise would change it before it is sent.
            target = source if out is value and out is source else self._empty_like(value)
            flat, into = source.reshape(-1), target.reshape(-1)
            collectives = self._collectives_on(device)
            collectives.prepare_all_reduce(flat)

            def move(flags: list[int], finish: Finish) -> bool:
                if all(flags):
                    collectives.all_reduce(into, flat, op, finish)
                return all(flags)

            if not self._workers.agree_and_run(move, 1, *call):
                return None
            if out is None or out is target:
                return target
            self._arrays.copy(out, target, self._arrays.current(device))
            return out

    def reduce_scatter(self, value: Any, op: Reduction) -> Any:
        """Return this worker's part of the reduction; None if a worker declines."""
        total = self.all_reduce(value, op)
        if total is None:
            return None
        start, stop = partition.bounds(len(value), self._workers.size, self._workers.rank)
        return self._copy_of(total[start:stop])  # a copy, so that the rest is freed

    def all_gather(self, value: Any, axis: int) -> Any:
        """Return the concatenation in a new array; None if a worker declines."""
        rest = (*value.shape[:axis], *value.shape[axis + 1 :])
        call = "gpu.all_gather", f"axis {axis}", Spec(("any", *rest), value.dtype)
        num_rows, is_supported = value.shape[axis], _is_on_gpu(value)
        flags = self._workers.agree_and_run(_return_numbers, 2 * num_rows + is_supported, *call)
        if not all(message & 1 for message in flags):
            return None
        device, row_nbytes = self._arrays.device_of(value), math.prod(rest) * value.itemsize
        rows = partition.starts(message >> 1 for message in flags)
        starts = [start * row_nbytes for start in rows]
        with self._arrays.at(device):
            result = self._arrays.empty(device, (rows[-1], *rest), value.dtype)
            own = result[rows[self._workers.rank] : rows[self._workers.rank + 1]]
            if own.size:
                self._arrays.copy(own, _move_axis(value, axis, 0), self._arrays.current(device))
            collectives = self._collectives_on(device)
            collectives.complete()

            def move(_: list[int], finish: Finish) -> None:
                if result.size:
                    collectives.all_gather(_as_bytes(result), starts, finish)

            self._workers.agree_and_run(move, 0, "gpu.all_gather allocated")
            return result if axis == 0 else self._contiguous(_move_axis(result, 0, axis))

    def broadcast(self, value: Any, root: int) -> Any:
        """Return the root's value in a new array; None if a worker declines."""
        call = "gpu.broadcast", f"from worker {root}", spec(value)
        if not _is_on_gpu(value):
            return self._decline(*call)
        device = self._arrays.device_of(value)
        with self._arrays.at(device):
            result = self._copy_of(value) if self._workers.rank == root else self._empty_like(value)
            collectives = self._collectives_on(device)
            collectives.complete()

            def move(flags: list[int], finish: Finish) -> bool:
                if all(flags) and result.size:
                    collectives.broadcast(_as_bytes(result), root, finish)
                return all(flags)

            return result if self._workers.agree_and_run(move, 1, *call) else None

    def _decline(self, verb: str, *terms: Any) -> None:
        """Vote that this worker's value is not on a GPU."""
        self._workers.agree_and_run(_return_numbers, 0, verb, *terms)

    def _collectives_on(self, device: int) -> GpuCollectives:
        found = self._collectives.get(device)
        if found is None:
            comm, seconds = self._workers.gpu_comms[0], self._workers.timeout_seconds
            found = GpuCollectives(comm, self._arrays, self._reduce, device, seconds)
            self._collectives[device] = found
        return found

    def _empty_like(self, value: Any) -> Any:
        return self._arrays.empty(self._arrays.device_of(value), value.shape, value.dtype)

    def _contiguous(self, value: Any) -> Any:
        """Return the array if it is contiguous, otherwise a contiguous copy."""
        return value if value.flags.c_contiguous else self._copy_of(value)

    def _copy_of(self, value: Any) -> Any:
        made = self._empty_like(value)
        if value.size:
            device = self._arrays.device_of(value)
            self._arrays.copy(made, value, self._arrays.current(device))
        return made


def _is_on_gpu(value: Any) -> bool:
    return not isinstance(value, (np.ndarray, np.generic))


def _return_numbers(flags: list[int], _: Finish) -> list[int]:
    """Return the numbers of all workers; move no data."""
    return flags


def _move_axis(array: Any, source: int, target: int) -> Any:
    axes = [axis for axis in range(array.ndim) if axis != source]
    return array.transpose([*axes[:target], source, *axes[target:]])


def _as_bytes(array: Any) -> Any:
    """Return a view of a contiguous GPU array as flat bytes."""
    return array.reshape(-1).view(np.uint8)
