"""Replicas of several workers: those of a worker reduce first, then the workers, once a worker."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators import levels
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__: list[str] = []


@final
class Hierarchical:
    """All replicas of all workers; each worker calls for its own.

    Parameters
    ----------
    inside : Communicator
        Of the replicas of this worker.
    workers : Workers
    replicas_of_workers : sequence of int
        How many replicas each worker has. Their ranks count on from worker to worker.

    Notes
    -----
    With one replica a worker this is the workers' own reduction. Else the replicas of a worker
    reduce to one array, which the workers reduce and each worker copies for its replicas: between
    processes each byte goes once a worker, not once a replica. Over shared memory all three are
    one pass, piece by piece. Half types go between them as
    float32, so that they are rounded once.
    """

    def __init__(
        self, inside: Communicator, workers: Workers, replicas_of_workers: Sequence[int]
    ) -> None:
        self._inside = inside
        self._workers = workers
        self._starts = partition.starts(replicas_of_workers)
        self._first, self.size = self._starts[workers.rank], self._starts[-1]
        self._is_flat = all(count == 1 for count in replicas_of_workers)

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into new arrays, or into ``out``."""
        if self._is_flat:
            return self._workers.all_reduce(values, op, out)
        how = levels.of(op, values[0].dtype, self.size)
        results = self._workers.all_reduce_replicas(values, how, out)
        if results is not None:
            return results
        total = self.reduce(values, op)
        if out is None:
            return _one_for_each(total, values)
        for target in out:
            target[...] = total
        return list(out)

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into one new array."""
        if self._is_flat:
            return self._workers.reduce(values, op)
        dtype = values[0].dtype
        how = levels.of(op, dtype, self.size)
        wide = [value.astype(how.wide, copy=False) for value in values]
        part = np.asarray(self._inside.reduce(wide, how.op))
        total = self._workers.all_reduce([part], how.op, [part])[0]
        how.divide(total)
        return total.astype(dtype, copy=False)

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce, and give each rank its part."""
        total = self.reduce(values, op)
        bounds = (
            partition.bounds(len(total), self.size, self._first + k) for k in range(len(values))
        )
        return [total[start:stop].copy() for start, stop in bounds]

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array for each rank."""
        own = values[0] if len(values) == 1 else np.concatenate(values, axis)
        return _one_for_each(self._workers.all_gather([own], axis)[0], values)

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value for every rank."""
        worker = bisect.bisect(self._starts, root) - 1
        own = root - self._first if worker == self._workers.rank else 0
        return _one_for_each(self._workers.broadcast([values[own]], worker)[0], values)


def _one_for_each(array: Any, values: Sequence[Any]) -> list[Any]:
    return [array, *(array.copy() for _ in values[1:])]
