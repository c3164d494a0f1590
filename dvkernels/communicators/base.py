"""What a communicator can do, whoever carries the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from dvkernels.communicators.accumulation import Accumulation
from dvkernels.reduce_op import Reduction

__all__ = ["Communicator", "Workers"]


@runtime_checkable
class Communicator(Protocol):
    """The collectives of one group of ranks, seen from a process that holds some of them.

    Every method takes one array per local rank, in rank order, leaves them unchanged unless
    ``out`` says otherwise, and returns new arrays that the caller owns. Arguments have been
    checked by the caller: one dtype, shapes that fit, an ``op`` that is defined for the dtype.
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
        """Return part r of the reduction to rank r, parts as ``numpy.array_split`` on axis 0."""

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Return the concatenation of all ranks' values, once per local rank."""

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Return the root's value, once per local rank."""


@runtime_checkable
class Workers(Communicator, Protocol):
    """The processes of a job, each with one array: a communicator that also carries words.

    Every worker calls the same methods in the same order. Workers that do not, and workers that
    are late or lost, are errors on all of them: ``CollectiveMismatchError``, after which all are
    in step again, ``CollectiveTimeoutError`` and ``WorkerLostError``, which are final.
    """

    @property
    def rank(self) -> int:
        """The number of this worker, from 0."""

    @property
    def timeout_seconds(self) -> float:
        """How long a worker waits for the others."""

    def all_reduce_columns(
        self,
        columns: Sequence[Sequence[Any]],
        how: Accumulation,
        outs: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Any]] | None:
        """Return the reductions of many values over all replicas of all workers.

        A column has one value for each replica of this worker, all columns are of one dtype; the
        values of a worker are combined first. None, and nothing has happened: these do not go in
        one pass here.
        """

    def empty(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
        """Return ``count`` new arrays of the host, reduced where they lie if that is possible.

        All workers call this, with the same shape and dtype.
        """

    def meet(self) -> None:
        """Return when every worker has called this."""

    def exchange(self, word: Any, verb: str = "exchange") -> list[Any]:
        """Return a small object of each worker, in their order; ``verb`` is for messages."""

    def agree(self, numbers: Sequence[int], verb: str, *terms: Any) -> list[list[int]]:
        """Return some integers of each worker, when all have called this with equal terms.

        For what is carried out by others than the workers, and must be asked for by all of them:
        after this they do.
        """

    def announce(self, error: BaseException) -> None:
        """Make what the others wait for, or call next, raise: this worker's step has failed.

        Does not wait. An error that all workers raise anyway is not announced.
        """

    def end(self, error: BaseException) -> None:
        """Make everything that any worker calls from now on raise this; final, does not wait.

        A ``CollectiveTimeoutError`` or a ``WorkerLostError``: other workers raise one of that kind.
        """

    @property
    def has_ended(self) -> bool:
        """Whether everything that a worker calls raises: after ``end``, or the loss of another."""

    def beside(self) -> Workers:
        """Return the same workers for the use of another thread: its calls are in an own order."""
