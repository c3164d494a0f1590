"""Communicator of several ranks in one process, over the kernels of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array
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
        self, values: Sequence[Array], op: Reduction, out: Sequence[Array] | None = None
    ) -> list[Array]:
        """Reduce into new arrays, or into ``out``."""
        results: list[Array] = backends.of_type(type(values[0])).all_reduce_unchecked(
            values, op, self._algorithm, out
        )
        return results

    def reduce(self, values: Sequence[Array], op: Reduction) -> Array:
        """Reduce into one new array."""
        total: Array = backends.of_type(type(values[0])).reduce_unchecked(values, op)
        return total

    def reduce_scatter(self, values: Sequence[Array], op: Reduction) -> list[Array]:
        """Reduce each rank's part into a new array."""
        twin = backends.of_type(type(values[0]))
        parts: list[Array] = twin.reduce_scatter_unchecked(values, op)
        return parts

    def all_gather(self, values: Sequence[Array], axis: int) -> list[Array]:
        """Concatenate into a new array for each rank."""
        twin = backends.of_type(type(values[0]))
        wholes: list[Array] = twin.all_gather_unchecked(values, axis)
        return wholes

    def broadcast(self, values: Sequence[Array], root: int) -> list[Array]:
        """Copy the root's value for every rank."""
        source = values[root]
        return [array_memory.holding(source).copy_to_device_of(source, value) for value in values]
