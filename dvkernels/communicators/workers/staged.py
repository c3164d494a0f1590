"""Workers for arrays in any memory, on top of workers that take host arrays.

A GPU array is copied to pinned host memory, reduced there, and copied back. MPI gets host memory
only: whether an MPI library accepts GPU memory (is CUDA-aware) cannot be found out reliably.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.workers.group import ControlMessages, WorkerGroup
from dvkernels.devices import array_memory, cuda
from dvkernels.devices.array_spec import Array, HostArray
from dvkernels.profiler.memory_report import Holding
from dvkernels.reduce_op import Reduction

__all__: list[str] = []


@final
class Staged(ControlMessages):
    """Communicator of workers for arrays in any memory; see ``communicators.base.Workers``.

    Parameters
    ----------
    group : WorkerGroup
        The same workers, for host arrays.
    arrays : ArrayLibrary, optional
        Allocates GPU arrays; by default the array library of this process, once one is staged.

    Notes
    -----
    If the values of one worker may be on a GPU, all workers use this class, so that all of them
    pack arrays into the same buckets.

    The caller waits for the copy to the host, but not for the copy back, which follows in the order
    of the current stream. Pinned memory is kept, and grows.
    """

    def __init__(self, group: WorkerGroup, arrays: cuda.ArrayLibrary | None = None) -> None:
        super().__init__(group.transport)
        self._group = group
        self._given_arrays = arrays
        self._pinned: HostArray = np.empty(0, np.uint8)
        self._upload_done: Any = None  # event: the pinned memory may be written again

    def duplicate(self) -> Staged:
        """Return the same workers for another thread, with pinned memory of their own."""
        return Staged(self._group.duplicate(), self._given_arrays)

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into a new array, or into ``out``."""
        (value,) = values
        if isinstance(value, np.ndarray):
            return self._group.all_reduce(values, op, out)
        staged = self._to_host(value)
        self._group.all_reduce([staged], op, [staged])
        if out is None:
            return [self._to_device(staged, value)]
        (target,) = out
        memory = array_memory.holding(target)
        result = memory.to_device_of(self._to_device(staged, value), target)
        memory.apply(operator.setitem, target, ..., result)
        return [target]

    def all_reduce_columns(
        self,
        columns: Sequence[Sequence[Array]],
        how: Accumulation,
        outs: Sequence[Sequence[Array]] | None = None,
    ) -> list[list[Any]] | None:
        """Return None: the arrays of another worker may be on GPUs."""
        return None

    def reduce(self, values: Sequence[Array], op: Reduction) -> Any:
        """Reduce into a new array, on every worker."""
        return self.all_reduce(values, op)[0]

    def reduce_scatter(self, values: Sequence[Array], op: Reduction) -> list[Any]:
        """Reduce, and keep this worker's part."""
        return self._call_on_host(self._group.reduce_scatter, values, op)

    def all_gather(self, values: Sequence[Array], axis: int) -> list[Any]:
        """Concatenate into a new array."""
        return self._call_on_host(self._group.all_gather, values, axis)

    def broadcast(self, values: Sequence[Array], root: int) -> list[Any]:
        """Copy the root's value."""
        return self._call_on_host(self._group.broadcast, values, root)

    def _call_on_host(
        self, call: Callable[..., list[Any]], values: Sequence[Array], argument: Reduction | int
    ) -> list[Any]:
        """Call a collective with a host array, and return the result in the value's memory."""
        (value,) = values
        if isinstance(value, np.ndarray):
            return call(values, argument)
        (result,) = call([self._to_host(value)], argument)
        return [self._to_device(result, value)]

    @functools.cached_property
    def _arrays(self) -> cuda.ArrayLibrary:
        return cuda.arrays() if self._given_arrays is None else self._given_arrays

    def _to_host(self, value: Any) -> HostArray:
        """Copy a GPU array to pinned host memory, and wait for the copy."""
        if self._upload_done is not None:
            self._upload_done.synchronize()
        if value.nbytes > len(self._pinned):
            self._pinned = self._arrays.pinned(value.nbytes)
            self._holding = Holding("cpu:0", "staging", value.nbytes)
        staged: HostArray = self._pinned[: value.nbytes].view(value.dtype).reshape(value.shape)
        dense = (
            value
            if value.flags.c_contiguous
            else array_memory.holding(value).copy_to_device_of(value, value)
        )
        device = self._arrays.device_of(value)
        stream = self._arrays.current(device)
        self._arrays.copy(staged, dense, stream)
        self._record_event(device, stream).synchronize()
        return staged

    def _to_device(self, staged: HostArray, value: Any) -> Any:
        """Start the copy of a staged result to a new array on the GPU of ``value``."""
        device = self._arrays.device_of(value)
        result = self._arrays.empty(device, staged.shape, staged.dtype)
        self._arrays.copy(result, staged)
        self._upload_done = self._record_event(device, self._arrays.current(device))
        return result

    def _record_event(self, device: int, stream: Any) -> Any:
        event = self._arrays.event(device)
        with self._arrays.at(device):  # whose default stream it may be
            event.record(stream)
        return event
