"""Arrays in GPU memory, of any library: their device, stream and NumPy description.

A buffer is described by a NumPy array over its device address. The description gives shape,
strides, dtype, flags and address, and can be sliced; its elements lie in memory that the host
cannot access, and are never read. So the checks and slices of the CPU kernels serve here too.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices import cuda, driver, interop
from dvkernels.devices.array_spec import refuse_masked
from dvkernels.devices.stream_order import DeviceStream
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.user_errors import text_of

__all__ = ["DeviceBuffer", "adopt", "describe", "like", "locate"]

Array = np.ndarray[Any, Any]


class DeviceBuffer(NamedTuple):
    """Description of a buffer, its device, and its stream."""

    array: Array  # over device memory: its elements are never read on the host
    device: int
    stream: int  # the current stream of its library


def locate(verb: str, buffers: Sequence[Any], name: str = "replica") -> list[DeviceBuffer]:
    """Return device, stream and description of each buffer; raise unless all are in GPU memory."""
    located: list[DeviceBuffer] = []
    for index, buffer in enumerate(buffers):
        label = f"{name} {index}"
        if not interop.is_on_gpu(buffer):
            _raise_elsewhere(verb, buffer, label, located)
        located.append(_locate_one(verb, buffer, label))
    return located


def _locate_one(verb: str, buffer: Any, label: str) -> DeviceBuffer:
    read = _READERS.get(type(buffer).__module__.partition(".")[0], _read_interface)
    try:
        return read(buffer)
    except (BufferError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise NotABufferError(
            f"{verb} cannot tell where {label}, a {type(buffer).__name__}, lies: {text_of(error)}"
        ) from error


def adopt(verb: str, buffer: Any, label: str) -> Any:
    """Return an array in GPU memory as a CuPy array, without a copy; ``label`` is for messages.

    The current stream of this thread waits for the present work of the array's stream.
    """
    if type(buffer).__module__.partition(".")[0] == "cupy":
        return buffer
    arrays = cuda.arrays()
    array, device, stream = _locate_one(verb, buffer, label)
    order_streams(
        [(DeviceStream(device, arrays.current(device).ptr), DeviceStream(device, stream))]
    )
    low, high = np.lib.array_utils.byte_bounds(array)
    return arrays.over((int(low), int(high)), int(array.ctypes.data), array, device, buffer)


def wait_for_result(result: Any, original: Any) -> None:
    """Let the stream of a foreign array wait for the current stream, which has the result."""
    if type(original).__module__.partition(".")[0] != "cupy":
        _, device, stream = _locate_one("a result", original, "the value")
        order_streams(
            [
                (
                    DeviceStream(device, stream),
                    DeviceStream(device, cuda.arrays().current(device).ptr),
                )
            ]
        )


def order_streams(pairs: Sequence[tuple[DeviceStream, DeviceStream]]) -> None:
    """Let the first stream of each pair wait for the present work of the second; not the host."""
    cuda_driver = driver.find() if pairs and not cuda.is_simulated() else None
    if cuda_driver is not None:
        for waiting, awaited in pairs:
            if waiting != awaited:
                cuda_driver.wait(awaited.device, waiting.stream, awaited.stream)


def _raise_elsewhere(verb: str, buffer: Any, label: str, located: Sequence[DeviceBuffer]) -> None:
    refuse_masked(buffer, f"{verb} needs arrays: {label}")
    if isinstance(buffer, np.ndarray) or interop.is_foreign(buffer):
        where = f"the others are on cuda:{located[0].device}" if located else "others are on a GPU"
        raise BufferMismatchError(
            f"{verb} needs buffers of one kind of device: {label} is in host memory, and {where}; "
            "copy it to the GPU (cupy.asarray), or the others to the host"
        )
    raise NotABufferError(
        f"{verb} needs arrays: {label} is a {type(buffer).__name__}; convert it with cupy.asarray"
    )


def describe(
    address: int,
    shape: Sequence[int],
    dtype: Any,
    strides: Sequence[int] | None = None,
    is_read_only: bool = False,
) -> Array:
    """Return a NumPy array over a device address, whose elements must not be accessed."""
    dtype, shape = np.dtype(dtype), tuple(shape)
    if strides is None or 0 in shape:
        nbytes, low = int(np.prod(shape, dtype=object)) * dtype.itemsize, 0
    else:
        spans = [stride * (extent - 1) for stride, extent in zip(strides, shape, strict=True)]
        low = sum(min(0, span) for span in spans)
        nbytes = sum(max(0, span) for span in spans) - low + dtype.itemsize
    if nbytes == 0:
        array: Array = np.empty(shape, dtype)
    else:
        memory = (ctypes.c_uint8 * nbytes).from_address(address + low)
        array = np.ndarray(shape, dtype, memory, -low, None if strides is None else tuple(strides))
    if is_read_only:
        array.flags.writeable = False
    return array


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
    """Describe an array by its ``__cuda_array_interface__``, or through DLPack and CuPy."""
    simulated_array = getattr(buffer, "_ary", None)
    if cuda.is_simulated() and isinstance(simulated_array, np.ndarray):
        return DeviceBuffer(simulated_array.view(np.ndarray), 0, 0)
    interface = getattr(buffer, "__cuda_array_interface__", None)
    if interface is None:
        return _read_cupy(sys.modules["cupy"].from_dlpack(buffer))
    if interface.get("mask") is not None:
        raise ValueError("it has a mask, which would be ignored; pass a filled copy")
    address, is_read_only = interface["data"]
    dtype = getattr(buffer, "dtype", None)
    if not isinstance(dtype, np.dtype):
        dtype = np.dtype(interface["typestr"])
    array = describe(address, interface["shape"], dtype, interface.get("strides"), is_read_only)
    cuda_driver = driver.find()
    device = cuda_driver.device_of(address) if cuda_driver is not None and array.size else 0
    # No stream: the array is complete, and the work goes to the default stream, 0.
    return DeviceBuffer(array, device, interface.get("stream") or 0)


_READERS: dict[str, Callable[[Any], DeviceBuffer]] = {"cupy": _read_cupy, "torch": _read_torch}


def like(result: Any, original: Any) -> Any:
    """Return ``result``, a CuPy array, in the library of ``original``, without a copy."""
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
