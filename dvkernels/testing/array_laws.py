"""Laws of array libraries for devices: those of CuPy, of the simulator, and third-party ones."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from dvkernels.devices.cuda import ArrayLibrary

__all__ = ["check_arrays"]

_DTYPES = ("float32", "float64", "float16", "complex64", "int8", "uint64", "bool")
_SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7, 3), (4099,))


def check_arrays(arrays: ArrayLibrary, device: int = 0) -> None:
    """Assert the laws of ``empty``, ``copy``, ``stream``, ``event`` and the rest of ArrayLibrary.

    Parameters
    ----------
    arrays : ArrayLibrary
        Allocates arrays on a device and copies between them and the host.
    device : int
        The device to test on.

    Raises
    ------
    AssertionError
        A law is broken; the message names it.

    Notes
    -----
    A new array has the requested shape and dtype, and its own memory. A copy to the device, to
    another array there and back to the host preserves all bits, also on a stream. A copy on a
    stream that waits for an event comes after the event. Arrays know their device, and read-only
    views share memory; a stream is found by its address; ``at`` makes a device and a stream current
    inside ``with`` only; arrays are overwritten on a stream; copies read pinned memory.

    Examples
    --------
    >>> from dvkernels import testing
    >>> from dvkernels.devices import cuda
    >>> if not cuda.missing():
    ...     testing.check_arrays(cuda.arrays())
    """
    for dtype in map(np.dtype, (*_DTYPES, ml_dtypes.bfloat16)):
        for shape in _SHAPES:
            _check_round_trip(arrays, device, shape, dtype)
    _check_streams(arrays, device)
    _check_own_memory(arrays, device)
    _check_operations_of_strategies(arrays, device)


def _check_round_trip(
    arrays: ArrayLibrary, device: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    rng = np.random.default_rng(7)
    content = rng.integers(0, 2, shape).astype(dtype)
    first, second = arrays.empty(device, shape, dtype), arrays.empty(device, shape, dtype)
    for made in (first, second):
        assert tuple(made.shape) == shape, f"empty: expected shape {shape}, got {made.shape}"
        assert made.dtype == dtype, f"empty: expected {dtype}, got {made.dtype}"
    received = np.empty(shape, dtype)
    arrays.copy(first, content)
    arrays.copy(second, first)
    arrays.copy(received, second)
    assert received.tobytes() == content.tobytes(), f"copy: {dtype}{shape} came back changed"


def _check_streams(arrays: ArrayLibrary, device: int) -> None:
    first_stream, second_stream = arrays.stream(device), arrays.stream(device)
    made = arrays.empty(device, (1 << 12,), np.dtype("f4"))
    for round_number in range(8):
        content, received = np.full(1 << 12, round_number, "f4"), np.empty(1 << 12, "f4")
        arrays.copy(made, content, first_stream)
        event = arrays.event(device)
        event.record(first_stream)
        second_stream.wait_event(event)
        arrays.copy(received, made, second_stream)
        second_stream.synchronize()
        assert (received == round_number).all(), "a stream that waited for an event read older data"
        event.synchronize()
        assert event.done, "an event that was waited for is not done"
    same_stream = arrays.stream_at(device, first_stream.ptr)
    assert same_stream.ptr == first_stream.ptr, "stream_at: another address"
    with arrays.at(device, same_stream):
        assert arrays.current(device).ptr == first_stream.ptr, "stream_at: did not become current"
    first_stream.synchronize()


def _check_own_memory(arrays: ArrayLibrary, device: int) -> None:
    made = [arrays.empty(device, (33,), np.dtype("i4")) for _ in range(3)]
    for number, array in enumerate(made):
        arrays.copy(array, np.full(33, number, "i4"))
    for number, array in enumerate(made):
        received = np.empty(33, "i4")
        arrays.copy(received, array)
        assert (received == number).all(), "two new arrays share memory"


def _check_operations_of_strategies(arrays: ArrayLibrary, device: int) -> None:
    made = [arrays.empty(device, (5,), np.dtype("f8")) for _ in range(3)]
    host = arrays.pinned(40).view(np.float64)
    host[:] = np.arange(5.0)
    arrays.copy(made[0], host)
    stream, before = arrays.stream(device, joins_default=True), arrays.current(device).ptr
    with arrays.at(device, stream):
        assert arrays.current(device).ptr == stream.ptr, "at: another stream is current"
        arrays.overwrite(device, stream.ptr, made[1:], [made[0], made[0]])
        shown = [arrays.to_host(arrays.read_only(array)) for array in made]
    assert arrays.current(device).ptr == before, "at: the stream stayed current"
    for array, content in zip(made, shown, strict=True):
        assert arrays.device_of(array) == device, "device_of"
        assert arrays.is_writable(array), "a new array is not writable"
        assert content.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0], "overwrite, read_only or to_host"
    shown[0][:] = 7.0
    assert arrays.to_host(made[0])[1] == 1.0, "to_host returned no copy"
