"""Signature of arrays in GPU memory: type, shape, strides, dtype and device, for the fast path.

Describing an array by a NumPy array (see cuda_arrays.py) takes 4 us, and checking it as long again.
Arrays of one library that agree in everything that the checks depend on, except their addresses,
are recognized by a few attributes, 0.5 us per array. Arrays that differ, or are unusual, are
declined.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from dvkernels.devices import driver

__all__ = ["Signature", "read"]


class Signature(NamedTuple):
    """Common properties of arrays, and their addresses."""

    kind: Hashable  # equal for equal type, shape, strides, dtype and device
    addresses: list[int]
    device: int
    stream: int  # the current stream of their library


def read(buffers: Sequence[Any]) -> Signature | None:
    """Return the signature of arrays; None: declined, for the slow path to check."""
    try:
        return _READERS.get(type(buffers[0]).__module__, _of_interface)(buffers)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError):
        return None


def _of_cupy(buffers: Sequence[Any]) -> Signature | None:
    first = buffers[0]
    kind, shape, strides, dtype = type(first), first.shape, first.strides, first.dtype
    device = first.data.device_id
    addresses = []
    for array in buffers:
        memory = array.data
        if (
            type(array) is not kind
            or array.shape != shape
            or array.strides != strides
            or array.dtype != dtype
            or memory.device_id != device
        ):
            return None
        addresses.append(memory.ptr)
    stream = sys.modules["cupy"].cuda.get_current_stream(device).ptr
    return Signature((kind, shape, strides, dtype, device), addresses, device, stream)


def _of_torch(buffers: Sequence[Any]) -> Signature | None:
    first = buffers[0]
    kind, shape, strides, dtype = type(first), first.shape, first.stride(), first.dtype
    device = first.get_device()  # -1: on the CPU
    addresses = []
    for tensor in buffers:
        if (
            type(tensor) is not kind
            or tensor.shape != shape
            or tensor.stride() != strides
            or tensor.dtype != dtype
            or tensor.get_device() != device
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return None
        addresses.append(tensor.data_ptr())
    if device < 0:
        return None
    stream = sys.modules["torch"].cuda.current_stream(device).cuda_stream
    return Signature((kind, shape, strides, dtype, device), addresses, device, stream)


def _of_interface(buffers: Sequence[Any]) -> Signature | None:
    """Read ``__cuda_array_interface__``, which Numba's and most other arrays have."""
    first = buffers[0]
    interface = first.__cuda_array_interface__
    kind, shape, strides, typestr = (
        type(first),
        interface["shape"],
        interface.get("strides"),
        interface["typestr"],
    )
    dtype, stream = getattr(first, "dtype", None), interface.get("stream")
    cuda_driver = driver.find()
    if cuda_driver is None:
        return None
    device = cuda_driver.device_of(interface["data"][0])
    addresses = []
    for buffer in buffers:
        own = interface if buffer is first else buffer.__cuda_array_interface__
        address, is_read_only = own["data"]
        if (
            type(buffer) is not kind
            or own["shape"] != shape
            or own.get("strides") != strides
            or own["typestr"] != typestr
            or getattr(buffer, "dtype", None) != dtype
            or own.get("stream") != stream
            or own.get("mask") is not None
            or is_read_only
            or (buffer is not first and cuda_driver.device_of(address) != device)
        ):
            return None
        addresses.append(address)
    return Signature((kind, shape, strides, typestr, dtype, device), addresses, device, stream or 0)


def _of_simulator(buffers: Sequence[Any]) -> Signature | None:
    first = vars(buffers[0])["_ary"]
    kind, shape, strides, dtype = type(buffers[0]), first.shape, first.strides, first.dtype
    addresses = []
    for buffer in buffers:
        array = vars(buffer)["_ary"]
        if (
            type(buffer) is not kind
            or array.shape != shape
            or array.strides != strides
            or array.dtype != dtype
            or not array.flags.writeable
        ):
            return None
        addresses.append(array.ctypes.data)
    return Signature((kind, shape, strides, dtype, 0), addresses, 0, 0)


_READERS: dict[str, Callable[[Sequence[Any]], Signature | None]] = {
    "cupy": _of_cupy,
    "torch": _of_torch,
    "torch.nn.parameter": _of_torch,
    "numba.cuda.simulator.cudadrv.devicearray": _of_simulator,
    "dvkernels.devices.simulated_arrays": _of_simulator,
}
