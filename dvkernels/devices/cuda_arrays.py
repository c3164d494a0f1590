"""Arrays in GPU memory, of any library: where they lie, on which stream, and results alike.

A buffer is described by a NumPy array over its address on the device. That array is asked for its
shape, strides, dtype, flags and address, and sliced; its elements lie where the host cannot reach,
and nobody reads them. So the checks and cuts of the CPU serve here too.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices import cuda, driver, interop
from dvkernels.devices.buffers import refuse_masked
from dvkernels.devices.stream_order import Lane
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.user_errors import text_of

__all__ = ["DeviceBuffer", "adopt", "describe", "like", "place"]

Array = np.ndarray[Any, Any]


class DeviceBuffer(NamedTuple):
    """A buffer, as kernels need to know it."""

    array: Array  # over the device's memory: never read on the host
    device: int
    stream: int  # where its library puts work now


def place(verb: str, buffers: Sequence[Any], name: str = "replica") -> list[DeviceBuffer]:
    """Return where each buffer lies; raise unless all are arrays in GPU memory."""
    found: list[DeviceBuffer] = []
    for index, buffer in enumerate(buffers):
        who = f"{name} {index}"
        if not interop.is_on_gpu(buffer):
            _raise_elsewhere(verb, buffer, who, found)
        found.append(_placed(verb, buffer, who))
    return found


def _placed(verb: str, buffer: Any, who: str) -> DeviceBuffer:
    read = _READERS.get(type(buffer).__module__.partition(".")[0], _read_interface)
    try:
        return read(buffer)
    except (BufferError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise NotABufferError(
            f"{verb} cannot read where {who}, a {type(buffer).__name__}, lies: {text_of(error)}"
        ) from error


def adopt(verb: str, buffer: Any, who: str) -> Any:
    """Return an array in GPU memory as one of ours, not copied; ``who`` is what messages call it.

    The current stream of this thread waits for what its library has put on its own so far.
    """
    if type(buffer).__module__.partition(".")[0] == "cupy":
        return buffer
    arrays = cuda.arrays()
    array, device, stream = _placed(verb, buffer, who)
    order([(Lane(device, arrays.current(device).ptr), Lane(device, stream))])
    low, high = np.lib.array_utils.byte_bounds(array)
    return arrays.over((int(low), int(high)), int(array.ctypes.data), array, device, buffer)


def follow(result: Any, original: Any) -> None:
    """Have the stream of another library's array wait for the one that carries a result."""
    if type(original).__module__.partition(".")[0] != "cupy":
        _, device, stream = _placed("a result", original, "the value")
        order([(Lane(device, stream), Lane(device, cuda.arrays().current(device).ptr))])


def order(pairs: Sequence[tuple[Lane, Lane]]) -> None:
    """Have the first lane of each pair wait for what the second has been given; no host waits."""
    found = driver.find() if pairs and not cuda.is_simulated() else None
    if found is not None:
        for waiting, awaited in pairs:
            if waiting != awaited:
                found.wait(awaited.device, waiting.stream, awaited.stream)


def _raise_elsewhere(verb: str, buffer: Any, who: str, found: Sequence[DeviceBuffer]) -> None:
    refuse_masked(buffer, f"{verb} needs arrays: {who}")
    if isinstance(buffer, np.ndarray) or interop.is_foreign(buffer):
        where = f"the others are on cuda:{found[0].device}" if found else "others are on a GPU"
        raise BufferMismatchError(
            f"{verb} needs buffers of one kind of device: {who} is in host memory, and {where}; "
            "copy it to the GPU (cupy.asarray), or the others to the host"
        )
    raise NotABufferError(
        f"{verb} needs arrays: {who} is a {type(buffer).__name__}; convert it with cupy.asarray"
    )


def describe(
    address: int,
    shape: Sequence[int],
    dtype: Any,
    strides: Sequence[int] | None = None,
    is_read_only: bool = False,
) -> Array:
    """Return a NumPy array over an address of a device; nobody may read its elements."""
    dtype, shape = np.dtype(dtype), tuple(shape)
    if strides is None or 0 in shape:
        nbytes, low = int(np.prod(shape, dtype=object)) * dtype.itemsize, 0
    else:
        reaches = [stride * (extent - 1) for stride, extent in zip(strides, shape, strict=True)]
        low = sum(min(0, reach) for reach in reaches)
        nbytes = sum(max(0, reach) for reach in reaches) - low + dtype.itemsize
    if nbytes == 0:
        found: Array = np.empty(shape, dtype)
    else:
        memory = (ctypes.c_uint8 * nbytes).from_address(address + low)
        found = np.ndarray(shape, dtype, memory, -low, None if strides is None else tuple(strides))
    if is_read_only:
        found.flags.writeable = False
    return found


def _read_cupy(array: Any) -> DeviceBuffer:
    device = array.device.id
    stream = sys.modules["cupy"].cuda.get_current_stream(device).ptr
    return DeviceBuffer(
        describe(array.data.ptr, array.shape, array.dtype, array.strides), device, stream
    )


def _read_torch(tensor: Any) -> DeviceBuffer:
    torch, device = sys.modules["torch"], tensor.device.index
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("it is a conjugated or negated view: call resolve_conj().resolve_neg()")
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = interop.dtype_named(name)
    strides = [stride * dtype.itemsize for stride in tensor.stride()]
    stream = torch.cuda.current_stream(device).cuda_stream
    return DeviceBuffer(describe(tensor.data_ptr(), tensor.shape, dtype, strides), device, stream)


def _read_interface(buffer: Any) -> DeviceBuffer:
    """Read what says of itself where it lies, or can say it to CuPy through DLPack."""
    own = getattr(buffer, "_ary", None)
    if cuda.is_simulated() and isinstance(own, np.ndarray):
        return DeviceBuffer(own.view(np.ndarray), 0, 0)
    told = getattr(buffer, "__cuda_array_interface__", None)
    if told is None:
        return _read_cupy(sys.modules["cupy"].from_dlpack(buffer))
    if told.get("mask") is not None:
        raise ValueError("it has a mask, which would be ignored; pass a filled copy")
    address, is_read_only = told["data"]
    dtype = getattr(buffer, "dtype", None)
    if not isinstance(dtype, np.dtype):
        dtype = np.dtype(told["typestr"])
    array = describe(address, told["shape"], dtype, told.get("strides"), is_read_only)
    found = driver.find()
    device = found.device_of(address) if found is not None and array.size else 0
    # No stream: whoever made it has waited. Then work goes to the default stream, which is 0.
    return DeviceBuffer(array, device, told.get("stream") or 0)


_READERS: dict[str, Callable[[Any], DeviceBuffer]] = {"cupy": _read_cupy, "torch": _read_torch}


def like(result: Any, original: Any) -> Any:
    """Return a new array of ours as one of the library that ``original`` comes from, not copied."""
    library = type(original).__module__.partition(".")[0]
    if cuda.is_simulated() or library == "cupy":
        return result
    if library == "torch":
        torch = sys.modules["torch"]
        if result.dtype.name == "bfloat16":
            return torch.from_dlpack(result.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(result)
    if library in ("numba", "numba_cuda"):
        return cuda.as_numba(result)
    convert = getattr(sys.modules.get(library), "from_dlpack", None)
    return result if convert is None else convert(result)
