"""Worker group: the collectives between processes, over a transport."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.workers.consistency import Fingerprint, fingerprint_of
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.communicators.workers.transport import Transport
from dvkernels.devices.array_spec import HostArray, Spec
from dvkernels.errors import AlgorithmError
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__: list[str] = []


_BARRIER = fingerprint_of("barrier")
_NO_BYTES = np.empty(0, np.uint8)


class ControlMessages:
    """Messages, failures and the end of a group: common to all communicators of workers."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.rank, self.size = transport.rank, transport.size
        self.timeout_seconds = transport.timeout_seconds

    def barrier(self) -> None:
        """Wait until every worker has called this."""
        self.transport.all_gather_bytes(_NO_BYTES, _BARRIER)

    def exchange(self, message: Any, verb: str = "exchange") -> list[Any]:
        """Return the messages of all workers; a message must be picklable."""
        data = np.frombuffer(pickle.dumps(message), np.uint8)
        return [
            pickle.loads(part.tobytes())
            for part in self.transport.all_gather_bytes(data, fingerprint_of(verb))
        ]

    def agree(self, numbers: Sequence[int], verb: str, *terms: Any) -> list[list[int]]:
        """Return the integers of all workers, once all have called this with equal terms."""
        data = np.array(numbers, np.int64).view(np.uint8)
        parts = self.transport.all_gather_bytes(data, fingerprint_of(verb, *terms))
        return [part.view(np.int64).tolist() for part in parts]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], count: int) -> list[HostArray]:
        """Return new arrays, in symmetric memory if the workers share memory."""
        symmetric_memory = self.transport.symmetric_memory
        if symmetric_memory is None:
            return [np.empty(shape, dtype) for _ in range(count)]
        return symmetric_memory.empty(self.agree, shape, dtype, count)

    def channels(self) -> list[MessageChannel | None]:
        """Return a message channel to each other worker; all workers call this together."""
        try:
            made = self.transport.channels()
        except BaseException as error:  # too little memory: the others do not wait
            self.end(error)
            raise
        self.barrier()  # all memory is clear
        return made

    def announce(self, error: BaseException) -> None:
        """Tell the other workers that this worker's step has failed."""
        self.transport.announce(error)

    def close(self) -> None:
        """Leave the group, where that is possible before this process exits."""
        self.transport.close()

    def end(self, error: BaseException) -> None:
        """Abort the group: every later call on any worker raises ``error``."""
        self.transport.end(error)

    @property
    def has_ended(self) -> bool:
        """Whether the group has been aborted."""
        return self.transport.has_ended


@final
class WorkerGroup(ControlMessages):
    """Communicator of the workers of a job, one host array each; see ``base.Workers``."""

    def duplicate(self) -> WorkerGroup:
        """Return the same workers for another thread."""
        return WorkerGroup(self.transport.duplicate())

    def all_reduce(
        self, values: Sequence[HostArray], op: Reduction, out: Sequence[HostArray] | None = None
    ) -> list[HostArray]:
        """Reduce into a new array, or into ``out``."""
        (value,) = values
        target = np.empty(value.shape, value.dtype) if out is None else out[0]
        fingerprint = _all_reduce_of(op, value.dtype, value.shape)
        if self.transport.all_reduce_short(value, target, op, fingerprint):
            return [target]
        is_flat = target.flags.c_contiguous
        flat = target.reshape(-1) if is_flat else np.empty(target.size, target.dtype)
        source = (value if value.flags.c_contiguous else np.ascontiguousarray(value)).reshape(-1)
        self.transport.all_reduce_into([[source, flat]], 1, op, fingerprint)
        if not is_flat:
            target[...] = flat.reshape(target.shape)
        return [target]

    def all_reduce_columns(
        self,
        columns: Sequence[Sequence[HostArray]],
        how: Accumulation,
        outs: Sequence[Sequence[HostArray]] | None = None,
    ) -> list[list[HostArray]] | None:
        """Reduce the arrays of all replicas of all workers, each in one pass over shared memory."""
        first = columns[0][0]
        if (
            not self.transport.takes_columns
            or how.wide != first.dtype
            or not all(type(value) is np.ndarray for column in columns for value in column)
        ):
            return None
        if outs is None:
            outs = [[np.empty(value.shape, value.dtype) for value in column] for column in columns]
        if len(columns) == len(columns[0]) == len(outs[0]) == 1:
            (source,), (target,) = columns[0], outs[0]
            call = _all_reduce_of(how.op, source.dtype, source.shape)
            if self.transport.all_reduce_short(source, target, how.op, call, how.divisor):
                return [[target]]
        targets = [
            [out if out.flags.c_contiguous else np.empty_like(out, order="C") for out in each]
            for each in outs
        ]
        specs = (Spec(column[0].shape, first.dtype) for column in columns)
        self.transport.all_reduce_into(
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

    def reduce(self, values: Sequence[HostArray], op: Reduction) -> HostArray:
        """Reduce into a new array, on every worker."""
        return self.all_reduce(values, op)[0]

    def reduce_scatter(self, values: Sequence[HostArray], op: Reduction) -> list[HostArray]:
        """Reduce, and keep this worker's part."""
        (value,) = values
        start, stop = partition.bounds(len(value), self.size, self.rank)
        return [self.reduce(values, op)[start:stop].copy()]

    def all_gather(self, values: Sequence[HostArray], axis: int) -> list[HostArray]:
        """Concatenate into a new array."""
        (value,) = values
        front = np.ascontiguousarray(np.moveaxis(value, axis, 0))
        rest = front.shape[1:]
        fingerprint = fingerprint_of(
            "all_gather", f"axis {axis}", Spec(("any", *rest), value.dtype)
        )
        parts = self.transport.all_gather_bytes(_as_bytes(front), fingerprint)
        # Empty rows have no bytes to count them by, so their numbers go as messages.
        counts = self.exchange(len(front)) if 0 in rest else [-1] * self.size
        rows = [
            part.view(value.dtype).reshape(count, *rest)
            for part, count in zip(parts, counts, strict=True)
        ]
        return [np.ascontiguousarray(np.moveaxis(np.concatenate(rows), 0, axis))]

    def broadcast(self, values: Sequence[HostArray], root: int) -> list[HostArray]:
        """Copy the root's value."""
        (value,) = values
        result = np.array(value, order="C")
        fingerprint = fingerprint_of(
            "broadcast", f"from worker {root}", Spec(value.shape, value.dtype)
        )
        self.transport.broadcast_into(_as_bytes(result), root, fingerprint)
        return [result]


# A name, a description and their hash take 0.3 us longer.
@functools.lru_cache(maxsize=1024)
def _all_reduce_of(op: Reduction, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Fingerprint:
    return fingerprint_of("all_reduce", op.name.lower(), Spec(shape, dtype))


def _as_bytes(array: HostArray) -> HostArray:
    """Return a view of a C-contiguous array as flat bytes."""
    return array.reshape(-1).view(np.uint8)


def check_algorithms(algorithms: Sequence[str]) -> None:
    """Raise ``AlgorithmError``, on all workers, if they ask for different algorithms."""
    if len({*algorithms}) > 1:
        raise AlgorithmError(
            f"all workers need the same algorithm between hosts, and cross_device_ops chooses "
            f"{algorithms}, in rank order; give all of them the same"
        )
