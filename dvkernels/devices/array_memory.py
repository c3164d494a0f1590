"""Memory of a strategy's arrays: of the host (NumPy), of GPUs (CuPy), or of JAX devices.

Arithmetic needs no twins: NumPy's functions dispatch CuPy's arrays to CuPy by the protocols of
NEP 13 and NEP 18. This module has the operations that these protocols do not cover: allocation,
copies between devices, overwriting, views and transfers to the host.
"""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, Protocol, final

import numpy as np

from dvkernels.devices import cuda, cuda_arrays, interop
from dvkernels.devices.array_spec import Array, HostArray
from dvkernels.devices.cuda_arrays import current_stream
from dvkernels.devices.device import Device
from dvkernels.devices.gpu_times import GpuSpan
from dvkernels.devices.stream_order import wait_pairs
from dvkernels.errors import DeviceError
from dvkernels.profiler import tracing

__all__ = ["HOST", "ArrayMemory", "holding", "of"]


class ArrayMemory(Protocol):
    """Operations on the arrays of one kind of device, other than kernels.

    Arrays are NumPy's on the host and CuPy's on GPUs. Those of JAX cannot be written: where
    ``is_immutable`` is true, variables take new arrays instead.
    """

    is_immutable: bool

    def view(self, verb: str, buffer: Any, label: str) -> Array:
        """Return an array of another library as NumPy or CuPy array, without a copy."""

    def like(self, result: Array, original: Any) -> Any:
        """Return a new NumPy or CuPy array in the library that ``original`` comes from."""

    def new(self, content: Array, device: Device) -> Array:
        """Return a new contiguous array on a device; ``content`` lies on the host or a GPU."""

    def on(self, array: Array, device: Device) -> Array:
        """Return the array itself if it lies on the device, else a copy on it."""

    def to_device_of(self, array: Array, other: Array) -> Array:
        """Return the array itself if it lies on the device of ``other``, else a copy on it."""

    def copy_to_device_of(self, array: Array, other: Array) -> Array:
        """Return a copy of the array on the device of ``other``."""

    def read_only(self, array: Array) -> Array:
        """Return a read-only view."""

    def is_writable(self, array: Array) -> bool:
        """Return whether an array is writable."""

    def kept_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype in which data of a dtype are kept: JAX has no 64 bits unless asked."""

    def apply(self, function: Callable[..., Any], array: Array, *others: Any) -> Any:
        """Return ``function(array, *others)``, computed on the device of ``array``."""

    def accumulate(self, function: Any, rows: Array, positions: Array, updates: Array) -> Any:
        """Apply a ufunc: ``rows[p] = function(rows[p], u)`` for each position and update.

        In the order of the updates; positions may repeat. Return the rows, which are the same
        array where arrays can be written.
        """

    def overwrite(self, targets: Sequence[Array], values: Sequence[Array]) -> None:
        """Overwrite contiguous arrays, each with its value, all of them or none.

        Values have the targets' shapes and dtypes, and may be views of them.
        """

    def overwrite_rows(
        self, targets: Sequence[Array], rows: Sequence[Any], values: Sequence[Any]
    ) -> None:
        """Overwrite rows of arrays, each with its value."""

    def to_host(self, array: Array) -> HostArray:
        """Return the content in host memory, which may be the array itself."""


def _write(arrays: Sequence[Any], where: Any, values: Sequence[Any]) -> None:
    """Set items in one expression, during which the interpreter handles no signal.

    So an interrupt comes before or after all of it, and no write is left half done.
    """
    set_item: Any = operator.setitem
    deque(map(set_item, arrays, where, values), maxlen=0)


@final
class _Host:
    """Host memory: arrays of NumPy."""

    is_immutable = False

    view = staticmethod(interop.view)
    like = staticmethod(interop.like)

    def new(self, content: Any, device: Device) -> HostArray:
        return np.array(content, order="C", copy=True)

    def on(self, array: Any, device: Device) -> Any:
        return array

    def to_device_of(self, array: Any, other: Any) -> Any:
        return array

    def copy_to_device_of(self, array: Any, other: Any) -> HostArray:
        return np.array(array, order="C")

    def read_only(self, array: Any) -> Any:
        view = array.view()
        view.flags.writeable = False
        return view

    def is_writable(self, array: Any) -> bool:
        return bool(array.flags.writeable)

    def kept_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return dtype

    def apply(self, function: Callable[..., Any], array: Any, *others: Any) -> Any:
        return function(array, *others)

    def accumulate(self, function: Any, rows: Any, positions: Any, updates: Any) -> Any:
        function.at(rows, positions, updates)
        return rows

    def overwrite(self, targets: Sequence[Any], values: Sequence[Any]) -> None:
        # Writing a target would change a value that is a view of it: such values are copied first.
        snapshots = {
            id(value): value.copy()
            if any(np.may_share_memory(value, a) for a in targets)
            else value
            for value in values
        }
        _write(targets, repeat(...), [snapshots[id(value)] for value in values])

    def overwrite_rows(
        self, targets: Sequence[Any], rows: Sequence[Any], values: Sequence[Any]
    ) -> None:
        _write(targets, rows, values)

    def to_host(self, array: Any) -> Any:
        return array


@final
class _Gpu:
    """GPU memory: arrays of CuPy, or simulated arrays in the simulator."""

    is_immutable = False

    def __init__(self) -> None:
        self._arrays = cuda.arrays()

    def view(self, verb: str, buffer: Any, label: str) -> Array:
        if interop.is_on_gpu(buffer):
            return cuda_arrays.adopt(verb, buffer, label)
        return interop.view(verb, buffer, label)

    def like(self, result: Array, original: Any) -> Any:
        if isinstance(result, np.ndarray):
            return interop.like(result, original)
        if interop.is_on_gpu(original):
            cuda_arrays.wait_for_result(original)
        return cuda_arrays.like(result, original)

    def new(self, content: Any, device: Device) -> Array:
        new_array = self._arrays.empty(device.index, tuple(content.shape), content.dtype)
        if isinstance(content, np.ndarray):
            self._copy(new_array, content, "host", device)
            return new_array
        target = current_stream(device.index)
        source = current_stream(self._arrays.device_of(content))
        cuda_arrays.order_streams([(target, source)])
        self._copy(new_array, content, f"cuda:{source.device}", device)
        cuda_arrays.order_streams([(source, target)])  # what overwrites the content, comes later
        return new_array

    def _copy(self, target: Any, content: Any, source: str, device: Device) -> None:
        recording = tracing.active
        if recording is None:
            self._arrays.copy(target, content)
            return
        span = GpuSpan(recording, *current_stream(device.index))
        self._arrays.copy(target, content)
        about = {"from": source, "to": str(device), "bytes": content.nbytes}
        span.end("copy", "copy", about | {"dtype": str(content.dtype)})

    def on(self, array: Any, device: Device) -> Any:
        if isinstance(array, np.ndarray) or self._arrays.device_of(array) != device.index:
            return self.new(array, device)
        return array

    def to_device_of(self, array: Any, other: Any) -> Any:
        return self.on(array, Device("cuda", self._arrays.device_of(other)))

    def copy_to_device_of(self, array: Any, other: Any) -> Array:
        return self.new(array, Device("cuda", self._arrays.device_of(other)))

    def read_only(self, array: Any) -> Array:
        return self._arrays.read_only(array)

    def is_writable(self, array: Any) -> bool:
        return self._arrays.is_writable(array)

    def kept_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return dtype

    def apply(self, function: Callable[..., Any], array: Any, *others: Any) -> Any:
        with self._arrays.at(self._arrays.device_of(array)):
            return function(array, *others)

    def accumulate(self, function: Any, rows: Any, positions: Any, updates: Any) -> Any:
        # Atomic operations would add in another order in each run. Round k applies the k-th update
        # of each row: as many rounds as the most frequent row has updates, usually one or two.
        with self._arrays.at(self._arrays.device_of(rows)):
            for selected in _conflict_free_rounds(positions):
                where = positions[selected]
                rows[where] = function(rows[where], updates[selected])
        return rows

    def overwrite(self, targets: Sequence[Any], values: Sequence[Any]) -> None:
        target_buffers = cuda_arrays.locate("a write", targets, "target")
        prepared = {id(value): self._contiguous_copy(value, target_buffers) for value in values}
        sources = [prepared[id(value)] for value in values]
        buffers = [*target_buffers, *cuda_arrays.locate("a write", sources, "value")]
        streams = [buffer.device_stream for buffer in buffers]
        work_stream = streams[0]
        cuda_arrays.order_streams(wait_pairs([work_stream], streams))
        self._arrays.overwrite(*work_stream, targets, sources)
        cuda_arrays.order_streams(wait_pairs(streams, [work_stream]))

    def _contiguous_copy(self, value: Any, targets: Sequence[cuda_arrays.DeviceBuffer]) -> Any:
        if isinstance(value, np.ndarray):
            return self.new(value, Device("cuda", targets[0].device))
        (buffer,) = cuda_arrays.locate("a write", [value], "value")
        shares = any(np.may_share_memory(buffer.array, target.array) for target in targets)
        if shares or not buffer.array.flags.c_contiguous:
            return self.new(value, Device("cuda", buffer.device))
        return value

    def overwrite_rows(
        self, targets: Sequence[Any], rows: Sequence[Any], values: Sequence[Any]
    ) -> None:
        devices = [Device("cuda", self._arrays.device_of(target)) for target in targets]
        prepared = [self.on(value, device) for value, device in zip(values, devices, strict=True)]
        for target, row, value, device in zip(targets, rows, prepared, devices, strict=True):
            with self._arrays.at(device.index):
                target[row] = value

    def to_host(self, array: Any) -> HostArray:
        return array if isinstance(array, np.ndarray) else self._arrays.to_host(array)


def _conflict_free_rounds(positions: Any) -> list[Any]:
    """Return the updates of each round: no position twice, those of a position in their order."""
    order = np.argsort(positions, kind="stable")
    ordered = positions[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else ordered
    counts = np.diff(np.r_[starts, len(ordered)])
    rank_in_row = np.arange(len(ordered)) - np.repeat(starts, counts)
    return [order[rank_in_row == k] for k in range(int(rank_in_row.max(initial=-1)) + 1)]


HOST: ArrayMemory = _Host()


@functools.cache
def gpu() -> ArrayMemory:
    """Return the memory of GPUs; raise :class:`DeviceError` where kernels cannot run on GPUs."""
    return _Gpu()


@functools.cache
def of_jax() -> ArrayMemory:
    """Return the memory of JAX devices."""
    from dvkernels.devices import jax_arrays

    return jax_arrays.MEMORY


def of(devices: Sequence[Device]) -> ArrayMemory:
    """Return the memory of these devices; raise unless all are of one kind."""
    kinds = {device.kind for device in devices}
    if len(kinds) > 1:
        named = ", ".join(map(str, devices))
        raise DeviceError(
            f"a strategy keeps its values in one kind of memory, and these devices have several: "
            f"{named}; use devices of one kind only"
        )
    if kinds == {"cuda"}:
        return gpu()
    return of_jax() if any(kind.startswith("jax:") for kind in kinds) else HOST


def copied(array: Array, device: Device) -> Any:
    """Return a copy of an array, from either memory, on a device of either kind."""
    memory = of([device])
    return memory.new(holding(array).to_host(array) if memory is HOST else array, device)


def on_device(array: Array, device: Device) -> Any:
    """Return an array on a device of either kind: the array itself if it lies there, or a copy."""
    memory = of([device])
    return memory.on(holding(array).to_host(array) if memory is HOST else array, device)


def of_value(value: Any) -> ArrayMemory:
    """Return the memory of a value of any library."""
    return gpu() if interop.is_on_gpu(value) else HOST


def holding(array: Array) -> ArrayMemory:
    """Return the memory of an array of NumPy, CuPy or JAX."""
    if isinstance(array, (np.ndarray, np.generic)):
        return HOST
    return of_jax() if interop.is_of_jax(array) else gpu()
