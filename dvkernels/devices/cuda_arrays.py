"""Arrays in GPU memory, of any library: their device, stream and NumPy description.

A buffer is described by a NumPy array over its device address. The description gives shape,
strides, dtype, flags and address, and can be sliced; its elements lie in memory that the host
cannot access, and are never read. So the checks and slices of the CPU kernels serve here too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from dvkernels.devices import cuda, driver, interop, signature
from dvkernels.devices.array_spec import Array, HostArray, refuse_masked
from dvkernels.devices.stream_order import DeviceStream
from dvkernels.errors import BufferMismatchError, DeviceError, NotABufferError
from dvkernels.user_errors import text_of

__all__ = [
    "DeviceBuffer",
    "adopt",
    "allocate",
    "allocate_like",
    "current_stream",
    "finish",
    "in_one_capture",
    "like",
    "locate",
    "order_streams",
    "wait_for_result",
    "wait_on_host",
]


# The handles of a device's default stream; 2, the default stream of a thread, is like any other.
_DEFAULT_STREAMS = (0, 1)


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
    except (BufferError, TypeError, RuntimeError, ValueError, AttributeError, ImportError) as error:
        raise NotABufferError(
            f"{verb} cannot tell where {label}, a {type(buffer).__name__}, lies: {text_of(error)}"
        ) from error


def _signature_of(buffer: Any) -> signature.Signature | None:
    """Return the signature of an array, read through CuPy where it has nothing but DLPack."""
    try:
        return signature.of([buffer])
    except AttributeError:
        return signature.of([importlib.import_module("cupy").from_dlpack(buffer)])


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
    """Return a new CuPy array, whose memory is ordered on a stream, and its description.

    Raise ``DeviceError`` where the stream is captured into a graph.
    """
    cuda_driver = driver.find()
    if cuda_driver is not None and cuda_driver.is_capturing(*target):
        raise DeviceError(
            "a call that is captured into a CUDA graph takes no memory of its own: when the graph "
            "is launched, its memory may belong to others; pass out= (or reduce in place), and "
            "arrays that are contiguous and aligned to their elements"
        )
    array = cuda.arrays().empty(target.device, shape, dtype, target.stream)
    return array, _locate_one("a new array", array, "it").array


def allocate_like(
    original: DeviceBuffer, owner: Any, target: DeviceStream, shape: tuple[int, ...]
) -> tuple[Any, HostArray]:
    """Return a new array for work on a stream, of the library and dtype of another, described.

    ``owner`` is the other array, ``original`` its description. For JAX it is of CuPy until the work
    is done (see :func:`finish`).
    """
    if interop.library_of(owner) == "torch" and target == original.device_stream:
        # From PyTorch's own pool, which keeps the memory for a graph that PyTorch captures.
        tensor = sys.modules["torch"].empty(shape, dtype=owner.dtype, device=owner.device)
        return tensor, _locate_one("a new tensor", tensor, "it").array
    array, described = allocate(target, shape, original.array.dtype)
    if interop.is_of_jax(owner):
        return array, described
    return like(array, owner, target.stream), described


def finish(results: Sequence[Any], owners: Sequence[Any]) -> list[Any]:
    """Return the new results of a call in the libraries of the other arrays."""
    pairs = zip(results, owners, strict=False)
    return [like(result, owner) if interop.is_of_jax(owner) else result for result, owner in pairs]


def adopt(verb: str, buffer: Any, label: str) -> Array:
    """Return an array in GPU memory as a CuPy array, without a copy; ``label`` is for messages.

    The current stream of this thread waits for the present work of the array's stream. Arrays of
    JAX are copied, and the host waits: JAX may write to their memory as soon as nobody in Python
    refers to them, while work on our streams still reads it.
    """
    if interop.library_of(buffer) == "cupy":
        return cast(Array, buffer)
    located, arrays = _locate_one(verb, buffer, label), cuda.arrays()
    order_streams([(current_stream(located.device), located.device_stream)])
    adopted = arrays.over(located.array, located.device, buffer)
    if interop.is_of_jax(buffer):
        own = arrays.empty(located.device, adopted.shape, adopted.dtype)
        arrays.copy(own, adopted)
        wait_on_host(current_stream(located.device))
        return own
    return adopted


def wait_for_result(original: Any) -> None:
    """Let the stream of a foreign array wait for the current stream, which has the result.

    JAX takes results that are there: for it the host waits.
    """
    if interop.is_of_jax(original):
        wait_on_host(current_stream(original.__dlpack_device__()[1]))
    elif interop.library_of(original) != "cupy":
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
            cuda_driver.record([(*awaited, event)])
            cuda_driver.wait_for([(*waiting, event)])
        finally:
            cuda_driver.destroy(awaited.device, event)


def wait_on_host(stream: DeviceStream) -> None:
    """Let the host wait for the present work of a stream."""
    arrays = cuda.arrays()
    with arrays.at(stream.device):  # whose default stream it may be
        arrays.stream_at(*stream).synchronize()


@contextlib.contextmanager
def in_one_capture(verb: str, streams: Iterable[DeviceStream]) -> Iterator[bool]:
    """Let all streams join the capture of a graph inside ``with``, if one of them is captured.

    Yield whether one is. A stream joins by waiting for a captured one, which waits for it in the
    end. Raise where a default stream would have to join: the driver captures none.
    """
    cuda_driver, distinct = driver.find(), dict.fromkeys(streams)
    captured = [each for each in distinct if cuda_driver and cuda_driver.is_capturing(*each)]
    others = [each for each in distinct if captured and each not in captured]
    for device, stream in others:
        if stream in _DEFAULT_STREAMS:
            raise DeviceError(
                f"{verb}: a CUDA graph is being captured on a stream of cuda:{captured[0].device}, "
                f"and the default stream of cuda:{device}, which holds other arrays of the call, "
                "cannot become part of it: make another stream current there, or pass stream="
            )
    order_streams([(other, captured[0]) for other in others])
    try:
        yield bool(captured)
    finally:
        order_streams([(captured[0], other) for other in others])


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


def like(result: Array, original: Any, stream: int | None = None) -> Any:
    """Return ``result``, a CuPy array, in the library of ``original``, without a copy.

    ``stream`` is that of the work on the result; None: the original's.
    """
    library = interop.library_of(original)
    if cuda.is_simulated() or library == "cupy":
        return result
    if library in ("numba", "numba_cuda"):
        if stream is None:
            stream = _locate_one("a result", original, "the value").stream
        return cuda.as_numba(result, cuda.arrays().device_of(result), stream)
    return interop.like(result, original)
