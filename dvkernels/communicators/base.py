"""Protocols of communicators: collectives of a group of ranks, and of the workers of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from dvkernels.communicators.accumulation import Accumulation
from dvkernels.reduce_op import Reduction

__all__ = ["Communicator", "Workers"]


@runtime_checkable
class Communicator(Protocol):
    """Collectives of one group of ranks, called by a process that holds some of the ranks.

    Every method takes one array per local rank, in rank order, leaves the arrays unchanged unless
    they are in ``out``, and returns new arrays that the caller owns. The caller has checked the
    arguments: one dtype, matching shapes, an ``op`` that is defined for the dtype.

    Examples
    --------
    The beginning of a communicator; ``examples/own_strategy.py`` has a whole one.

    >>> from dvkernels import kernels
    >>> class Plain:
    ...     def __init__(self, size):
    ...         self.size = size
    ...     def reduce(self, values, op):
    ...         return kernels.reduce(values, op)
    ...     def broadcast(self, values, root):
    ...         return [values[root].copy() for _ in values]
    """

    @property
    def size(self) -> int:
        """The number of ranks."""

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Return the reduction of all ranks' values, once per local rank."""

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Return the reduction of all ranks' values, once."""

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Return part r of the reduction for rank r; parts as ``numpy.array_split`` on axis 0."""

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Return the concatenation of all ranks' values, once per local rank."""

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Return the root's value, once per local rank."""


@runtime_checkable
class Workers(Communicator, Protocol):
    """Communicator of the processes of a job, one array each, which also carries small messages.

    Every worker calls the same methods in the same order. Where one does not, all workers raise
    ``CollectiveMismatchError``, after which the group can be used again. Where one is late or lost,
    all raise ``CollectiveTimeoutError`` or ``WorkerLostError``, which are final.
    """

    @property
    def rank(self) -> int:
        """The rank of this worker, from 0."""

    @property
    def timeout_seconds(self) -> float:
        """How long a worker waits for the other workers."""

    def all_reduce_columns(
        self,
        columns: Sequence[Sequence[Any]],
        how: Accumulation,
        outs: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Any]] | None:
        """Return the reductions of many values over all replicas of all workers, or None.

        A column has one value for each replica of this worker; all columns have one dtype. The
        values of a worker are combined first. None means that this communicator cannot reduce the
        columns in one pass, and has not touched them.
        """

    def empty(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
        """Return ``count`` new host arrays, in symmetric memory where the workers share memory.

        All workers call this, with the same shape and dtype.
        """

    def barrier(self) -> None:
        """Wait until every worker has called this."""

    def exchange(self, message: Any, verb: str = "exchange") -> list[Any]:
        """Return the messages of all workers, in rank order; ``verb`` names the call in errors."""

    def agree(self, numbers: Sequence[int], verb: str, *terms: Any) -> list[list[int]]:
        """Return the integers of all workers, once all have called this with equal terms.

        The barrier before an operation that another library (NCCL) carries out: every worker is
        known to ask for the same operation.
        """

    def announce(self, error: BaseException) -> None:
        """Tell the other workers that the step of this worker has failed, without waiting.

        Their pending or next call raises. An error that all workers raise anyway is not announced.
        """

    def end(self, error: BaseException) -> None:
        """Abort the group without waiting: every later call on any worker raises ``error``.

        ``error`` is a ``CollectiveTimeoutError`` or a ``WorkerLostError``; the other workers raise
        the same class.
        """

    @property
    def has_ended(self) -> bool:
        """Whether the group has been aborted, by :meth:`end` or by the loss of a worker."""

    def close(self) -> None:
        """Leave the group, with the strategy; do nothing where only an exit can leave it."""

    def duplicate(self) -> Workers:
        """Return the same workers for another thread, with a call order of its own."""
