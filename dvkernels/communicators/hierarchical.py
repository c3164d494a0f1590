"""Hierarchical collectives: first over the replicas of a worker, then over the workers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators import accumulation
from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.custom_reduction import CustomReduction
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__: list[str] = []


@final
class Hierarchical:
    """Communicator of all replicas of all workers; each worker passes the arrays of its own.

    Parameters
    ----------
    local : Communicator
        The communicator of this worker's replicas.
    workers : Workers
    replicas_of_workers : sequence of int
        The number of replicas of each worker. Ranks are numbered worker by worker.

    Notes
    -----
    With one replica per worker, this is the reduction between the workers. Otherwise the replicas
    of a worker reduce to one array, the workers all-reduce these arrays, and each worker copies the
    result to its replicas: processes exchange each byte once per worker, not once per replica. Over
    shared memory the three levels are one pass, piece by piece. Half types are accumulated in
    float32 between the levels, and rounded once.
    """

    def __init__(
        self, local: Communicator, workers: Workers, replicas_of_workers: Sequence[int]
    ) -> None:
        self.local = local
        self._workers = workers
        self._share = WorkerShare(replicas_of_workers, workers.rank)
        self.size = self._share.num_replicas
        self._is_flat = all(count == 1 for count in replicas_of_workers)

    def all_reduce(
        self, values: Sequence[Array], op: Reduction, out: Sequence[Array] | None = None
    ) -> list[Array]:
        """Reduce into new arrays, or into ``out``."""
        if self._is_flat:
            return self._workers.all_reduce(values, op, out)
        how = accumulation.of(op, values[0].dtype, self.size)
        results = self._workers.all_reduce_columns([values], how, None if out is None else [out])
        if results is not None:
            return results[0]
        total = self.reduce(values, op)
        if out is None:
            return _copy_for_each(total, values)
        memory = array_memory.holding(total)
        for target in out:
            memory.apply(operator.setitem, target, ..., memory.to_device_of(total, target))
        return list(out)

    def all_reduce_many(
        self,
        columns: Sequence[Sequence[Array]],
        op: Reduction,
        outs: Sequence[Sequence[Array]] | None = None,
    ) -> list[list[Array]] | None:
        """Reduce each column into new arrays, or ``outs``, in one pass; None if that is impossible.

        After None the caller packs the columns into buckets; none has been touched.
        """
        hows = {column[0].dtype: self._accumulation_of(op, column[0].dtype) for column in columns}
        if isinstance(op, CustomReduction) or any(how.wide != dtype for dtype, how in hows.items()):
            return None
        # The workers must decline all dtypes or none: a column must not be reduced twice.
        if len(hows) > 1 and not all(type(one) is np.ndarray for each in columns for one in each):
            return None
        results: dict[int, list[Array]] = {}
        for dtype, how in hows.items():
            alike = [k for k, column in enumerate(columns) if column[0].dtype == dtype]
            into = None if outs is None else [outs[k] for k in alike]
            reduced = self._workers.all_reduce_columns([columns[k] for k in alike], how, into)
            if reduced is None:
                return None
            results |= zip(alike, reduced, strict=True)
        return [results[k] for k in range(len(columns))]

    def _accumulation_of(self, op: Reduction, dtype: np.dtype[Any]) -> Accumulation:
        if self._is_flat:  # one level: the kernels round and divide
            return Accumulation(op, dtype, 1)
        return accumulation.of(op, dtype, self.size)

    def reduce(self, values: Sequence[Array], op: Reduction) -> Any:
        """Reduce into one new array."""
        if self._is_flat:
            return self._workers.reduce(values, op)
        dtype = values[0].dtype
        how = accumulation.of(op, dtype, self.size)
        memory = array_memory.holding(values[0])
        wide = [memory.apply(_cast, value, how.wide) for value in values]
        part = self.local.reduce(wide, how.op)
        if isinstance(part, np.generic):
            part = np.asarray(part)
        total = self._workers.all_reduce([part], how.op, [part])[0]
        memory.apply(how.divide, total)
        return memory.apply(_cast, total, dtype)

    def reduce_scatter(self, values: Sequence[Array], op: Reduction) -> list[Array]:
        """Reduce, and return each local rank's part."""
        total = self.reduce(values, op)
        memory = array_memory.holding(total)
        first, length = self._share.first_replica, total.shape[0]
        bounds = (partition.bounds(length, self.size, first + k) for k in range(len(values)))
        return [
            memory.copy_to_device_of(total[start:stop], value)
            for (start, stop), value in zip(bounds, values, strict=True)
        ]

    def all_gather(self, values: Sequence[Array], axis: int) -> list[Array]:
        """Concatenate into a new array for each rank."""
        memory = array_memory.holding(values[0])
        near = [memory.to_device_of(value, values[0]) for value in values]
        own = memory.apply(lambda *parts: np.concatenate(parts, axis), *near)
        return _copy_for_each(self._workers.all_gather([own], axis)[0], values)

    def broadcast(self, values: Sequence[Array], root: int) -> list[Array]:
        """Copy the root's value for every rank."""
        worker = self._share.worker_of(root)
        own = root - self._share.first_replica if worker == self._workers.rank else 0
        return _copy_for_each(self._workers.broadcast([values[own]], worker)[0], values)


def _copy_for_each(array: Any, values: Sequence[Array]) -> list[Array]:
    """Return the array in the memory of the first value, and a copy in that of each other one."""
    memory = array_memory.holding(array)
    return [
        memory.to_device_of(array, values[0]),
        *(memory.copy_to_device_of(array, value) for value in values[1:]),
    ]


def _cast(array: Any, dtype: np.dtype[Any]) -> Any:
    with np.errstate(over="ignore"):  # half types overflow to infinity, as in the kernels
        return array.astype(dtype, copy=False)
