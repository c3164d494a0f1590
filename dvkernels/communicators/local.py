"""Communicator of several ranks in one process, over the kernels of this package."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, final

from dvkernels.devices import array_memory
from dvkernels.kernels import backends
from dvkernels.reduce_op import Reduction

__all__: list[str] = []


@final
class Local:
    """Communicator whose ranks are buffers of one process; one thread calls for all of them.

    A collective runs where its arrays are stored: NumPy arrays on the CPU, others on their GPU.

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
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into new arrays, or into ``out``."""
        kernels, algorithm = backends.of(values[0]), self._algorithm
        results: list[Any]
        if out is None:
            results = kernels.all_reduce_new(values, op, algorithm)
        elif all(map(operator.is_, out, values)):
            results = kernels.all_reduce(values, op, algorithm=algorithm)  # in place: fewer checks
        else:
            results = kernels.all_reduce(values, op, algorithm=algorithm, out=out)
        return results

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into one new array."""
        return backends.of(values[0]).reduce(values, op)

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce each rank's part into a new array."""
        results: list[Any] = backends.of(values[0]).reduce_scatter(values, op)
        return results

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array for each rank."""
        results: list[Any] = backends.of(values[0]).all_gather(values, axis)
        return results

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value for every rank."""
        source = values[root]
        return [array_memory.holding(source).copy_to_device_of(source, value) for value in values]
