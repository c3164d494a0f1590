"""Workers whose values lie in any memory, over others that carry arrays of the host.

A value on a GPU goes straight to the GPUs of the others where MPI takes their memory and the values
of all lie there. Else it goes down into page-locked memory, through the workers there, and back up.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory, cuda
from dvkernels.reduce_op import Reduction

if TYPE_CHECKING:  # it brings the compiler of kernels with it
    from dvkernels.communicators.workers.gpu.direct import GpuDirect

__all__: list[str] = []


@final
class Staged:
    """The same workers, for arrays of any memory. See ``communicators.base.Workers``.

    Parameters
    ----------
    workers : Workers
        Who carry arrays of the host.
    arrays : ArrayLibrary, optional
        What makes arrays on GPUs; that of this process if not given, when there is one to stage.
    straight : GpuDirect, optional
        The same workers, for values that go from GPU to GPU. All workers have it, or none.

    Notes
    -----
    If the values of one worker may lie on a GPU, all workers have this: what one of them packs, the
    others do not reduce array by array.

    The caller waits for a value to have come down, and not for the result to have gone up: that
    follows in the order of the current stream. Page-locked memory is kept, and grows.
    """

    def __init__(
        self,
        workers: Workers,
        arrays: cuda.ArrayLibrary | None = None,
        straight: GpuDirect | None = None,
    ) -> None:
        self._workers = workers
        self._given = arrays
        self._straight = straight
        self._pinned = np.empty(0, np.uint8)
        self._uploaded: Any = None  # when the memory may be written again
        self.rank, self.size = workers.rank, workers.size
        self.timeout_seconds = workers.timeout_seconds

    def beside(self) -> Staged:
        """Return the same workers for another thread, with memory of their own."""
        straight = None if self._straight is None else self._straight.beside()
        return Staged(self._workers.beside(), self._given, straight)

    def empty(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
        """Return new arrays of the host."""
        return self._workers.empty(shape, dtype, count)

    def meet(self) -> None:
        """Return when every worker has called this."""
        self._workers.meet()

    def exchange(self, word: Any, verb: str = "exchange") -> list[Any]:
        """Return a small object of each worker."""
        return self._workers.exchange(word, verb)

    def agree(self, numbers: Sequence[int], verb: str, *terms: Any) -> list[list[int]]:
        """Return some integers of each worker, when all have called this with equal terms."""
        return self._workers.agree(numbers, verb, *terms)

    def announce(self, error: BaseException) -> None:
        """Tell the others that this worker's step has failed."""
        self._workers.announce(error)

    def end(self, error: BaseException) -> None:
        """Make everything that any worker calls from now on raise this."""
        self._workers.end(error)

    @property
    def has_ended(self) -> bool:
        """Whether everything that a worker calls raises."""
        return self._workers.has_ended

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into a new array, or into ``out``."""
        (value,) = values
        if self._straight is not None:
            result = self._straight.all_reduce(value, op, None if out is None else out[0])
            if result is not None:
                return [result]
        if isinstance(value, np.ndarray):
            return self._workers.all_reduce(values, op, out)
        staged = self._down(value)
        self._workers.all_reduce([staged], op, [staged])
        if out is None:
            return [self._up(staged, value)]
        (target,) = out
        held = array_memory.holding(target)
        held.apply(operator.setitem, target, ..., held.near(self._up(staged, value), target))
        return [target]

    def all_reduce_columns(
        self,
        columns: Sequence[Sequence[Any]],
        how: Accumulation,
        outs: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Any]] | None:
        """Return None: those of another worker may lie on GPUs, wherever these do."""
        return None

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into a new array, on every worker."""
        return self.all_reduce(values, op)[0]

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce, and keep this worker's part."""
        (value,) = values
        if self._straight is not None:
            part = self._straight.reduce_scatter(value, op)
            if part is not None:
                return [part]
        if isinstance(value, np.ndarray):
            return self._workers.reduce_scatter(values, op)
        return [self._up(self._workers.reduce_scatter([self._down(value)], op)[0], value)]

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array."""
        (value,) = values
        if self._straight is not None:
            result = self._straight.all_gather(value, axis)
            if result is not None:
                return [result]
        if isinstance(value, np.ndarray):
            return self._workers.all_gather(values, axis)
        return [self._up(self._workers.all_gather([self._down(value)], axis)[0], value)]

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value."""
        (value,) = values
        if self._straight is not None:
            result = self._straight.broadcast(value, root)
            if result is not None:
                return [result]
        if isinstance(value, np.ndarray):
            return self._workers.broadcast(values, root)
        return [self._up(self._workers.broadcast([self._down(value)], root)[0], value)]

    @functools.cached_property
    def _arrays(self) -> cuda.ArrayLibrary:
        return cuda.arrays() if self._given is None else self._given

    def _down(self, value: Any) -> Any:
        """Return what a value holds, in page-locked memory, when it has come there."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        if value.nbytes > len(self._pinned):
            self._pinned = self._arrays.pinned(value.nbytes)
        staged = self._pinned[: value.nbytes].view(value.dtype).reshape(value.shape)
        dense = (
            value if value.flags.c_contiguous else array_memory.holding(value).beside(value, value)
        )
        device = self._arrays.device_of(value)
        stream = self._arrays.current(device)
        self._arrays.copy(staged, dense, stream)
        self._recorded(device, stream).synchronize()
        return staged

    def _up(self, staged: Any, value: Any) -> Any:
        """Return a new array where the value lies."""
        device = self._arrays.device_of(value)
        made = self._arrays.empty(device, staged.shape, staged.dtype)
        self._arrays.copy(made, staged)
        self._uploaded = self._recorded(device, self._arrays.current(device))
        return made

    def _recorded(self, device: int, stream: Any) -> Any:
        event = self._arrays.event(device)
        event.record(stream)
        return event
