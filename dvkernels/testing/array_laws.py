"""What every library of device arrays must do: CuPy's twin, the simulator's, and others'."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from dvkernels.devices.cuda import ArrayLibrary

__all__ = ["check_arrays"]

_DTYPES = ("float32", "float64", "float16", "complex64", "int8", "uint64", "bool")
_SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7, 3), (4099,))


def check_arrays(arrays: ArrayLibrary, device: int = 0) -> None:
    """Assert the laws of ``empty``, ``copy``, ``stream``, ``event``, and what strategies need.

    Parameters
    ----------
    arrays : ArrayLibrary
        What makes arrays on a device and copies between them and the host.
    device : int
        The device to try them on.

    Raises
    ------
    AssertionError
        A law is broken; the message names it.

    Notes
    -----
    A new array has the shape and dtype that were asked for and memory of its own. What is copied
    there and back is the same, bit by bit, also from device to device and on a stream whose work
    has been waited for. What is copied after an event has been awaited comes after it. Arrays know
    their device, and their views share memory; a device and a stream are current as long as asked
    for; arrays are overwritten on a stream; page-locked memory is read by copies.
    """
    for dtype in map(np.dtype, (*_DTYPES, ml_dtypes.bfloat16)):
        for shape in _SHAPES:
            _check_round_trip(arrays, device, shape, dtype)
    _check_streams(arrays, device)
    _check_own_memory(arrays, device)
    _check_what_strategies_need(arrays, device)


def _check_round_trip(
    arrays: ArrayLibrary, device: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    rng = np.random.default_rng(7)
    sent = rng.integers(0, 2, shape).astype(dtype)
    first, second = arrays.empty(device, shape, dtype), arrays.empty(device, shape, dtype)
    for made in (first, second):
        assert tuple(made.shape) == shape, f"empty: expected shape {shape}, got {made.shape}"
        assert made.dtype == dtype, f"empty: expected {dtype}, got {made.dtype}"
    received = np.empty(shape, dtype)
    arrays.copy(first, sent)
    arrays.copy(second, first)
    arrays.copy(received, second)
    assert received.tobytes() == sent.tobytes(), f"copy: {dtype}{shape} came back changed"
    held = arrays.bytes_of(second)
    held = held if isinstance(held, np.ndarray) else arrays.to_host(held)
    assert held.dtype == np.uint8, f"bytes_of: expected uint8, got {held.dtype}"
    assert held.tobytes() == sent.tobytes(), f"bytes_of: those of {dtype}{shape} are others"


def _check_streams(arrays: ArrayLibrary, device: int) -> None:
    one, other = arrays.stream(device), arrays.stream(device)
    made = arrays.empty(device, (1 << 12,), np.dtype("f4"))
    for turn in range(8):
        sent, received = np.full(1 << 12, turn, "f4"), np.empty(1 << 12, "f4")
        arrays.copy(made, sent, one)
        event = arrays.event(device)
        event.record(one)
        other.wait_event(event)
        arrays.copy(received, made, other)
        other.synchronize()
        assert (received == turn).all(), "a stream that awaited an event read what was before it"
        event.synchronize()
        assert event.done, "an event that was waited for says that it has not happened"
    with one:
        pass
    one.synchronize()


def _check_own_memory(arrays: ArrayLibrary, device: int) -> None:
    made = [arrays.empty(device, (33,), np.dtype("i4")) for _ in range(3)]
    for number, array in enumerate(made):
        arrays.copy(array, np.full(33, number, "i4"))
    for number, array in enumerate(made):
        received = np.empty(33, "i4")
        arrays.copy(received, array)
        assert (received == number).all(), "two new arrays share memory"


def _check_what_strategies_need(arrays: ArrayLibrary, device: int) -> None:
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
        assert arrays.is_writable(array), "a new array cannot be written to"
        assert content.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0], "overwrite, read_only or to_host"
    shown[0][:] = 7.0
    assert arrays.to_host(made[0])[1] == 1.0, "to_host gave no copy"
