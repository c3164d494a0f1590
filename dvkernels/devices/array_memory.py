"""The memory that a strategy's arrays lie in: that of the host, or that of GPUs.

Arithmetic needs no twins: NumPy's functions hand on arrays of CuPy to CuPy, by the protocols of
NEP 13 and NEP 18. Here is what they cannot do: make, bring, overwrite and show arrays.
"""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, Protocol, final

import numpy as np

from dvkernels.devices import cuda, cuda_arrays, interop, stream_order
from dvkernels.devices.base import Device
from dvkernels.errors import DeviceError

__all__ = ["HOST", "ArrayMemory", "holding", "of"]


class ArrayMemory(Protocol):
    """What is done with arrays of one kind of device, outside of kernels."""

    def view(self, verb: str, buffer: Any, who: str) -> Any:
        """Return an array of another library as one of ours, not copied."""

    def like(self, result: Any, original: Any) -> Any:
        """Return a new array of ours as one of the library that ``original`` comes from."""

    def new(self, content: Any, device: Device) -> Any:
        """Return a new dense array on a device; ``content`` may lie in any memory it sees."""

    def on(self, array: Any, device: Device) -> Any:
        """Return an array with that content on the device: the same one if it lies there."""

    def near(self, array: Any, other: Any) -> Any:
        """Return an array with that content where another lies: the same one if it lies there."""

    def beside(self, array: Any, other: Any) -> Any:
        """Return a copy of an array where another one lies."""

    def read_only(self, array: Any) -> Any:
        """Return a view that is not to be written to."""

    def is_writable(self, array: Any) -> bool:
        """Return whether an array may be written to."""

    def apply(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """Return what a function makes of arrays, computed where the first of them lies."""

    def accumulate(self, function: Any, rows: Any, positions: Any, updates: Any) -> None:
        """Apply a ufunc to rows and updates, update after update: positions may repeat."""

    def overwrite(self, targets: Sequence[Any], values: Sequence[Any]) -> None:
        """Overwrite dense arrays, each with its value, all of them or none.

        Values have the targets' shapes and dtypes, and may be views of them.
        """

    def overwrite_rows(
        self, targets: Sequence[Any], rows: Sequence[Any], values: Sequence[Any]
    ) -> None:
        """Overwrite rows of arrays, each with its value."""

    def to_host(self, array: Any) -> Any:
        """Return the content in the memory of the host, perhaps the array itself."""


def _write(arrays: Sequence[Any], where: Any, values: Sequence[Any]) -> None:
    """Set items in one expression that never enters the interpreter's loop.

    So an interrupt falls before or after all of it: nothing is left half-written.
    """
    set_item: Any = operator.setitem
    deque(map(set_item, arrays, where, values), maxlen=0)


@final
class _Host:
    """Arrays of NumPy."""

    view = staticmethod(interop.view)
    like = staticmethod(interop.like)

    def new(self, content: Any, device: Device) -> Any:
        return np.array(content, order="C", copy=True)

    def on(self, array: Any, device: Device) -> Any:
        return array

    def near(self, array: Any, other: Any) -> Any:
        return array

    def beside(self, array: Any, other: Any) -> Any:
        return np.array(array, order="C")

    def read_only(self, array: Any) -> Any:
        view = array.view()
        view.flags.writeable = False
        return view

    def is_writable(self, array: Any) -> bool:
        return bool(array.flags.writeable)

    def apply(self, function: Callable[..., Any], *arrays: Any) -> Any:
        return function(*arrays)

    def accumulate(self, function: Any, rows: Any, positions: Any, updates: Any) -> None:
        function.at(rows, positions, updates)

    def overwrite(self, targets: Sequence[Any], values: Sequence[Any]) -> None:
        # A value that is a view of a target would change while it is written to the others.
        apart = {
            id(value): value.copy()
            if any(np.may_share_memory(value, a) for a in targets)
            else value
            for value in values
        }
        _write(targets, repeat(...), [apart[id(value)] for value in values])

    def overwrite_rows(
        self, targets: Sequence[Any], rows: Sequence[Any], values: Sequence[Any]
    ) -> None:
        _write(targets, rows, values)

    def to_host(self, array: Any) -> Any:
        return array


@final
class _Gpu:
    """Arrays of CuPy, or of what stands in for it in the simulator."""

    def __init__(self) -> None:
        self._arrays = cuda.arrays()

    def view(self, verb: str, buffer: Any, who: str) -> Any:
        if interop.is_on_gpu(buffer):
            return cuda_arrays.adopt(verb, buffer, who)
        return interop.view(verb, buffer, who)

    def like(self, result: Any, original: Any) -> Any:
        if isinstance(result, np.ndarray):
            return interop.like(result, original)
        if interop.is_on_gpu(original):
            cuda_arrays.follow(result, original)
        return cuda_arrays.like(result, original)

    def new(self, content: Any, device: Device) -> Any:
        lane = stream_order.Lane(device.index, self._arrays.current(device.index).ptr)
        if not isinstance(content, np.ndarray):
            source = self._arrays.device_of(content)
            cuda_arrays.order([(lane, stream_order.Lane(source, self._arrays.current(source).ptr))])
        made = self._arrays.empty(device.index, tuple(content.shape), content.dtype)
        self._arrays.copy(made, content)
        return made

    def on(self, array: Any, device: Device) -> Any:
        if isinstance(array, np.ndarray) or self._arrays.device_of(array) != device.index:
            return self.new(array, device)
        return array

    def near(self, array: Any, other: Any) -> Any:
        return self.on(array, Device("cuda", self._arrays.device_of(other)))

    def beside(self, array: Any, other: Any) -> Any:
        return self.new(array, Device("cuda", self._arrays.device_of(other)))

    def read_only(self, array: Any) -> Any:
        return self._arrays.read_only(array)

    def is_writable(self, array: Any) -> bool:
        return self._arrays.is_writable(array)

    def apply(self, function: Callable[..., Any], *arrays: Any) -> Any:
        with self._arrays.at(self._arrays.device_of(arrays[0])):
            return function(*arrays)

    def accumulate(self, function: Any, rows: Any, positions: Any, updates: Any) -> None:
        # Atomic operations would add up in another order each time. In round k each row meets its
        # k-th update: as many rounds as the most frequent row has updates, usually one or two.
        with self._arrays.at(self._arrays.device_of(rows)):
            for taken in _rounds(positions):
                where = positions[taken]
                rows[where] = function(rows[where], updates[taken])

    def overwrite(self, targets: Sequence[Any], values: Sequence[Any]) -> None:
        places = cuda_arrays.place("a write", targets, "target")
        ready = {id(value): self._dense_and_apart(value, places) for value in values}
        sources = [ready[id(value)] for value in values]
        found = [*places, *cuda_arrays.place("a write", sources, "value")]
        lanes = [stream_order.Lane(one.device, one.stream) for one in found]
        home = lanes[0]
        cuda_arrays.order(stream_order.crossings([home], lanes))
        self._arrays.overwrite(home.device, home.stream, targets, sources)
        cuda_arrays.order(stream_order.crossings(lanes, [home]))

    def _dense_and_apart(self, value: Any, targets: Sequence[cuda_arrays.DeviceBuffer]) -> Any:
        if isinstance(value, np.ndarray):
            return self.new(value, Device("cuda", targets[0].device))
        (place,) = cuda_arrays.place("a write", [value], "value")
        shares = any(np.may_share_memory(place.array, target.array) for target in targets)
        if shares or not place.array.flags.c_contiguous:
            return self.new(value, Device("cuda", place.device))
        return value

    def overwrite_rows(
        self, targets: Sequence[Any], rows: Sequence[Any], values: Sequence[Any]
    ) -> None:
        devices = [Device("cuda", self._arrays.device_of(target)) for target in targets]
        ready = [self.on(value, device) for value, device in zip(values, devices, strict=True)]
        for target, which, value, device in zip(targets, rows, ready, devices, strict=True):
            with self._arrays.at(device.index):
                target[which] = value

    def to_host(self, array: Any) -> Any:
        return array if isinstance(array, np.ndarray) else self._arrays.to_host(array)


def _rounds(positions: Any) -> list[Any]:
    """Return which updates each round takes: no position twice, each in the order given."""
    order = np.argsort(positions, kind="stable")
    ordered = positions[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else ordered
    counts = np.diff(np.r_[starts, len(ordered)])
    turn = np.arange(len(ordered)) - np.repeat(starts, counts)
    return [order[turn == k] for k in range(int(turn.max(initial=-1)) + 1)]


HOST: ArrayMemory = _Host()


@functools.cache
def gpu() -> ArrayMemory:
    """Return the memory of GPUs; raise :class:`DeviceError` where there is none."""
    return _Gpu()


def of(devices: Sequence[Device]) -> ArrayMemory:
    """Return the memory of these devices; raise unless they are of one kind."""
    kinds = {device.kind for device in devices}
    if len(kinds) > 1:
        named = ", ".join(map(str, devices))
        raise DeviceError(
            f"a strategy keeps its values in one kind of memory, and these devices have several: "
            f"{named}; use CPU devices only, or GPUs only"
        )
    return gpu() if kinds == {"cuda"} else HOST


def copied(array: Any, device: Device) -> Any:
    """Return a new array on a device, of any kind, with the content of one of any memory."""
    there = of([device])
    return there.new(holding(array).to_host(array) if there is HOST else array, device)


def brought(array: Any, device: Device) -> Any:
    """Return an array on a device, of any kind: the same one if it lies in memory it sees."""
    there = of([device])
    return there.on(holding(array).to_host(array) if there is HOST else array, device)


def seeing(value: Any) -> ArrayMemory:
    """Return the memory in which to look at a value of any library."""
    return gpu() if interop.is_on_gpu(value) else HOST


def holding(array: Any) -> ArrayMemory:
    """Return the memory that an array of ours lies in."""
    return HOST if isinstance(array, (np.ndarray, np.generic)) else gpu()
