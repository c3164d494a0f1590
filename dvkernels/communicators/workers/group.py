"""Worker group: the collectives between processes, over a transport."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np

from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.workers.consistency import Fingerprint, fingerprint_of
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.devices.array_spec import Spec
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__: list[str] = []


class Transport(Protocol):
    """Transport of flat arrays between workers, which first checks that all call the same."""

    rank: int
    size: int
    timeout_seconds: float
    takes_columns: bool  # all_reduce_into takes several columns, of several arrays each
    symmetric_memory: SymmetricMemory | None  # whose arrays are reduced in place

    def all_reduce_into(
        self,
        columns: Sequence[Sequence[Any]],
        num_sources: int,
        op: Reduction,
        fingerprint: Fingerprint,
        divisor: int = 1,
    ) -> None:
        """Write the reduction of all workers' sources to each target: flat arrays of one dtype.

        A column is [*sources, *targets], of one length; targets may be sources. A worker's own
        sources are combined first, and the result is divided by ``divisor``. A transport that does
        not take columns gets one column of one source and one target, and no divisor.
        """

    def all_gather_bytes(self, source: Any, fingerprint: Fingerprint) -> list[Any]:
        """Return the bytes of all workers, whose numbers may differ."""

    def broadcast_into(self, target: Any, root: int, fingerprint: Fingerprint) -> None:
        """Write the root's bytes, which its ``target`` holds, to every ``target``."""

    def announce(self, error: BaseException) -> None:
        """Tell the other workers that this worker's step has failed."""

    def end(self, error: BaseException) -> None:
        """Abort the group, unless it has ended: every later call on any worker raises ``error``."""

    def duplicate(self) -> Transport:
        """Return a transport between the same workers for another thread."""

    @property
    def has_ended(self) -> bool:
        """Whether the group has been aborted."""

    @property
    def is_settled(self) -> bool:
        """Whether the exit of this process need not wait for anything pending."""

    def leave(self, text: str) -> None:
        """Tell the other workers that this worker makes no further call, and why."""

    def remaining_workers(self) -> list[int]:
        """Return the other workers that have not left, as far as is known."""


_BARRIER = fingerprint_of("barrier")
_NO_BYTES = np.empty(0, np.uint8)


@final
class WorkerGroup:
    """Communicator of the workers of a job, one array each: see ``communicators.base.Workers``.

    Parameters
    ----------
    transport : Transport
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank, self.size = transport.rank, transport.size
        self.timeout_seconds = transport.timeout_seconds

    def duplicate(self) -> WorkerGroup:
        """Return the same workers for another thread."""
        return WorkerGroup(self._transport.duplicate())

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into a new array, or into ``out``."""
        (value,) = values
        target = np.empty(value.shape, value.dtype) if out is None else out[0]
        is_flat = target.flags.c_contiguous
        flat = target.reshape(-1) if is_flat else np.empty(target.size, target.dtype)
        source = (value if value.flags.c_contiguous else np.ascontiguousarray(value)).reshape(-1)
        fingerprint = fingerprint_of("all_reduce", op.name.lower(), Spec(value.shape, value.dtype))
        self._transport.all_reduce_into([[source, flat]], 1, op, fingerprint)
        if not is_flat:
            target[...] = flat.reshape(target.shape)
        return [target]

    def all_reduce_columns(
        self,
        columns: Sequence[Sequence[Any]],
        how: Accumulation,
        outs: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Any]] | None:
        """Reduce the arrays of all replicas of all workers, each in one pass over shared memory."""
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
            len(columns[0]),
            how.op,
            fingerprint_of("all_reduce", how.op.name.lower(), *specs),
            how.divisor,
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
        fingerprint = fingerprint_of(
            "all_gather", f"axis {axis}", Spec(("any", *rest), value.dtype)
        )
        parts = self._transport.all_gather_bytes(_as_bytes(front), fingerprint)
        # Empty rows have no bytes to count them by, so their numbers go as messages.
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
        fingerprint = fingerprint_of(
            "broadcast", f"from worker {root}", Spec(value.shape, value.dtype)
        )
        self._transport.broadcast_into(_as_bytes(result), root, fingerprint)
        return [result]

    def barrier(self) -> None:
        """Wait until every worker has called this."""
        self._transport.all_gather_bytes(_NO_BYTES, _BARRIER)

    def exchange(self, message: Any, verb: str = "exchange") -> list[Any]:
        """Return the messages of all workers; a message must be picklable."""
        data = np.frombuffer(pickle.dumps(message), np.uint8)
        return [
            pickle.loads(part.tobytes())
            for part in self._transport.all_gather_bytes(data, fingerprint_of(verb))
        ]

    def agree(self, numbers: Sequence[int], verb: str, *terms: Any) -> list[list[int]]:
        """Return the integers of all workers, once all have called this with equal terms."""
        data = np.array(numbers, np.int64).view(np.uint8)
        parts = self._transport.all_gather_bytes(data, fingerprint_of(verb, *terms))
        return [part.view(np.int64).tolist() for part in parts]

    def empty(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
        """Return new arrays, in symmetric memory if the workers share memory."""
        symmetric_memory = self._transport.symmetric_memory
        if symmetric_memory is None:
            return [np.empty(shape, dtype) for _ in range(count)]
        return symmetric_memory.empty(self.agree, shape, dtype, count)

    def announce(self, error: BaseException) -> None:
        """Tell the other workers that this worker's step has failed."""
        self._transport.announce(error)

    def end(self, error: BaseException) -> None:
        """Abort the group: every later call on any worker raises ``error``."""
        self._transport.end(error)

    @property
    def has_ended(self) -> bool:
        """Whether the group has been aborted."""
        return self._transport.has_ended


def _as_bytes(array: Any) -> Any:
    """Return a view of a C-contiguous array as flat bytes."""
    return array.reshape(-1).view(np.uint8)
