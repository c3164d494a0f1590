"""Communicator of several ranks in one process, over the kernels of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array
from dvkernels.errors import BufferMismatchError
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
        self.algorithm = algorithm

    def all_reduce(
        self, values: Sequence[Array], op: Reduction, out: Sequence[Array] | None = None
    ) -> list[Array]:
        """Reduce into new arrays, or into ``out``."""
        twin = _twin("all_reduce", values if out is None else [*values, *out])
        results: list[Array] = twin.all_reduce_unchecked(values, op, self.algorithm, out)
        return results

    def reduce(self, values: Sequence[Array], op: Reduction) -> Array:
        """Reduce into one new array."""
        total: Array = _twin("reduce", values).reduce_unchecked(values, op)
        return total

    def reduce_scatter(self, values: Sequence[Array], op: Reduction) -> list[Array]:
        """Reduce each rank's part into a new array."""
        parts: list[Array] = _twin("reduce_scatter", values).reduce_scatter_unchecked(values, op)
        return parts

    def all_gather(self, values: Sequence[Array], axis: int) -> list[Array]:
        """Concatenate into a new array for each rank."""
        wholes: list[Array] = _twin("all_gather", values).all_gather_unchecked(values, axis)
        return wholes

    def broadcast(self, values: Sequence[Array], root: int) -> list[Array]:
        """Copy the root's value for every rank."""
        source = values[root]
        return [array_memory.holding(source).copy_to_device_of(source, value) for value in values]


def _twin(verb: str, values: Sequence[Array]) -> Any:
    """Return the twin, CPU or CUDA, for the arrays of all ranks.

    Replicas check their own arrays, so only here can be seen that some are on GPUs and others not.
    """
    kind = type(values[0])
    twin = backends.of_type(kind)
    for value in values:
        if type(value) is not kind and backends.of_type(type(value)) is not twin:
            raise BufferMismatchError(
                f"{verb} needs buffers of one kind of device: those of replica 0 are in "
                f"{'host' if twin is backends.cpu() else 'GPU'} memory, and others are not; copy "
                f"them first"
            )
    return twin
