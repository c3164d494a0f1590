"""Replicas of several workers: those of a worker reduce first, then the workers, once a worker."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators import accumulation
from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.custom_reduction import CustomReduction
from dvkernels.devices import array_memory
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
    one pass, piece by piece. Half types go between them as float32, so that they are rounded once.
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
        how = accumulation.of(op, values[0].dtype, self.size)
        results = self._workers.all_reduce_columns([values], how, None if out is None else [out])
        if results is not None:
            return results[0]
        total = self.reduce(values, op)
        if out is None:
            return _one_for_each(total, values)
        held = array_memory.holding(total)
        for target in out:
            held.apply(operator.setitem, target, ..., held.near(total, target))
        return list(out)

    def all_reduce_many(
        self,
        columns: Sequence[Sequence[Any]],
        op: Reduction,
        outs: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Any]] | None:
        """Reduce each column into new arrays, or ``outs``, in one pass.

        None: they are better packed.
        """
        hows = {column[0].dtype: self._levels_of(op, column[0].dtype) for column in columns}
        if isinstance(op, CustomReduction) or any(how.wide != dtype for dtype, how in hows.items()):
            return None
        # The workers are to decline all dtypes or none: what they have reduced is not done again.
        if len(hows) > 1 and not all(type(one) is np.ndarray for each in columns for one in each):
            return None
        results: dict[int, list[Any]] = {}
        for dtype, how in hows.items():
            alike = [k for k, column in enumerate(columns) if column[0].dtype == dtype]
            into = None if outs is None else [outs[k] for k in alike]
            reduced = self._workers.all_reduce_columns([columns[k] for k in alike], how, into)
            if reduced is None:
                return None
            results |= zip(alike, reduced, strict=True)
        return [results[k] for k in range(len(columns))]

    def _levels_of(self, op: Reduction, dtype: np.dtype[Any]) -> Accumulation:
        if self._is_flat:  # one level: the kernels round and divide
            return Accumulation(op, dtype, 1)
        return accumulation.of(op, dtype, self.size)

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into one new array."""
        if self._is_flat:
            return self._workers.reduce(values, op)
        dtype = values[0].dtype
        how = accumulation.of(op, dtype, self.size)
        held = array_memory.holding(values[0])
        wide = [held.apply(_as, value, how.wide) for value in values]
        part = self._inside.reduce(wide, how.op)
        if isinstance(part, np.generic):
            part = np.asarray(part)
        total = self._workers.all_reduce([part], how.op, [part])[0]
        held.apply(how.divide, total)
        return held.apply(_as, total, dtype)

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce, and give each rank its part."""
        total = self.reduce(values, op)
        held = array_memory.holding(total)
        bounds = (
            partition.bounds(len(total), self.size, self._first + k) for k in range(len(values))
        )
        return [
            held.beside(total[start:stop], value)
            for (start, stop), value in zip(bounds, values, strict=True)
        ]

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array for each rank."""
        held = array_memory.holding(values[0])
        near = [held.near(value, values[0]) for value in values]
        own = held.apply(lambda *parts: np.concatenate(parts, axis), *near)
        return _one_for_each(self._workers.all_gather([own], axis)[0], values)

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value for every rank."""
        worker = bisect.bisect(self._starts, root) - 1
        own = root - self._first if worker == self._workers.rank else 0
        return _one_for_each(self._workers.broadcast([values[own]], worker)[0], values)


def _one_for_each(array: Any, values: Sequence[Any]) -> list[Any]:
    """Return the array where the first value lies, and a copy where each other one does."""
    held = array_memory.holding(array)
    return [
        held.near(array, values[0]),
        *(held.beside(array, value) for value in values[1:]),
    ]


def _as(array: Any, dtype: np.dtype[Any]) -> Any:
    with np.errstate(over="ignore"):  # of half types, as in the kernels
        return array.astype(dtype, copy=False)
