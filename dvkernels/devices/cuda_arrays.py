"""Arrays in GPU memory, of any library: their device, stream and NumPy description.

A buffer is described by a NumPy array over its device address. The description gives shape,
strides, dtype, flags and address, and can be sliced; its elements lie in memory that the host
cannot access, and are never read. So the checks and slices of the CPU kernels serve here too.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from dvkernels.devices import cuda, driver, interop, signature
from dvkernels.devices.array_spec import Array, HostArray, refuse_masked
from dvkernels.devices.stream_order import DeviceStream
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.user_errors import text_of

__all__ = [
    "DeviceBuffer",
    "adopt",
    "allocate",
    "current_stream",
    "like",
    "locate",
    "order_streams",
    "wait_for_result",
]


class DeviceBuffer(NamedTuple):
    """Description of a buffer, its device, and its stream."""

    array: HostArray  # over device memory: its elements are never read on the host
    device: int
    stream: int  # the current stream of its library

    @property
    def device_stream(self) -> DeviceStream:
        """The stream together with its device."""
        return DeviceStream(self.device, self.stream)


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
    try:
        found = _signature_of(buffer)
        assert found is not None  # a single array does not differ from others
        return DeviceBuffer(_describe(found), found.kind[-1], found.stream)
    except (BufferError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise NotABufferError(
            f"{verb} cannot tell where {label}, a {type(buffer).__name__}, lies: {text_of(error)}"
        ) from error


def _signature_of(buffer: Any) -> signature.Signature | None:
    """Return the signature of an array, read through CuPy where it has nothing but DLPack."""
    try:
        return signature.of([buffer])
    except AttributeError:
        return signature.of([sys.modules["cupy"].from_dlpack(buffer)])


def _describe(found: signature.Signature) -> HostArray:
    """Return a NumPy array over the device address of the only array of a signature."""
    shape, dtype, strides = signature.layout(found.kind)
    if strides is None or 0 in shape:
        nbytes, low = int(np.prod(shape, dtype=object)) * dtype.itemsize, 0
    else:
        spans = [stride * (extent - 1) for stride, extent in zip(strides, shape, strict=True)]
        low = sum(min(0, span) for span in spans)
        nbytes = sum(max(0, span) for span in spans) - low + dtype.itemsize
    if nbytes == 0:
        array: HostArray = np.empty(shape, dtype)
    else:
        memory: Any = (ctypes.c_uint8 * nbytes).from_address(found.addresses[0] + low)
        array = np.ndarray(shape, dtype, memory, -low, strides)
    if found.is_read_only:
        array.flags.writeable = False
    return array


def allocate(
    target: DeviceStream, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Array, HostArray]:
    """Return a new CuPy array, whose memory is ordered on a stream, and its description."""
    array = cuda.arrays().empty(target.device, shape, dtype, target.stream)
    return array, _locate_one("a new array", array, "it").array


def adopt(verb: str, buffer: Any, label: str) -> Array:
    """Return an array in GPU memory as a CuPy array, without a copy; ``label`` is for messages.

    The current stream of this thread waits for the present work of the array's stream.
    """
    if interop.library_of(buffer) == "cupy":
        return cast(Array, buffer)
    located = _locate_one(verb, buffer, label)
    order_streams([(current_stream(located.device), located.device_stream)])
    return cuda.arrays().over(located.array, located.device, buffer)


def wait_for_result(original: Any) -> None:
    """Let the stream of a foreign array wait for the current stream, which has the result."""
    if interop.library_of(original) != "cupy":
        located = _locate_one("a result", original, "the value")
        order_streams([(located.device_stream, current_stream(located.device))])


def current_stream(device: int) -> DeviceStream:
    """Return this thread's current stream of CuPy on a device."""
    return DeviceStream(device, cuda.arrays().current(device).ptr)


def order_streams(pairs: Sequence[tuple[DeviceStream, DeviceStream]]) -> None:
    """Let the first stream of each pair wait for the present work of the second; not the host."""
    cuda_driver = driver.find() if pairs else None
    if cuda_driver is None:  # in the simulator, all work is done when a call returns
        return
    for waiting, awaited in pairs:
        if waiting == awaited:
            continue
        if waiting.device == awaited.device:
            cuda_driver.wait(waiting.device, waiting.stream, awaited.stream)
            continue
        event = cuda_driver.event(awaited.device)
        try:
            cuda_driver.record(*awaited, event)
            cuda_driver.await_event(*waiting, event)
        finally:
            cuda_driver.destroy(awaited.device, event)


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


def like(result: Array, original: Any) -> Any:
    """Return ``result``, a CuPy array, in the library of ``original``, without a copy."""
    library = interop.library_of(original)
    if cuda.is_simulated() or library == "cupy":
        return result
    if library in ("numba", "numba_cuda"):
        return cuda.as_numba(result)
    return interop.like(result, original)
