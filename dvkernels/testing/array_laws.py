"""What every library of device arrays must do: CuPy's twin, the simulator's, and others'."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from dvkernels.devices.cuda import Arrays

__all__ = ["check_arrays"]

_DTYPES = ("float32", "float64", "float16", "complex64", "int8", "uint64", "bool")
_SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7, 3), (4099,))


def check_arrays(arrays: Arrays, device: int = 0) -> None:
    """Assert the laws of ``empty``, ``copy``, ``stream`` and ``event``.

    Parameters
    ----------
    arrays : Arrays
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
    has been waited for. What is copied after an event has been awaited comes after it.
    """
    for dtype in map(np.dtype, (*_DTYPES, ml_dtypes.bfloat16)):
        for shape in _SHAPES:
            _check_round_trip(arrays, device, shape, dtype)
    _check_streams(arrays, device)
    _check_own_memory(arrays, device)


def _check_round_trip(
    arrays: Arrays, device: int, shape: tuple[int, ...], dtype: np.dtype[Any]
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


def _check_streams(arrays: Arrays, device: int) -> None:
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
    with one:
        pass
    one.synchronize()


def _check_own_memory(arrays: Arrays, device: int) -> None:
    made = [arrays.empty(device, (33,), np.dtype("i4")) for _ in range(3)]
    for number, array in enumerate(made):
        arrays.copy(array, np.full(33, number, "i4"))
    for number, array in enumerate(made):
        received = np.empty(33, "i4")
        arrays.copy(received, array)
        assert (received == number).all(), "two new arrays share memory"
