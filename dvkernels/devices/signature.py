"""Signature of arrays in GPU memory: what they have in common, and their addresses.

Here is what the package knows of the arrays of CuPy, PyTorch, Numba and others on GPUs. The fast
path compares signatures, whose few attributes take 0.5 us per array; describing an array by a NumPy
array (see cuda_arrays.py) takes 4 us, and checking it as long again. Arrays that differ in anything
that the checks depend on, except their addresses, have no signature.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices import driver, interop

__all__ = ["Kind", "Signature", "layout", "of", "read"]

# Type, shape, strides, dtype and device, in terms of the library; strides None: contiguous.
Kind = tuple[type, tuple[int, ...], tuple[int, ...] | None, Any, int]


class Signature(NamedTuple):
    """Common properties of arrays, and their addresses."""

    kind: Kind
    addresses: list[int]
    stream: int  # the current stream of their library
    is_read_only: bool = False


def read(arrays: Sequence[Any]) -> Signature | None:
    """Return the signature of arrays; None: declined, for the slow path to check."""
    try:
        return of(arrays)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError):
        return None


def of(arrays: Sequence[Any]) -> Signature | None:
    """Return the signature of arrays, None if they differ; raise what reading them raises."""
    module = type(arrays[0]).__module__
    reader = _READERS.get(module) or _READERS.get(module.partition(".")[0], _of_interface)
    return reader(arrays)


def layout(kind: Kind) -> tuple[tuple[int, ...], np.dtype[Any], tuple[int, ...] | None]:
    """Return the shape, the dtype of NumPy, and the strides in bytes."""
    _, shape, strides, dtype, _ = kind
    if isinstance(dtype, np.dtype):
        return shape, dtype, strides
    dtype = interop.dtype_named(str(dtype).removeprefix("torch."))
    assert strides is not None
    return shape, dtype, tuple(stride * dtype.itemsize for stride in strides)


def _of_cupy(arrays: Sequence[Any]) -> Signature | None:
    first = arrays[0]
    kind, shape, strides, dtype = type(first), first.shape, first.strides, first.dtype
    device = first.data.device_id
    addresses = []
    for array in arrays:
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
    return Signature((kind, shape, strides, dtype, device), addresses, stream)


def _of_torch(tensors: Sequence[Any]) -> Signature | None:
    first = tensors[0]
    kind, shape, strides, dtype = type(first), first.shape, first.stride(), first.dtype
    device = first.get_device()  # -1: on the CPU
    addresses = []
    for tensor in tensors:
        if (
            type(tensor) is not kind
            or tensor.shape != shape
            or tensor.stride() != strides
            or tensor.dtype != dtype
            or tensor.get_device() != device
            or device < 0
        ):
            return None
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError(
                "it is a conjugated or negated view: call resolve_conj().resolve_neg()"
            )
        addresses.append(tensor.data_ptr())
    stream = sys.modules["torch"].cuda.current_stream(device).cuda_stream
    return Signature((kind, shape, strides, dtype, device), addresses, stream)


def _of_jax(arrays: Sequence[Any]) -> Signature | None:
    """Read arrays of JAX, which tells nobody its streams: the host waits until they are there.

    Their ``__cuda_array_interface__`` knows no bfloat16, and would have us read them too early.
    """
    first = arrays[0].block_until_ready()
    kind, shape, dtype = type(first), first.shape, np.dtype(first.dtype)
    device = first.__dlpack_device__()[1]
    layout_of = getattr(getattr(first, "format", None), "layout", None)  # since JAX 0.7
    addresses = []
    for array in arrays:
        if (
            type(array) is not kind
            or array.shape != shape
            or array.dtype != dtype
            or getattr(getattr(array, "format", None), "layout", None) != layout_of
            or array.__dlpack_device__()[1] != device
        ):
            return None
        addresses.append(array.block_until_ready().unsafe_buffer_pointer())
    strides = None if layout_of is None else _strides(layout_of, shape, dtype.itemsize)
    return Signature((kind, shape, strides, dtype, device), addresses, 0, is_read_only=True)


def _strides(layout_of: Any, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    """Return the strides of a layout of JAX; None: contiguous."""
    if layout_of.tiling:
        raise ValueError("it is laid out in tiles; copy it to a layout in rows")
    order = tuple(layout_of.major_to_minor)
    if order == tuple(range(len(shape))):
        return None
    by_axis, nbytes = {}, itemsize
    for axis in reversed(order):
        by_axis[axis], nbytes = nbytes, nbytes * shape[axis]
    return tuple(by_axis[axis] for axis in range(len(shape)))


def _of_interface(arrays: Sequence[Any]) -> Signature | None:
    """Read ``__cuda_array_interface__``, which Numba's and most other arrays have."""
    first, cuda_driver = arrays[0], driver.find()
    interface = first.__cuda_array_interface__
    kind, shape, strides = type(first), interface["shape"], interface.get("strides")
    typestr, dtype = interface["typestr"], getattr(first, "dtype", None)
    (start, is_read_only), stream = interface["data"], interface.get("stream")
    # The driver knows of no device where there are no elements.
    device_of = None if cuda_driver is None or 0 in shape else cuda_driver.device_of
    device = 0 if device_of is None else device_of(start)
    addresses = []
    for array in arrays:
        own = interface if array is first else array.__cuda_array_interface__
        address, own_read_only = own["data"]
        if own.get("mask") is not None:
            raise ValueError("it has a mask, which would be ignored; pass a filled copy")
        if (
            type(array) is not kind
            or own["shape"] != shape
            or own.get("strides") != strides
            or own["typestr"] != typestr
            or getattr(array, "dtype", None) != dtype
            or own.get("stream") != stream
            or own_read_only != is_read_only
            or (array is not first and device_of is not None and device_of(address) != device)
        ):
            return None
        addresses.append(address)
    if not isinstance(dtype, np.dtype):
        dtype = np.dtype(typestr)
    # No stream: the array is complete, and the work goes to the default stream, 0.
    return Signature((kind, shape, strides, dtype, device), addresses, stream or 0, is_read_only)


def _of_simulator(arrays: Sequence[Any]) -> Signature | None:
    first = vars(arrays[0])["_ary"]
    kind, shape, strides, dtype = type(arrays[0]), first.shape, first.strides, first.dtype
    is_writable = first.flags.writeable
    addresses = []
    for array in arrays:
        own = vars(array)["_ary"]
        if (
            type(array) is not kind
            or own.shape != shape
            or own.strides != strides
            or own.dtype != dtype
            or own.flags.writeable != is_writable
        ):
            return None
        addresses.append(own.ctypes.data)
    return Signature((kind, shape, strides, dtype, 0), addresses, 0, not is_writable)


# By module, or by package.
_READERS: dict[str, Callable[[Sequence[Any]], Signature | None]] = {
    "cupy": _of_cupy,
    "jax": _of_jax,
    "jaxlib": _of_jax,
    "torch": _of_torch,
    "torch.nn.parameter": _of_torch,
    "numba.cuda.simulator.cudadrv.devicearray": _of_simulator,
    "dvkernels.devices.simulated_arrays": _of_simulator,
}
