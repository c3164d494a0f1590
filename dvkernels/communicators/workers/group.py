"""The verbs between workers, over whatever carries their arrays."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, final

import numpy as np

from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.workers.consistency import Fingerprint, asked
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.communicators.workers.wait import Finish
from dvkernels.devices.buffers import Spec
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__: list[str] = []

T = TypeVar("T")


class Transport(Protocol):
    """Carries flat arrays and bytes; every call first makes sure that all workers ask for it."""

    rank: int
    size: int
    timeout_seconds: float
    takes_columns: bool  # all_reduce_into takes several, of several arrays
    window: SymmetricMemory | None  # where it reduces arrays without copying them

    def all_reduce_into(
        self,
        columns: Sequence[Sequence[Any]],
        num_sources: int,
        op: Reduction,
        wanted: Fingerprint,
        divisor: int = 1,
    ) -> None:
        """Leave the reduction of all workers' sources in each target: flat, of one dtype.

        A column is [*sources, *targets], of one length, and targets may be sources. A worker's own
        sources are combined first; the result is divided by ``divisor``. One column of one each,
        and no divisor, unless the transport takes columns.
        """

    def gather(self, source: Any, wanted: Fingerprint) -> list[Any]:
        """Return the bytes of all workers; each may bring another number of them."""

    def broadcast_into(self, target: Any, root: int, wanted: Fingerprint) -> None:
        """Leave the root's bytes in ``target``, which holds them on the root."""

    def carry(self, move: Callable[[list[int], Finish], T], number: int, wanted: Fingerprint) -> T:
        """Return what ``move`` makes of the numbers of all workers, not below 0.

        It carries what this does not, by requests of its own, and is given what waits for one:
        that raises where it is in vain.
        """

    def announce(self, error: BaseException) -> None:
        """Tell the others that this worker's step has failed."""

    def end(self, error: BaseException) -> None:
        """End the group, unless it has ended: what any worker calls from now on raises this."""

    def beside(self) -> Transport:
        """Return another one, for another thread."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing can be carried any more."""

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way that the end of the process would have to wait for."""

    def leave(self, text: str) -> None:
        """Say that this worker calls nothing any more, and why."""

    def those_that_stay(self) -> list[int]:
        """Return the other workers that are there and have not left, as far as it is known."""


_MEETING = asked("barrier")
_NO_BYTES = np.empty(0, np.uint8)


@final
class WorkerGroup:
    """The workers of a job, each with one array: see ``communicators.base.Workers``.

    Parameters
    ----------
    transport : Transport
    gpu_comms : sequence of mpi4py.MPI.Comm
        That take memory of GPUs, one for each thread; none if MPI does not.
    """

    def __init__(self, transport: Transport, gpu_comms: Sequence[Any] = ()) -> None:
        self._transport = transport
        self.gpu_comms = gpu_comms
        self.rank, self.size = transport.rank, transport.size
        self.timeout_seconds = transport.timeout_seconds

    def beside(self) -> WorkerGroup:
        """Return the same workers for another thread."""
        return WorkerGroup(self._transport.beside(), self.gpu_comms[1:] or self.gpu_comms)

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into a new array, or into ``out``."""
        (value,) = values
        target = np.empty(value.shape, value.dtype) if out is None else out[0]
        is_flat = target.flags.c_contiguous
        flat = target.reshape(-1) if is_flat else np.empty(target.size, target.dtype)
        source = (value if value.flags.c_contiguous else np.ascontiguousarray(value)).reshape(-1)
        wanted = asked("all_reduce", op.name.lower(), Spec(value.shape, value.dtype))
        self._transport.all_reduce_into([[source, flat]], 1, op, wanted)
        if not is_flat:
            target[...] = flat.reshape(target.shape)
        return [target]

    def all_reduce_columns(
        self,
        columns: Sequence[Sequence[Any]],
        how: Accumulation,
        outs: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Any]] | None:
        """Reduce the arrays of all replicas of all workers, each in one pass over memory."""
        first = columns[0][0]
        if (
            not self._transport.takes_columns
            or how.wide != first.dtype
            or not all(type(value) is np.ndarray for column in columns for value in column)
        ):
            return None
        if outs is None:
            outs = [[np.empty(value.shape, value.dtype) for value in column] for column in columns]
        targets = [
            [out if out.flags.c_contiguous else np.empty_like(out, order="C") for out in each]
            for each in outs
        ]
        specs = (Spec(column[0].shape, first.dtype) for column in columns)
        self._transport.all_reduce_into(
            [
                [array.reshape(-1) for array in [*map(np.ascontiguousarray, column), *each]]
                for column, each in zip(columns, targets, strict=True)
            ],
            len(columns[0]), how.op, asked("all_reduce", how.op.name.lower(), *specs), how.divisor,
        )  # fmt: skip
        for each, made in zip(outs, targets, strict=True):
            for out, target in zip(each, made, strict=True):
                if out is not target:
                    out[...] = target
        return [[*each] for each in outs]

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into a new array, on every worker."""
        return self.all_reduce(values, op)[0]

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce, and keep this worker's part."""
        (value,) = values
        start, stop = partition.bounds(len(value), self.size, self.rank)
        return [self.reduce(values, op)[start:stop].copy()]

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array."""
        (value,) = values
        front = np.ascontiguousarray(np.moveaxis(value, axis, 0))
        rest = front.shape[1:]
        wanted = asked("all_gather", f"axis {axis}", Spec(("any", *rest), value.dtype))
        parts = self._transport.gather(_as_bytes(front), wanted)
        # Rows without content are counted in words: they have no bytes.
        counts = self.exchange(len(front)) if 0 in rest else [-1] * self.size
        rows = [
            part.view(value.dtype).reshape(count, *rest)
            for part, count in zip(parts, counts, strict=True)
        ]
        return [np.ascontiguousarray(np.moveaxis(np.concatenate(rows), 0, axis))]

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value."""
        (value,) = values
        result = np.array(value, order="C")
        wanted = asked("broadcast", f"from worker {root}", Spec(value.shape, value.dtype))
        self._transport.broadcast_into(_as_bytes(result), root, wanted)
        return [result]

    def meet(self) -> None:
        """Return when every worker has called this."""
        self._transport.gather(_NO_BYTES, _MEETING)

    def exchange(self, word: Any, verb: str = "exchange") -> list[Any]:
        """Return a small object of each worker; it must be one that pickle takes."""
        held = np.frombuffer(pickle.dumps(word), np.uint8)
        return [pickle.loads(part.tobytes()) for part in self._transport.gather(held, asked(verb))]

    def agree(self, numbers: Sequence[int], verb: str, *terms: Any) -> list[list[int]]:
        """Return some integers of each worker, when all have called this with equal terms."""
        held = np.array(numbers, np.int64).view(np.uint8)
        parts = self._transport.gather(held, asked(verb, *terms))
        return [part.view(np.int64).tolist() for part in parts]

    def empty(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
        """Return new arrays, which are reduced where they lie if the workers share memory."""
        window = self._transport.window
        if window is None:
            return [np.empty(shape, dtype) for _ in range(count)]
        return window.empty(self.agree, shape, dtype, count)

    def carry(
        self, move: Callable[[list[int], Finish], T], number: int, verb: str, *terms: Any
    ) -> T:
        """Return what ``move`` makes of a number of each worker; see ``Transport``."""
        return self._transport.carry(move, number, asked(verb, *terms))

    def announce(self, error: BaseException) -> None:
        """Tell the others that this worker's step has failed."""
        self._transport.announce(error)

    def end(self, error: BaseException) -> None:
        """Make everything that any worker calls from now on raise this."""
        self._transport.end(error)

    @property
    def has_ended(self) -> bool:
        """Whether everything that a worker calls raises."""
        return self._transport.has_ended


def _as_bytes(array: Any) -> Any:
    """Return a C-contiguous array as flat bytes, not copied."""
    return array.reshape(-1).view(np.uint8)
