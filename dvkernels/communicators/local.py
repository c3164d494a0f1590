"""The communicator of several ranks in one process, over the project's own kernels."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from dvkernels.kernels import twins
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import partition

__all__: list[str] = []


@final
class Local:
    """All ranks are buffers of this process; one thread calls for all of them.

    Parameters
    ----------
    size : int
        The number of ranks.
    algorithm : str
        ``"auto"``, ``"direct"`` or ``"ring"``: see ``dvkernels.kernels.all_reduce``.
    """

    def __init__(self, size: int, algorithm: str) -> None:
        self.size = size
        self._algorithm = algorithm

    def all_reduce(
        self, values: Sequence[Any], op: ReduceOp, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into new arrays, or into ``out``."""
        kernels, algorithm = twins.cpu(), self._algorithm
        results: list[Any]
        if out is None:
            results = kernels.all_reduce_new(values, op, algorithm)
        elif all(map(operator.is_, out, values)):
            results = kernels.all_reduce(values, op, algorithm=algorithm)  # in place: fewer checks
        else:
            results = kernels.all_reduce(values, op, algorithm=algorithm, out=out)
        return results

    def reduce(self, values: Sequence[Any], op: ReduceOp) -> Any:
        """Reduce into one new array."""
        return twins.cpu().reduce(values, op)

    def reduce_scatter(self, values: Sequence[Any], op: ReduceOp) -> list[Any]:
        """Reduce part by part: each rank's result is reduced from views of the ranks' parts."""
        parts = partition.parts(len(values[0]), self.size)
        return [
            twins.cpu().reduce([value[start:stop] for value in values], op) for start, stop in parts
        ]

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate once, then copy for the other ranks."""
        whole = np.concatenate(values, axis)
        return [whole, *(whole.copy() for _ in range(self.size - 1))]

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value for every rank."""
        return [np.array(values[root]) for _ in range(self.size)]
